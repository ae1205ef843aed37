//! A changed configuration in a running node: what differs changes, the rest does not notice, and nothing is lost.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rig::{Certificates, Homelab, Signal, eventually};
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

const ENERGY: &str =
    r#"{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 7}}"#;

/// A stream of its own that goes to a table that is there already.
const BOILER: &str = r#"
[streams.boiler]
broker = "home"
topic_filter = "boiler/+/state"

[streams.boiler.fields]
device_id     = { topic_level = 2, device_id = true, tag = true }
location      = { constant = "cellar", tag = true }
temperature_c = { path = "water_c", type = "float8", required = true }

[streams.boiler.tables.temperature_sensors]
database = "telemetry"
kind = "append"
"#;

fn change(world: &World, change: impl FnOnce(&mut Homelab)) {
    let file = world.node.config();
    let mut homelab = Homelab::open(file).unwrap();
    change(&mut homelab);
    homelab.write(file).unwrap();
}

fn conf_d(world: &World, text: &str) {
    let folder = world.node.config().with_file_name("conf.d");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("more.toml"), text).unwrap();
}

/// `telemetry reload --json`, which must work.
#[track_caller]
fn reload(world: &World) -> Value {
    let output = world.node.command(&["reload", "--json"]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Part → fate.
fn fates(changes: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let parts = changes["parts"].as_array().unwrap().iter();
    parts.map(|change| (text(&change["part"]), text(&change["fate"]))).collect()
}

fn fate(part: &str, fate: &str) -> (String, String) {
    (part.to_owned(), fate.to_owned())
}

fn connects(world: &World, stream: &str) -> String {
    let text = world.node.get("/metrics").unwrap().body;
    let line = format!("telemetry_mqtt_connects_total{{stream=\"{stream}\"}}");
    text.lines().find_map(|l| l.strip_prefix(&line)).unwrap_or_default().trim().to_owned()
}

/// Publishes to the energy stream while `work` runs; gives how many messages.
fn under_load(world: &World, work: impl FnOnce()) -> u64 {
    let publisher = world.publisher();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                publisher.publish("energy", "saveeye/telemetry", ENERGY);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    publisher.flush(SOON).unwrap();
    publisher.count() as u64
}

#[test]
fn streams_and_mappings_come_change_and_go_and_the_others_do_not_notice() {
    let world = World::start(Changes { kafka: true, ..Changes::default() });
    let published = under_load(&world, || {
        comes(&world);
        changes(&world);
        goes_and_comes_back(&world);
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), published);
    assert_eq!(world.kafka_records("homelab-energy-realtime").len() as u64, published);
    assert_eq!(connects(&world, "energy"), "1", "the others' connections were left alone");
    let health = world.node.get("/health").unwrap().json().unwrap();
    for (part, status) in health["parts"].as_object().unwrap() {
        assert_eq!(status["restarts"], 0, "{part}");
    }
}

fn comes(world: &World) {
    let topic = world.topic("boiler");
    let kafka = format!(
        "[streams.boiler.kafka]\ncluster = \"main\"\ntopic = \"{topic}\"\nensure = {{ partitions = 1 }}\n"
    );
    conf_d(world, &format!("{BOILER}{kafka}"));
    let told = world.node.command(&["check", "--diff"]).unwrap();
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(text.contains("+ streams.boiler.topic_filter = \"boiler/+/state\""), "{text}");
    assert!(
        text.contains("parts added: writer:boiler:temperature_sensors, stream:boiler"),
        "{text}"
    );
    assert!(!world.node.get("/streams").unwrap().body.contains("boiler"), "only compared");

    let expected = [
        // It looks after the tables of its database.
        fate("migrator:telemetry", "renewed"),
        fate("writer:boiler:temperature_sensors", "added"),
        fate("stream:boiler", "added"),
        fate("kafka:main/boiler", "added"),
    ];
    assert_eq!(fates(&reload(world)), expected);
    world.subscribed();
    let publisher = world.publisher_named("boiler");
    publisher.publish("boiler", "boiler/b1/state", r#"{"water_c": 61.5}"#);
    publisher.flush(SOON).unwrap();
    let row = "SELECT temperature_c, location FROM temperature_sensors WHERE device_id = 'b1'";
    eventually(SOON, "the new stream's row", || {
        world.row("telemetry", row) == Some(json!({"temperature_c": 61.5, "location": "cellar"}))
    });
    eventually(SOON, "the new stream's record", || world.kafka_records("boiler").len() == 1);
    assert!(fates(&reload(world)).is_empty(), "nothing has changed since");
}

fn changes(world: &World) {
    change(world, |homelab| {
        homelab.set(&["streams", "plug", "fields", "uptime_seconds", "scale"], 2.0);
    });
    let expected = [fate("writer:plug:power_plugs", "renewed"), fate("kafka:main/plug", "renewed")];
    assert_eq!(fates(&reload(world)), expected, "its reader has no mapping");
    let publisher = world.publisher_named("plug");
    publisher.publish("plug", "tele/desk/STATE", r#"{"POWER": "ON", "UptimeSec": 21}"#);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the row follows the new mapping", || {
        world.row(
            "homelab_settings",
            "SELECT uptime_seconds FROM power_plugs WHERE plug_id = 'desk'",
        ) == Some(json!({"uptime_seconds": 42}))
    });
    let mut records = Vec::new();
    eventually(SOON, "and so does the record", || {
        records = world.kafka_records("homelab-plug-telemetry");
        records.len() == 1
    });
    assert!(String::from_utf8_lossy(&records[0].value).contains("\"uptime_seconds\":42"));
}

fn goes_and_comes_back(world: &World) {
    conf_d(world, "");
    let removed = reload(world);
    assert!(fates(&removed).contains(&fate("stream:boiler", "removed")), "{removed}");
    eventually(SOON, "it is on no page any more", || {
        ["/streams", "/metrics", "/parts"]
            .iter()
            .all(|page| !world.node.get(page).unwrap().body.contains("boiler"))
    });
    // Its session is still with the broker, which keeps for it.
    let publisher = world.publisher_named("boiler");
    publisher.publish("boiler", "boiler/b1/state", r#"{"water_c": 62.5}"#);
    publisher.flush(SOON).unwrap();
    conf_d(world, BOILER);
    reload(world);
    let rows = "SELECT count(*) AS n FROM temperature_sensors WHERE device_id = 'b1'";
    eventually(SOON, "what came meanwhile is delivered", || {
        world.row("telemetry", rows) == Some(json!({"n": 2}))
    });
    assert_eq!(world.books("boiler", "temperature_sensors", "cursor"), 2, "its numbers go on");
}

#[test]
fn whatever_of_the_outside_changes_under_load_nothing_is_lost_or_doubled() {
    let world = World::start(Changes { kafka: true, ..Changes::default() });
    let published = under_load(&world, || {
        for turn in 0..3 {
            change(&world, |homelab| {
                homelab.set(&["brokers", "home", "keepalive_seconds"], 20 + turn);
                homelab.set(&["databases", "telemetry", "statement_timeout_seconds"], 10 + turn);
                homelab.set(&["clusters", "main", "linger_ms"], 6 + turn);
            });
            let told = fates(&reload(&world));
            for part in ["stream:energy", "kafka:main", "writer:energy:energy_consumption"] {
                assert!(told.contains(&fate(part, "renewed")), "{part}: {told:?}");
            }
            // The other database has not changed.
            assert!(!told.contains(&fate("writer:plug:power_plugs", "renewed")), "{told:?}");
            world.subscribed();
        }
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), published);
    let mut ids: Vec<_> = world
        .kafka_records("homelab-energy-realtime")
        .iter()
        .map(|record| record.header("telemetry-id").unwrap().to_owned())
        .collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len() as u64, published);
}

#[test]
fn a_bad_configuration_is_refused_and_the_old_one_goes_on() {
    let world = World::start(Changes::default());
    let good = fs::read_to_string(world.node.config()).unwrap();
    let published = under_load(&world, || {
        change(&world, |homelab| {
            homelab.set(&["streams", "energy", "topic_filter"], "a/#/b");
            homelab.set(&["brokers", "home", "prot"], 1);
        });
        let refused = world.node.command(&["reload"]).unwrap();
        assert_eq!(refused.status.code(), Some(78));
        let report = String::from_utf8(refused.stderr).unwrap();
        assert!(report.contains("a/#/b") && report.contains("prot"), "{report}");
        world.node.signal(Signal::HUP).unwrap();
        eventually(SOON, "the journal has the report", || {
            let log = world.node.log_text();
            log.contains("configuration_refused") && log.contains("a/#/b") && log.contains("prot")
        });

        fs::write(world.node.config(), &good).unwrap();
        change(&world, |homelab| homelab.set(&["node", "name"], "another"));
        let refused = world.node.command(&["reload"]).unwrap();
        assert_eq!(refused.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("node.name"));
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), published);
    assert_eq!(connects(&world, "energy"), "1");
}

#[test]
fn what_needs_a_restart_says_so_and_the_log_level_does_not() {
    let mut world = World::start(Changes::default());
    let said = |what: &str| world.node.log_text().matches(what).count();
    for filter in ["info", "error"] {
        change(&world, |homelab| {
            homelab.set(&["buffer", "quota_bytes"], 2_000_000_000);
            homelab.set(&["log", "filter"], filter);
        });
        let changes = reload(&world);
        assert!(fates(&changes).is_empty(), "{changes}");
        let waits: Vec<_> = changes["settings"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|setting| setting["needs_restart"] == true)
            .map(|setting| setting["path"].as_str().unwrap())
            .collect();
        assert_eq!(waits, ["buffer.quota_bytes"], "until it is restarted");
        // The second time only errors are let through.
        assert_eq!((said("configuration_reloaded"), said("restart_needed")), (1, 1));
    }
    world.node.stop(SOON).unwrap();
    world.node.start().unwrap();
    let told = world.node.command(&["check", "--diff"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&told.stdout), "nothing has changed\n");
}

#[test]
fn a_pause_outlasts_a_reload_and_a_removed_sink_holds_nothing_back() {
    let world = World::start(Changes::default());
    let pause =
        world.node.command(&["parts", "pause", "writer:energy:energy_consumption"]).unwrap();
    assert!(pause.status.success());
    change(&world, |homelab| {
        homelab.set(&["streams", "energy", "fields", "wifi_rssi", "scale"], 2.0);
    });
    assert_eq!(fates(&reload(&world)), [fate("writer:energy:energy_consumption", "renewed")]);
    eventually(SOON, "still paused", || {
        world.sink("energy", "energy_consumption")["status"]["state"] == "paused"
    });
    change(&world, |homelab| homelab.remove(&["streams", "heatpump", "tables", "settings"]));
    reload(&world);
    assert_eq!(world.sink("heatpump", "settings"), Value::Null);
    let publisher = world.publisher();
    publisher.publish("heatpump", "thermiq_heatpump/data", r#"{"Client_Name": "hp", "d0": 1}"#);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the other sink goes on", || {
        world.books("heatpump", "heatpump_status", "delivered") == 1
    });
}

#[test]
fn renewed_certificates_count_within_ten_seconds_of_a_reload() {
    let certificates = Certificates::generate().unwrap();
    let mut world =
        World::prepare(Changes { broker_tls: Some(certificates.clone()), ..Changes::default() });
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    world.subscribed();
    let files = world.node.config().with_file_name("tls");
    let published = under_load(&world, || {
        // The same authority in a new file: what a renewal leaves.
        certificates.write(&files).unwrap();
        let changes = reload(&world);
        assert_eq!(changes["files"].as_array().unwrap().len(), 1, "{changes}");
        assert!(fates(&changes).contains(&fate("stream:energy", "renewed")), "{changes}");
        eventually(Duration::from_secs(10), "every stream is back", || {
            let all = world.node.streams().unwrap();
            let streams = all["streams"].as_array().unwrap();
            streams.iter().all(|line| line["status"]["subscribed"] == true)
                && connects(&world, "energy") == "2"
        });
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), published);
}
