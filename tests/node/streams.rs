//! Each reference stream from publish to Kafka record and row, field by field.

use rig::eventually;
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

const ENERGY: &str = r#"{"saveeyeDeviceSerialNumber": "SE-4471-K", "meterType": "three-phase", "meterSerialNumber": "18402217",
 "timestamp": "2026-03-14T07:21:05", "wifiRssi": -41, "reactiveActualConsumption": {"total": 4},
 "activeActualConsumption": {"total": 1284, "L1": 612, "L2": 389, "L3": 283},
 "activeActualProduction": {"total": 0, "L1": 0, "L2": 0, "L3": 0},
 "activeTotalConsumption": {"total": 104233871}, "activeTotalProduction": {"total": 83},
 "rmsVoltage": {"L1": 237, "L2": 238, "L3": 236}, "rmsCurrent": {"L1": 2583, "L2": 1634, "L3": 1199},
 "powerFactor": {"total": 98}}"#;

const HEATPUMP: &str = r#"{"Client_Name": "ThermIQ_0A1B2C3D4E5F", "app_info": "v2.68", "rssi": -60,
 "d0": -3, "d5": 36, "d6": 31, "d7": 52, "d8": -1, "d9": 2, "d13": 0, "d16": 6, "d25": -180, "d30": 50,
 "d50": 21, "d51": 1, "d52": 36, "d53": 10, "d54": 45, "d55": 2, "d56": 0, "d57": -1, "d58": 17, "d73": 4,
 "d104": 44120, "d106": 455, "d108": 3144, "d114": 470, "INDR_T": 20.6, "EVU": 0}"#;

const INDOOR: &str = r#"{"src": "shellyhtg3-5ec0ffee0001", "dst": "shellyhtg3-5ec0ffee0001/events", "method": "NotifyFullStatus",
 "params": {"ts": 1773472865.31, "temperature:0": {"id": 0, "tC": 21.4, "tF": 70.5}, "humidity:0": {"id": 0, "rh": 44.2},
  "devicepower:0": {"id": 0, "battery": {"V": 5.86, "percent": 83}, "external": {"present": false}},
  "wifi": {"sta_ip": "192.0.2.63", "status": "got ip", "rssi": -55},
  "sys": {"mac": "5EC0FFEE0001", "uptime": 30, "ram_size": 255800, "ram_free": 164220}}}"#;

const OUTDOOR: &str =
    r#"{"temperature_c": 6.4, "humidity_pct": 71, "wind_speed_ms": 3.2, "pressure_hpa": 1012.6}"#;

const PLUG: &str = r#"{"Time": "2026-03-14T08:00:04", "UptimeSec": 277964, "POWER": "ON", "Wifi": {"RSSI": 72, "SSId": "example"}}"#;

/// The one record of a topic, without `ts`, and `ts` with its key.
fn record(world: &World, topic: &str) -> (Value, String, String) {
    let mut found = Vec::new();
    eventually(SOON, format!("one record in {topic}"), || {
        found = world.kafka_records(topic);
        found.len() == 1
    });
    let record = &found[0];
    let key = String::from_utf8(record.key.clone().unwrap()).unwrap();
    let id = record.header("telemetry-id").expect("the header telemetry-id");
    assert!(id.ends_with("/1"), "{id}");
    let mut value: Value = serde_json::from_slice(&record.value).unwrap();
    let ts = value.as_object_mut().unwrap().remove("ts").unwrap();
    (value, ts.as_str().unwrap().to_owned(), key)
}

