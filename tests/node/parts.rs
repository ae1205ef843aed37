//! A part that panics or hangs loses that life of its own and nothing else.

use std::collections::HashSet;
use std::fs;
use std::time::{Duration, Instant};

use rig::{eventually, free_port, request_as};
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

/// Each kind of part, and where a life of one of them can be ended or stopped.
const KINDS: [(&str, &str); 8] = [
    ("stream:energy", "part_stream_homelab-1-energy"),
    ("writer:energy:energy_consumption", "part_writer_energy"),
    ("kafka:main", "part_kafka_energy"),
    ("kafka:copies", "part_copies_copies"),
    ("migrator:homelab_settings", "part_migrator_homelab_settings"),
    ("watch:certificates", "part_watch_certificates"),
    ("watch:clock", "part_watch_clock"),
    ("watch:disk", "part_watch_disk"),
];
const WRITER: &str = "writer:energy:energy_consumption";
const READINGS: u64 = 200;
/// The share of its rate that a part may lose while others fail.
const LOSS: u64 = 100;

/// The homelab with a second cluster, for copies of dead letters, of whose brokers one is away.
fn prepare(failpoints: &str, supervision: &str) -> World {
    let world = World::prepare(Changes {
        kafka: true,
        failpoints: failpoints.to_owned(),
        extra: format!("[supervision]\n{supervision}\n"),
        ..Changes::default()
    });
    let config = world.node.config();
    let own = fs::read_to_string(config).unwrap();
    let cluster = format!(
        "[clusters.copies]\nbootstrap_servers = [\"127.0.0.1:{}\", \"{}\"]\n\
         [clusters.copies.dead_letters]\ntopic = \"{}\"\nensure = {{ partitions = 1 }}\n",
        free_port(),
        world.bootstrap(),
        world.topic("dead-letters")
    );
    fs::write(config, format!("{own}\n{cluster}")).unwrap();
    world
}

/// The same at the point of every kind; `except` has its own.
fn everywhere(action: &str, except: &[&str]) -> String {
    let kinds = KINDS.iter().filter(|(part, _)| !except.contains(part));
    kinds.map(|(_, point)| format!("{point}={action};")).collect()
}

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

fn indoor(publisher: &rig::Publisher, device: &str, payload: &str) {
    publisher.publish("temperature_indoor", &format!("{device}/events/rpc"), payload);
}

/// Readings for the parts that fail, and two messages that are no JSON: a dead letter for each of their sinks.
fn publish(publisher: &rig::Publisher) {
    for count in 0..READINGS {
        publisher.publish("energy", "saveeye/telemetry", reading(count));
    }
    for _ in 0..2 {
        indoor(publisher, "shelly-1", "?");
    }
    publisher.flush(SOON).unwrap();
}

fn status(world: &World, part: &str) -> Value {
    world.node.get("/health").unwrap().json().unwrap()["parts"][part].clone()
}

fn ids(world: &World, topic: &str) -> HashSet<String> {
    let records = world.kafka_records(topic);
    records.iter().filter_map(|one| one.header("telemetry-id").map(str::to_owned)).collect()
}

/// Everything of [`publish`] is where it belongs, and these parts alone were started afresh, once.
#[track_caller]
fn nothing_lost(world: &World, restarted: &[&str], copies: usize) {
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), READINGS);
    eventually(SOON, "every record", || {
        ids(world, "homelab-energy-realtime").len() as u64 == READINGS
    });
    eventually(SOON, "every copy", || {
        let records = world.kafka_records("dead-letters");
        let keys: HashSet<_> = records.into_iter().filter_map(|record| record.key).collect();
        keys.len() == copies
    });
    let health = world.node.get("/health").unwrap().json().unwrap();
    for (part, status) in health["parts"].as_object().unwrap() {
        let times = u64::from(restarted.contains(&part.as_str()));
        assert_eq!(status["restarts"], times, "{part}: {status}");
    }
}

