//! The streams of the reference deployment as settings, and a small builder for others.

use std::time::Duration;

use indexmap::IndexMap;
use serde_json::json;

use crate::config::*;
use crate::domain::{SinkName, StreamName};

const DAY: Duration = Duration::from_secs(86_400);

pub(super) struct Builder(StreamSettings);

pub(super) fn stream(
    name: &str,
    topic_filter: &str,
    device_id: &str,
    fields: Vec<(&str, FieldSettings)>,
) -> Builder {
    let mapping = MappingSettings {
        payload_bytes_max: 256 * 1024,
        filter: None,
        require_any: Vec::new(),
        fields: fields.into_iter().map(|(name, field)| (name.to_owned(), field)).collect(),
        device_id: device_id.to_owned(),
    };
    Builder(StreamSettings {
        name: StreamName::parse(name).unwrap(),
        broker: "main".into(),
        topic_filter: topic_filter.into(),
        qos: 1,
        client_id: format!("node-{name}"),
        mapping,
        silent_after: (None, None),
        dedupe: None,
        kafka: Some(KafkaSinkSettings {
            sink: SinkName::parse("kafka").unwrap(),
            cluster: "main".into(),
            topic: name.into(),
            raw_root: false,
            ensure: None,
        }),
        tables: IndexMap::new(),
    })
}

impl Builder {
    pub(super) fn table(self, name: &str, fields: &[&str]) -> Self {
        let kind = TableKind::Append {
            time_column: "time".into(),
            node_column: None,
            retention: None,
            partition: DAY,
        };
        self.any_table(name, fields, kind)
    }

    pub(super) fn latest(
        self,
        name: &str,
        fields: &[&str],
        key: &str,
        insert_only: &[(&str, &str)],
    ) -> Self {
        let pair = |(column, field): &(&str, &str)| ((*column).into(), (*field).into());
        let kind = TableKind::Latest {
            key: key.into(),
            updated_at_column: "updated_at".into(),
            insert_only: insert_only.iter().map(pair).collect(),
        };
        self.any_table(name, fields, kind)
    }

    fn any_table(mut self, name: &str, fields: &[&str], kind: TableKind) -> Self {
        let sink = SinkName::parse(name).unwrap();
        let table = TableSettings {
            sink: sink.clone(),
            database: "main".into(),
            table: name.into(),
            kind,
            columns: fields.iter().map(|field| ((*field).into(), (*field).into())).collect(),
            batch_rows_max: 1000,
            batch_bytes_max: 1 << 20,
            batch_linger: Duration::from_millis(50),
        };
        self.0.tables.insert(sink, table);
        self
    }

    pub(super) fn filter(mut self, path: &str, test: FilterTest) -> Self {
        let source = FieldSource::Paths(vec![path.into()]);
        self.0.mapping.filter = Some(FilterSettings { source, test });
        self
    }

    pub(super) fn require_any(mut self, fields: &[&str]) -> Self {
        self.0.mapping.require_any = fields.iter().map(|field| (*field).into()).collect();
        self
    }

    pub(super) fn build(self) -> StreamSettings {
        self.0
    }
}

pub(super) fn field(path: &str, field_type: FieldType) -> FieldSettings {
    FieldSettings {
        source: FieldSource::Paths(vec![path.to_owned()]),
        field_type,
        tag: false,
        required: false,
        rounding: Rounding::Nearest,
        record_type: None,
        min: None,
        max: None,
        out_of_range: OutOfRange::DeadLetter,
        default: None,
        scale: 1.0,
        offset: 0.0,
        bit: None,
        values: None,
        boolean_as_number: false,
        text_as_number: false,
        timestamp: TimestampSettings {
            format: TimestampFormat::Auto,
            max_age: 7 * DAY,
            max_skew: Duration::from_secs(300),
        },
    }
}

pub(super) fn id(path: &str) -> FieldSettings {
    FieldSettings { tag: true, required: true, ..field(path, FieldType::Text) }
}

pub(super) fn tag(path: &str) -> FieldSettings {
    FieldSettings { tag: true, ..field(path, FieldType::Text) }
}

pub(super) fn constant(value: serde_json::Value, field_type: FieldType) -> FieldSettings {
    FieldSettings { source: FieldSource::Constant(value), ..field("-", field_type) }
}

