//! One definition per stream, compiled once, yields the Kafka record *and* the table rows. Pure: bytes in, values out.
//!
//! `scan` finds the raw values in one pass over the payload, `plan` decides whether the message counts, `convert`
//! makes typed values of raw ones by the `rule` of each field, `record` and `row` write them down.

mod clock;
mod convert;
mod decimal;
mod explain;
mod path;
mod plan;
mod record;
mod row;
mod rule;
mod scan;
#[cfg(test)]
mod tests;

pub use explain::{Explanation, FieldTrace, UseExplanation, explain};
pub use path::write_at;
pub use record::RecordMapper;
pub use row::RowMapper;

use crate::config::FieldType;
use crate::domain::{
    Arrival, DeadLetter, DeadLetterKey, Reason, Record, SinkName, Stage, StreamName,
};

/// A value in a detail text is cut here, in characters.
const SHOWN_CHARACTERS_MAX: usize = 80;

/// The text, or its beginning with an ellipsis.
fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARACTERS_MAX) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// A mapping that cannot be compiled: named by field and rule. `check` reports all of a stream's at once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field:?}: {problem}")]
pub struct MappingError {
    pub field: String,
    pub problem: String,
}

/// What became of one record for one use.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome<T> {
    Mapped(T),
    Filtered,
    Incomplete,
    Dead(Fault),
}

/// Why a record is a dead letter for a use.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    pub stage: Stage,
    pub reason: Reason,
    /// The field (record) or column (table) concerned.
    pub field: Option<String>,
    /// Value and rule, for people; a long value is cut.
    pub detail: String,
}

impl Fault {
    /// The dead letter of `record` for one sink; `sqlstate` when it was the server that refused it.
    pub fn into_letter(
        self,
        stream: &StreamName,
        sink: &SinkName,
        record: &Record<'_>,
        sqlstate: Option<String>,
    ) -> DeadLetter {
        let (sink, stream) = (sink.clone(), stream.clone());
        DeadLetter {
            key: DeadLetterKey { sink, stream, sequence: record.sequence },
            topic: record.topic.to_owned(),
            payload: record.payload.to_vec(),
            arrival: record.arrival,
            dead_at: Arrival::now(),
            stage: self.stage,
            reason: self.reason,
            detail: self.detail,
            sqlstate,
            column: self.field,
            attempts: 1,
            retain: record.flags.retain,
        }
    }
}

/// One value of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    Null,
    Bool(bool),
    /// Fits its column: range-checked for `Int2`, `Int4`, `Int8`.
    Int(i64),
    Float(f64),
    Text(std::borrow::Cow<'a, str>),
    /// Microseconds since 1970.
    Timestamp(i64),
}

impl<T> From<plan::Stop> for Outcome<T> {
    fn from(stop: plan::Stop) -> Self {
        match stop {
            plan::Stop::Filtered => Outcome::Filtered,
            plan::Stop::Incomplete => Outcome::Incomplete,
            plan::Stop::Dead(fault) => Outcome::Dead(fault),
        }
    }
}

/// A column the mapping fills, in the order of `Row::values`.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    pub name: String,
    pub field: String,
    pub field_type: FieldType,
    /// The mapping never yields NULL for it.
    pub required: bool,
}

/// What a mapper saw beside its values since it was last asked: taken once per batch.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Payload members no field uses (dotted path) and how often; at most 100 names.
    pub unmapped: Vec<(String, u64)>,
    pub device_time_invalid: u64,
    pub out_of_range: u64,
    /// Records mapped while counting these.
    pub mapped: u64,
}
