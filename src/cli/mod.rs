//! The commands, one file each. They print data on standard output and everything else on standard error; colour only
//! on a terminal.

mod buffer;
mod certs;
pub mod check;
mod client;
mod clock;
mod dlq;
mod doctor;
mod ledger;
pub mod migrate;
mod pages;
mod parts;
mod reload;
mod run;
mod simulate;
mod status;
mod token;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Settings;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Fine = 0,
    Failed = 1,
    Usage = 2,
    /// The configuration has mistakes: systemd does not restart on it.
    Configuration = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// A build whose steps can be made to fail says so: it is for tests alone, and they must be able to tell.
const VERSION: &str = match fail::has_failpoints() {
    true => concat!(env!("CARGO_PKG_VERSION"), " (with fail points)"),
    false => env!("CARGO_PKG_VERSION"),
};

/// A telemetry node: MQTT streams, kept durably before they are acknowledged, into Kafka and PostgreSQL.
#[derive(Parser, Debug)]
#[command(name = "telemetry", version = VERSION, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where the configuration is.
#[derive(clap::Args, Debug, Clone)]
pub struct ConfigArg {
    /// The configuration; conf.d/*.toml beside it is read too
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/telemetry/telemetry.toml"
    )]
    pub config: PathBuf,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the node
    #[command(after_help = "Example:
  telemetry run --config telemetry.toml

Ends with 0 after SIGTERM or Ctrl-C, 78 on a mistake in the configuration, 1 when it cannot start or the disk fails.")]
    Run(run::RunArgs),
    /// Check the configuration: every mistake in one report
    #[command(after_help = "Examples:
  telemetry check --config telemetry.toml
  telemetry check --config telemetry.toml --effective
  telemetry check --config telemetry.toml --explain energy < message.json
  telemetry check --diff

Ends with 78 when the configuration has mistakes.")]
    Check(check::CheckArguments),
    /// Plan, apply or draft database migrations
    #[command(after_help = "Examples:
  telemetry migrate plan --config telemetry.toml
  telemetry migrate apply --database telemetry
  telemetry migrate draft energy > migrations/mine/0001_energy.sql")]
    Migrate(migrate::MigrateArgs),
    /// Publish made-up messages of the reference streams to a broker
    #[command(after_help = "Examples:
  telemetry simulate --config telemetry.toml --rate x10 --duration 60
  telemetry simulate --broker 127.0.0.1:1883 --stream energy=1000 --ledger sent.jsonl
  telemetry simulate --faults bad-value=0.01,malformed=0.01")]
    Simulate(simulate::SimulateArguments),
    /// Show the running node
    #[command(after_help = "Examples:
  telemetry status
  telemetry status --watch
  telemetry status --json | jq '.streams[].sinks[].pending'

Ends with 1 when the node is unhealthy or does not answer.")]
    Status(status::StatusArgs),
    /// List, show, correct, export, replay or purge dead letters
    #[command(after_help = "Examples:
  telemetry dlq list --stream energy --since 2h
  telemetry dlq show energy/energy_consumption/4711
  telemetry dlq fix energy/energy_consumption/4711 --set activeActualConsumption.total=500
  telemetry dlq replay --reason out_of_range
  telemetry dlq export --output dead.jsonl
  telemetry dlq purge --stream plug --yes

Works on a running and on a stopped node. Of a stopped one fix, replay and purge do the work themselves; the node cannot
start meanwhile. Ends with 1 when a letter stays.")]
    Dlq(dlq::DlqArgs),
    /// Show the books of every sink: what was received is delivered, pending, set aside, filtered or lost
    #[command(after_help = "Examples:
  telemetry ledger
  telemetry ledger --json | jq '.[] | select(.difference != 0)'

Works on a running and on a stopped node. Ends with 1 when a difference is not 0.")]
    Ledger(ledger::LedgerArgs),
    /// Make the running node take its changed configuration, part by part
    #[command(after_help = "Examples:
  telemetry check --diff
  telemetry reload
  telemetry reload --json | jq '.parts'

