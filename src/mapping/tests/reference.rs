//! The five reference streams and the plant monitor, field by field.

use serde_json::json;

use super::streams::{energy, heatpump, indoor, outdoor, plant, plug};
use super::*;

pub(super) const ENERGY: &str = r#"{"saveeyeDeviceSerialNumber": "SE-4471-K", "meterType": "three-phase",
 "meterSerialNumber": "18402217", "timestamp": "2026-03-14T07:21:05", "wifiRssi": -41,
 "reactiveActualConsumption": {"total": 4},
 "activeActualConsumption": {"total": 1284, "L1": 612, "L2": 389, "L3": 283},
 "activeActualProduction": {"total": 0, "L1": 0, "L2": 0, "L3": 0},
 "activeTotalConsumption": {"total": 104233871}, "activeTotalProduction": {"total": 83},
 "rmsVoltage": {"L1": 237, "L2": 238, "L3": 236}, "rmsCurrent": {"L1": 2583, "L2": 1634, "L3": 1199},
 "powerFactor": {"total": 98}}"#;

const HEATPUMP: &str = r#"{"Client_Name": "ThermIQ_0A1B2C3D4E5F", "app_info": "v2.68", "rssi": -60,
 "d0": -3, "d5": 36, "d6": 31, "d7": 52, "d8": -1, "d9": 2, "d13": 0, "d16": 6, "d25": -180, "d30": 50,
 "d50": 21, "d51": 1, "d52": 36, "d53": 10, "d54": 45, "d55": 2, "d56": 0, "d57": -1, "d58": 17, "d73": 4,
 "d104": 44120, "d106": 455, "d108": 3144, "d114": 470, "INDR_T": 20.6, "EVU": 0}"#;

const INDOOR: &str = r#"{"src": "shellyhtg3-5ec0ffee0001", "dst": "shellyhtg3-5ec0ffee0001/events",
 "method": "NotifyFullStatus",
 "params": {"ts": 1773472865.31, "temperature:0": {"id": 0, "tC": 21.4, "tF": 70.5}, "humidity:0": {"id": 0, "rh": 44.2},
  "devicepower:0": {"id": 0, "battery": {"V": 5.86, "percent": 83}, "external": {"present": false}},
  "wifi": {"sta_ip": "192.0.2.63", "status": "got ip", "rssi": -55},
  "sys": {"mac": "5EC0FFEE0001", "uptime": 30, "ram_size": 255800, "ram_free": 164220}}}"#;

const OUTDOOR: &str =
    r#"{"temperature_c": 6.4, "humidity_pct": 71, "wind_speed_ms": 3.2, "pressure_hpa": 1012.6}"#;

const PLUG: &str = r#"{"Time": "2026-03-14T08:00:04", "UptimeSec": 277964, "POWER": "ON",
 "Wifi": {"RSSI": 72, "SSId": "example"}}"#;

fn ints(row: &IndexMap<String, Value<'static>>, names: &[&str]) -> Vec<Value<'static>> {
    names.iter().map(|name| row[*name].clone()).collect()
}

#[test]
fn energy_record_is_the_documented_one() {
    let (json, key) = kafka(&energy(), "saveeye/telemetry", ENERGY.as_bytes()).mapped();
    assert_eq!(key, "SE-4471-K");
    let expected = concat!(
        r#"{"ts":"2026-03-14T07:21:05.412908Z","#,
        r#""tags":{"device_serial":"SE-4471-K","meter_type":"three-phase"},"#,
        r#""fields":{"wifi_rssi":-41,"active_power_total":1284,"active_power_l1":612,"#,
        r#""active_power_l2":389,"active_power_l3":283,"active_production_total":0,"#,
        r#""active_energy_total":104233871,"active_energy_production":83,"voltage_l1":237,"#,
        r#""voltage_l2":238,"voltage_l3":236,"current_l1":2583,"current_l2":1634,"#,
        r#""current_l3":1199,"power_factor":98}}"#
    );
    assert_eq!(json, expected);
}

#[test]
fn energy_row() {
    let row = row(&energy(), "energy_consumption", "t", ENERGY.as_bytes()).mapped();
    assert_eq!(row.len(), 17);
    assert_eq!(row["device_serial"], text("SE-4471-K"));
    assert_eq!(row["meter_type"], text("three-phase"));
    let numbers: Vec<Value<'_>> = row.values().skip(2).cloned().collect();
    let expected =
        [-41, 1284, 612, 389, 283, 0, 104_233_871, 83, 237, 238, 236, 2583, 1634, 1199, 98];
    assert_eq!(numbers, expected.map(Value::Int));
}

#[test]
fn a_minimal_energy_message_has_every_member() {
    let payload = br#"{"saveeyeDeviceSerialNumber": "S", "activeActualConsumption": {"total": 1}}"#;
    let full = kafka(&energy(), "t", ENERGY.as_bytes()).mapped().0;
    let minimal = kafka(&energy(), "t", payload).mapped().0;
    let members = |text: &str| {
        let json = parsed(text);
        ["tags", "fields"]
            .map(|group| json[group].as_object().unwrap().keys().cloned().collect::<Vec<String>>())
    };
    assert_eq!(members(&minimal), members(&full));
    assert_eq!(parsed(&minimal)["fields"]["voltage_l1"], json!(null));
    let row = row(&energy(), "energy_consumption", "t", payload).mapped();
    assert_eq!(row["voltage_l1"], Value::Null);
    assert_eq!(row["active_power_total"], Value::Int(1));
}

#[test]
fn energy_fractions_are_floored() {
    let payload = br#"{"saveeyeDeviceSerialNumber": "S",
        "activeActualConsumption": {"total": 90.05044555664062, "L1": -0.4}}"#;
    let row = row(&energy(), "energy_consumption", "t", payload).mapped();
    assert_eq!(ints(&row, &["active_power_total", "active_power_l1"]), [90, -1].map(Value::Int));
}

