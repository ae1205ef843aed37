//! The table of bad input: that message alone is set aside with its reason, its neighbours flow.

use rig::eventually;
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

fn energy(power: &str) -> String {
    format!(
        r#"{{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {{"total": {power}}}, "activeTotalConsumption": {{"total": 7}}}}"#
    )
}

fn letters(world: &World) -> Vec<Value> {
    let output = world.node.command(&["dlq", "list", "--json"]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_kind_of_bad_message_is_set_aside_alone_with_its_reason() {
    let world = World::start(Changes::default());
    let publisher = world.publisher();
    let big = format!("{{\"pad\": \"{}\"}}", "x".repeat(300 * 1024));
    // Above `packet_bytes_max`, of which a broker must not learn: it would drop the message in silence.
    let huge = vec![b'x'; 9 * 1024 * 1024];
    let deep = "[".repeat(10_000);
    let bad: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "empty"),
        (b"{\"a\": ".to_vec(), "not_json"),
        (b"{} trailing".to_vec(), "not_json"),
        (b"[1]".to_vec(), "not_an_object"),
        (vec![0xff, 0xfe], "not_utf8"),
        (big.into_bytes(), "too_large"),
        (huge, "too_large"),
        (format!("{{\"a\": {deep}").into_bytes(), "too_deep"),
        (energy("1").replace("\"SE-1\"", "\"\"").into_bytes(), "no_device_id"),
        (energy("\"1\"").into_bytes(), "wrong_type"),
        (energy("2147483648").into_bytes(), "out_of_range"),
        (energy("1").replace("SE-1", "S\\u0000E").into_bytes(), "nul_in_text"),
    ];
    for (payload, _) in &bad {
        publisher.publish("energy", "saveeye/telemetry", energy("33700"));
        publisher.publish("energy", "saveeye/telemetry", payload);
    }
    publisher.publish("energy", "saveeye/telemetry", r#"{"saveeyeDeviceSerialNumber": "SE-1"}"#);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "every message judged", || {
        world.books("energy", "energy_consumption", "cursor") == 2 * bad.len() as u64 + 1
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), bad.len() as u64);
    assert_eq!(world.books("energy", "energy_consumption", "incomplete"), 1);
    let found = letters(&world);
    let reasons: Vec<_> = found.iter().map(|letter| letter["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, bad.iter().map(|(_, reason)| *reason).collect::<Vec<_>>());
    let log = world.node.log_text();
    assert_eq!(log.matches("\"event\":\"dead_lettered\"").count(), 1, "one line a minute\n{log}");
    let range = found.iter().find(|letter| letter["reason"] == "out_of_range").unwrap();
    assert_eq!(range["column"], "active_power_total");
    assert!(range["detail"].as_str().unwrap().contains("2147483648"), "{range}");
}

#[test]
fn what_the_filter_excludes_is_counted_and_no_error() {
    let world = World::start(Changes::default());
    let publisher = world.publisher();
    for count in 0..100 {
        let kind = if count % 5 == 0 { "NotifyFullStatus" } else { "NotifyStatus" };
        let payload = json!({"src": "shelly-1", "method": kind,
            "params": {"temperature:0": {"tC": 20.0 + f64::from(count) / 10.0}}});
        publisher.publish("temperature_indoor", "shelly-1/events/rpc", payload.to_string());
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "100 judged", || {
        world.books("temperature_indoor", "temperature_sensors", "cursor") == 100
    });
    assert_eq!(world.books("temperature_indoor", "temperature_sensors", "filtered"), 80);
    assert_eq!(world.count("telemetry", "temperature_sensors"), 20);
    assert_eq!(letters(&world).len(), 0);
}

#[test]
fn a_row_the_database_refuses_is_isolated_and_its_replay_keeps_the_arrival_time() {
    let world = World::start(Changes::default());
    let guard =
        "ALTER TABLE energy_consumption ADD CONSTRAINT sane CHECK (active_power_total <> 13)";
    world.postgres.execute("telemetry", guard).unwrap();
    let publisher = world.publisher();
    for count in 0..500 {
        let power = if count == 250 { 13 } else { 1000 + count };
        publisher.publish("energy", "saveeye/telemetry", energy(&power.to_string()));
    }
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), 499);
    let found = letters(&world);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["sqlstate"], "23514");
    let arrival = found[0]["arrival"].as_str().unwrap().to_owned();
    world
        .postgres
        .execute("telemetry", "ALTER TABLE energy_consumption DROP CONSTRAINT sane")
        .unwrap();
    for _ in 0..2 {
        let output = world.node.command(&["dlq", "replay"]).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    assert_eq!(world.count("telemetry", "energy_consumption"), 500);
    let kept = format!(
        "SELECT 1 AS kept FROM energy_consumption WHERE active_power_total = 13 \
         AND time = '{arrival}'"
    );
    assert!(world.row("telemetry", &kept).is_some(), "the row of {arrival}");
    assert_eq!(letters(&world).len(), 0);
    eventually(SOON, "the books know the replay", || {
        world.books("energy", "energy_consumption", "delivered") == 500
            && world.sink("energy", "energy_consumption")["difference"] == 0
    });
}

#[test]
fn a_missing_column_holds_that_writer_only_and_names_the_fix() {
    let mut world = World::prepare(Changes::default());
    let output = world.node.command(&["migrate", "apply"]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    world
        .postgres
        .execute("telemetry", "ALTER TABLE energy_consumption DROP COLUMN power_factor")
        .unwrap();
    world.node.start().unwrap();
    world.subscribed();
    eventually(SOON, "the writer holds", || {
        world.sink("energy", "energy_consumption")["status"]["state"] == "held"
    });
    let trouble = world.sink("energy", "energy_consumption")["status"]["trouble"].clone();
    assert!(trouble.as_str().unwrap().contains("power_factor"), "{trouble}");
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", energy("5"));
    publisher.publish(
        "temperature_outdoor",
        "homelab/temperature/outdoor",
        r#"{"temperature_c": 1}"#,
    );
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the other stream flows", || {
        world.count("telemetry", "temperature_sensors") == 1
    });
    eventually(SOON, "the held stream is kept", || {
        world.sink("energy", "energy_consumption")["pending"] == 1
    });
    let tried = || {
        let page = world.node.get("/metrics").unwrap().body;
        let series = "telemetry_sink_retries_total{stream=\"energy\",sink=\"energy_consumption\"} ";
        let count = page.lines().find_map(|line| line.strip_prefix(series)?.parse::<u64>().ok());
        count.expect("the series stands from the start")
    };
    eventually(SOON, "it is tried again and again", || tried() >= 5);
    let log = world.node.log_text();
    let told: Vec<_> = log.lines().filter(|line| line.contains("\"sink_held\"")).collect();
    assert_eq!(told.len(), 1, "once, however often: {told:#?}");
    assert!(told[0].contains("\"runbook\":\"sink-held\""), "{told:?}");
    world
        .postgres
        .execute("telemetry", "ALTER TABLE energy_consumption ADD COLUMN power_factor smallint")
        .unwrap();
    let output =
        world.node.command(&["parts", "restart", "writer:energy:energy_consumption"]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    eventually(SOON, "it goes on", || world.count("telemetry", "energy_consumption") == 1);
}
