//! Start, load, crash, hang, stop.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rig::{get, until};

use crate::load::{Load, number};
use crate::memory;
use crate::world::{CAUGHT_UP_WITHIN, DRAIN, HTTP_PORT, MQTT_PASSWORD, MQTT_USER, SOON, World};

/// From `kill -9` until systemd has the node back: two seconds of them are `RestartSec=`.
const BACK_WITHIN: Duration = Duration::from_secs(3);
/// `TimeoutStopSec=`.
const STOP_LIMIT: Duration = Duration::from_secs(60);
const LOAD_FOR: Duration = Duration::from_secs(10);
const RATE_MIN: f64 = 950.0;
pub const SECOND_PORT: u16 = 9465;

pub fn unconfigured(world: &mut World) -> Result<String> {
    let started = world.machine.output(&["systemctl", "start", "telemetry"])?;
    ensure!(!started.status.success(), "it starts without a configuration");
    world.expect("ExecMainStatus", "78")?;
    world.expect("ActiveState", "failed")?;
    world.expect("SubState", "failed")?;
    world.expect("NRestarts", "0")?;
    let said = world.machine.run(&[
        "journalctl",
        "-u",
        "telemetry",
        "-p",
        "err",
        "-o",
        "cat",
        "--no-pager",
    ])?;
    for words in ["no stream is defined", "node.name", "/etc/telemetry/telemetry.toml"] {
        ensure!(said.contains(words), "the journal's errors do not tell of {words:?}:\n{said}");
    }
    Ok("failed, NRestarts=0".to_owned())
}

pub fn start(world: &mut World) -> Result<String> {
    world.configure(&world.homelab()?, "/etc/telemetry/telemetry.toml")?;
    world.give_secrets("telemetry.service")?;
    memory::limit(world)?;
    world.machine.run(&[
        "systemd-analyze",
        "verify",
        "--man=no",
        "telemetry.service",
        "telemetry@x.service",
    ])?;
    let began = Instant::now();
    world.machine.run(&["systemctl", "enable", "--quiet", "--now", "telemetry"])?;
    let notified = began.elapsed();
    world.wait_ready(SOON)?;
    let ready = began.elapsed();
    let line = until(SOON, "a line for people", || {
        let line = world.property("StatusText")?;
        Ok((line == "accepting; 5 of 5 streams subscribed").then_some(line))
    })
    .or_else(|error| {
        Err(error).with_context(|| format!("StatusText={:?}", world.property("StatusText")))
    })?;
    Ok(format!("notified after {notified:.1?}, ready after {ready:.1?}: {line}"))
}

pub fn load(world: &mut World) -> Result<String> {
    let bound = memory::Bound::begin(world)?;
    world.load = Some(Load::begin(world.mosquitto.port(), (MQTT_USER, MQTT_PASSWORD)));
    // What the publisher was handed may wait in its queue; what counts is what the node keeps.
    let (before, began) = until(SOON, "the load arrives", || {
        let kept = kept(world)?;
        Ok((kept > 0).then(|| (kept, Instant::now())))
    })?;
    let mut threads = 0;
    until(LOAD_FOR + SOON, "the load has run for a while", || {
        threads = threads.max(status_number(world, "Threads")?);
        Ok((began.elapsed() >= LOAD_FOR).then_some(()))
    })?;
    let rate = (kept(world)? - before) as f64 / began.elapsed().as_secs_f64();
    ensure!(rate > RATE_MIN, "only {rate:.0} messages a second");
    let published = world.load()?.published();
    until(CAUGHT_UP_WITHIN, "what was published has been kept", || {
        Ok((kept(world)? >= published).then_some(()))
    })?;
    let tasks_max = world.count("TasksMax")?;
    // Half is left for what a bad hour starts.
    ensure!(threads * 2 <= tasks_max, "{threads} threads, TasksMax={tasks_max}");
    let resident = status_number(world, "VmHWM")? / 1024;
    let peak = bound.end()?;
    Ok(format!(
        "{rate:.0}/s; {threads} threads of TasksMax={tasks_max}; at most {peak}, resident {resident} MB"
    ))
}

/// Of what the load publishes.
fn kept(world: &World) -> Result<u64> {
    Ok(world.streams()?.stream("energy").map_or(0, |stream| stream.status.sequence))
}

