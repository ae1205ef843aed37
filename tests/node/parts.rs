//! A panic in one part, or a thread that stands still, ends that life of the parts concerned and nothing else.

use std::time::{Duration, Instant};

use rig::eventually;
use serde_json::json;

use crate::world::{Changes, SOON, World};

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

/// Panics `part` once at `failpoint`, and sees that everything arrives all the same.
fn survives(part: &str, failpoint: &str, kafka: bool) {
    let failpoints = format!("{failpoint}=1*panic(made by a test)");
    let mut world = World::prepare(Changes { kafka, failpoints, ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    for count in 0..200 {
        publisher.publish("energy", "saveeye/telemetry", reading(count));
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, format!("{part} was started afresh"), || {
        let health = world.node.get("/health").unwrap().json().unwrap();
        health["parts"][part]["restarts"].as_u64() == Some(1)
    });
    eventually(SOON, "all rows", || {
        world.postgres.count("telemetry", "energy_consumption").is_ok_and(|rows| rows == 200)
    });
    world.drained(SOON);
    let health = world.node.get("/health").unwrap().json().unwrap();
    let others = health["parts"].as_object().unwrap().iter().filter(|(name, _)| *name != part);
    for (name, other) in others {
        assert_eq!(other["restarts"], 0, "{name}");
    }
    if kafka {
        eventually(SOON, "all records", || {
            let records = world.kafka_records("homelab-energy-realtime");
            let ids: std::collections::HashSet<_> =
                records.iter().filter_map(|record| record.header("telemetry-id")).collect();
            ids.len() == 200
        });
    }
}

#[test]
fn a_panicking_stream_is_started_afresh() {
    survives("stream:energy", "stream_batch", false);
}

#[test]
fn a_panicking_writer_is_started_afresh() {
    survives("writer:energy:energy_consumption", "writer_batch_energy", false);
}

#[test]
fn a_panicking_migrator_is_started_afresh() {
    survives("migrator:telemetry", "migrator_apply_telemetry", false);
}

#[test]
fn a_panicking_producer_is_started_afresh() {
    survives("kafka:main", "kafka_attempt_energy", true);
}

/// Of a thread that stands still: longer than it takes to notice, to cancel in vain and to start afresh.
const HANG: Duration = Duration::from_secs(40);

#[test]
fn parts_on_a_thread_that_hangs_go_on_on_others_also_those_that_had_nothing_to_do() {
    let failpoints = format!("writer_batch_energy=1*sleep({})", HANG.as_millis());
    let extra = "[supervision]\nstall_timeout_seconds = 5\n".to_owned();
    let mut world = World::prepare(Changes { failpoints, extra, ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    eventually(SOON, "every table is there", || {
        let health = world.node.get("/health").unwrap().json().unwrap();
        health["state"] == "healthy"
    });
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    let hung = Instant::now();
    let stalls = |part: &str| {
        let health = world.node.get("/health").unwrap().json().unwrap();
        health["parts"][part]["stalls"].as_u64()
    };
    // The one that hangs, and one on the same thread that waits for its first message.
    for part in
        ["writer:energy:energy_consumption", "writer:temperature_outdoor:temperature_sensors"]
    {
        eventually(SOON, format!("{part} counts as stalled"), || stalls(part) == Some(1));
    }
    publisher.publish(
        "temperature_outdoor",
        "homelab/temperature/outdoor",
        r#"{"temperature_c": 1}"#,
    );
    publisher.flush(SOON).unwrap();
    for table in ["energy_consumption", "temperature_sensors"] {
        eventually(SOON, format!("a row in {table}"), || world.count("telemetry", table) == 1);
    }
    assert!(hung.elapsed() < HANG, "{:?}: the thread goes on", hung.elapsed());
    assert_eq!(stalls("stream:energy"), Some(0), "streams have threads of their own");
    // What hung wakes up again, and finds that others have done its work.
    eventually(HANG, "the thread goes on", || hung.elapsed() > HANG + Duration::from_secs(1));
    publisher.publish("energy", "saveeye/telemetry", reading(2));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the second", || world.count("telemetry", "energy_consumption") == 2);
    world.drained(SOON);
}

#[test]
fn a_part_that_panics_each_time_is_parked_and_the_others_go_on() {
    let failpoints = "writer_batch_energy=panic(made by a test)".to_owned();
    let extra =
        "[supervision]\nrestarts_max = 2\nbackoff_min_ms = 10\nbackoff_max_ms = 20\n".to_owned();
    let mut world = World::prepare(Changes { failpoints, extra, ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "it is parked", || {
        let health = world.node.get("/health").unwrap().json().unwrap();
        health["parts"]["writer:energy:energy_consumption"]["state"] == "parked"
    });
    publisher.publish(
        "temperature_outdoor",
        "homelab/temperature/outdoor",
        r#"{"temperature_c": 1}"#,
    );
    publisher.flush(SOON).unwrap();
    eventually(SOON, "another writer goes on", || {
        world.count("telemetry", "temperature_sensors") == 1
    });
    let metrics = world.node.get("/metrics").unwrap().body;
    let line = r#"telemetry_part_parked{part="writer:energy:energy_consumption"} 1"#;
    assert!(metrics.contains(line), "{metrics}");
}