#[test]
fn a_silent_stream_is_never_healthy_and_its_age_survives_a_restart() {
    let mut world = World::prepare(Changes::default());
    let config = world.node.config().to_owned();
    let mut text = std::fs::read_to_string(&config).unwrap();
    for limit in ["silent_warning_after_seconds", "silent_critical_after_seconds"] {
        text = text.lines().filter(|line| !line.starts_with(limit)).collect::<Vec<_>>().join("\n");
    }
    let header = "[streams.temperature_outdoor]\n";
    assert!(text.contains(header), "{text}");
    let limits = "silent_warning_after_seconds = 2\nsilent_critical_after_seconds = 5\n";
    std::fs::write(&config, text.replace(header, &format!("{header}{limits}"))).unwrap();
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    world.subscribed();
    let publisher = world.publisher();
    let speak = || {
        let payload = r#"{"temperature_c": 1}"#;
        publisher.publish("temperature_outdoor", "homelab/temperature/outdoor", payload);
        publisher.flush(SOON).unwrap();
    };
    let health = || world.node.get("/health").unwrap().json().unwrap();
    eventually(SOON, "a message makes it healthy", || {
        speak();
        health()["state"] == "healthy"
    });
    eventually(SOON, "silence is a warning", || health()["state"] == "degraded");
    let because = health()["because"].to_string();
    assert!(because.contains("temperature_outdoor is silent"), "{because}");
    eventually(SOON, "then critical", || health()["state"] == "unhealthy");
    assert_eq!(health()["parts"]["stream:temperature_outdoor"]["restarts"], 0);
    let said = || world.node.log_text().matches("stream_silent").count();
    eventually(SOON, "each limit is said once", || said() >= 2);

    let age = |world: &World| {
        let all = world.node.streams().unwrap();
        let streams = all["streams"].as_array().unwrap().clone();
        let line = streams.into_iter().find(|line| line["name"] == "temperature_outdoor").unwrap();
        line["data_age_seconds"].as_f64()
    };
    let before = age(&world).unwrap();
    // The node looks at it at least once a second.
    eventually(SOON, "it is silent for longer", || age(&world) > Some(before + 4.0));
    assert_eq!(said(), 2, "and not again");
    drop(publisher);
    world.node.kill();
    world.node.start().unwrap();
    eventually(SOON, "the age is known", || age(&world).is_some());
    assert!(age(&world).unwrap() >= before, "{:?}", age(&world));
    eventually(SOON, "silent from the start", || {
        world.node.get("/health").unwrap().body.contains("temperature_outdoor is silent")
    });
    // A clean stop, too; and then a message ends it.
    world.node.stop(SOON).unwrap();
    let told = world.node.log_text().matches("stream_silent").count();
    world.node.start().unwrap();
    eventually(SOON, "the age is known", || age(&world).is_some_and(|age| age >= before));
    eventually(SOON, "a new life says it again", || {
        world.node.log_text().matches("stream_silent").count() > told
    });
    let payload = r#"{"temperature_c": 2}"#;
    let publisher = world.publisher();
    publisher.publish("temperature_outdoor", "homelab/temperature/outdoor", payload);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "it is heard", || age(&world).is_some_and(|age| age < 2.0));
    eventually(SOON, "and says so", || world.node.log_text().contains("stream_heard"));
}

#[test]
fn each_stream_reaches_its_topic_and_its_tables_field_by_field() {
    let world = World::start(Changes { kafka: true, ..Changes::default() });
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", ENERGY);
    publisher.publish("heatpump", "thermiq_heatpump/data", HEATPUMP);
    publisher.publish("temperature_indoor", "shellyhtg3-5ec0ffee0001/events/rpc", INDOOR);
    publisher.publish("temperature_outdoor", "homelab/temperature/outdoor", OUTDOOR);
    publisher.publish("plug", "tele/plug-desk/STATE", PLUG);
    publisher.flush(SOON).unwrap();
    energy(&world);
    heatpump(&world);
    indoor(&world);
    outdoor(&world);
    plug(&world);
    world.drained(SOON);
}

