//! The reference streams field by field, and each rule of the mapping.

mod properties;
mod reference;
mod rules;
mod streams;

use indexmap::IndexMap;
use serde_json::{Value as Json, json};

use super::{Fault, Outcome, RecordMapper, RowMapper, Value};
use crate::config::{FieldSettings, StreamSettings};
use crate::domain::{Arrival, DeliveryFlags, Reason, Record, Sequence, SinkName};

/// 2026-03-14T07:21:05.412908Z
const ARRIVAL: i64 = 1_773_472_865_412_908;

fn record<'a>(topic: &'a str, payload: &'a [u8]) -> Record<'a> {
    Record {
        sequence: Sequence(1),
        arrival: Arrival(ARRIVAL),
        topic,
        payload,
        flags: DeliveryFlags { qos: 1, ..DeliveryFlags::default() },
        packet_id: 1,
    }
}

/// The row of one table, by column.
fn row(
    stream: &StreamSettings,
    table: &str,
    topic: &str,
    payload: &[u8],
) -> Outcome<IndexMap<String, Value<'static>>> {
    let table = &stream.tables[&SinkName::parse(table).unwrap()];
    let mut mapper = RowMapper::compile(stream, table).unwrap();
    let names: Vec<String> = mapper.columns().iter().map(|column| column.name.clone()).collect();
    match mapper.map(&record(topic, payload)) {
        Outcome::Mapped(values) => {
            Outcome::Mapped(names.into_iter().zip(values.iter().map(owned)).collect())
        }
        Outcome::Filtered => Outcome::Filtered,
        Outcome::Incomplete => Outcome::Incomplete,
        Outcome::Dead(fault) => Outcome::Dead(fault),
    }
}

fn owned(value: &Value<'_>) -> Value<'static> {
    match value {
        Value::Text(text) => Value::Text(text.clone().into_owned().into()),
        Value::Null => Value::Null,
        Value::Bool(value) => Value::Bool(*value),
        Value::Int(value) => Value::Int(*value),
        Value::Float(value) => Value::Float(*value),
        Value::Timestamp(micros) => Value::Timestamp(*micros),
    }
}

/// The record's JSON and key.
fn kafka(stream: &StreamSettings, topic: &str, payload: &[u8]) -> Outcome<(String, String)> {
    let mut mapper = RecordMapper::compile(stream).unwrap();
    let (mut json, mut key) = (b"stale".to_vec(), b"stale".to_vec());
    match mapper.map(&record(topic, payload), &mut json, &mut key) {
        Outcome::Mapped(()) => {
            Outcome::Mapped((String::from_utf8(json).unwrap(), String::from_utf8(key).unwrap()))
        }
        Outcome::Filtered => Outcome::Filtered,
        Outcome::Incomplete => Outcome::Incomplete,
        Outcome::Dead(fault) => Outcome::Dead(fault),
    }
}

impl<T: std::fmt::Debug> Outcome<T> {
    #[track_caller]
    fn mapped(self) -> T {
        match self {
            Outcome::Mapped(value) => value,
            other => panic!("not mapped: {other:?}"),
        }
    }

    #[track_caller]
    fn dead(self) -> Fault {
        match self {
            Outcome::Dead(fault) => fault,
            other => panic!("not dead: {other:?}"),
        }
    }

    #[track_caller]
    fn reason(self) -> Reason {
        self.dead().reason
    }
}

fn text(text: &str) -> Value<'static> {
    Value::Text(text.to_owned().into())
}

/// A stream with a device id `id` and one field `v` (member `v`), in the record and in table `t`.
fn one_field(field: FieldSettings) -> StreamSettings {
    streams::stream("plain", "d/+/x", "id", vec![("id", streams::id("id")), ("v", field)])
        .table("t", &["id", "v"])
        .build()
}

/// What became of `v`, sent as this JSON text, in the table.
fn column(field: FieldSettings, raw: &str) -> Outcome<Value<'static>> {
    let payload = format!(r#"{{"id": "a", "v": {raw}}}"#);
    match row(&one_field(field), "t", "d/x/x", payload.as_bytes()) {
        Outcome::Mapped(mut row) => Outcome::Mapped(row.swap_remove("v").unwrap()),
        Outcome::Filtered => Outcome::Filtered,
        Outcome::Incomplete => Outcome::Incomplete,
        Outcome::Dead(fault) => Outcome::Dead(fault),
    }
}

/// The same in the record, as JSON text.
fn member(field: FieldSettings, raw: &str) -> Outcome<String> {
    let payload = format!(r#"{{"id": "a", "v": {raw}}}"#);
    match kafka(&one_field(field), "d/x/x", payload.as_bytes()) {
        Outcome::Mapped((json, _)) => {
            let start = json.find("\"v\":").unwrap() + 4;
            Outcome::Mapped(json[start..].trim_end_matches('}').to_owned())
        }
        Outcome::Filtered => Outcome::Filtered,
        Outcome::Incomplete => Outcome::Incomplete,
        Outcome::Dead(fault) => Outcome::Dead(fault),
    }
}

fn parsed(text: &str) -> Json {
    serde_json::from_str(text).unwrap_or_else(|error| json!({ "unreadable": error.to_string() }))
}
