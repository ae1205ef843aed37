//! The package: what it puts where, upgrade, downgrade, removal, purge.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::{Publisher, PublisherOptions, until};

use crate::world::{CAUGHT_UP_WITHIN, MQTT_PASSWORD, MQTT_USER, SOON, World};

/// What must be there for systemd, shells and people; the pages of single commands and the documents come on top.
const FILES: [&str; 15] = [
    "/etc/telemetry/telemetry.toml",
    "/usr/bin/telemetry",
    "/usr/lib/systemd/system/telemetry.service",
    "/usr/lib/systemd/system/telemetry@.service",
    "/usr/lib/sysusers.d/telemetry.conf",
    "/usr/lib/tmpfiles.d/telemetry.conf",
    "/usr/share/bash-completion/completions/telemetry",
    "/usr/share/doc/telemetry/configuration.md",
    "/usr/share/doc/telemetry/copyright",
    "/usr/share/doc/telemetry/examples/homelab/telemetry.toml",
    "/usr/share/fish/vendor_completions.d/telemetry.fish",
    "/usr/share/man/man1/telemetry.1.gz",
    "/usr/share/telemetry/prometheus/telemetry.rules.yml",
    "/usr/share/telemetry/migrations/telemetry/0001_energy_consumption.sql",
    "/usr/share/zsh/vendor-completions/_telemetry",
];
const WHILE_AWAY: u64 = 500;

fn apt(world: &World, words: &[&str]) -> Result<Duration> {
    let began = Instant::now();
    let all = [&["apt-get", "--quiet", "--yes", "--no-install-recommends"], words].concat();
    world.machine.run(&all)?;
    Ok(began.elapsed())
}

pub fn fresh(world: &mut World) -> Result<String> {
    let took = apt(world, &["install", &format!("/packages/{}", world.package)])?;
    let listed = world.machine.run(&["dpkg", "--listfiles", "telemetry"])?;
    for file in FILES {
        ensure!(listed.lines().any(|line| line == file), "the package has no {file}");
    }
    let owned = world.machine.run(&[
        "stat",
        "-c",
        "%a %U %n",
        "/etc/telemetry/credentials",
        "/usr/bin/telemetry",
    ])?;
    ensure!(owned == "700 root /etc/telemetry/credentials\n755 root /usr/bin/telemetry", "{owned}");
    world.machine.run(&["getent", "passwd", "telemetry"])?;
    world.expect("ActiveState", "inactive")?;
    world.expect("UnitFileState", "disabled")?;
    Ok(format!("{} files in {took:.1?}", listed.lines().count()))
}

pub fn upgrade(world: &mut World) -> Result<String> {
    change_version(world, &["install", &format!("/packages/{}", world.newer)])
}

pub fn downgrade(world: &mut World) -> Result<String> {
    change_version(
        world,
        &["install", "--allow-downgrades", &format!("/packages/{}", world.package)],
    )
}

fn change_version(world: &World, words: &[&str]) -> Result<String> {
    let version = |world: &World| {
        world.machine.run(&["dpkg-query", "--show", "--showformat=${Version}", "telemetry"])
    };
    let (before, process) = (version(world)?, world.count("MainPID")?);
    let took = apt(world, words)?;
    let after = version(world)?;
    ensure!(before != after, "it is still {before}");
    world.expect("ActiveState", "active")?;
    ensure!(world.count("MainPID")? != process, "the old process still runs");
    let ready = world.wait_ready(SOON)?;
    Ok(format!("{before} to {after} in {took:.1?}, ready {ready:.1?} later"))
}

pub fn remove(world: &mut World) -> Result<String> {
    let identity = "cat /var/lib/telemetry/buffer/identity";
    let before = world.machine.shell(identity)?;
    apt(world, &["remove", "telemetry"])?;
    world.expect("ActiveState", "inactive")?;
    world.machine.run(&["test", "!", "-e", "/usr/bin/telemetry"])?;
    for kept in ["/etc/telemetry/telemetry.toml", "/etc/telemetry/credentials/database"] {
        world.machine.run(&["test", "-f", kept])?;
    }
    ensure!(world.machine.shell(identity)? == before, "the buffer is another");
    let rows = world.postgres.count("telemetry", "energy_consumption")?;
    publish_while_away(world)?;
    apt(world, &["install", &format!("/packages/{}", world.package)])?;
    world.expect("UnitFileState", "enabled")?;
    world.machine.run(&["systemctl", "start", "telemetry"])?;
    world.wait_ready(SOON)?;
    let wanted = rows + WHILE_AWAY;
    until(CAUGHT_UP_WITHIN, "what came while it was away has arrived", || {
        Ok((world.postgres.count("telemetry", "energy_consumption")? >= wanted).then_some(()))
    })?;
    world.wait_drained(SOON)?;
    let rows = world.postgres.count("telemetry", "energy_consumption")?;
    ensure!(rows == wanted, "{rows} rows instead of {wanted}");
    ensure!(world.machine.shell(identity)? == before, "the buffer is another");
    Ok(format!("{WHILE_AWAY} messages of the time without it arrived, each once"))
}

/// The broker keeps them for the session of the node.
fn publish_while_away(world: &World) -> Result<()> {
    let mut mqtt = rig::MqttOptions::new(world.mosquitto.port(), "while-away");
    mqtt.login = Some((MQTT_USER.to_owned(), MQTT_PASSWORD.to_owned()));
    let publisher = Publisher::with(PublisherOptions { mqtt, window: 100 });
    for number in 0..WHILE_AWAY {
        let reading = serde_json::json!({"saveeyeDeviceSerialNumber": "SE-2",
            "activeActualConsumption": {"total": 1}, "activeTotalConsumption": {"total": number}});
        publisher.publish("energy", "saveeye/telemetry", reading.to_string());
    }
    publisher.flush(SOON)
}

pub fn purge(world: &mut World) -> Result<String> {
    apt(world, &["purge", "telemetry"])?;
    let left =
        world.machine.shell("ls -d /var/lib/telemetry* /etc/telemetry 2>/dev/null || true")?;
    ensure!(left.is_empty(), "still there: {left}");
    let state = world.machine.run(&["systemctl", "show", "telemetry", "-P", "LoadState"])?;
    // The administrator's drop-in stays his own.
    ensure!(state != "loaded", "systemd still knows the unit: {state}");
    world
        .machine
        .run(&["systemctl", "is-system-running"])
        .context("the machine is not as well as before")?;
    Ok("state, configuration and secrets are gone".to_owned())
}