fn energy(world: &World) {
    let (value, ts, key) = record(world, "homelab-energy-realtime");
    assert_eq!(key, "SE-4471-K");
    let fields = json!({"wifi_rssi": -41, "active_power_total": 1284, "active_power_l1": 612,
        "active_power_l2": 389, "active_power_l3": 283, "active_production_total": 0,
        "active_energy_total": 104233871, "active_energy_production": 83, "voltage_l1": 237,
        "voltage_l2": 238, "voltage_l3": 236, "current_l1": 2583, "current_l2": 1634,
        "current_l3": 1199, "power_factor": 98});
    let tags = json!({"device_serial": "SE-4471-K", "meter_type": "three-phase"});
    assert_eq!(value, json!({"tags": tags, "fields": fields}));
    let row = same_instant_row(world, "telemetry", "energy_consumption", &ts);
    for (name, value) in fields.as_object().unwrap().iter().chain(tags.as_object().unwrap()) {
        assert_eq!(&row[name], value, "{name}");
    }
    assert_eq!(row["node"], "homelab-1");
}

/// The row whose time is the record's, to the microsecond.
fn same_instant_row(world: &World, database: &str, table: &str, ts: &str) -> Value {
    let sql = format!("SELECT * FROM {table} WHERE time = '{ts}'");
    let mut row = None;
    eventually(SOON, format!("a row of {ts} in {table}"), || {
        row = world.row(database, &sql);
        row.is_some()
    });
    row.unwrap()
}

fn heatpump(world: &World) {
    let (value, ts, key) = record(world, "homelab-heatpump-telemetry");
    assert_eq!(key, "ThermIQ_0A1B2C3D4E5F");
    let fields = &value["fields"];
    assert_eq!(fields["indoor_temp"], json!(20.6), "the record keeps what was sent");
    for (name, expected) in [("outdoor_temp", -3), ("runtime_compressor", 44120), ("curve", 36)] {
        assert_eq!(fields[name], json!(expected), "{name}");
    }
    assert_eq!(fields["brinepump_on"], json!(false));
    assert_eq!(fields["compressor_on"], json!(true));
    let row = same_instant_row(world, "telemetry", "heatpump_status", &ts);
    let expected = json!({"device_id": "ThermIQ_0A1B2C3D4E5F", "outdoor_temp": -3, "supplyline_temp": 36,
        "returnline_temp": 31, "hotwater_temp": 52, "brine_out_temp": -1, "brine_in_temp": 2,
        "flowlinepump_speed": 50, "integral": -180, "runtime_compressor": 44120,
        "runtime_hotwater": 3144, "runtime_3kw": 455, "runtime_6kw": 470, "indoor_temp": 21,
        "brinepump_on": false, "compressor_on": true, "flowlinepump_on": true,
        "hotwater_production": false, "aux_heater_3kw_on": false, "aux_heater_6kw_on": false});
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&row[name], value, "{name}");
    }
    let settings = world.row("homelab_settings", "SELECT * FROM settings").unwrap();
    let expected = json!({"device_id": "ThermIQ_0A1B2C3D4E5F", "indoor_target_temp": 21.0, "mode": 1,
        "curve": 36, "curve_min": 10, "curve_max": 45, "curve_plus_5": 2, "curve_zero": 0,
        "curve_minus_5": -1, "heatstop": 17, "integral_setting": 4});
    for (name, value) in expected.as_object().unwrap() {
        let equal = settings[name].as_f64().zip(value.as_f64()).is_some_and(|(a, b)| a == b);
        assert!(equal || &settings[name] == value, "{name}: {}", settings[name]);
    }
    let moved = format!("SELECT 1 AS same FROM settings WHERE updated_at = '{ts}'");
    assert!(world.row("homelab_settings", &moved).is_some(), "updated_at is the arrival time");
}

