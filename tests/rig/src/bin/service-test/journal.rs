//! What `journalctl -u telemetry` tells of an outage.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use rig::until;
use serde_json::Value;

use crate::world::{SOON, World};

/// Priorities of syslog.
const WARNING: &str = "4";
const INFO: &str = "6";

pub fn outage(world: &mut World) -> Result<String> {
    world.postgres.stop()?;
    let line = until(SOON, "the unit's line tells who waits", || {
        let line = world.property("StatusText")?;
        Ok((line.contains("5 of 5") && line.contains(" waiting")).then_some(line))
    })?;
    world.postgres.restart()?;
    until(SOON, "the journal tells that the database is back", || {
        let entries = entries(world)?;
        let lost = entries.iter().rposition(|entry| entry.is("EVENT", "dependency_lost"));
        let lost = lost.context("no outage in the journal")?;
        let back = |entry: &Entry| {
            entry.is("EVENT", "dependency_reached")
                && entry.0.get("DEPENDENCY") == entries[lost].0.get("DEPENDENCY")
        };
        Ok(entries[lost..].iter().any(back).then_some(()))
    })?;
    world.wait_ready(SOON)?;
    let entries = entries(world)?;
    let lost = find(&entries, "dependency_lost")?;
    ensure!(lost.is("PRIORITY", WARNING), "an outage is no warning: {lost:?}");
    ensure!(
        lost.is("DEPENDENCY", "postgresql:telemetry")
            || lost.is("DEPENDENCY", "postgresql:homelab_settings"),
        "{lost:?}"
    );
    ensure!(lost.is("SYSLOG_IDENTIFIER", "telemetry"), "{lost:?}");
    ensure!(find(&entries, "node_started")?.is("PRIORITY", INFO), "a start is no information");
    let subscribed = find(&entries, "stream_input_active")?;
    ensure!(subscribed.0.contains_key("STREAM"), "a stream's event has no STREAM=: {subscribed:?}");
    let told = world.machine.run(&["journalctl", "-u", "telemetry", "-o", "cat", "--no-pager"])?;
    ensure!(
        !told.contains("already exists, skipping"),
        "the database's own notices are in the journal"
    );
    let warnings = world.machine.run(&[
        "journalctl",
        "-u",
        "telemetry",
        "-p",
        "warning",
        "-o",
        "cat",
        "--no-pager",
    ])?;
    ensure!(!warnings.contains("subscribed"), "{warnings}");
    Ok(format!("while it lasted: {line}"))
}

#[derive(Debug)]
struct Entry(BTreeMap<String, Value>);

impl Entry {
    fn is(&self, field: &str, value: &str) -> bool {
        self.0.get(field).and_then(Value::as_str) == Some(value)
    }
}

/// What the node itself wrote.
fn entries(world: &World) -> Result<Vec<Entry>> {
    let words = [
        "journalctl",
        "-u",
        "telemetry",
        "SYSLOG_IDENTIFIER=telemetry",
        "-o",
        "json",
        "--no-pager",
    ];
    let text = world.machine.run(&words)?;
    text.lines()
        .map(|line| Ok(Entry(serde_json::from_str(line).with_context(|| line.to_owned())?)))
        .collect()
}

fn find<'a>(entries: &'a [Entry], event: &str) -> Result<&'a Entry> {
    entries
        .iter()
        .find(|entry| entry.is("EVENT", event))
        .with_context(|| format!("no EVENT={event} in the journal"))
}
