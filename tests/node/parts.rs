//! A part that panics or hangs loses that life of its own and nothing else.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rig::{eventually, request_as};
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

/// The least that counts as a stall.
const IMPATIENT: &str = "[supervision]\nstall_timeout_seconds = 5\n";
/// Parked after the third failure.
const QUICK: &str = "[supervision]\nrestarts_max = 2\nbackoff_min_ms = 10\nbackoff_max_ms = 20\n";
const LOAD: Duration = Duration::from_secs(5);

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

/// Two hundred readings, while `failpoints` fails or stops `part` once: it is started afresh, everything arrives, and no
/// other part notices. Gives the part's status.
fn survives(part: &str, failpoints: &str, kafka: bool) -> Value {
    let changes = Changes {
        kafka,
        failpoints: failpoints.to_owned(),
        extra: IMPATIENT.to_owned(),
        ..Changes::default()
    };
    let mut world = World::prepare(changes);
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    for count in 0..200 {
        publisher.publish("energy", "saveeye/telemetry", reading(count));
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, format!("{part} was started afresh"), || {
        health(&world)["parts"][part]["restarts"].as_u64() == Some(1)
    });
    eventually(SOON, "all rows", || {
        world.postgres.count("telemetry", "energy_consumption").is_ok_and(|rows| rows == 200)
    });
    world.drained(SOON);
    if kafka {
        eventually(SOON, "all records", || {
            let records = world.kafka_records("homelab-energy-realtime");
            let ids: HashSet<_> =
                records.iter().filter_map(|record| record.header("telemetry-id")).collect();
            ids.len() == 200
        });
    }
    let mut parts = health(&world)["parts"].as_object().unwrap().clone();
    let status = parts.remove(part).unwrap();
    for (name, other) in parts {
        assert_eq!(other["restarts"], 0, "{name}");
    }
    status
}

fn health(world: &World) -> Value {
    world.node.get("/health").unwrap().json().unwrap()
}

#[test]
fn a_panicking_stream_is_started_afresh() {
    survives("stream:energy", "stream_batch=1*panic(made by a test)", false);
}

#[test]
fn a_panicking_writer_is_started_afresh() {
    survives(
        "writer:energy:energy_consumption",
        "writer_batch_energy=1*panic(made by a test)",
        false,
    );
}

#[test]
fn a_panicking_migrator_is_started_afresh() {
    survives("migrator:telemetry", "migrator_apply_telemetry=1*panic(made by a test)", false);
}

#[test]
fn a_panicking_producer_is_started_afresh() {
    survives("kafka:main", "kafka_attempt_energy=1*panic(made by a test)", true);
}

#[test]
fn a_stream_that_hangs_is_cancelled_and_started_afresh() {
    let status = survives("stream:energy", "hang_stream_homelab-1-energy=1*return", false);
    assert_eq!(status["stalls"], 1, "{status}");
}

#[test]
fn a_writer_that_hangs_is_cancelled_and_started_afresh() {
    let status = survives("writer:energy:energy_consumption", "hang_writer_energy=1*return", false);
    assert_eq!(status["stalls"], 1, "{status}");
}

#[test]
fn a_producer_of_which_one_stream_hangs_is_cancelled_and_started_afresh() {
    let status = survives("kafka:main", "hang_kafka_energy=1*return", true);
    assert_eq!(status["stalls"], 1, "{status}");
}

/// The parts of a database share a thread, so its writers may be among those that are started afresh.
#[test]
fn a_migrator_whose_thread_is_blocked_gets_another_one() {
    let failpoints = format!("migrator_apply_telemetry=1*sleep({})", SOON.as_millis());
    let changes = Changes { failpoints, extra: IMPATIENT.to_owned(), ..Changes::default() };
    let mut world = World::prepare(changes);
    let began = Instant::now();
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    eventually(SOON, "the row", || {
        world.postgres.count("telemetry", "energy_consumption").is_ok_and(|rows| rows == 1)
    });
    assert!(began.elapsed() < SOON, "it waited for the blocked thread");
    let status = &health(&world)["parts"]["migrator:telemetry"];
    assert_eq!((&status["stalls"], &status["restarts"]), (&json!(1), &json!(1)), "{status}");
}

#[test]
fn a_parked_part_goes_on_when_a_person_says_so_on_the_shell_and_over_http() {
    let part = "writer:energy:energy_consumption";
    let failpoints = "writer_batch_energy=6*panic(made by a test)".to_owned();
    let mut world =
        World::prepare(Changes { failpoints, extra: QUICK.to_owned(), ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    let parked = |times: u64| {
        eventually(SOON, format!("parked after {times} failures"), || {
            let status = &health(&world)["parts"][part];
            status["state"] == "parked" && status["restarts"] == times
        });
    };
    parked(3);
    let ordered = world.node.command(&["parts", "restart", part]).unwrap();
    assert!(ordered.status.success(), "{ordered:?}");
    parked(6);
    let made = world.node.command(&["token", "create", "--scope", "operate", "--json"]).unwrap();
    let token = serde_json::from_slice::<Value>(&made.stdout).unwrap()["token"].clone();
    let path = format!("/parts/{part}/restart");
    let answer = request_as(world.node.http_port(), token.as_str(), "POST", &path, "").unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    eventually(SOON, "the row", || world.count("telemetry", "energy_consumption") == 1);
    let status = &health(&world)["parts"][part];
    assert_eq!((&status["state"], &status["restarts"]), (&json!("running"), &json!(6)));
}

/// While one writer panics at every attempt, another stream's rows come at the rate at which they are published.
#[test]
fn the_rate_of_the_others_stays_while_a_part_panics_for_ever() {
    let failpoints = "writer_batch_energy=panic(made by a test)".to_owned();
    let extra = "[supervision]\nrestarts_max = 1000\nbackoff_min_ms = 10\nbackoff_max_ms = 20\n";
    let mut world =
        World::prepare(Changes { failpoints, extra: extra.to_owned(), ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    let restarts = || {
        health(&world)["parts"]["writer:energy:energy_consumption"]["restarts"].as_u64().unwrap()
    };
    eventually(SOON, "it panics again and again", || restarts() > 3);
    let (began, before) = (Instant::now(), restarts());
    let mut published = 0;
    while began.elapsed() < LOAD {
        let payload = format!(r#"{{"temperature_c": {published}}}"#);
        publisher.publish("temperature_outdoor", "homelab/temperature/outdoor", payload);
        published += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    publisher.flush(SOON).unwrap();
    let in_time = published - published / 100;
    eventually(LOAD / 5, format!("99 of 100 of {published}"), || {
        world.count("telemetry", "temperature_sensors") >= in_time
    });
    let others = &health(&world)["parts"]["writer:temperature_outdoor:temperature_sensors"];
    assert_eq!(others["restarts"], 0, "{others}");
    assert!(restarts() > before + 10, "it went on failing meanwhile");
}

#[test]
fn a_part_that_panics_each_time_is_parked_and_the_others_go_on() {
    let failpoints = "writer_batch_energy=panic(made by a test)".to_owned();
    let mut world =
        World::prepare(Changes { failpoints, extra: QUICK.to_owned(), ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "it is parked", || {
        health(&world)["parts"]["writer:energy:energy_consumption"]["state"] == "parked"
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