What `systemctl reload telemetry` runs. Ends with 78 when the configuration has mistakes and with 1 when the node does
not take it; the old one goes on then.")]
    Reload(reload::ReloadArgs),
    /// Show, pause or restart the parts of the running node
    #[command(after_help = "Examples:
  telemetry parts list
  telemetry parts restart stream:energy
  telemetry parts pause kafka:main")]
    Parts(parts::PartsArgs),
    /// Look into the buffer, of a running or a stopped node; changes nothing
    #[command(after_help = "Examples:
  telemetry buffer inspect
  telemetry buffer verify
  telemetry buffer export energy --from 1 --to 100")]
    Buffer(buffer::BufferArguments),
    /// Look at everything the promises rest on: brokers, clusters, databases, drive, certificates
    #[command(after_help = "Examples:
  telemetry doctor
  telemetry doctor --quiet || mail -s telemetry admin
  telemetry doctor --json | jq '.findings[] | select(.verdict != \"ok\")'

Changes nothing and needs no running node. Ends with 1 when a line says fail, 78 on a mistake in the configuration.")]
    Doctor(doctor::DoctorArgs),
    /// Make, renew and show certificates
    #[command(after_help = "Examples:
  telemetry certs init --name broker.lan --name 192.168.1.10 --device meter-1
  telemetry certs renew --within 30
  telemetry certs show
  telemetry certs show /etc/telemetry/tls/server.crt --json")]
    Certs(certs::CertsArgs),
    /// Make, list or revoke tokens for the HTTP listener
    #[command(after_help = "Examples:
  telemetry token create --scope read --expires 90d --note grafana
  telemetry token list
  telemetry token revoke 1f0c9a2b

A running node heeds a change at once. Run it as the node's user or as root.")]
    Token(token::TokenArgs),
    /// Write manual pages and shell completions into a folder
    #[command(hide = true)]
    Pages(pages::PagesArgs),
}

/// A command ends because of something that has been told already.
#[derive(Debug, thiserror::Error)]
#[error("told already")]
struct Told(Exit);

/// Runs one command to its end. An error is told on standard error.
pub fn main(cli: Cli) -> Exit {
    // Whoever reads our output may have enough of it (`| head`); the node itself must survive closed sockets.
    if !matches!(cli.command, Command::Run(_) | Command::Simulate(_)) {
        sigpipe::reset();
    }
    run_command(cli.command).unwrap_or_else(|error| match error.downcast_ref::<Told>() {
        Some(Told(exit)) => *exit,
        None => {
            crate::observe::tell_error(&format!("telemetry: {error:#}"));
            Exit::Failed
        }
    })
}

/// The checked configuration; its report is printed when it has mistakes. Warnings are for `check` and `run`.
fn settings(config: &Path) -> anyhow::Result<Settings> {
    let loaded = check::load(config).map_err(|report| {
        eprint!("{report}");
        Told(Exit::Configuration)
    })?;
    Ok(loaded.settings)
}

fn run_command(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Check(args) => check::check(&args),
        Command::Migrate(args) => {
            let settings = settings(&args.config)?;
            block_on(migrate::run(&args, &settings, &mut std::io::stdout().lock()))?
        }
        Command::Simulate(args) => Ok(simulate::simulate(&args)),
        Command::Status(args) => status::run(&args),
        Command::Dlq(args) => dlq::run(&args),
        Command::Ledger(args) => ledger::run(&args),
        Command::Reload(args) => reload::run(&args),
        Command::Parts(args) => parts::run(&args),
        Command::Buffer(args) => buffer::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Certs(args) => certs::run(&args),
        Command::Token(args) => token::run(&args),
        Command::Pages(args) => pages::run(&args),
    }
}

/// Runs one question to the node on a small runtime of its own.
fn block_on<T>(question: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(question))
}
