//! The wall clock is set under a running node: arrival times follow, and nothing else does.

use std::path::PathBuf;

use rig::eventually;
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

fn library() -> PathBuf {
    let names = std::fs::read_dir("/usr/lib").unwrap().filter_map(Result::ok);
    let found = names.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    found.into_iter().find(|path| path.exists()).expect("scripts/setup installs faketime")
}

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

#[test]
fn an_hour_forward_and_back_is_told_once_each_and_stops_nothing() {
    let folder = rig::Folder::new(None, "clock").unwrap();
    let file = folder.path().join("offset");
    let set = |offset: &str| {
        // Replaced in one step: a half-written file would be another jump.
        let draft = folder.path().join("draft");
        std::fs::write(&draft, offset).unwrap();
        std::fs::rename(&draft, &file).unwrap();
    };
    set("+0");
    let environment = [
        ("LD_PRELOAD", library().display().to_string()),
        ("FAKETIME_TIMESTAMP_FILE", file.display().to_string()),
        ("FAKETIME_NO_CACHE", "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value)).to_vec();
    let world = World::start(Changes { environment, kafka: true, ..Changes::default() });
    let publisher = world.publisher();
    let jumps = |direction: &str| {
        let line = format!("telemetry_clock_jumps_total{{direction=\"{direction}\"}} ");
        let metrics = world.node.get("/metrics").unwrap().body;
        let count = metrics.lines().find_map(|found| found.strip_prefix(&line)).map(str::to_owned);
        count.expect("the series stands from the start")
    };
    assert_eq!((jumps("forward"), jumps("backward")), ("0".to_owned(), "0".to_owned()));
    let mut count = 0;
    let desk = |state: &str| {
        publisher.publish("plug", "tele/desk/STATE", json!({"POWER": state}).to_string());
        let on = (state == "ON").to_string();
        let row = "SELECT status::text FROM power_plugs WHERE plug_id = 'desk'";
        let newest = || world.postgres.value("homelab_settings", row).is_ok_and(|is| is == on);
        eventually(SOON, "the newest state, whatever the clock says", newest);
    };
    let mut deliver = || {
        for _ in 0..50 {
            publisher.publish("energy", "saveeye/telemetry", reading(count));
            count += 1;
        }
        publisher.flush(SOON).unwrap();
        eventually(SOON, "its rows", || world.count("telemetry", "energy_consumption") == count);
    };
    deliver();
    desk("OFF");
    let healthy = || world.node.get("/health").unwrap().json().unwrap()["state"] == "healthy";
    eventually(SOON, "its topics are there", healthy);
    set("+3600");
    eventually(SOON, "the jump is counted", || jumps("forward") == "1");
    let health = world.node.get("/health").unwrap().json().unwrap();
    assert_eq!(health["state"], "healthy", "no stream is an hour silent: {}", health["because"]);
    deliver();
    desk("ON");
    set("+0");
    eventually(SOON, "the way back too", || jumps("backward") == "1");
    deliver();
    desk("OFF");
    assert_eq!(jumps("forward"), "1");
    let log = world.node.log_text();
    assert_eq!(log.matches("clock_jumped").count(), 2, "{log}");
    world.drained(SOON);
    // An hour between the second fifty and its neighbours, although they were received in order.
    let hours =
        "SELECT count(*) FROM energy_consumption WHERE time > now() + interval '30 minutes'";
    assert_eq!(world.postgres.value("telemetry", hours).unwrap(), "50");
    let records = world.kafka_records("homelab-energy-realtime");
    let total = |record: &rig::Record| {
        let value: Value = serde_json::from_slice(&record.value).unwrap();
        value["fields"]["active_energy_total"].as_u64().unwrap()
    };
    let totals: Vec<u64> = records.iter().map(total).collect();
    assert_eq!(totals, (0..count).collect::<Vec<u64>>(), "as they were received");
    let health = world.node.get("/health").unwrap().json().unwrap();
    assert_eq!(health["state"], "healthy", "{health:#}");
    let restarts = health["parts"].as_object().unwrap().values().map(|part| &part["restarts"]);
    assert!(restarts.into_iter().all(|restarts| *restarts == 0), "no timer ran wild: {health:#}");
}
