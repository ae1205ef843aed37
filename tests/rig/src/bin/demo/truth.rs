//! What must be in the topics and tables, worked out from the published payloads alone. This is written from the
//! description of the five streams and shares no code with the node: two ways to one result.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// How a member of the payload becomes a value.
#[derive(Clone, Copy)]
enum Rule {
    /// Text, or a number as it was sent.
    AsSent,
    Floor,
    Nearest,
    /// A whole number in the table, as sent in the record.
    NearestInTable,
    /// true = 1, false = 0.
    OneOrZero,
    /// "ON" or "OFF".
    OnOff,
    Bit(u8),
    Constant(&'static str),
    /// A level of the topic, 1 = first; the pointer is not used.
    Level(usize),
}

use Rule::*;

/// Name, JSON pointer, rule.
type Field = (&'static str, &'static str, Rule);

/// Where rows go and how they are compared.
pub enum Rows {
    /// One row per message.
    Each,
    /// One row per key; null never erases.
    Latest { key: &'static str },
}

pub struct Table {
    pub name: &'static str,
    pub rows: Rows,
    /// Of a table that several streams share.
    pub condition: &'static str,
    required: &'static [&'static str],
    /// A message without any of them is no message for this table.
    fields: &'static [Field],
    /// Set when the row is made: column and the field it is a copy of.
    copy: Option<(&'static str, &'static str)>,
}

pub struct Stream {
    pub name: &'static str,
    device: Field,
    tags: &'static [Field],
    /// Pointer and the only value that counts.
    filter: Option<(&'static str, &'static str)>,
    pub tables: &'static [Table],
}

const ENERGY: &[Field] = &[
    ("wifi_rssi", "/wifiRssi", Floor),
    ("active_power_total", "/activeActualConsumption/total", Floor),
    ("active_power_l1", "/activeActualConsumption/L1", Floor),
    ("active_power_l2", "/activeActualConsumption/L2", Floor),
    ("active_power_l3", "/activeActualConsumption/L3", Floor),
    ("active_production_total", "/activeActualProduction/total", Floor),
    ("active_energy_total", "/activeTotalConsumption/total", Floor),
    ("active_energy_production", "/activeTotalProduction/total", Floor),
    ("voltage_l1", "/rmsVoltage/L1", Floor),
    ("voltage_l2", "/rmsVoltage/L2", Floor),
    ("voltage_l3", "/rmsVoltage/L3", Floor),
    ("current_l1", "/rmsCurrent/L1", Floor),
    ("current_l2", "/rmsCurrent/L2", Floor),
    ("current_l3", "/rmsCurrent/L3", Floor),
    ("power_factor", "/powerFactor/total", Floor),
];

const HEATPUMP_STATUS: &[Field] = &[
    ("outdoor_temp", "/d0", Nearest),
    ("supplyline_temp", "/d5", Nearest),
    ("returnline_temp", "/d6", Nearest),
    ("hotwater_temp", "/d7", Nearest),
    ("brine_out_temp", "/d8", Nearest),
    ("brine_in_temp", "/d9", Nearest),
    ("flowlinepump_speed", "/d30", Nearest),
    ("integral", "/d25", Nearest),
    ("runtime_compressor", "/d104", Nearest),
    ("runtime_hotwater", "/d108", Nearest),
    ("runtime_3kw", "/d106", Nearest),
    ("runtime_6kw", "/d114", Nearest),
    ("indoor_temp", "/INDR_T", NearestInTable),
    ("brinepump_on", "/d16", Bit(0)),
    ("compressor_on", "/d16", Bit(1)),
    ("flowlinepump_on", "/d16", Bit(2)),
    ("hotwater_production", "/d16", Bit(3)),
    ("aux_heater_3kw_on", "/d13", Bit(0)),
    ("aux_heater_6kw_on", "/d13", Bit(1)),
];

const HEATPUMP_SETTINGS: &[Field] = &[
    ("indoor_target_temp", "/d50", AsSent),
    ("mode", "/d51", Nearest),
    ("curve", "/d52", Nearest),
    ("curve_min", "/d53", Nearest),
    ("curve_max", "/d54", Nearest),
    ("curve_plus_5", "/d55", Nearest),
    ("curve_zero", "/d56", Nearest),
    ("curve_minus_5", "/d57", Nearest),
    ("heatstop", "/d58", Nearest),
    ("integral_setting", "/d73", Nearest),
];

const INDOOR: &[Field] = &[
    ("temperature_c", "/params/temperature:0/tC", AsSent),
    ("temperature_f", "/params/temperature:0/tF", AsSent),
    ("humidity", "/params/humidity:0/rh", AsSent),
    ("wifi_rssi", "/params/wifi/rssi", AsSent),
    ("battery_voltage", "/params/devicepower:0/battery/V", AsSent),
    ("battery_percent", "/params/devicepower:0/battery/percent", AsSent),
    ("external_power", "/params/devicepower:0/external/present", OneOrZero),
    ("uptime", "/params/sys/uptime", AsSent),
    ("ram_free", "/params/sys/ram_free", AsSent),
];

const OUTDOOR: &[Field] = &[
    ("temperature_c", "/temperature_c", AsSent),
    ("humidity", "/humidity_pct", AsSent),
    ("wind_speed_ms", "/wind_speed_ms", AsSent),
    ("pressure_hpa", "/pressure_hpa", AsSent),
];

const PLUG: &[Field] = &[
    ("status", "/POWER", OnOff),
    ("wifi_rssi", "/Wifi/RSSI", Nearest),
    ("uptime_seconds", "/UptimeSec", Nearest),
];

const fn each(
    name: &'static str,
    condition: &'static str,
    required: &'static [&'static str],
    fields: &'static [Field],
) -> Table {
    Table { name, rows: Rows::Each, condition, required, fields, copy: None }
}

