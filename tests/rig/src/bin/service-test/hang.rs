//! What stands still is ended by the watchdog and comes back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{MqttOptions, Publisher, PublisherOptions, Streams, get, until};

use crate::held::{hold, wait_replaced};
use crate::life::SECOND_PORT;
use crate::world::{DISK, MQTT_PASSWORD, MQTT_USER, SOON, World};

/// `WatchdogSec=`, the restart, and a busy machine.
const WATCHDOG_WITHIN: Duration = Duration::from_secs(30 + 20);
const UNIT: &str = "telemetry@frozen";
/// Of the node on the disk that may stand still; all that is published on this stream goes to it. Every step finds it as
/// the one before has left it.
const STALL: Duration = Duration::from_secs(5);
const PUBLISHED: u64 = 300;
/// It has one of its own too: the other node hears the same plugs.
const DATABASE: &str = "frozen";

pub fn process(world: &mut World) -> Result<String> {
    let before = world.count("NRestarts")?;
    let began = Instant::now();
    world.machine.run(&["systemctl", "kill", "--kill-whom=main", "--signal=STOP", "telemetry"])?;
    let back = until(WATCHDOG_WITHIN, "the watchdog has restarted it", || {
        let back = world.count("NRestarts")? > before && world.property("ActiveState")? == "active";
        Ok(back.then(|| began.elapsed()))
    })?;
    let said = journal(world, "telemetry")?;
    ensure!(said.contains("Failed with result 'watchdog'"), "the journal has no result 'watchdog'");
    world.wait_ready(SOON)?;
    Ok(format!("Result=watchdog, back after {back:.1?}"))
}

/// The threads of every part hang, those of the supervisor, the buffer and HTTP do not: each part is made anew on a thread
/// of its own, by the same process.
pub fn threads(world: &mut World) -> Result<String> {
    world.postgres.create_database(DATABASE)?;
    begin(world)?;
    let publisher = publisher(world);
    publish(&publisher, 0);
    publisher.flush(SOON)?;
    wait_kept(world, PUBLISHED)?;
    let parts = ["stream:plug", "writer:plug:power_plugs", "migrator:homelab_settings"];
    let of_parts = |name: &str| name.starts_with("streams-") || name.starts_with("pg:");
    let held = hold(world, UNIT, &world.file("held"), of_parts)?;
    let began = Instant::now();
    publish(&publisher, PUBLISHED);
    wait_replaced(SECOND_PORT, &parts, WATCHDOG_WITHIN)?;
    publisher.flush(SOON)?;
    wait_kept(world, 2 * PUBLISHED)?;
    let took = began.elapsed();
    let names = held.names.join(", ");
    // They wake up, and find that others do their work.
    drop(held);
    publish(&publisher, 2 * PUBLISHED);
    publisher.flush(SOON)?;
    wait_kept(world, 3 * PUBLISHED)?;
    ensure!(restarts(world)? == 0, "the process was restarted");
    let told = ["journalctl", "-u", UNIT, "EVENT=part_failed", "-o", "export", "--no-pager"];
    let told = world.machine.run(&told)?;
    ensure!(told.contains("its thread is blocked"), "the journal does not tell:\n{told}");
    Ok(format!("{names}: all delivered after {took:.1?} by others, same process, nothing lost"))
}

/// Whoever looks after the parts and feeds the watchdog hangs itself; nobody in the process can mend that.
pub fn supervisor(world: &mut World) -> Result<String> {
    let publisher = publisher(world);
    let before = restarts(world)?;
    let held = hold(world, UNIT, &world.file("held"), |name| name == "telemetry")?;
    let began = Instant::now();
    publish(&publisher, 3 * PUBLISHED);
    until(WATCHDOG_WITHIN, "the watchdog has had enough", || {
        Ok((ended_by_watchdog(world)? > 0).then_some(()))
    })?;
    // The signal waits for whoever holds the thread.
    drop(held);
    let back = until(SOON, "it is back", || {
        let ready = get(SECOND_PORT, "/health/ready").is_ok_and(|answer| answer.status == 200);
        Ok((ready && restarts(world)? > before).then(|| began.elapsed()))
    })?;
    let said = journal(world, UNIT)?;
    ensure!(said.contains("Failed with result 'watchdog'"), "no result 'watchdog':\n{said}");
    publisher.flush(SOON)?;
    wait_kept(world, 4 * PUBLISHED)?;
    world.machine.run(&["systemctl", "stop", UNIT])?;
    Ok(format!("Result=watchdog, ready after {back:.1?}; nothing lost"))
}

