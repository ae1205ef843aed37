//! A message a sink could not take for a reason of the message's own. Kept with its original bytes until a person
//! replays or purges it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Arrival, DeliveryFlags, Record, Sequence, SinkName, StreamName};

/// One dead letter per sink and record: the same message may be fine for another sink.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeadLetterKey {
    pub sink: SinkName,
    pub stream: StreamName,
    pub sequence: Sequence,
}

/// `stream/sink/sequence`, as people write it.
impl fmt::Display for DeadLetterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.stream, self.sink, self.sequence)
    }
}

/// Where on its way the message was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Size, UTF-8, JSON.
    Decode,
    /// Device id, conversion, range.
    Map,
    /// Refused by the sink itself.
    Deliver,
}

impl Stage {
    /// Its JSON form.
    pub fn code(self) -> &'static str {
        match self {
            Stage::Decode => "decode",
            Stage::Map => "map",
            Stage::Deliver => "deliver",
        }
    }
}

/// Why; a closed list, because it labels a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Empty,
    TooLarge,
    NotUtf8,
    NotJson,
    TooDeep,
    NotAnObject,
    NoDeviceId,
    WrongType,
    NotInValueMap,
    FractionRefused,
    NotFinite,
    OutOfRange,
    NulInText,
    BadTimestamp,
    SchemaViolation,
    /// SQLSTATE class 22, 23, 54 or P0001.
    DatabaseRefused,
    /// Larger than the Kafka broker takes.
    KafkaTooLarge,
    KafkaRefused,
    /// The part panicked on this record each time.
    Panicked,
    Other,
}

impl Reason {
    /// Every reason, in the order they are listed to people and exported as label values.
    pub const ALL: [Reason; 20] = [
        Reason::Empty,
        Reason::TooLarge,
        Reason::NotUtf8,
        Reason::NotJson,
        Reason::TooDeep,
        Reason::NotAnObject,
        Reason::NoDeviceId,
        Reason::WrongType,
        Reason::NotInValueMap,
        Reason::FractionRefused,
        Reason::NotFinite,
        Reason::OutOfRange,
        Reason::NulInText,
        Reason::BadTimestamp,
        Reason::SchemaViolation,
        Reason::DatabaseRefused,
        Reason::KafkaTooLarge,
        Reason::KafkaRefused,
        Reason::Panicked,
        Reason::Other,
    ];

    /// The label value, also its JSON form.
    pub fn code(self) -> &'static str {
        match self {
            Reason::Empty => "empty",
            Reason::TooLarge => "too_large",
            Reason::NotUtf8 => "not_utf8",
            Reason::NotJson => "not_json",
            Reason::TooDeep => "too_deep",
            Reason::NotAnObject => "not_an_object",
            Reason::NoDeviceId => "no_device_id",
            Reason::WrongType => "wrong_type",
            Reason::NotInValueMap => "not_in_value_map",
            Reason::FractionRefused => "fraction_refused",
            Reason::NotFinite => "not_finite",
            Reason::OutOfRange => "out_of_range",
            Reason::NulInText => "nul_in_text",
            Reason::BadTimestamp => "bad_timestamp",
            Reason::SchemaViolation => "schema_violation",
            Reason::DatabaseRefused => "database_refused",
            Reason::KafkaTooLarge => "kafka_too_large",
            Reason::KafkaRefused => "kafka_refused",
            Reason::Panicked => "panicked",
            Reason::Other => "other",
        }
    }
}

/// Everything a person needs to judge it, and everything a replay needs to deliver it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    pub key: DeadLetterKey,
    pub topic: String,
    /// The bytes as received.
    pub payload: Vec<u8>,
    /// When the message arrived: a replay keeps it.
    pub arrival: Arrival,
    /// When it was set aside.
    pub dead_at: Arrival,
    pub stage: Stage,
    pub reason: Reason,
    /// For people: field, value, rule. Never a secret.
    pub detail: String,
    pub sqlstate: Option<String>,
    /// The column or field concerned.
    pub column: Option<String>,
    /// Deliveries tried, this one included.
    pub attempts: u32,
    pub retain: bool,
}

impl DeadLetter {
    /// The record it was made from, for a replay through the current mapping.
    pub fn record(&self) -> Record<'_> {
        Record {
            sequence: self.key.sequence,
            arrival: self.arrival,
            topic: &self.topic,
            payload: &self.payload,
            flags: DeliveryFlags { retain: self.retain, ..DeliveryFlags::default() },
            packet_id: 0,
        }
    }
}
