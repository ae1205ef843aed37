//! `telemetry migrate`: what would be applied, apply it, what was applied, and a draft for a stream of one's own.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use super::Exit;
use crate::config::{DatabaseSettings, Settings};
use crate::domain::StreamName;
use crate::migrate::{Draft, Session, draft, next_number};

/// `telemetry migrate …`
#[derive(Debug, Args)]
pub struct MigrateArgs {
    #[command(subcommand)]
    pub command: MigrateCommand,
    /// Configuration file.
    #[arg(long, global = true, default_value = "/etc/telemetry/telemetry.toml")]
    pub config: PathBuf,
    /// Only this database of the configuration.
    #[arg(long, global = true, value_name = "NAME")]
    pub database: Option<String>,
    /// Print JSON.
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum MigrateCommand {
    /// Show what would be applied, or why it would be refused; changes nothing.
    Plan,
    /// Apply what is pending.
    Apply,
    /// Show what was applied and what is pending.
    Status,
    /// Print the SQL that the tables of a stream need.
    Draft { stream: String },
}

/// Runs one subcommand and answers with the exit code; what it found goes to `out`.
pub async fn run(
    args: &MigrateArgs,
    settings: &Settings,
    out: &mut impl Write,
) -> anyhow::Result<Exit> {
    if let MigrateCommand::Draft { stream } = &args.command {
        return print_draft(args, settings, stream, out);
    }
    let Some(databases) = chosen(args, settings) else {
        let known: Vec<_> = settings.databases.keys().map(String::as_str).collect();
        writeln!(out, "no such database; configured: {}", known.join(", "))?;
        return Ok(Exit::Usage);
    };
    let interrupt = match &args.command {
        MigrateCommand::Apply => Some(Interrupt::listen().context("listen for signals")?),
        _ => None,
    };
    let mut reports = Vec::new();
    for (name, database) in databases {
        reports.push(match &interrupt {
            Some(interrupt) => applied(name, database, interrupt).await,
            None => compared(name, database).await,
        });
    }
    print_reports(args, &reports, out)?;
    Ok(if reports.iter().any(|report| report.error.is_some()) { Exit::Failed } else { Exit::Fine })
}

fn chosen<'s>(
    args: &MigrateArgs,
    settings: &'s Settings,
) -> Option<Vec<(&'s String, &'s DatabaseSettings)>> {
    match &args.database {
        None => Some(settings.databases.iter().collect()),
        Some(name) => Some(vec![settings.databases.get_key_value(name)?]),
    }
}

/// One database's answer.
#[derive(Debug, Default, Serialize)]
struct Report {
    database: String,
    /// In the ledger before this command.
    applied: Vec<String>,
    /// Not applied (after `apply`: what is left).
    pending: Vec<String>,
    /// By this command.
    applied_now: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

async fn compared(name: &str, settings: &DatabaseSettings) -> Report {
    let mut report = Report { database: name.to_owned(), ..Report::default() };
    let standing = async { Session::open(name, settings).await?.standing().await };
    match standing.await {
        Ok(standing) => {
            report.applied = standing.applied.into_iter().map(|row| row.name).collect();
            report.pending = standing.plan.pending.into_iter().map(|file| file.name).collect();
        }
        Err(error) => report.error = Some(error.to_string()),
    }
    report
}

async fn applied(name: &str, settings: &DatabaseSettings, interrupt: &Interrupt) -> Report {
    let before = compared(name, settings).await;
    if before.error.is_some() {
        return before;
    }
    let told = || interrupt.told();
    let apply = async { Session::open(name, settings).await?.apply_unless(&told).await };
    match apply.await {
        Ok(done) => {
            let applied_now = done.into_iter().map(|file| file.name).collect();
            Report { applied_now, pending: Vec::new(), ..before }
        }
        Err(error) => {
            // Files before the one that failed stay applied.
            let after = compared(name, settings).await;
            let done = |file: &&String| !after.pending.contains(*file);
            let applied_now = before.pending.iter().filter(done).cloned().collect();
            Report { applied_now, pending: after.pending, error: Some(error.to_string()), ..before }
        }
    }
}

/// Ctrl-C and SIGTERM: the first lets the running file finish and begins no other. The second ends the process, and the
/// server rolls the running file back.
struct Interrupt {
    told: Arc<AtomicBool>,
    listening: JoinHandle<()>,
}

impl Interrupt {
    fn listen() -> std::io::Result<Interrupt> {
        let told = Arc::new(AtomicBool::new(false));
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let heard = told.clone();
        let listening = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if heard.swap(true, Ordering::Relaxed) {
                    std::process::exit(Exit::Failed as i32);
                }
                eprintln!("telemetry: stops after this file; once more rolls it back and ends");
            }
        });
        Ok(Interrupt { told, listening })
    }

    fn told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

fn print_reports(
    args: &MigrateArgs,
    reports: &[Report],
    out: &mut impl Write,
) -> Result<(), anyhow::Error> {
    if args.json {
        serde_json::to_writer_pretty(&mut *out, reports).context("print JSON")?;
        return writeln!(out).context("print JSON");
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["DATABASE", "FILE", "STATE"]);
    for report in reports {
        let lines = [
            (&report.applied, "applied"),
            (&report.applied_now, "applied now"),
            (&report.pending, "pending"),
        ];
        // Only `status` tells of the past.
        let told = if matches!(args.command, MigrateCommand::Status) { 0 } else { 1 };
        let mut quiet = report.error.is_none();
        for (files, state) in &lines[told..] {
            for file in *files {
                table.add_row([report.database.as_str(), file.as_str(), *state]);
                quiet = false;
            }
        }
        if quiet {
            table.add_row([report.database.as_str(), "", "up to date"]);
        }
    }
    writeln!(out, "{table}")?;
    for report in reports {
        if let Some(error) = &report.error {
            writeln!(out, "\n{}: {}", report.database, error.replace("; ", ";\n  "))?;
        }
    }
    Ok(())
}

fn print_draft(
    args: &MigrateArgs,
    settings: &Settings,
    stream: &str,
    out: &mut impl Write,
) -> anyhow::Result<Exit> {
    let known = StreamName::parse(stream).ok().and_then(|name| settings.streams.get(&name));
    let Some(found) = known else {
        let known: Vec<_> = settings.streams.keys().map(StreamName::as_str).collect();
        writeln!(out, "no stream {stream:?}; configured: {}", known.join(", "))?;
        return Ok(Exit::Usage);
    };
    let wanted = |draft: &Draft| args.database.as_ref().is_none_or(|name| *name == draft.database);
    let drafts: Vec<Draft> = draft(found).into_iter().filter(wanted).collect();
    if drafts.is_empty() {
        writeln!(out, "stream {stream} writes no table")?;
        return Ok(Exit::Usage);
    }
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &drafts).context("print JSON")?;
        writeln!(out)?;
        return Ok(Exit::Fine);
    }
    for (index, one) in drafts.iter().enumerate() {
        let folder =
            settings.databases.get(&one.database).and_then(|d| d.migrations_dir.as_deref());
        let earlier = drafts[..index].iter().filter(|other| other.database == one.database);
        let number = next_number(folder) + i32::try_from(earlier.count())?;
        if drafts.len() > 1 {
            writeln!(out, "-- ===== {number:04}_{}.sql =====", one.table)?;
        }
        writeln!(out, "{}", one.sql)?;
    }
    Ok(Exit::Fine)
}
