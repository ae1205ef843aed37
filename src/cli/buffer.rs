//! `telemetry buffer inspect | verify | export`: read only, on a stopped and on a running node.

use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use comfy_table::{Table, presets};

use super::{ConfigArg, Exit};
use crate::buffer::inspect::{self, GenerationReport, Hole, Inspection, Verification};
use crate::buffer::{BufferError, LostLetters};
use crate::domain::{Sequence, SequenceRange, StreamName};

/// Look into the buffer: read only, also beside a running node.
#[derive(Debug, Args)]
pub struct BufferArguments {
    #[command(flatten)]
    pub config: ConfigArg,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// The state directory, instead of the configuration's
    #[arg(long, global = true, value_name = "FOLDER")]
    pub state_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub command: BufferCommand,
}

#[derive(Debug, Subcommand)]
pub enum BufferCommand {
    /// What the buffer holds: generations, sequences, books, dead letters, losses
    Inspect,
    /// Read every record and check it; fails when one is missing or damaged
    Verify,
    /// Print the records of a stream as JSON Lines
    Export {
        stream: String,
        /// First sequence
        #[arg(long, default_value_t = 1)]
        from: u64,
        /// Last sequence
        #[arg(long, default_value_t = u64::MAX)]
        to: u64,
    },
}

/// `Failed` when a verification found something wrong.
pub fn run(args: &BufferArguments) -> anyhow::Result<Exit> {
    let state_dir = match &args.state_dir {
        Some(state_dir) => state_dir.clone(),
        None => super::settings(&args.config.config)?.node.state_dir,
    };
    let fine = look(&args.command, &state_dir, args.json)?;
    Ok(if fine { Exit::Fine } else { Exit::Failed })
}

fn look(command: &BufferCommand, state_dir: &Path, json: bool) -> anyhow::Result<bool> {
    let mut out = BufWriter::new(io::stdout().lock());
    let fine = match command {
        BufferCommand::Inspect => {
            let inspection = inspect::inspect(state_dir)?;
            if json {
                serde_json::to_writer_pretty(&mut out, &inspection)?;
                writeln!(out)?;
            } else {
                print_inspection(&inspection, &mut out)?;
            }
            true
        }
        BufferCommand::Verify => {
            let verification = inspect::verify(state_dir)?;
            if json {
                serde_json::to_writer_pretty(&mut out, &verification)?;
                writeln!(out)?;
            } else {
                print_verification(&verification, &mut out)?;
            }
            verification.fine()
        }
        BufferCommand::Export { stream, from, to } => {
            let stream = StreamName::parse(stream)?;
            let range = SequenceRange { first: Sequence((*from).max(1)), last: Sequence(*to) };
            match inspect::export(state_dir, &stream, range, &mut out) {
                // `telemetry buffer export … | head`
                Err(BufferError::Io { source, .. })
                    if source.kind() == io::ErrorKind::BrokenPipe =>
                {
                    return Ok(true);
                }
                exported => exported?,
            };
            true
        }
    };
    out.flush()?;
    Ok(fine)
}

fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(heads);
    table
}

fn generations(reports: &[GenerationReport]) -> Table {
    let mut table = table(&["generation", "bytes", "state", "stream", "records", "sequences"]);
    for report in reports {
        let state = match (&report.trouble, report.sealed) {
            (Some(trouble), _) => trouble.clone(),
            (None, true) => "sealed".to_owned(),
            (None, false) => "written".to_owned(),
        };
        let mut lead = [report.number.to_string(), report.bytes.to_string(), state];
        if report.streams.is_empty() {
            table.add_row(lead.clone());
        }
        for (stream, range) in &report.streams {
            let [number, bytes, state] = std::mem::take(&mut lead);
            let (records, sequences) = (range.count().to_string(), range.to_string());
            table.add_row([number, bytes, state, stream.to_string(), records, sequences]);
        }
    }
    table
}

fn print_inspection(inspection: &Inspection, out: &mut impl io::Write) -> io::Result<()> {
    writeln!(out, "log identity {}\n", inspection.identity)?;
    writeln!(out, "{}\n", generations(&inspection.generations))?;
    let mut sinks = table(&["stream", "sink", "cursor", "delivered", "filtered", "dead letters"]);
    for sink in &inspection.sinks {
        let books = sink.books.unwrap_or_default();
        sinks.add_row([
            sink.stream.to_string(),
            sink.sink.to_string(),
            books.cursor.to_string(),
            books.delivered.to_string(),
            books.filtered.to_string(),
            sink.dead_letters.to_string(),
        ]);
    }
    match &inspection.state_trouble {
        Some(trouble) => writeln!(out, "books and dead letters cannot be read: {trouble}")?,
        None => writeln!(out, "{sinks}")?,
    }
    for folder in &inspection.quarantine {
        writeln!(out, "quarantined: {} ({} bytes)", folder.folder.display(), folder.bytes)?;
    }
    for loss in &inspection.losses {
        writeln!(out, "lost: {} {} ({})", loss.stream, loss.range, loss.reason)?;
    }
    for loss in &inspection.letter_losses {
        let LostLetters { stream, sink, sequences, unnamed, .. } = loss;
        for range in sequences {
            writeln!(out, "lost dead letters: {stream} -> {sink} {range}")?;
        }
        if *unnamed > 0 {
            writeln!(out, "lost dead letters: {stream} -> {sink} {unnamed}, nothing tells which")?;
        }
    }
    Ok(())
}

fn print_verification(verification: &Verification, out: &mut impl io::Write) -> io::Result<()> {
    writeln!(out, "{}\n", generations(&verification.generations))?;
    for Hole { stream, range } in &verification.missing {
        writeln!(out, "missing: {stream} {range} ({} records)", range.count())?;
    }
    let verdict = if verification.fine() { "every record is there" } else { "records are missing" };
    writeln!(out, "{verdict}")
}
