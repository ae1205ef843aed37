//! `telemetry ledger`: the conservation sum of every sink, of a running or a stopped node.

use std::io::Write as _;

use anyhow::Context as _;
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table};
use serde::Serialize;
use serde_json::Value;

use super::client::{self, OrderError};
use super::{ConfigArg, Exit};
use crate::config::Settings;
use crate::domain::{Books, Sequence, SinkName, StreamName};
use crate::http::CONTROL_SOCKET;

#[derive(Args, Debug)]
pub struct LedgerArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// received = delivered + pending + dead-lettered + filtered + incomplete + lost, since the sink began.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct Line {
    stream: StreamName,
    sink: SinkName,
    received: u64,
    /// With what changed nothing in a latest-state table, or was too old for it.
    delivered: u64,
    pending: u64,
    dead_lettered: u64,
    filtered: u64,
    incomplete: u64,
    lost: u64,
    /// Received minus the sum of the others: 0 when the books balance.
    difference: i64,
}

impl Line {
    fn new(stream: StreamName, sink: SinkName, last: Sequence, books: Books) -> Line {
        let received = last.since(books.base);
        let pending = last.since(books.cursor);
        let others = [books.delivered, pending, books.dead_lettered, books.filtered];
        let sum: u64 = others.iter().sum::<u64>() + books.incomplete + books.lost;
        Line {
            stream,
            sink,
            received,
            delivered: books.delivered,
            pending,
            dead_lettered: books.dead_lettered,
            filtered: books.filtered,
            incomplete: books.incomplete,
            lost: books.lost,
            difference: (i128::from(received) - i128::from(sum)) as i64,
        }
    }
}

pub fn run(args: &LedgerArgs) -> anyhow::Result<Exit> {
    let settings = super::settings(&args.config.config)?;
    let lines = match ask(&settings)? {
        Some(streams) => of_running(&streams)?,
        None => of_stopped(&settings)?,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", serde_json::to_value(&lines)?)?;
    } else {
        writeln!(out, "{}", table(&lines))?;
    }
    let balanced = lines.iter().all(|line| line.difference == 0);
    Ok(if balanced { Exit::Fine } else { Exit::Failed })
}

/// What the running node says at `/streams`; `None` when it is stopped.
fn ask(settings: &Settings) -> anyhow::Result<Option<Value>> {
    let socket = settings.node.state_dir.join(CONTROL_SOCKET);
    match super::block_on(client::order(&socket, "/streams", None::<&()>))? {
        Ok(streams) => Ok(Some(streams)),
        Err(OrderError::NotRunning(_)) => Ok(None),
        Err(OrderError::Failed(error)) => Err(error),
    }
}

fn of_running(answer: &Value) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for stream in answer["streams"].as_array().context("the node's answer lists no streams")? {
        let last: Sequence = serde_json::from_value(stream["status"]["sequence"].clone())?;
        for sink in stream["sinks"].as_array().into_iter().flatten() {
            // A sink that has not read its cursor yet has no books.
            let books: Option<Books> = serde_json::from_value(sink["status"]["books"].clone())?;
            let Some(books) = books else { continue };
            let stream = serde_json::from_value(stream["name"].clone())?;
            lines.push(Line::new(
                stream,
                serde_json::from_value(sink["sink"].clone())?,
                last,
                books,
            ));
        }
    }
    Ok(lines)
}

/// As the node saved its books last; those of a table may lag behind its cursor row by seconds, with what is pending.
fn of_stopped(settings: &Settings) -> anyhow::Result<Vec<Line>> {
    let found = crate::buffer::inspect::inspect(&settings.node.state_dir)?;
    if let Some(trouble) = found.state_trouble {
        anyhow::bail!("the books cannot be read: {trouble}");
    }
    let line = |sink: crate::buffer::inspect::SinkReport| {
        let books = sink.books?;
        let last = found.last.get(&sink.stream).copied().unwrap_or_default().max(books.cursor);
        Some(Line::new(sink.stream, sink.sink, last, books))
    };
    Ok(found.sinks.into_iter().filter_map(line).collect())
}

fn table(lines: &[Line]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "STREAM",
        "SINK",
        "RECEIVED",
        "= DELIVERED",
        "+ PENDING",
        "+ DEAD",
        "+ FILTERED",
        "+ INCOMPLETE",
        "+ LOST",
        "DIFFERENCE",
    ]);
    for line in lines {
        let counts = [
            line.received,
            line.delivered,
            line.pending,
            line.dead_lettered,
            line.filtered,
            line.incomplete,
            line.lost,
        ];
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let names = [Cell::new(&line.stream), Cell::new(&line.sink)];
        let counts = counts.into_iter().map(|count| right(count.to_string()));
        table.add_row(names.into_iter().chain(counts).chain([right(line.difference.to_string())]));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_shows_as_difference() {
        let books = Books {
            cursor: Sequence(20),
            base: Sequence(10),
            delivered: 5,
            dead_lettered: 1,
            filtered: 2,
            incomplete: 1,
            lost: 1,
            ..Books::default()
        };
        let of = |books| {
            let (stream, sink) = (StreamName::parse("s").unwrap(), SinkName::parse("k").unwrap());
            Line::new(stream, sink, Sequence(25), books)
        };
        let line = of(books);
        assert_eq!((line.received, line.pending, line.difference), (15, 5, 0));
        assert_eq!(of(Books { delivered: 4, ..books }).difference, 1);
        assert_eq!(of(Books { delivered: 7, ..books }).difference, -2);
    }
}
