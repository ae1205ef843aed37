//! `telemetry dlq`: messages a sink could not take. A running node is asked through its control socket; of a stopped one
//! the files are read, and what changes them is done here, see [`desk`].

mod correction;
mod desk;
mod fix;
mod replay;
mod shown;

use std::collections::BTreeMap;
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use comfy_table::Table;

use self::desk::Desk;
use super::client::{self, OrderError};
use super::{ConfigArg, Exit};
use crate::buffer::DeadLetterFilter;
use crate::config::Settings;
use crate::domain::{Arrival, DeadLetter, DeadLetterKey, Reason, Sequence, SinkName, StreamName};
use crate::http::{CONTROL_SOCKET, ReplayRequest};

/// Letters of one order: how often a long replay says how far it is.
const PAGE: usize = 100;

#[derive(Args, Debug)]
pub struct DlqArgs {
    #[command(flatten)]
    config: ConfigArg,
    #[command(subcommand)]
    order: DlqOrder,
}

#[derive(Subcommand, Debug)]
enum DlqOrder {
    /// A line per dead letter, and counts by reason
    List {
        #[command(flatten)]
        filter: FilterArgs,
        /// Print JSON, one letter a line
        #[arg(long)]
        json: bool,
    },
    /// One dead letter with its payload
    Show {
        /// STREAM/SINK/SEQUENCE, as `list` prints it
        #[arg(value_parser = parse_key)]
        letter: DeadLetterKey,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Correct a copy of one payload (in $EDITOR, with --set or --patch), check it, replay it
    Fix(fix::FixArgs),
    /// Every dead letter as a line of JSON, with its payload
    Export {
        #[command(flatten)]
        filter: FilterArgs,
        /// Into this file instead of standard output
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Deliver again through the current mapping, with the original arrival time
    Replay {
        #[command(flatten)]
        filter: FilterArgs,
        /// Only these: STREAM/SINK/SEQUENCE
        #[arg(value_parser = parse_key)]
        letters: Vec<DeadLetterKey>,
        /// Say what would be replayed
        #[arg(long)]
        dry_run: bool,
    },
    /// Give up on dead letters: they are gone
    Purge {
        #[command(flatten)]
        filter: FilterArgs,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Args, Debug, Default)]
struct FilterArgs {
    /// Only of this stream
    #[arg(long, value_parser = |text: &str| StreamName::parse(text))]
    stream: Option<StreamName>,
    /// Only of this sink
    #[arg(long, value_parser = |text: &str| SinkName::parse(text))]
    sink: Option<SinkName>,
    /// Only for this reason, e.g. out_of_range
    #[arg(long, value_parser = parse_reason)]
    reason: Option<Reason>,
    /// Only what was set aside at or after this: 2026-03-14T07:00:00Z, or 2h ago as `2h`
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<Arrival>,
    /// Only what was set aside before this
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<Arrival>,
}

impl FilterArgs {
    fn filter(&self) -> DeadLetterFilter {
        DeadLetterFilter {
            stream: self.stream.clone(),
            sink: self.sink.clone(),
            reason: self.reason,
            since: self.since,
            until: self.until,
        }
    }
}

fn parse_reason(text: &str) -> Result<Reason, String> {
    Reason::ALL.into_iter().find(|reason| reason.code() == text).ok_or_else(|| {
        let known: Vec<_> = Reason::ALL.iter().map(|reason| reason.code()).collect();
        format!("one of: {}", known.join(", "))
    })
}

/// A time, or how long ago.
fn parse_time(text: &str) -> Result<Arrival, String> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(Arrival(time.as_microsecond()));
    }
    let ago = text.parse::<jiff::SignedDuration>().map_err(|_| {
        "give a time with its zone, e.g. 2026-03-14T07:00:00Z, or how long ago, e.g. 2h".to_owned()
    })?;
    let ago = i64::try_from(ago.as_micros()).map_err(|error| error.to_string())?;
    Ok(Arrival(Arrival::now().as_micros().saturating_sub(ago)))
}

fn parse_key(text: &str) -> Result<DeadLetterKey, String> {
    let parts: Vec<_> = text.split('/').collect();
    let [stream, sink, sequence] = parts[..] else {
        return Err("give it as STREAM/SINK/SEQUENCE".to_owned());
    };
    Ok(DeadLetterKey {
        stream: StreamName::parse(stream).map_err(|error| error.to_string())?,
        sink: SinkName::parse(sink).map_err(|error| error.to_string())?,
        sequence: Sequence(sequence.parse().map_err(|_| format!("{sequence:?} is no sequence"))?),
    })
}

pub fn run(args: &DlqArgs) -> anyhow::Result<Exit> {
    let settings = super::settings(&args.config.config)?;
    match &args.order {
        DlqOrder::List { filter, json } => list(&settings, filter, *json),
        DlqOrder::Show { letter, json } => show(&settings, letter, *json),
        DlqOrder::Fix(args) => fix::fix(&settings, args),
        DlqOrder::Export { filter, output } => export(&settings, filter, output.as_deref()),
        DlqOrder::Replay { filter, letters, dry_run } => {
            replay::replay(&settings, filter, letters, *dry_run)
        }
        DlqOrder::Purge { filter, yes } => purge(&settings, filter, *yes),
    }
}