#[test]
fn a_panic_in_each_kind_of_part_and_callback_and_a_poisonous_message_lose_nothing() {
    let poison = "map_row_poison/events/rpc=panic;map_record_poison/events/rpc=panic;\
                  map_copy_poison/events/rpc=panic";
    let callbacks =
        "callback_delivery=20*off->3*panic;callback_log=1*panic;callback_error=1*panic;";
    let points = format!("{}{callbacks}{poison}", everywhere("1*panic(made by a test)", &[]));
    let mut world = prepare(&points, "");
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publish(&publisher);
    let climate =
        r#"{"src": "s", "method": "NotifyFullStatus", "params": {"temperature:0": {"tC": 20}}}"#;
    for device in ["shelly-1", "poison", "shelly-2"] {
        indoor(&publisher, device, &climate.replace("\"s\"", &format!("\"{device}\"")));
    }
    publisher.flush(SOON).unwrap();
    for (part, _) in KINDS {
        eventually(SOON, format!("{part} was started afresh"), || {
            status(&world, part)["restarts"] == 1
        });
    }
    nothing_lost(&world, &KINDS.map(|(part, _)| part), 4);
    assert_eq!(world.count("telemetry", "temperature_sensors"), 2);
    assert_eq!(ids(&world, "homelab-temperature-indoor").len(), 2);
    let letters = world.node.command(&["dlq", "list", "--json"]).unwrap().stdout;
    let letters = String::from_utf8(letters).unwrap();
    let panicked: Vec<_> = letters.lines().filter(|line| line.contains("\"panicked\"")).collect();
    assert_eq!(panicked.len(), 2, "one for each sink: {letters}");
    let log = world.node.log_text();
    assert_eq!(log.matches("\"event\":\"dead_letter_not_copied\"").count(), 2, "{panicked:?}");
    for (callback, times) in [("delivery", 3), ("log", 1), ("error", 1)] {
        let told = format!("\"callback\":\"{callback}\"");
        assert_eq!(log.matches(&told).count(), times, "{callback}");
    }
}

