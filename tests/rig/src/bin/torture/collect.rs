//! What is in the tables and among the dead letters.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use rig::{Node, Postgres};
use serde::Deserialize;

use crate::traffic::{STREAMS, Stream, Table};

/// A message as a sink shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    pub device: String,
    pub number: u64,
    pub value: Option<u32>,
    /// Of its arrival at the node, in UTC, to the microsecond.
    pub time: String,
}

/// A dead letter, as `telemetry dlq list --json` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct Letter {
    /// STREAM/SINK/SEQUENCE
    pub letter: String,
    pub payload: String,
    pub reason: String,
    pub sqlstate: Option<String>,
    /// As a reading's time.
    pub arrival: String,
}

impl Letter {
    pub fn is_of(&self, stream: &str, sink: &str) -> bool {
        let mut parts = self.letter.split('/');
        parts.next() == Some(stream) && parts.next() == Some(sink)
    }

    /// The reason, and what the database said of it.
    pub fn cause(&self) -> (&str, Option<&str>) {
        (&self.reason, self.sqlstate.as_deref())
    }
}

/// One round's findings outside Kafka.
#[derive(Debug, Default)]
pub struct Found {
    /// By table: the round's, or every row of a table of the latest state, where rows of earlier rounds must stand as
    /// they stood.
    pub rows: BTreeMap<&'static str, Vec<Reading>>,
    /// By append table: rows of all rounds.
    pub totals: BTreeMap<&'static str, u64>,
    pub letters: Vec<Letter>,
}

/// # Errors
/// When database or node do not answer.
pub fn found(round: u64, postgres: &Postgres, node: &Node) -> Result<Found> {
    let mut found = Found { letters: letters(node)?, ..Found::default() };
    for table in STREAMS.iter().flat_map(|stream: &Stream| stream.tables) {
        found.rows.insert(table.name, rows(round, postgres, table)?);
        if !table.latest {
            found.totals.insert(table.name, postgres.count(table.database, table.name)?);
        }
    }
    Ok(found)
}

fn rows(round: u64, postgres: &Postgres, table: &Table) -> Result<Vec<Reading>> {
    let [device, number, value] = table.columns;
    let which =
        if table.latest { String::new() } else { format!("WHERE {device} LIKE 'r{round}-%'") };
    let time =
        format!("to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')", table.time);
    let sql = format!(
        "SELECT {device}, {number}::bigint, {value}::bigint, {time} FROM {} {which}",
        table.name
    );
    let rows = postgres.query(table.database, &sql)?;
    rows.into_iter()
        .map(|row| {
            let [Some(device), Some(number), value, Some(time)] = &row[..] else {
                bail!("a row {row:?}")
            };
            let value = value.as_deref().map(str::parse).transpose();
            Ok(Reading {
                device: device.clone(),
                number: number.parse().context("a row's number")?,
                value: value.context("a row's value")?,
                time: time.clone(),
            })
        })
        .collect()
}

fn letters(node: &Node) -> Result<Vec<Letter>> {
    let output = node.command(&["dlq", "list", "--json"])?;
    if !output.status.success() {
        bail!("dlq list: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8(output.stdout).context("dlq list printed no text")?;
    text.lines().map(|line| serde_json::from_str(line).context("a dead letter")).collect()
}

/// The round's letters have been judged.
///
/// # Errors
/// When the node does not take the order.
pub fn purge_letters(node: &Node) -> Result<()> {
    let output = node.command(&["dlq", "purge", "--yes"])?;
    if !output.status.success() {
        bail!("dlq purge: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