/// Every letter that matches, page by page, from the running node or from the files of a stopped one.
fn letters(settings: &Settings, filter: &DeadLetterFilter) -> anyhow::Result<Vec<DeadLetter>> {
    let mut found: Vec<DeadLetter> = Vec::new();
    loop {
        let after = found.last().map(|letter| letter.key.clone());
        let request = ReplayRequest { filter: filter.clone(), after, ..Default::default() };
        let page: Vec<DeadLetter> = match order(settings, "/dlq/list", &request) {
            Ok(answer) => serde_json::from_value(answer)?,
            Err(OrderError::NotRunning(_)) => {
                return Ok(crate::buffer::inspect::dead_letters(&settings.node.state_dir, filter)?);
            }
            Err(OrderError::Failed(error)) => return Err(error),
        };
        if page.is_empty() {
            return Ok(found);
        }
        found.extend(page);
    }
}

fn order(
    settings: &Settings,
    path: &str,
    request: &ReplayRequest,
) -> Result<serde_json::Value, OrderError> {
    let socket = settings.node.state_dir.join(CONTROL_SOCKET);
    super::block_on(client::order(&socket, path, Some(request)))?
}

fn list(settings: &Settings, filter: &FilterArgs, json: bool) -> anyhow::Result<Exit> {
    let letters = letters(settings, &filter.filter())?;
    let mut out = std::io::stdout().lock();
    if json {
        for letter in &letters {
            writeln!(out, "{}", shown::json(letter))?;
        }
        return Ok(Exit::Fine);
    }
    if letters.is_empty() {
        writeln!(out, "no dead letters")?;
        return Ok(Exit::Fine);
    }
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["LETTER", "ARRIVED", "REASON", "COLUMN", "DETAIL"]);
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for letter in &letters {
        *counts.entry(letter.reason.code()).or_default() += 1;
        table.add_row([
            letter.key.to_string(),
            shown::time_text(letter.arrival),
            letter.reason.code().to_owned(),
            letter.column.clone().unwrap_or_default(),
            letter.detail.clone(),
        ]);
    }
    writeln!(out, "{table}")?;
    let counts: Vec<_> = counts.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    writeln!(out, "{} dead letters: {}", letters.len(), counts.join(", "))?;
    Ok(Exit::Fine)
}

/// One letter by its key.
fn find(settings: &Settings, key: &DeadLetterKey) -> anyhow::Result<DeadLetter> {
    let request = ReplayRequest { keys: vec![key.clone()], ..Default::default() };
    let found: Vec<DeadLetter> = match order(settings, "/dlq/list", &request) {
        Ok(answer) => serde_json::from_value(answer)?,
        Err(OrderError::NotRunning(_)) => {
            let filter = DeadLetterFilter {
                stream: Some(key.stream.clone()),
                sink: Some(key.sink.clone()),
                ..Default::default()
            };
            crate::buffer::inspect::dead_letters(&settings.node.state_dir, &filter)?
        }
        Err(OrderError::Failed(error)) => return Err(error),
    };
    let found = found.into_iter().find(|letter| letter.key == *key);
    found.with_context(|| format!("no dead letter {key}: see `telemetry dlq list`"))
}

fn show(settings: &Settings, key: &DeadLetterKey, json: bool) -> anyhow::Result<Exit> {
    let letter = find(settings, key)?;
    let mut out = std::io::stdout().lock();
    if json {
        let mut value = shown::json(&letter);
        value["mapping"] = match shown::explained(settings, &letter) {
            Ok(explained) => serde_json::to_value(explained)?,
            Err(why) => why.into(),
        };
        writeln!(out, "{value:#}")?;
    } else {
        shown::text(settings, &letter, &mut out)?;
    }
    Ok(Exit::Fine)
}

fn export(settings: &Settings, filter: &FilterArgs, output: Option<&Path>) -> anyhow::Result<Exit> {
    let letters = letters(settings, &filter.filter())?;
    let mut out: Box<dyn std::io::Write> = match output {
        None => Box::new(std::io::stdout().lock()),
        Some(file) => {
            let made = std::fs::File::create_new(file);
            Box::new(std::io::BufWriter::new(made.with_context(|| {
                format!("make {}: an export overwrites nothing", file.display())
            })?))
        }
    };
    for letter in &letters {
        writeln!(out, "{}", shown::json(letter))?;
    }
    out.flush()?;
    if output.is_some() {
        eprintln!("exported {}", letters.len());
    }
    Ok(Exit::Fine)
}

fn purge(settings: &Settings, filter: &FilterArgs, yes: bool) -> anyhow::Result<Exit> {
    let letters = letters(settings, &filter.filter())?;
    if letters.is_empty() {
        println!("no dead letters");
        return Ok(Exit::Fine);
    }
    if !yes && !confirmed(letters.len())? {
        return Ok(Exit::Failed);
    }
    let keys: Vec<_> = letters.iter().map(|letter| letter.key.clone()).collect();
    super::block_on(async {
        let mut desk = Desk::new(settings);
        for page in keys.chunks(PAGE) {
            let request = ReplayRequest { keys: page.to_vec(), ..Default::default() };
            desk.purge(&request).await?;
        }
        desk.close().await
    })??;
    println!("purged {}", letters.len());
    Ok(Exit::Fine)
}

fn confirmed(count: usize) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("{count} dead letters would be gone for good: confirm with --yes");
    }
    eprint!("{count} dead letters will be gone for good. Type yes: ");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}