fn indoor(world: &World) {
    let (value, ts, key) = record(world, "homelab-temperature-indoor");
    assert_eq!(key, "shellyhtg3-5ec0ffee0001");
    assert_eq!(
        value["fields"]["external_power"],
        json!(0),
        "a declared boolean, in the record too"
    );
    let row = same_instant_row(world, "telemetry", "temperature_sensors", &ts);
    let expected = json!({"device_id": "shellyhtg3-5ec0ffee0001", "mac_address": "5EC0FFEE0001",
        "location": "indoor", "temperature_c": 21.4, "temperature_f": 70.5, "humidity": 44.2,
        "battery_voltage": 5.86});
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&row[name], value, "{name}");
    }
    for (name, value) in [
        ("wifi_rssi", -55.0),
        ("battery_percent", 83.0),
        ("external_power", 0.0),
        ("uptime", 30.0),
        ("ram_free", 164220.0),
    ] {
        assert_eq!(row[name].as_f64(), Some(value), "{name}");
    }
    assert_eq!(row["wind_speed_ms"], Value::Null);
    assert_eq!(row["pressure_hpa"], Value::Null);
}

fn outdoor(world: &World) {
    let (value, ts, key) = record(world, "homelab-temperature-outdoor");
    assert_eq!(key, "outdoor-sensor");
    assert_eq!(value["tags"]["location"], "outdoor");
    let row = same_instant_row(world, "telemetry", "temperature_sensors", &ts);
    for (name, value) in [
        ("temperature_c", 6.4),
        ("humidity", 71.0),
        ("wind_speed_ms", 3.2),
        ("pressure_hpa", 1012.6),
    ] {
        assert_eq!(row[name].as_f64(), Some(value), "{name}");
    }
    assert_eq!(row["device_id"], "outdoor-sensor");
    assert_eq!(row["temperature_f"], Value::Null);
}

fn plug(world: &World) {
    let (value, _, key) = record(world, "homelab-plug-telemetry");
    assert_eq!(key, "plug-desk");
    assert_eq!(value["tags"], json!({"plug_id": "plug-desk"}));
    assert_eq!(value["fields"], json!({"status": true, "wifi_rssi": 72, "uptime_seconds": 277964}));
    let row = world.row("homelab_settings", "SELECT * FROM power_plugs").unwrap();
    for (name, value) in [
        ("plug_id", json!("plug-desk")),
        ("name", json!("plug-desk")),
        ("status", json!(true)),
        ("wifi_rssi", json!(72)),
        ("uptime_seconds", json!(277964)),
    ] {
        assert_eq!(row[name], value, "{name}");
    }
}

#[test]
fn a_latest_state_row_changes_only_when_a_value_does_and_nothing_is_erased() {
    let world = World::start(Changes::default());
    let publisher = world.publisher();
    let send = |payload: &str| {
        publisher.publish("heatpump", "thermiq_heatpump/data", payload);
    };
    for _ in 0..200 {
        send(HEATPUMP);
    }
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    assert_eq!(world.count("homelab_settings", "settings"), 1);
    assert_eq!(world.books("heatpump", "settings", "unchanged"), 199);
    let before = world.row("homelab_settings", "SELECT updated_at FROM settings").unwrap();
    send(r#"{"Client_Name": "ThermIQ_0A1B2C3D4E5F", "d0": 1, "d50": null}"#);
    send(r#"{"Client_Name": "ThermIQ_0A1B2C3D4E5F", "d0": 1, "d51": 1}"#);
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    let after = world.row("homelab_settings", "SELECT updated_at FROM settings").unwrap();
    assert_eq!(world.books("heatpump", "settings", "unchanged"), 200);
    assert_eq!(before, after, "nothing changed, so updated_at stands");
    assert_eq!(world.books("heatpump", "settings", "filtered"), 1, "no setting at all in it");
    send(r#"{"Client_Name": "ThermIQ_0A1B2C3D4E5F", "d52": 38}"#);
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    let row = world.row("homelab_settings", "SELECT * FROM settings").unwrap();
    assert_eq!((&row["curve"], &row["curve_max"]), (&json!(38), &json!(45)), "a partial message");
    assert_ne!(row["updated_at"], before["updated_at"]);
    assert_eq!(
        world.books("heatpump", "heatpump_status", "incomplete"),
        1,
        "no outdoor temperature"
    );
}