/// A number of the main process from /proc.
fn status_number(world: &World, name: &str) -> Result<u64> {
    let status = world.machine.shell("cat /proc/$(systemctl show telemetry -P MainPID)/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let text = line.and_then(|line| line.split_whitespace().next()).unwrap_or_default();
    text.parse().with_context(|| format!("{name} in\n{status}"))
}

pub fn second_node(world: &mut World) -> Result<String> {
    let mut homelab = world.homelab()?;
    homelab.keep_stream("plug")?;
    homelab.without_kafka();
    homelab.set(&["node", "name"], "second");
    homelab.set(&["node", "state_dir"], "/var/lib/telemetry@second");
    homelab.set(&["http", "listen"], format!("127.0.0.1:{SECOND_PORT}"));
    world.configure(&homelab, "/etc/telemetry/nodes/second/telemetry.toml")?;
    world.give_secrets("telemetry@second.service")?;
    world.machine.run(&["systemctl", "start", "telemetry@second"])?;
    until(SOON, "the second node is ready", || {
        Ok(get(SECOND_PORT, "/health/ready").is_ok_and(|answer| answer.status == 200).then_some(()))
    })?;
    world.machine.run(&["systemctl", "stop", "telemetry@second"])?;
    world.machine.run(&["test", "-d", "/var/lib/telemetry@second/buffer"])?;
    Ok("ready beside the first, on its own state".to_owned())
}

/// Under load: a bad configuration is refused with its report in the journal, a good one counts, and nobody else notices.
pub fn reloaded(world: &mut World) -> Result<String> {
    const FILE: &str = "/etc/telemetry/telemetry.toml";
    let process = world.property("MainPID")?;
    let mut homelab = world.homelab()?;
    homelab.set(&["streams", "plug", "topic_filter"], "tele/#/STATE");
    world.configure(&homelab, FILE)?;
    let refused = world.machine.output(&["systemctl", "reload", "telemetry"])?;
    ensure!(!refused.status.success(), "a bad configuration was taken");
    let journal = ["journalctl", "-u", "telemetry", "-o", "cat", "--no-pager"];
    let said = world.machine.run(&journal)?;
    ensure!(said.contains("streams.plug.topic_filter"), "the journal has no report");

    homelab.set(&["streams", "plug", "topic_filter"], "tele/+/SENSOR");
    world.configure(&homelab, FILE)?;
    let told = world.machine.run(&["telemetry", "check", "--diff"])?;
    ensure!(told.contains("parts renewed: stream:plug"), "check --diff says {told}");
    let began = Instant::now();
    world.machine.run(&["systemctl", "reload", "telemetry"])?;
    let took = began.elapsed();
    let said = world.machine.run(&journal)?;
    ensure!(said.contains("the configuration was read again"), "the journal does not tell of it");
    world.wait_ready(SOON)?;
    world.configure(&world.homelab()?, FILE)?;
    world.machine.run(&["systemctl", "reload", "telemetry"])?;
    world.wait_ready(SOON)?;
    world.expect("MainPID", &process)?;
    world.expect("NRestarts", "0")?;
    Ok(format!("refused, and taken within {took:.1?}, by the same process"))
}

pub fn killed(world: &mut World) -> Result<String> {
    let before = world.count("NRestarts")?;
    let began = Instant::now();
    world.machine.run(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", "telemetry"])?;
    let back = until(SOON, "systemd has it back", || {
        let back = world.count("NRestarts")? > before && world.property("ActiveState")? == "active";
        Ok(back.then(|| began.elapsed()))
    })?;
    ensure!(back < BACK_WITHIN, "back after {back:.1?} only");
    world.wait_ready(SOON)?;
    Ok(format!("started again after {back:.1?}, ready after {:.1?}", began.elapsed()))
}

pub fn stopped(world: &mut World) -> Result<String> {
    let began = Instant::now();
    world.machine.run(&["systemctl", "stop", "telemetry"])?;
    let took = began.elapsed();
    ensure!(took < STOP_LIMIT, "it took {took:.1?}");
    world.expect("Result", "success")?;
    world.expect("ExecMainStatus", "0")?;
    ensure!(get(HTTP_PORT, "/health/live").is_err(), "somebody still answers");
    world.machine.run(&["systemctl", "start", "telemetry"])?;
    world.wait_ready(SOON)?;
    Ok(format!("stopped with exit 0 after {took:.1?}"))
}

/// systemd's own patience is shorter than the drain, which the node has announced.
pub fn long_drain(world: &mut World) -> Result<String> {
    let drop_in = "/etc/systemd/system/telemetry.service.d/impatient.conf";
    world.machine.write(drop_in, "[Service]\nTimeoutStopSec=2s\n")?;
    world.machine.run(&["systemctl", "daemon-reload"])?;
    world.postgres.freeze();
    let began = Instant::now();
    let outcome = world.machine.run(&["systemctl", "stop", "telemetry"]);
    let took = began.elapsed();
    world.postgres.thaw();
    outcome?;
    ensure!(took >= DRAIN, "it did not wait for its sinks: {took:.1?}");
    world.expect("Result", "success")?;
    world.expect("ExecMainStatus", "0")?;
    world.machine.run(&["rm", drop_in])?;
    world.machine.run(&["systemctl", "daemon-reload"])?;
    world.machine.run(&["systemctl", "start", "telemetry"])?;
    world.wait_ready(SOON)?;
    Ok(format!("TimeoutStopSec=2s, exit 0 after {took:.1?}"))
}

/// Nothing lost, nothing doubled, after all that has happened.
pub fn ledger(world: &mut World) -> Result<String> {
    let ledger = world.load.take().context("there is no load")?.end()?;
    let published = ledger.entries().len();
    until(CAUGHT_UP_WITHIN, "the last has been kept", || {
        Ok((kept(world)? as usize >= published).then_some(()))
    })?;
    world.wait_drained(CAUGHT_UP_WITHIN)?;
    let rows =
        world.postgres.query("telemetry", "SELECT active_energy_total FROM energy_consumption")?;
    let rows: Vec<String> = rows.into_iter().filter_map(|row| row.into_iter().next()?).collect();
    let identify = |entry: &rig::Entry| number(&entry.payload).unwrap_or_default();
    let found = ledger.compare(identify, rows.iter().map(String::as_str));
    if !found.is_exact() {
        bail!(
            "{} lost, {} doubled, {} unknown rows",
            found.lost.len(),
            found.doubled.len(),
            found.unknown.len()
        );
    }
    let records = world.kafka.read_topic("homelab-energy-realtime")?;
    let mut ids: Vec<_> =
        records.iter().filter_map(|record| record.header("telemetry-id")).collect();
    ids.sort_unstable();
    ids.dedup();
    ensure!(ids.len() == published, "{} of {published} in Kafka", ids.len());
    let repeats = records.len() - ids.len();
    Ok(format!(
        "{published} published: 0 lost, 0 doubled in PostgreSQL; 0 lost, {repeats} marked repeats in Kafka"
    ))
}