#[test]
fn energy_without_power_is_incomplete_for_the_table_only() {
    for total in [r#"{}"#, r#"{"total": null}"#, "null", "7"] {
        let payload =
            format!(r#"{{"saveeyeDeviceSerialNumber": "S", "activeActualConsumption": {total}}}"#);
        let table = row(&energy(), "energy_consumption", "t", payload.as_bytes());
        assert_eq!(table, Outcome::Incomplete);
        kafka(&energy(), "t", payload.as_bytes()).mapped();
    }
}

#[test]
fn heatpump_status_row() {
    let row = row(&heatpump(), "heatpump_status", "t", HEATPUMP.as_bytes()).mapped();
    assert_eq!(row["device_id"], text("ThermIQ_0A1B2C3D4E5F"));
    let numbers: Vec<Value<'_>> = row.values().skip(1).take(13).cloned().collect();
    let expected = [-3, 36, 31, 52, -1, 2, 50, -180, 44120, 3144, 455, 470, 21];
    assert_eq!(numbers, expected.map(Value::Int));
    let bits: Vec<Value<'_>> = row.values().skip(14).cloned().collect();
    assert_eq!(bits, [false, true, true, false, false, false].map(Value::Bool));
}

#[test]
fn heatpump_settings_row_and_record() {
    let row = row(&heatpump(), "settings", "t", HEATPUMP.as_bytes()).mapped();
    assert_eq!(row["indoor_target_temp"], Value::Float(21.0));
    let numbers: Vec<Value<'_>> = row.values().skip(2).cloned().collect();
    assert_eq!(numbers, [1, 36, 10, 45, 2, 0, -1, 17, 4].map(Value::Int));
    let (json, key) = kafka(&heatpump(), "t", HEATPUMP.as_bytes()).mapped();
    assert_eq!(key, "ThermIQ_0A1B2C3D4E5F");
    let fields = &parsed(&json)["fields"];
    assert_eq!(fields.as_object().unwrap().len(), 29);
    assert_eq!(fields["indoor_temp"], json!(20.6));
    assert_eq!(fields["compressor_on"], json!(true));
    assert_eq!(fields["integral_setting"], json!(4));
}

#[test]
fn heatpump_uses_are_judged_apart() {
    let only_settings = br#"{"Client_Name": "T", "d51": 2}"#;
    assert_eq!(row(&heatpump(), "heatpump_status", "t", only_settings), Outcome::Incomplete);
    assert_eq!(row(&heatpump(), "settings", "t", only_settings).mapped()["mode"], Value::Int(2));
    let only_status = br#"{"Client_Name": "T", "d0": 0, "d51": null}"#;
    let status = row(&heatpump(), "heatpump_status", "t", only_status).mapped();
    assert_eq!(status["outdoor_temp"], Value::Int(0));
    assert_eq!(status["compressor_on"], Value::Null);
    assert_eq!(row(&heatpump(), "settings", "t", only_status), Outcome::Filtered);
    let poisoned_setting = br#"{"Client_Name": "T", "d0": 1, "d51": "two"}"#;
    row(&heatpump(), "heatpump_status", "t", poisoned_setting).mapped();
    assert_eq!(row(&heatpump(), "settings", "t", poisoned_setting).reason(), Reason::WrongType);
    assert_eq!(kafka(&heatpump(), "t", poisoned_setting).reason(), Reason::WrongType);
}

#[test]
fn indoor_row_and_record() {
    let row = row(&indoor(), "temperature_sensors", "t", INDOOR.as_bytes()).mapped();
    assert_eq!(row["device_id"], text("shellyhtg3-5ec0ffee0001"));
    assert_eq!(row["mac_address"], text("5EC0FFEE0001"));
    assert_eq!(row["location"], text("indoor"));
    let numbers: Vec<Value<'_>> = row.values().skip(3).cloned().collect();
    let expected = [21.4, 70.5, 44.2, -55.0, 5.86, 83.0, 0.0, 30.0, 164_220.0];
    assert_eq!(numbers, expected.map(Value::Float));
    let (json, _) = kafka(&indoor(), "t", INDOOR.as_bytes()).mapped();
    let expected = r#""fields":{"temperature_c":21.4,"temperature_f":70.5,"humidity":44.2,"#;
    assert!(json.contains(expected), "{json}");
    assert_eq!(parsed(&json)["fields"]["external_power"].as_f64(), Some(0.0));
}

#[test]
fn indoor_kinds() {
    let with = |method: &str| INDOOR.replace(r#""method": "NotifyFullStatus","#, method);
    for (method, expected) in [
        (r#""method": "NotifyStatus","#, Outcome::Filtered),
        (r#""method": "NotifyEvent","#, Outcome::Filtered),
        (r#""method": 7,"#, Outcome::Filtered),
        (r#""method": null,"#, Outcome::Incomplete),
        ("", Outcome::Incomplete),
    ] {
        let payload = with(method);
        let table = row(&indoor(), "temperature_sensors", "t", payload.as_bytes());
        assert_eq!(table, expected, "{method}");
        let record = kafka(&indoor(), "t", payload.as_bytes());
        assert_eq!(format!("{record:?}"), format!("{expected:?}"), "{method}");
    }
    // The filter comes before the device id.
    let stranger = br#"{"method": "NotifyEvent"}"#;
    assert_eq!(row(&indoor(), "temperature_sensors", "t", stranger), Outcome::Filtered);
}

#[test]
fn outdoor_row_and_record() {
    let row = row(&outdoor(), "temperature_sensors", "t", OUTDOOR.as_bytes()).mapped();
    assert_eq!(row["device_id"], text("outdoor-sensor"));
    assert_eq!(row["location"], text("outdoor"));
    let numbers: Vec<Value<'_>> = row.values().skip(2).cloned().collect();
    assert_eq!(numbers, [6.4, 71.0, 3.2, 1012.6].map(Value::Float));
    let (json, key) = kafka(&outdoor(), "t", OUTDOOR.as_bytes()).mapped();
    assert_eq!(key, "outdoor-sensor");
    assert!(json.ends_with(r#""humidity":71,"wind_speed_ms":3.2,"pressure_hpa":1012.6}}"#));
}

#[test]
fn plug_row_and_record() {
    let row = row(&plug(), "power_plugs", "tele/plug-desk/STATE", PLUG.as_bytes()).mapped();
    let expected = [
        text("plug-desk"),
        Value::Bool(true),
        Value::Int(72),
        Value::Int(277_964),
        text("plug-desk"),
    ];
    assert_eq!(row.values().cloned().collect::<Vec<_>>(), expected);
    assert_eq!(row.keys().last().unwrap(), "name");
    let (json, key) = kafka(&plug(), "tele/plug-desk/STATE", PLUG.as_bytes()).mapped();
    assert_eq!(key, "plug-desk");
    let expected = r#""tags":{"plug_id":"plug-desk"},"fields":{"status":true,"wifi_rssi":72,"uptime_seconds":277964}}"#;
    assert!(json.ends_with(expected), "{json}");
}

#[test]
fn plug_faults() {
    let state = |power: &str| format!(r#"{{"POWER": {power}}}"#);
    for power in [r#""on""#, r#""TOGGLE""#, "true", "1"] {
        let outcome = row(&plug(), "power_plugs", "tele/p/STATE", state(power).as_bytes());
        assert_eq!(outcome.reason(), Reason::NotInValueMap, "{power}");
    }
    assert_eq!(row(&plug(), "power_plugs", "tele/p/STATE", b"{}"), Outcome::Incomplete);
    let no_id = row(&plug(), "power_plugs", "tele//STATE", PLUG.as_bytes());
    assert_eq!(no_id.reason(), Reason::NoDeviceId);
}

#[test]
fn plant_readings_with_a_good_and_a_bad_clock() {
    let good = br#"{"timestamp": "2026-03-14T07:21:00Z", "soil_moisture": 41.5, "light": 780.0}"#;
    let row_of = |payload: &[u8]| row(&plant(), "telemetry", "devices/dev-1/telemetry", payload);
    let row = row_of(good).mapped();
    assert_eq!(row["device_id"], text("dev-1"));
    assert_eq!(row["device_time"], Value::Timestamp(ARRIVAL - 5_412_908));
    assert_eq!(row["light_level"], Value::Float(780.0));
    assert_eq!(row["flags"], Value::Null);
    let since_boot = br#"{"timestamp": 4520117, "soil_moisture": 141.5}"#;
    let row = row_of(since_boot).mapped();
    assert_eq!(row["device_time"], Value::Timestamp(ARRIVAL));
    assert_eq!(row["soil_moisture"], Value::Float(141.5));
    assert_eq!(row["flags"], text("device_time_invalid,out_of_range"));
    let (json, _) = kafka(&plant(), "devices/dev-1/telemetry", since_boot).mapped();
    let fields = &parsed(&json)["fields"];
    assert_eq!(fields["flags"], json!("device_time_invalid,out_of_range"));
    assert_eq!(fields["device_time"], json!("2026-03-14T07:21:05.412908Z"));
    assert_eq!(row_of(br#"{"timestamp": 4520117}"#), Outcome::Incomplete);
}