/// The homelab's five streams.
pub const STREAMS: &[Stream] = &[
    Stream {
        name: "energy",
        device: ("device_serial", "/saveeyeDeviceSerialNumber", AsSent),
        tags: &[("meter_type", "/meterType", AsSent)],
        filter: None,
        tables: &[each("energy_consumption", "true", &["active_power_total"], ENERGY)],
    },
    Stream {
        name: "heatpump",
        device: ("device_id", "/Client_Name", AsSent),
        tags: &[],
        filter: None,
        tables: &[
            each("heatpump_status", "true", &["outdoor_temp"], HEATPUMP_STATUS),
            Table {
                name: "settings",
                rows: Rows::Latest { key: "device_id" },
                condition: "true",
                required: &[],
                fields: HEATPUMP_SETTINGS,
                copy: None,
            },
        ],
    },
    Stream {
        name: "temperature_indoor",
        device: ("device_id", "/src", AsSent),
        tags: &[("mac_address", "/params/sys/mac", AsSent), ("location", "", Constant("indoor"))],
        filter: Some(("/method", "NotifyFullStatus")),
        tables: &[each("temperature_sensors", "location = 'indoor'", &["temperature_c"], INDOOR)],
    },
    Stream {
        name: "temperature_outdoor",
        device: ("device_id", "", Constant("outdoor-sensor")),
        tags: &[("location", "", Constant("outdoor"))],
        filter: None,
        tables: &[each("temperature_sensors", "location = 'outdoor'", &["temperature_c"], OUTDOOR)],
    },
    Stream {
        name: "plug",
        device: ("plug_id", "", Level(2)),
        tags: &[],
        filter: None,
        tables: &[Table {
            name: "power_plugs",
            rows: Rows::Latest { key: "plug_id" },
            condition: "true",
            required: &["status"],
            fields: PLUG,
            copy: Some(("name", "plug_id")),
        }],
    },
];

impl Rule {
    fn apply(self, payload: &Value, pointer: &str, topic: &str, record: bool) -> Option<Value> {
        match self {
            Constant(text) => return Some(text.into()),
            Level(number) => {
                let level = topic.split('/').nth(number - 1)?;
                return (!level.is_empty()).then(|| level.into());
            }
            _ => {}
        }
        let found = payload.pointer(pointer).filter(|value| !value.is_null())?;
        let whole = |number: f64| Value::from(number as i64);
        match self {
            AsSent => Some(found.clone()),
            NearestInTable if record => Some(found.clone()),
            Floor => found.as_f64().map(|number| whole(number.floor())),
            Nearest | NearestInTable => found.as_f64().map(|number| whole(number.round())),
            OneOrZero => found.as_bool().map(|yes| Value::from(u8::from(yes))),
            OnOff => Some(Value::from(found.as_str()? == "ON")),
            Bit(bit) => Some(Value::from(found.as_u64()? >> bit & 1 == 1)),
            Constant(_) | Level(_) => None,
        }
    }
}