pub(super) fn required(settings: FieldSettings) -> FieldSettings {
    FieldSettings { required: true, ..settings }
}

fn floor(path: &str, field_type: FieldType) -> FieldSettings {
    FieldSettings { rounding: Rounding::Floor, ..field(path, field_type) }
}

fn bit(path: &str, bit: u8) -> FieldSettings {
    FieldSettings { bit: Some(bit), ..field(path, FieldType::Boolean) }
}

pub(super) fn energy() -> StreamSettings {
    use FieldType::{Int2, Int4, Int8};
    let fields = vec![
        ("device_serial", id("saveeyeDeviceSerialNumber")),
        ("meter_type", tag("meterType")),
        ("wifi_rssi", floor("wifiRssi", Int2)),
        ("active_power_total", required(floor("activeActualConsumption.total", Int4))),
        ("active_power_l1", floor("activeActualConsumption.L1", Int4)),
        ("active_power_l2", floor("activeActualConsumption.L2", Int4)),
        ("active_power_l3", floor("activeActualConsumption.L3", Int4)),
        ("active_production_total", floor("activeActualProduction.total", Int4)),
        ("active_energy_total", floor("activeTotalConsumption.total", Int8)),
        ("active_energy_production", floor("activeTotalProduction.total", Int8)),
        ("voltage_l1", floor("rmsVoltage.L1", Int2)),
        ("voltage_l2", floor("rmsVoltage.L2", Int2)),
        ("voltage_l3", floor("rmsVoltage.L3", Int2)),
        ("current_l1", floor("rmsCurrent.L1", Int4)),
        ("current_l2", floor("rmsCurrent.L2", Int4)),
        ("current_l3", floor("rmsCurrent.L3", Int4)),
        ("power_factor", floor("powerFactor.total", Int2)),
    ];
    let columns: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    stream("energy", "saveeye/telemetry", "device_serial", fields)
        .table("energy_consumption", &columns)
        .build()
}

