//! Dead letters of a stopped node, delivered by the command itself.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rig::{Homelab, eventually};
use serde_json::Value;

use crate::world::{Changes, SOON, World};

/// Readings that the mapping takes only once text may be a number.
const READINGS: u64 = 3;
/// The node's user in a test that runs as root.
const STRANGER: u32 = 4711;

/// A stopped node whose readings are dead letters of Kafka and of the table.
fn stopped() -> World {
    let mut world = World::start(Changes { kafka: true, ..Changes::default() });
    let publisher = world.publisher();
    for count in 0..READINGS {
        let payload = format!(
            r#"{{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {{"total": "5"}}, "activeTotalConsumption": {{"total": {count}}}}}"#
        );
        publisher.publish("energy", "saveeye/telemetry", payload);
    }
    publisher.publish("plug", "tele/desk/STATE", r#"{"POWER": "LIT"}"#);
    publisher.flush(SOON).unwrap();
    for (stream, table, count) in
        [("energy", "energy_consumption", READINGS), ("plug", "power_plugs", 1)]
    {
        eventually(SOON, "both sinks set all aside", || {
            [table, "kafka"].iter().all(|sink| world.books(stream, sink, "dead_lettered") == count)
        });
    }
    world.node.stop(SOON).unwrap();
    world
}

/// Changes the configuration.
fn change(world: &World, change: impl FnOnce(&mut Homelab)) {
    let mut homelab = Homelab::open(world.node.config()).unwrap();
    change(&mut homelab);
    homelab.write(world.node.config()).unwrap();
}

/// From now on the mapping takes the readings.
fn mend(world: &World) {
    let path = ["streams", "energy", "fields", "active_power_total", "text_as_number"];
    change(world, |homelab| homelab.set(&path, true));
}

fn dlq(world: &World, arguments: &[&str]) -> Output {
    world.node.command(&[&["dlq"], arguments].concat()).unwrap()
}

/// Stands still until this is dropped, however long what is tried meanwhile takes.
struct Still(u32);

impl Still {
    fn of(command: &Child) -> Self {
        let still = Still(command.id());
        still.signal("-STOP");
        still
    }

    fn signal(&self, signal: &str) {
        let mut kill = Command::new("kill");
        assert!(kill.args([signal, &self.0.to_string()]).status().unwrap().success());
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}

/// A command that a test holds up, or kills, at this point.
fn dlq_at(world: &World, point: &str, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_telemetry"))
        .arg("dlq")
        .args(arguments)
        .arg("--config")
        .arg(world.node.config())
        .env("FAILPOINTS", point)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn fine(output: &Output) -> String {
    assert!(output.status.success(), "{}\n{}", out(output), error(output));
    out(output)
}

fn letters(world: &World) -> Vec<Value> {
    let shown = fine(&dlq(world, &["list", "--json"]));
    shown.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn rows(world: &World) -> u64 {
    world.count("telemetry", "energy_consumption")
}

fn ids(world: &World, topic: &str) -> Vec<String> {
    let records = world.kafka_records(topic);
    records.iter().filter_map(|one| one.header("telemetry-id").map(str::to_owned)).collect()
}

fn state_dir(world: &World) -> PathBuf {
    world.node.config().with_file_name("state")
}

/// Both sinks have everything once, and the node's books say so after a start.
#[track_caller]
fn all_delivered(world: &mut World) {
    world.node.start().unwrap();
    world.drained(SOON);
    for sink in ["energy_consumption", "kafka"] {
        let books = |what| world.books("energy", sink, what);
        eventually(SOON, format!("the books of {sink} agree"), || {
            (books("delivered"), books("dead_lettered")) == (READINGS, 0)
        });
        assert_eq!(world.sink("energy", sink)["status"]["dead_letters"], 0);
    }
    fine(&world.node.command(&["ledger"]).unwrap());
    let distinct = "SELECT count(DISTINCT active_energy_total) FROM energy_consumption";
    assert_eq!(world.postgres.value("telemetry", distinct).unwrap(), READINGS.to_string());
    assert_eq!(rows(world), READINGS);
    let distinct: BTreeSet<_> = ids(world, "homelab-energy-realtime").into_iter().collect();
    assert_eq!(distinct.len() as u64, READINGS);
}

#[test]
fn letters_of_a_stopped_node_are_corrected_and_replayed_into_tables_and_topics() {
    let mut world = stopped();
    let found = letters(&world);
    assert_eq!(found.len() as u64, 2 * READINGS + 2);
    let dry = fine(&dlq(&world, &["replay", "--dry-run"]));
    assert_eq!(dry.matches("would replay ").count(), found.len());
    let refused = dlq(&world, &["replay", "--stream", "energy"]);
    assert_eq!(refused.status.code(), Some(1), "nothing is mended yet");
    assert_eq!(out(&refused).matches("still dead energy/").count() as u64, 2 * READINGS);
    assert!(!error(&refused).contains("not tried"), "each for its own reason: {}", error(&refused));

    mend(&world);
    for sink in ["power_plugs", "kafka"] {
        let fixed = dlq(&world, &["fix", &format!("plug/{sink}/1"), "--set", "POWER=ON"]);
        assert_eq!(fine(&fixed), format!("corrected and replayed plug/{sink}/1\n"));
        assert!(error(&fixed).contains("dead_letter_fixed"), "{}", error(&fixed));
    }
    let replayed = dlq(&world, &["replay"]);
    assert_eq!(fine(&replayed).matches("replayed energy/").count() as u64, 2 * READINGS);
    let audit = error(&replayed);
    assert!(audit.contains("dead_letters_replayed") && audit.contains("uid "), "{audit}");
    assert!(letters(&world).is_empty());
    fine(&dlq(&world, &["replay"]));
    fine(&world.node.command(&["ledger"]).unwrap());

    for letter in found.iter().filter(|letter| letter["sink"] == "energy_consumption") {
        let arrival = letter["arrival"].as_str().unwrap();
        let row = format!("SELECT 1 AS kept FROM energy_consumption WHERE time = '{arrival}'");
        assert!(world.row("telemetry", &row).is_some(), "the row of {arrival}");
    }
    let switched = "SELECT status FROM power_plugs WHERE plug_id = 'desk'";
    assert_eq!(world.row("homelab_settings", switched).unwrap()["status"], true);
    let arrivals: BTreeSet<_> = found
        .iter()
        .filter(|letter| letter["stream"] == "energy" && letter["sink"] == "kafka")
        .map(|letter| letter["arrival"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap())
        .map(|arrival| Some(arrival.as_millisecond()))
        .collect();
    let records = world.kafka_records("homelab-energy-realtime");
    assert_eq!(records.iter().map(|one| one.timestamp).collect::<BTreeSet<_>>(), arrivals);
    assert_eq!(records.len() as u64, READINGS);
    assert_eq!(ids(&world, "homelab-plug-telemetry").len(), 1);
    all_delivered(&mut world);
    assert_eq!(world.books("plug", "power_plugs", "delivered"), 1);
    assert_eq!(ids(&world, "homelab-energy-realtime").len() as u64, READINGS, "and once");
}

#[test]
fn a_replay_of_a_stopped_node_killed_half_way_is_repeated_by_the_node_and_writes_each_row_once() {
    let mut world = stopped();
    mend(&world);
    let to_table = ["replay", "--sink", "energy_consumption"];
    for (point, written) in [("crash_replay_written", 0), ("crash_replayed", 1)] {
        let killed = dlq_at(&world, &format!("{point}=return"), &to_table);
        assert_eq!(killed.wait_with_output().unwrap().status.code(), None, "{point}");
        assert_eq!(rows(&world), written, "{point}");
    }
    // Between the confirmation of the brokers and the step that removes the letter and counts it.
    let to_kafka = ["replay", "--stream", "energy", "--sink", "kafka"];
    let killed = dlq_at(&world, "crash_state_written=return", &to_kafka);
    assert_eq!(killed.wait_with_output().unwrap().status.code(), None);
    assert_eq!(ids(&world, "homelab-energy-realtime").len(), 1);
    assert_eq!(letters(&world).len() as u64, 2 * READINGS + 2);

    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    eventually(SOON, "the node replays the rest", || {
        dlq(&world, &["replay", "--stream", "energy"]).status.success()
    });
    world.node.stop(SOON).unwrap();
    all_delivered(&mut world);
    assert!(ids(&world, "homelab-energy-realtime").len() as u64 <= READINGS + 1);
}

#[test]
fn a_sink_that_takes_nothing_is_asked_once_and_the_rest_is_told() {
    let mut world = stopped();
    mend(&world);
    let cluster = ["clusters", "main"];
    change(&world, |homelab| {
        homelab.cluster(&format!("127.0.0.1:{}", rig::free_port()));
        homelab.set(&[cluster[0], cluster[1], "message_timeout_seconds"], 3);
        homelab.set(&["databases", "telemetry", "connect_timeout_seconds"], 3);
    });
    world.postgres.stop().unwrap();
    for arguments in [
        &["replay", "--stream", "energy", "--sink", "kafka"][..],
        &["replay", "--sink", "energy_consumption"],
    ] {
        let began = Instant::now();
        let refused = dlq(&world, arguments);
        assert_eq!(refused.status.code(), Some(1), "{}", error(&refused));
        assert_eq!(out(&refused).matches("still dead").count(), 1, "{}", out(&refused));
        let told = error(&refused);
        assert!(told.contains("replayed 0, still dead 1, not tried 2"), "{told}");
        assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    }
    assert_eq!(letters(&world).len() as u64, 2 * READINGS + 2);

    world.postgres.restart().unwrap();
    let ledger = "ALTER TABLE telemetry_replayed RENAME TO hidden";
    world.postgres.execute("telemetry", ledger).unwrap();
    let refused = dlq(&world, &["replay", "--sink", "energy_consumption"]);
    assert!(out(&refused).contains("telemetry migrate apply"), "{}", out(&refused));
    let back = "ALTER TABLE hidden RENAME TO telemetry_replayed";
    world.postgres.execute("telemetry", back).unwrap();
    let hidden = "ALTER TABLE energy_consumption RENAME TO hidden";
    world.postgres.execute("telemetry", hidden).unwrap();
    let refused = dlq(&world, &["replay", "--sink", "energy_consumption"]);
    assert!(out(&refused).contains("telemetry migrate apply"), "{}", out(&refused));
    let back = "ALTER TABLE hidden RENAME TO energy_consumption";
    world.postgres.execute("telemetry", back).unwrap();

    // One sink is away, the other takes what is its own.
    let refused = dlq(&world, &["replay", "--stream", "energy"]);
    assert_eq!(refused.status.code(), Some(1));
    let told = error(&refused);
    assert!(told.contains("replayed 3, still dead 1, not tried 2"), "{told}");
    assert_eq!(rows(&world), READINGS);
    let bootstrap = world.bootstrap();
    change(&world, |homelab| homelab.cluster(&bootstrap));
    fine(&dlq(&world, &["replay", "--stream", "energy"]));
    all_delivered(&mut world);

    // The same of a running node.
    let guard = "ALTER TABLE energy_consumption ADD CONSTRAINT sane CHECK (active_power_total < 0) NOT VALID";
    world.postgres.execute("telemetry", guard).unwrap();
    let publisher = world.publisher();
    let reading =
        r#"{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 7}}"#;
    world.subscribed();
    for _ in 0..3 {
        publisher.publish("energy", "saveeye/telemetry", reading);
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "three more letters", || letters(&world).len() == 3 + 2);
    world.postgres.stop().unwrap();
    let refused = dlq(&world, &["replay", "--stream", "energy"]);
    let told = error(&refused);
    assert!(told.contains("replayed 0, still dead 1, not tried 2"), "{told}");
}

#[test]
fn one_process_at_a_time_has_the_state_of_a_stopped_node() {
    let mut world = stopped();
    mend(&world);
    let to_table = ["replay", "--sink", "energy_consumption"];
    let working = dlq_at(&world, "crash_replay_written=1*sleep(8000)", &to_table);
    let lock = File::options().write(true).open(state_dir(&world).join("lock")).unwrap();
    eventually(SOON, "the command is at work", || match lock.try_lock() {
        Ok(()) => {
            lock.unlock().unwrap();
            false
        }
        Err(_) => true,
    });
    let still = Still::of(&working);
    assert!(lock.try_lock().is_err(), "it stands still in the middle of its work");
    assert!(world.node.start().is_err(), "the state is taken");
    let log = world.node.log_text();
    assert!(log.contains("held by another process") && log.contains("telemetry dlq"), "{log}");
    let refused = dlq(&world, &["replay"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(error(&refused).contains("try again in a moment"), "{}", error(&refused));
    drop(still);
    fine(&working.wait_with_output().unwrap());

    // What root makes while it works there belongs to the node's user all the same.
    give(&state_dir(&world), STRANGER);
    fine(&dlq(&world, &["replay", "--stream", "energy"]));
    fine(&dlq(&world, &["purge", "--stream", "plug", "--yes"]));
    let made = fs::read_dir(state_dir(&world).join("state")).unwrap();
    let made = made.map(|entry| entry.unwrap().path());
    for path in made.chain([state_dir(&world).join("buffer/letters")]) {
        assert_eq!(fs::metadata(&path).unwrap().uid(), STRANGER, "{}", path.display());
    }
    give(&state_dir(&world), 0);
    all_delivered(&mut world);
}

fn give(path: &Path, user: u32) {
    chown(path, Some(user), Some(user)).unwrap();
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path(), user));
    }
}
