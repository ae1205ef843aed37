//! The commands, one file each. They print data on standard output and everything else on standard error; colour only
//! on a terminal.

mod buffer;
pub mod check;
mod client;
mod dlq;
pub mod migrate;
mod parts;
mod run;
mod simulate;
mod status;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Settings;

/// How a command ended, as the exit codes of `docs/operations.md` say.
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

/// A telemetry node: MQTT streams, kept durably before they are acknowledged, into Kafka and PostgreSQL.
#[derive(Parser, Debug)]
#[command(name = "telemetry", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where the configuration is.
#[derive(clap::Args, Debug, Clone)]
pub struct ConfigArg {
    /// The configuration; conf.d/*.toml beside it is read too
    #[arg(long, value_name = "FILE", default_value = "/etc/telemetry/telemetry.toml")]
    pub config: PathBuf,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the node
    Run(run::RunArgs),
    /// Check the configuration: every mistake in one report
    Check(check::CheckArguments),
    /// Plan, apply or draft database migrations
    Migrate(migrate::MigrateArgs),
    /// Publish made-up messages of the reference streams to a broker
    Simulate(simulate::SimulateArguments),
    /// Show the running node
    Status(status::StatusArgs),
    /// List, show, replay or purge dead letters
    Dlq(dlq::DlqArgs),
    /// Show, pause or restart the parts of the running node
    Parts(parts::PartsArgs),
    /// Look into the buffer, of a running or a stopped node
    Buffer(buffer::BufferArguments),
}

/// A command ends because of something that has been told already.
#[derive(Debug, thiserror::Error)]
#[error("told already")]
struct Told(Exit);

/// Runs one command to its end. An error is told on standard error.
pub fn main(cli: Cli) -> Exit {
    run_command(cli.command).unwrap_or_else(|error| match error.downcast_ref::<Told>() {
        Some(Told(exit)) => *exit,
        None => {
            eprintln!("telemetry: {error:#}");
            Exit::Failed
        }
    })
}

/// The checked configuration; its report is printed when it has mistakes.
fn settings(config: &Path) -> anyhow::Result<Settings> {
    let loaded = check::load_or_report(config).map_err(|_| Told(Exit::Configuration))?;
    Ok(loaded.settings)
}

fn run_command(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Check(args) => Ok(check::check(&args)),
        Command::Migrate(args) => {
            let settings = settings(&args.config)?;
            block_on(migrate::run(&args, &settings, &mut std::io::stdout().lock()))?
        }
        Command::Simulate(args) => Ok(simulate::simulate(&args)),
        Command::Status(args) => status::run(&args),
        Command::Dlq(args) => dlq::run(&args),
        Command::Parts(args) => parts::run(&args),
        Command::Buffer(args) => buffer::run(&args),
    }
}

/// Runs one question to the node on a small runtime of its own.
fn block_on<T>(question: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(question))
}