/// A write that never returns gives no error. The buffer's writer hangs in it for real, everything else goes on.
pub fn disk(world: &mut World) -> Result<String> {
    begin(world)?;
    let ended_before = ended_by_watchdog(world)?;
    let publisher = publisher(world);
    publish(&publisher, 4 * PUBLISHED);
    publisher.flush(SOON)?;
    wait_kept(world, 5 * PUBLISHED)?;
    let before = restarts(world)?;
    let frozen = world.disk.freeze()?;
    let began = Instant::now();
    publish(&publisher, 5 * PUBLISHED);
    until(SOON, "the node tells that the disk does not answer", || {
        Ok(journal(world, UNIT)?.contains("the disk does not answer").then_some(()))
    })?;
    ensure!(get(SECOND_PORT, "/health/live").is_ok(), "only the disk stands still");
    until(WATCHDOG_WITHIN, "the watchdog has had enough", || {
        Ok((ended_by_watchdog(world)? > ended_before).then_some(()))
    })?;
    let ended = began.elapsed();
    // Until now the process waits inside the kernel, where no signal reaches it.
    drop(frozen);
    until(SOON, "it is back", || {
        let ready = get(SECOND_PORT, "/health/ready").is_ok_and(|answer| answer.status == 200);
        Ok((ready && restarts(world)? > before).then_some(()))
    })?;
    publisher.flush(SOON)?;
    wait_kept(world, 6 * PUBLISHED)?;
    world.machine.run(&["systemctl", "stop", UNIT])?;
    Ok(format!("Result=watchdog {ended:.1?} after the disk stood still; nothing lost"))
}

/// A node of its own on the other disk, with little patience.
fn begin(world: &World) -> Result<()> {
    let mut homelab = world.homelab()?;
    homelab.keep_stream("plug")?;
    homelab.without_kafka();
    homelab.set(&["node", "name"], "frozen");
    homelab.set(&["node", "state_dir"], format!("{DISK}/state"));
    homelab.set(&["databases", "homelab_settings", "dbname"], DATABASE);
    // A connection whose task hangs with another part's thread is waited for that long: no stall of who waits.
    for database in homelab.names("databases") {
        homelab.set(&["databases", &database, "statement_timeout_seconds"], 5);
    }
    // The disk is smaller than what is kept free by default.
    homelab.set(&["buffer", "free_bytes_min"], 8_000_000);
    homelab.set(&["buffer", "ballast_bytes"], 1_000_000);
    homelab.set(&["supervision", "stall_timeout_seconds"], STALL.as_secs() as i64);
    homelab.set(&["http", "listen"], format!("127.0.0.1:{SECOND_PORT}"));
    world.configure(&homelab, "/etc/telemetry/nodes/frozen/telemetry.toml")?;
    world.give_secrets(&format!("{UNIT}.service"))?;
    let drop_in = format!("[Service]\nReadWritePaths={DISK}\nWatchdogSec=10s\n");
    world.machine.write(&format!("/etc/systemd/system/{UNIT}.service.d/disk.conf"), &drop_in)?;
    world.machine.run(&["chown", "telemetry:", DISK])?;
    world.machine.run(&["systemctl", "daemon-reload"])?;
    world.machine.run(&["systemctl", "start", UNIT])?;
    until(SOON, "it is subscribed", || {
        Ok(streams().is_ok_and(|streams| streams.all_subscribed()).then_some(()))
    })
}

fn publisher(world: &World) -> Publisher {
    let mut mqtt = MqttOptions::new(world.mosquitto.port(), "plugs");
    mqtt.login = Some((MQTT_USER.to_owned(), MQTT_PASSWORD.to_owned()));
    Publisher::with(PublisherOptions { mqtt, window: 100 })
}

/// Each from a plug of its own, so that the table of latest states has a row of each message.
fn publish(publisher: &Publisher, first: u64) {
    for number in first..first + PUBLISHED {
        let state = serde_json::json!({"POWER": "ON", "UptimeSec": number});
        publisher.publish("plug", &format!("tele/plug-{number}/STATE"), state.to_string());
    }
}

fn streams() -> Result<Streams> {
    let answer = get(SECOND_PORT, "/streams")?;
    serde_json::from_str(&answer.body).context("/streams")
}

/// Waits until this many are durable and every sink has dealt with them, and looks for each in the table.
fn wait_kept(world: &World, wanted: u64) -> Result<()> {
    let mut kept = 0;
    until(SOON, "all that was published is kept and delivered", || {
        let streams = streams().unwrap_or_default();
        let plug = streams.stream("plug");
        kept = plug.map_or(0, |plug| plug.status.sequence);
        Ok((kept >= wanted && plug.is_some_and(|plug| plug.is_drained())).then_some(()))
    })?;
    ensure!(kept == wanted, "{kept} kept of {wanted}");
    let sql = "SELECT plug_id, uptime_seconds::text FROM power_plugs p ORDER BY p.uptime_seconds";
    let rows = world.postgres.query(DATABASE, sql)?;
    let expected = (0..wanted).map(|n| vec![Some(format!("plug-{n}")), Some(n.to_string())]);
    ensure!(rows.iter().eq(&expected.collect::<Vec<_>>()), "{} rows of {wanted}", rows.len());
    Ok(())
}

fn restarts(world: &World) -> Result<u64> {
    let text = world.machine.run(&["systemctl", "show", UNIT, "-P", "NRestarts"])?;
    text.parse().with_context(|| format!("NRestarts={text}"))
}

/// How often.
fn ended_by_watchdog(world: &World) -> Result<usize> {
    Ok(journal(world, UNIT)?.matches("Watchdog timeout").count())
}

fn journal(world: &World, unit: &str) -> Result<String> {
    world.machine.run(&["journalctl", "-u", unit, "-o", "cat", "--no-pager"])
}
