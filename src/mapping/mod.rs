//! One definition per stream, compiled once, yields the Kafka record *and* the table rows. Pure: bytes in, values out.

use crate::config::{FieldType, StreamSettings, TableSettings};
use crate::domain::{Reason, Record, Stage};

/// A mapping that cannot be compiled: named by field and rule. `check` reports all of a stream's at once.
#[derive(Debug, Clone, thiserror::Error)]
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

/// Makes Kafka records of one stream. Owns its scratch memory: one per sink, not shared.
pub struct RecordMapper {}

impl RecordMapper {
    pub fn compile(stream: &StreamSettings) -> Result<Self, Vec<MappingError>> {
        todo!()
    }

    /// Writes the JSON record to `json` and the device id to `key` (both cleared first).
    pub fn map(
        &mut self,
        record: &Record<'_>,
        json: &mut Vec<u8>,
        key: &mut Vec<u8>,
    ) -> Outcome<()> {
        todo!()
    }

    pub fn observed(&mut self) -> Observed {
        todo!()
    }
}

/// Makes rows of one table. Owns its scratch memory.
pub struct RowMapper {}

/// A column the mapping fills, in the order of `Row::values`.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    pub name: String,
    pub field: String,
    pub field_type: FieldType,
    /// The mapping never yields NULL for it.
    pub required: bool,
}

impl RowMapper {
    pub fn compile(
        stream: &StreamSettings,
        table: &TableSettings,
    ) -> Result<Self, Vec<MappingError>> {
        todo!()
    }

    pub fn columns(&self) -> &[Column] {
        todo!()
    }

    /// The values of the record's row, one per column, valid until the next call.
    pub fn map<'m>(&'m mut self, record: &'m Record<'_>) -> Outcome<&'m [Value<'m>]> {
        todo!()
    }

    pub fn observed(&mut self) -> Observed {
        todo!()
    }
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

/// For `telemetry check --explain`: what each rule made of one message.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Explanation {}

/// Explains one message for every use of the stream.
pub fn explain(
    stream: &StreamSettings,
    record: &Record<'_>,
) -> Result<Explanation, Vec<MappingError>> {
    todo!()
}