impl Stream {
    pub fn named(name: &str) -> Option<&'static Stream> {
        STREAMS.iter().find(|stream| stream.name == name)
    }

    /// Whether the message counts at all.
    pub fn counts(&self, payload: &Value) -> bool {
        self.filter.is_none_or(|(pointer, wanted)| {
            payload.pointer(pointer).and_then(Value::as_str) == Some(wanted)
        })
    }

    fn put(
        &self,
        into: &mut Map<String, Value>,
        field: &Field,
        message: (&str, &Value),
        record: bool,
    ) {
        let (name, pointer, rule) = *field;
        let (topic, payload) = message;
        into.insert(
            name.into(),
            rule.apply(payload, pointer, topic, record).unwrap_or(Value::Null),
        );
    }

    fn key(&self, message: (&str, &Value)) -> Map<String, Value> {
        let mut map = Map::new();
        for field in std::iter::once(&self.device).chain(self.tags) {
            self.put(&mut map, field, message, false);
        }
        map
    }

    /// Tags and fields of the Kafka record, in one.
    pub fn record(&self, topic: &str, payload: &Value) -> Map<String, Value> {
        let mut map = self.key((topic, payload));
        for field in self.tables.iter().flat_map(|table| table.fields) {
            self.put(&mut map, field, (topic, payload), true);
        }
        map
    }

    /// The rows of a table after these messages, in the order they were published.
    pub fn rows<'a>(
        &self,
        table: &Table,
        messages: impl Iterator<Item = (&'a str, &'a Value)>,
    ) -> Vec<Map<String, Value>> {
        let rows = messages.filter_map(|message| self.row(table, message));
        let Rows::Latest { key } = table.rows else { return rows.collect() };
        let mut latest: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
        for row in rows {
            let id = row.get(key).map(Value::to_string).unwrap_or_default();
            let known = latest.entry(id).or_default();
            known.extend(row.into_iter().filter(|(_, value)| !value.is_null()));
            if let Some((column, field)) = table.copy {
                let first = known.get(field).cloned().unwrap_or(Value::Null);
                known.entry(column).or_insert(first);
            }
        }
        latest.into_values().collect()
    }

    fn row(&self, table: &Table, message: (&str, &Value)) -> Option<Map<String, Value>> {
        let mut values = Map::new();
        for field in table.fields {
            self.put(&mut values, field, message, false);
        }
        let missing = |name: &&str| values.get(*name).is_none_or(Value::is_null);
        if table.required.iter().any(missing) || values.values().all(Value::is_null) {
            return None;
        }
        let mut row = self.key(message);
        if matches!(table.rows, Rows::Latest { .. }) {
            row.retain(|name, _| name == self.device.0);
        }
        row.extend(values);
        Some(row)
    }
}

/// One text for values that are equal: members sorted, null left out, numbers without a form of their own.
pub fn canonical(map: &Map<String, Value>) -> String {
    let members: BTreeMap<&String, String> = map
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| {
            (name, value.as_f64().map_or_else(|| value.to_string(), |n| n.to_string()))
        })
        .collect();
    members.iter().map(|(name, value)| format!("{name}={value} ")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rows(stream: &str, table: usize, messages: &[(&str, Value)]) -> Vec<String> {
        let stream = Stream::named(stream).unwrap();
        let messages = messages.iter().map(|(topic, payload)| (*topic, payload));
        stream.rows(&stream.tables[table], messages).iter().map(canonical).collect()
    }

    #[test]
    fn fractions_are_rounded_towards_the_floor() {
        let message =
            json!({"saveeyeDeviceSerialNumber": "S", "activeActualConsumption": {"total": -0.4}});
        assert_eq!(
            rows("energy", 0, &[("t", message)]),
            ["active_power_total=-1 device_serial=\"S\" "]
        );
    }

    #[test]
    fn a_message_without_a_required_field_has_no_row() {
        assert!(rows("heatpump", 0, &[("t", json!({"Client_Name": "H", "d5": 1}))]).is_empty());
    }

    #[test]
    fn settings_keep_what_a_later_message_does_not_say() {
        let messages = [
            json!({"Client_Name": "H", "d50": 21, "d51": 1}),
            json!({"Client_Name": "H", "d51": 2, "d52": null}),
        ];
        let messages = messages.map(|payload| ("t", payload));
        assert_eq!(
            rows("heatpump", 1, &messages),
            ["device_id=\"H\" indoor_target_temp=21 mode=2 "]
        );
    }

    #[test]
    fn a_plug_is_named_by_its_topic() {
        let message = json!({"POWER": "ON", "Wifi": {"RSSI": 72}});
        let row = rows("plug", 0, &[("tele/desk/STATE", message)]);
        assert_eq!(row, ["name=\"desk\" plug_id=\"desk\" status=true wifi_rssi=72 "]);
    }
}