#[test]
fn a_message_that_panics_in_the_fold_is_set_aside_and_a_fold_that_always_panics_parks() {
    const WRITER: &str = "writer:plug:power_plugs";
    let quick = "restarts_max = 2\nbackoff_min_ms = 50\nbackoff_max_ms = 100\n\
                 parked_retry_seconds = 6";
    // The writer starts late, so that all of them are one batch.
    let mut world = prepare("fold_poison=panic;part_writer_plug=1*sleep(1500)", quick);
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    for plug in ["desk", "lamp", "poison", "stove", "poison", "tv"] {
        publisher.publish("plug", &format!("tele/{plug}/STATE"), r#"{"POWER": "ON"}"#);
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all are judged", || world.books("plug", "power_plugs", "cursor") == 6);
    world.drained(SOON);
    assert_eq!(world.count("homelab_settings", "power_plugs"), 4);
    assert_eq!(world.books("plug", "power_plugs", "dead_lettered"), 2);
    let letters = world.node.command(&["dlq", "list", "--json", "--reason", "panicked"]).unwrap();
    let letters = String::from_utf8(letters.stdout).unwrap();
    assert_eq!(letters.matches("\"plug/power_plugs/").count(), 2, "{letters}");
    assert_eq!(status(&world, WRITER)["restarts"], 0, "it goes on");

    // Mended by an update: the letters are delivered.
    world.node.stop(SOON).unwrap();
    let replayed = world.node.command(&["dlq", "replay", "--reason", "panicked"]).unwrap();
    assert!(replayed.status.success(), "{}", String::from_utf8_lossy(&replayed.stdout));
    assert_eq!(world.count("homelab_settings", "power_plugs"), 5);

    world.node.set_failpoints("fold=panic");
    world.node.start().unwrap();
    world.subscribed();
    publisher.publish("plug", "tele/desk/STATE", r#"{"POWER": "OFF"}"#);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "it is parked", || status(&world, WRITER)["state"] == "parked");
    assert_eq!(world.sink("plug", "power_plugs")["status"]["dead_letters"], 0);
    assert_eq!(world.sink("plug", "power_plugs")["pending"], 1, "the message waits");
}

/// One of them by a blocked thread: whatever else lives there moves with it.
#[test]
fn a_part_of_each_kind_that_hangs_is_started_afresh_and_nothing_is_lost() {
    const BLOCKED: &str = "migrator:homelab_settings";
    /// Longer than all the waiting here together.
    const BLOCK: Duration = Duration::from_secs(20 * SOON.as_secs());
    let neighbours = ["writer:heatpump:settings", "writer:plug:power_plugs"];
    let points = format!(
        "{}part_migrator_homelab_settings=1*sleep({})",
        everywhere("1*return", &[BLOCKED]),
        BLOCK.as_millis()
    );
    let mut world = prepare(&points, "stall_timeout_seconds = 5");
    world.node.start().unwrap();
    world.subscribed();
    let began = Instant::now();
    let publisher = world.publisher();
    publish(&publisher);
    publisher.publish("plug", "tele/plug-1/STATE", r#"{"POWER": "ON"}"#);
    publisher.flush(SOON).unwrap();
    for (part, _) in KINDS {
        eventually(SOON, format!("{part} stalled and was started afresh"), || {
            let status = status(&world, part);
            (&status["stalls"], &status["restarts"]) == (&json!(1), &json!(1))
        });
    }
    let restarted: Vec<_> = KINDS.iter().map(|(part, _)| *part).chain(neighbours).collect();
    nothing_lost(&world, &restarted, 4);
    assert_eq!(world.count("homelab_settings", "power_plugs"), 1);
    assert!(began.elapsed() < BLOCK, "it waited for the blocked thread");
}

/// While a part of each kind panics at every attempt, another stream's rows come at the rate at which they are published.
#[test]
fn parts_that_panic_for_ever_are_parked_tried_slowly_and_by_hand_and_the_others_keep_their_rate() {
    let points = format!(
        "{}part_writer_energy=8*panic(made by a test)",
        everywhere("panic(made by a test)", &[WRITER])
    );
    let supervision = "restarts_max = 2\nbackoff_min_ms = 10\nbackoff_max_ms = 20\n\
                       parked_retry_seconds = 6";
    let mut world = prepare(&points, supervision);
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publish(&publisher);
    let published = load(&publisher, Duration::from_secs(4));
    eventually(Duration::from_secs(1), "the others keep their rate", || {
        world.count("telemetry", "temperature_sensors") >= published - published / LOSS
    });
    parked(&world, WRITER, 3);
    let health = world.node.get("/health").unwrap().json().unwrap();
    let because = health["because"].to_string();
    assert_eq!(health["state"], "unhealthy", "{because}");
    for words in [&format!("part {WRITER} is parked: panic: made by a test"), "part-parked"] {
        assert!(because.contains(words), "{words} in {because}");
    }
    let ordered = world.node.command(&["parts", "restart", WRITER]).unwrap();
    assert!(ordered.status.success(), "{ordered:?}");
    parked(&world, WRITER, 6);
    // A person's order clears the slate: it was parked at its third and at its sixth failure alone.
    let log = world.node.log_text();
    let told = log.lines().filter(|line| line.contains("\"part_parked\"") && line.contains(WRITER));
    assert_eq!(told.count(), 2);
    restart_over_http(&world, WRITER);
    // Its stream is parked: the broker keeps the others.
    eventually(SOON, "what the buffer has", || {
        world.sink("energy", "energy_consumption")["pending"] == 0
            && world.count("telemetry", "energy_consumption") > 0
    });
    assert_eq!(status(&world, WRITER)["restarts"], 8);
    for (part, _) in KINDS.iter().filter(|(part, _)| *part != WRITER) {
        eventually(SOON, format!("{part} was tried again, and is parked"), || {
            let status = status(&world, part);
            status["state"] == "parked" && status["restarts"].as_u64() > Some(3)
        });
        let metrics = world.node.get("/metrics").unwrap().body;
        let line = format!("telemetry_part_parked{{part=\"{part}\"}} 1");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
    let other = status(&world, "writer:temperature_outdoor:temperature_sensors");
    assert_eq!(other["restarts"], 0, "{other}");
}

#[track_caller]
fn parked(world: &World, part: &str, failures: u64) {
    eventually(SOON, format!("{part} is parked after {failures} failures"), || {
        let status = status(world, part);
        status["state"] == "parked" && status["restarts"] == failures
    });
}

/// At a steady rate; gives how many.
fn load(publisher: &rig::Publisher, duration: Duration) -> u64 {
    let began = Instant::now();
    let mut published = 0;
    while began.elapsed() < duration {
        let payload = format!(r#"{{"temperature_c": {}}}"#, published % 40);
        publisher.publish("temperature_outdoor", "homelab/temperature/outdoor", payload);
        published += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    publisher.flush(SOON).unwrap();
    published
}

fn restart_over_http(world: &World, part: &str) {
    let create = ["token", "create", "--scope", "operate", "--expires", "1h", "--json"];
    let made = world.node.command(&create).unwrap();
    let token = serde_json::from_slice::<Value>(&made.stdout).unwrap()["token"].clone();
    let path = format!("/parts/{part}/restart");
    let answer = request_as(world.node.http_port(), token.as_str(), "POST", &path, "").unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
}
