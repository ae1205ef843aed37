//! `telemetry reload` and `telemetry check --diff`: the running node takes its changed configuration, or tells what it
//! would do with it.

use std::io::IsTerminal as _;
use std::path::Path;

use clap::Args;

use super::{ConfigArg, Exit, check, client};
use crate::config::{self, Settings};
use crate::domain::{Changes, PartFate, SettingChange};
use crate::http::{CONTROL_SOCKET, ReloadRequest};
use crate::observe::tell_error;

#[derive(Args, Debug)]
pub struct ReloadArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &ReloadArgs) -> anyhow::Result<Exit> {
    let config = &args.config.config;
    // The node checks, not this command: the service manager lets the main process alone into the credentials.
    let state_dir = match config::state_dir(config) {
        Some(folder) => folder,
        None => super::settings(config)?.node.state_dir,
    };
    let changes = match ask(&state_dir, config, false) {
        Err(refusal) if check::load(config).is_err() => {
            tell_error(&format!("{refusal:#}"));
            return Ok(Exit::Configuration);
        }
        answer => answer?,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&changes)?);
    } else {
        print(&changes);
    }
    Ok(Exit::Fine)
}

/// What the running node would do with its configuration as it is now.
pub fn compare(settings: &Settings, config: &Path) -> anyhow::Result<Changes> {
    ask(&settings.node.state_dir, config, true)
}

fn ask(state_dir: &Path, config: &Path, compare: bool) -> anyhow::Result<Changes> {
    let socket = state_dir.join(CONTROL_SOCKET);
    let request = ReloadRequest { compare };
    let answer = super::block_on(client::order(&socket, "/reload", Some(&request)))??;
    let changes: Changes = serde_json::from_value(answer)?;
    let same = |a: &Path, b: &Path| a.canonicalize().ok() == b.canonicalize().ok();
    if !same(&changes.config, config) {
        eprintln!("note: the running node reads {}", changes.config.display());
    }
    Ok(changes)
}

/// For people: what changed, and what that means for the parts.
pub fn print(changes: &Changes) {
    if changes.is_empty() {
        println!("nothing has changed");
        return;
    }
    let colour = std::io::stdout().is_terminal();
    for setting in &changes.settings {
        println!("{}", line(setting, colour));
    }
    for file in &changes.files {
        println!("{} {} has new content", mark('~', colour), file.display());
    }
    for (fate, word) in
        [(PartFate::Added, "added"), (PartFate::Renewed, "renewed"), (PartFate::Removed, "removed")]
    {
        let parts = changes.parts.iter().filter(|change| change.fate == fate);
        let parts: Vec<_> = parts.map(|change| change.part.as_str()).collect();
        if !parts.is_empty() {
            println!("parts {word}: {}", parts.join(", "));
        }
    }
    println!("parts untouched: {}", changes.parts_untouched);
}

fn line(setting: &SettingChange, colour: bool) -> String {
    let SettingChange { path, before, after, needs_restart } = setting;
    let text = match (before, after) {
        (Some(before), Some(after)) => {
            format!("{} {path} = {after}   (was {before})", mark('~', colour))
        }
        (None, after) => {
            format!("{} {path} = {}", mark('+', colour), after.as_deref().unwrap_or_default())
        }
        (Some(before), None) => format!("{} {path} = {before}", mark('-', colour)),
    };
    if *needs_restart { format!("{text}   from the next start on") } else { text }
}

fn mark(sign: char, colour: bool) -> String {
    let code = match sign {
        '+' => 32,
        '-' => 31,
        _ => 33,
    };
    if colour { format!("\x1b[{code}m{sign}\x1b[0m") } else { sign.to_string() }
}
