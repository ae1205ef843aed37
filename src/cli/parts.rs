//! `telemetry parts`: the supervised parts of the running node.

use clap::{Args, Subcommand};
use comfy_table::Table;

use super::{ConfigArg, Exit, client};
use crate::http::CONTROL_SOCKET;
use crate::observe::PartStatus;

#[derive(Args, Debug)]
pub struct PartsArgs {
    #[command(subcommand)]
    order: PartsOrder,
}

#[derive(Subcommand, Debug)]
enum PartsOrder {
    /// Every part with its state, restarts and last failure
    List {
        #[command(flatten)]
        config: ConfigArg,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Start a part afresh; a parked one at once
    Restart(OneName),
    /// Let a part rest until it is resumed: its messages wait in the broker or the buffer
    Pause(OneName),
    /// Let a paused part go on
    Resume(OneName),
}

#[derive(Args, Debug)]
struct OneName {
    /// As `telemetry parts list` shows it, e.g. stream:energy
    name: String,
    #[command(flatten)]
    config: ConfigArg,
}

pub fn run(args: &PartsArgs) -> anyhow::Result<Exit> {
    match &args.order {
        PartsOrder::List { config, json } => list(config, *json),
        PartsOrder::Restart(one) => order(one, "restart"),
        PartsOrder::Pause(one) => order(one, "pause"),
        PartsOrder::Resume(one) => order(one, "resume"),
    }
}

fn list(config: &ConfigArg, json: bool) -> anyhow::Result<Exit> {
    let settings = super::settings(&config.config)?;
    let socket = settings.node.state_dir.join(CONTROL_SOCKET);
    let answer = super::block_on(client::order(&socket, "/parts", None::<&()>))??;
    if json {
        println!("{answer:#}");
        return Ok(Exit::Fine);
    }
    let parts: std::collections::BTreeMap<String, PartStatus> = serde_json::from_value(answer)?;
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["PART", "STATE", "RESTARTS", "STALLS", "LAST FAILURE"]);
    for (name, part) in parts {
        table.add_row([
            name,
            format!("{:?}", part.state).to_lowercase(),
            part.restarts.to_string(),
            part.stalls.to_string(),
            part.last_failure.unwrap_or_default(),
        ]);
    }
    println!("{table}");
    Ok(Exit::Fine)
}

fn order(one: &OneName, what: &str) -> anyhow::Result<Exit> {
    let settings = super::settings(&one.config.config)?;
    let socket = settings.node.state_dir.join(CONTROL_SOCKET);
    let path = format!("/parts/{}/{what}", one.name);
    super::block_on(client::order(&socket, &path, Some(&())))??;
    println!("{what}: {}", one.name);
    Ok(Exit::Fine)
}