pub(super) fn heatpump() -> StreamSettings {
    use FieldType::{Float8, Int2, Int4};
    let indoor = FieldSettings { record_type: Some(Float8), ..field("INDR_T", Int2) };
    let status = vec![
        ("outdoor_temp", required(field("d0", Int2))),
        ("supplyline_temp", field("d5", Int2)),
        ("returnline_temp", field("d6", Int2)),
        ("hotwater_temp", field("d7", Int2)),
        ("brine_out_temp", field("d8", Int2)),
        ("brine_in_temp", field("d9", Int2)),
        ("flowlinepump_speed", field("d30", Int2)),
        ("integral", field("d25", Int2)),
        ("runtime_compressor", field("d104", Int4)),
        ("runtime_hotwater", field("d108", Int4)),
        ("runtime_3kw", field("d106", Int4)),
        ("runtime_6kw", field("d114", Int4)),
        ("indoor_temp", indoor),
        ("brinepump_on", bit("d16", 0)),
        ("compressor_on", bit("d16", 1)),
        ("flowlinepump_on", bit("d16", 2)),
        ("hotwater_production", bit("d16", 3)),
        ("aux_heater_3kw_on", bit("d13", 0)),
        ("aux_heater_6kw_on", bit("d13", 1)),
    ];
    let settings = vec![
        ("indoor_target_temp", field("d50", Float8)),
        ("mode", field("d51", Int4)),
        ("curve", field("d52", Int4)),
        ("curve_min", field("d53", Int4)),
        ("curve_max", field("d54", Int4)),
        ("curve_plus_5", field("d55", Int4)),
        ("curve_zero", field("d56", Int4)),
        ("curve_minus_5", field("d57", Int4)),
        ("heatstop", field("d58", Int4)),
        ("integral_setting", field("d73", Int2)),
    ];
    let names = |fields: &[(&'static str, FieldSettings)]| {
        let names = fields.iter().map(|(name, _)| *name);
        std::iter::once("device_id").chain(names).collect::<Vec<_>>()
    };
    let (status_columns, settings_columns) = (names(&status), names(&settings));
    let mut fields = vec![("device_id", id("Client_Name"))];
    fields.extend(status);
    fields.extend(settings);
    stream("heatpump", "thermiq_heatpump/data", "device_id", fields)
        .table("heatpump_status", &status_columns)
        .latest("settings", &settings_columns, "device_id", &[])
        .build()
}

pub(super) fn indoor() -> StreamSettings {
    use FieldType::{Float8, Text};
    let power = field("params['devicepower:0'].external.present", Float8);
    let fields = vec![
        ("device_id", id("src")),
        ("mac_address", tag("params.sys.mac")),
        ("location", FieldSettings { tag: true, ..constant(json!("indoor"), Text) }),
        ("temperature_c", required(field("params['temperature:0'].tC", Float8))),
        ("temperature_f", field("params['temperature:0'].tF", Float8)),
        ("humidity", field("params['humidity:0'].rh", Float8)),
        ("wifi_rssi", field("params.wifi.rssi", Float8)),
        ("battery_voltage", field("params['devicepower:0'].battery.V", Float8)),
        ("battery_percent", field("params['devicepower:0'].battery.percent", Float8)),
        ("external_power", FieldSettings { boolean_as_number: true, ..power }),
        ("uptime", field("params.sys.uptime", Float8)),
        ("ram_free", field("params.sys.ram_free", Float8)),
    ];
    let columns: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    stream("temperature_indoor", "+/events/rpc", "device_id", fields)
        .table("temperature_sensors", &columns)
        .filter("method", FilterTest::OneOf(vec![json!("NotifyFullStatus")]))
        .build()
}

pub(super) fn outdoor() -> StreamSettings {
    use FieldType::{Float8, Text};
    let fields = vec![
        ("device_id", FieldSettings { tag: true, ..constant(json!("outdoor-sensor"), Text) }),
        ("location", FieldSettings { tag: true, ..constant(json!("outdoor"), Text) }),
        ("temperature_c", required(field("temperature_c", Float8))),
        ("humidity", field("humidity_pct", Float8)),
        ("wind_speed_ms", field("wind_speed_ms", Float8)),
        ("pressure_hpa", field("pressure_hpa", Float8)),
    ];
    let columns: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    stream("temperature_outdoor", "homelab/temperature/outdoor", "device_id", fields)
        .table("temperature_sensors", &columns)
        .build()
}

pub(super) fn plug() -> StreamSettings {
    use FieldType::{Boolean, Int4, Text};
    let on_off = [("ON".to_owned(), json!(true)), ("OFF".to_owned(), json!(false))];
    let status = FieldSettings {
        values: Some(on_off.into_iter().collect()),
        ..required(field("POWER", Boolean))
    };
    let level = FieldSettings { source: FieldSource::TopicLevel(2), tag: true, ..field("-", Text) };
    let fields = vec![
        ("plug_id", level),
        ("status", status),
        ("wifi_rssi", field("Wifi.RSSI", Int4)),
        ("uptime_seconds", field("UptimeSec", Int4)),
    ];
    let columns = ["plug_id", "status", "wifi_rssi", "uptime_seconds"];
    stream("plug", "tele/+/STATE", "plug_id", fields)
        .latest("power_plugs", &columns, "plug_id", &[("name", "plug_id")])
        .build()
}

/// A plant monitor's board: a clock that is often wrong, every reading optional, flags kept beside them.
pub(super) fn plant() -> StreamSettings {
    use FieldType::{Float8, Text, Timestamp};
    let level = FieldSettings { source: FieldSource::TopicLevel(2), tag: true, ..field("-", Text) };
    let paths = FieldSource::Paths(vec!["light_level".into(), "light".into()]);
    let moisture = FieldSettings {
        min: Some(0.0),
        max: Some(100.0),
        out_of_range: OutOfRange::Flag,
        ..field("soil_moisture", Float8)
    };
    let fields = vec![
        ("device_id", level),
        ("flags", FieldSettings { source: FieldSource::Flags, ..field("-", Text) }),
        ("device_time", field("timestamp", Timestamp)),
        ("soil_moisture", moisture),
        ("temperature", field("temperature", Float8)),
        ("light_level", FieldSettings { source: paths, ..field("-", Float8) }),
    ];
    let columns: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
    stream("plant", "devices/+/telemetry", "device_id", fields)
        .table("telemetry", &columns)
        .require_any(&["soil_moisture", "temperature", "light_level"])
        .build()
}
