//! What `journalctl -u telemetry` tells of an outage.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use rig::until;
use serde_json::Value;

use crate::world::{DATABASES, SOON, World};

/// Priorities of syslog.
const WARNING: &str = "4";
const INFO: &str = "6";

/// Of one outage: a line when it begins and one when the breaker opens, for each database that notices.
const WARNINGS_MAX: usize = 4;

pub fn outage(world: &mut World) -> Result<String> {
    let before = cursor(world)?;
    world.postgres.stop()?;
    let line = until(SOON, "the unit's line tells who waits", || {
        let line = world.property("StatusText")?;
        Ok((line.contains("5 of 5") && line.contains(" waiting")).then_some(line))
    })?;
    until(SOON, "the breaker opens", || {
        let since = entries(world, &["--after-cursor", &before])?;
        Ok(since.iter().any(|entry| entry.is("EVENT", "breaker_opened")).then_some(()))
    })?;
    world.postgres.restart()?;
    let story = until(SOON, "the journal tells that the database is back", || {
        let since = entries(world, &["--after-cursor", &before])?;
        let opened = since.iter().find(|entry| entry.is("EVENT", "breaker_opened"));
        let id = opened.and_then(|entry| entry.text("CORRELATION_ID")).context("no id")?;
        // What a person types who has read one line of it.
        let story = entries(world, &[&format!("CORRELATION_ID={id}")])?;
        let over = story.last().is_some_and(|entry| entry.is("EVENT", "dependency_reached"));
        Ok(over.then_some(story))
    })?;
    world.wait_ready(SOON)?;
    let told: Vec<_> = story.iter().filter_map(|entry| entry.text("EVENT")).collect();
    ensure!(told == ["dependency_lost", "breaker_opened", "dependency_reached"], "{told:?}");
    fields(world, &story)?;
    let warnings = entries(world, &["-p", "warning", "--after-cursor", &before])?;
    let told: Vec<_> = warnings.iter().filter_map(|entry| entry.text("EVENT")).collect();
    let known = |event: &&str| ["dependency_lost", "breaker_opened"].contains(event);
    ensure!(told.iter().all(known) && told.len() <= WARNINGS_MAX, "{told:?}");
    let all = world.machine.run(&["journalctl", "-u", "telemetry", "-o", "cat", "--no-pager"])?;
    ensure!(!all.contains("already exists, skipping"), "the database's notices are in the journal");
    Ok(format!("{} warnings; while it lasted: {line}", warnings.len()))
}

/// Fields, and priorities, as people ask for them.
fn fields(world: &World, story: &[Entry]) -> Result<()> {
    let [lost, .., reached] = story else { bail!("too short: {story:?}") };
    ensure!(lost.is("PRIORITY", WARNING) && reached.is("PRIORITY", INFO), "{story:?}");
    for (name, value) in [("SYSLOG_IDENTIFIER", "telemetry"), ("RUNBOOK", "dependency-down")] {
        ensure!(lost.is(name, value), "not {name}={value}: {lost:?}");
    }
    let databases = DATABASES.map(|name| format!("postgresql:{name}"));
    let dependency = lost.text("DEPENDENCY").unwrap_or_default();
    ensure!(databases.iter().any(|name| name == dependency), "{lost:?}");
    let of_plug = entries(world, &["EVENT=stream_input_active", "STREAM=plug"])?;
    ensure!(of_plug.iter().all(|entry| entry.is("STREAM", "plug")), "{of_plug:?}");
    let begin = of_plug.first().context("no line of the stream plug")?;
    ensure!(begin.is("PRIORITY", INFO), "{begin:?}");
    Ok(())
}

/// Where the journal ends now.
fn cursor(world: &World) -> Result<String> {
    let last = ["journalctl", "-u", "telemetry", "-n", "1", "-o", "json", "--no-pager"];
    let last: Value = serde_json::from_str(&world.machine.run(&last)?).context("the last entry")?;
    Ok(last["__CURSOR"].as_str().context("an entry without a cursor")?.to_owned())
}

#[derive(Debug)]
struct Entry(BTreeMap<String, Value>);

impl Entry {
    fn is(&self, field: &str, value: &str) -> bool {
        self.text(field) == Some(value)
    }

    fn text(&self, field: &str) -> Option<&str> {
        self.0.get(field).and_then(Value::as_str)
    }
}

/// What the node itself wrote, of what `journalctl -u telemetry` with these words shows.
fn entries(world: &World, words: &[&str]) -> Result<Vec<Entry>> {
    let node = ["-u", "telemetry", "SYSLOG_IDENTIFIER=telemetry", "-o", "json", "--no-pager"];
    let text = world.machine.run(&[&["journalctl"], &node[..], words].concat())?;
    text.lines()
        .map(|line| Ok(Entry(serde_json::from_str(line).with_context(|| line.to_owned())?)))
        .collect()
}
