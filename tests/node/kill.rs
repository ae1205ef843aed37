//! `kill -9` under load, again and again: nothing acknowledged is lost, no row is doubled.

use std::collections::HashMap;
use std::time::Duration;

use rig::eventually;
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

const MESSAGES_A_ROUND: u64 = 300;

fn payload(stream: &str, count: u64) -> (&'static str, String) {
    match stream {
        "energy" => (
            "saveeye/telemetry",
            json!({"saveeyeDeviceSerialNumber": format!("SE-{}", count % 3),
                "activeActualConsumption": {"total": 500},
                "activeTotalConsumption": {"total": count}})
            .to_string(),
        ),
        _ => (
            "homelab/temperature/outdoor",
            json!({"temperature_c": count, "humidity_pct": 50}).to_string(),
        ),
    }
}

fn number(entry: &rig::Entry) -> String {
    let value: Value = serde_json::from_slice(&entry.payload).unwrap();
    let number = value.pointer("/activeTotalConsumption/total").or(value.get("temperature_c"));
    format!("{} {}", entry.stream, number.unwrap())
}

#[test]
fn kills_under_load_lose_nothing_and_double_no_row() {
    let changes = Changes { kafka: true, ..Changes::default() };
    let (world, count) = kill_rounds(changes, 20);
    assert_topic(&world, count);
}

#[test]
fn kills_under_the_older_protocol_lose_nothing_and_double_no_row() {
    let extra = "[brokers.home]\nversion = \"3.1.1\"\n".to_owned();
    kill_rounds(Changes { extra, ..Changes::default() }, 10);
}

/// Compares the tables with the ledger; how many messages each stream got.
fn kill_rounds(changes: Changes, rounds: u64) -> (World, u64) {
    let mut world = World::start(changes);
    let publisher = world.publisher();
    let rows = |world: &World| world.count("telemetry", "energy_consumption");
    let mut count = 0;
    let mut publish = |messages: u64| {
        for _ in 0..messages {
            for stream in ["energy", "temperature_outdoor"] {
                let (topic, payload) = payload(stream, count);
                publisher.publish(stream, topic, payload);
            }
            count += 1;
        }
        count
    };
    let mut hits = 0;
    for round in 0..rounds {
        let before = rows(&world);
        // Every other life is killed on its way to its first row, the others while they deliver.
        if round % 2 == 1 {
            eventually(SOON, "rows come", || publish(10) > 0 && rows(&world) > before);
        }
        let published = publish(MESSAGES_A_ROUND);
        // A moment that differs from round to round, and does not depend on what the node has done.
        std::thread::sleep(Duration::from_millis(round * 37 % 250));
        world.node.kill();
        let after = rows(&world);
        hits += u64::from(before < after && after < published);
        world.node.start().unwrap();
    }
    assert!(hits >= rounds / 4, "{hits} of {rounds} kills came between two rows");
    publisher.flush(Duration::from_secs(60)).unwrap();
    eventually(Duration::from_secs(60), "all rows", || {
        rows(&world) >= count && world.count("telemetry", "temperature_sensors") >= count
    });
    world.drained(SOON);
    let mut arrived = Vec::new();
    for (stream, sql) in [
        ("energy", "SELECT active_energy_total FROM energy_consumption"),
        ("temperature_outdoor", "SELECT temperature_c FROM temperature_sensors"),
    ] {
        let rows = world.postgres.query("telemetry", sql).unwrap();
        arrived.extend(rows.into_iter().flatten().flatten().map(|n| format!("{stream} {n}")));
    }
    let comparison = publisher.ledger().compare(number, arrived.iter().map(String::as_str));
    assert!(comparison.is_exact(), "{comparison:?}");
    (world, count)
}

/// At least once, each repeat marked by its id, and in order per device once repeats are dropped.
fn assert_topic(world: &World, count: u64) {
    let mut newest: HashMap<String, u64> = HashMap::new();
    let mut seen = std::collections::HashSet::new();
    for record in world.kafka_records("homelab-energy-realtime") {
        if !seen.insert(record.header("telemetry-id").unwrap().to_owned()) {
            continue;
        }
        let value: Value = serde_json::from_slice(&record.value).unwrap();
        let number = value["fields"]["active_energy_total"].as_u64().unwrap();
        let device = String::from_utf8(record.key.unwrap()).unwrap();
        let before = newest.insert(device, number);
        assert!(before.is_none_or(|before| before < number), "{before:?} before {number}");
    }
    assert_eq!(seen.len() as u64, count);
}

/// More than there are packet ids: a broker that drains its queue reads our acknowledgements late, and sends again what
/// it has not read.
const FLOOD: u64 = 150_000;

#[test]
fn a_kill_in_the_middle_of_a_flood_doubles_no_row() {
    let mut world = World::start(Changes { flooded: true, ..Changes::default() });
    assert!(world.node.stop(SOON).unwrap().success());
    let publisher = world.publisher();
    for count in 0..FLOOD {
        let (topic, payload) = payload("energy", count);
        publisher.publish("energy", topic, payload);
    }
    publisher.flush(Duration::from_secs(60)).unwrap();
    world.node.start().unwrap();
    for share in [3, 2] {
        eventually(Duration::from_secs(60), "part of the flood", || {
            let all = world.node.streams().unwrap_or_default();
            let streams = all["streams"].as_array().cloned().unwrap_or_default();
            let energy = streams.into_iter().find(|line| line["name"] == "energy");
            energy.is_some_and(|line| line["status"]["sequence"].as_u64() > Some(FLOOD / share))
        });
        world.node.kill();
        world.node.start().unwrap();
    }
    eventually(Duration::from_secs(120), "all rows", || {
        world.count("telemetry", "energy_consumption") >= FLOOD
    });
    world.drained(SOON);
    let sql = "SELECT count(*), count(DISTINCT active_energy_total) FROM energy_consumption";
    let rows = world.postgres.query("telemetry", sql).unwrap();
    let counts: Vec<_> = rows[0].iter().flatten().cloned().collect();
    assert_eq!(counts, [FLOOD.to_string(), FLOOD.to_string()], "rows, and publications among them");
}
