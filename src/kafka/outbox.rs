//! From a kept record to a Kafka record: mapped into reused memory, signed with its position.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rdkafka::message::{Header, OwnedHeaders};

use super::error::KafkaError;
use super::session::Outgoing;
use crate::config::StreamSettings;
use crate::domain::{Arrival, LogIdentity, Reason, Record, Sequence, Stage, TelemetryId};
use crate::mapping::{Fault, MappingError, Observed, Outcome, RecordMapper};

/// By it a consumer drops repeats.
pub const TELEMETRY_ID_HEADER: &str = "telemetry-id";
/// What a Kafka record takes on the wire beside key, value and header value: lengths, timestamp delta, header name.
pub(super) const RECORD_OVERHEAD_BYTES: usize = 128;

/// Maps one stream's records. Nothing is allocated per record but what librdkafka copies.
pub(super) struct Outbox {
    settings: StreamSettings,
    topic: String,
    mapper: RecordMapper,
    json: Vec<u8>,
    key: Vec<u8>,
    signature: Vec<u8>,
    /// Bytes of `signature` that stay: log and stream.
    signature_prefix: usize,
}

impl Outbox {
    pub fn new(
        settings: StreamSettings,
        topic: String,
        log: LogIdentity,
    ) -> Result<Self, KafkaError> {
        let mapper = compile(&settings)?;
        let id = TelemetryId { log, stream: &settings.name, sequence: Sequence::ZERO }.to_string();
        let signature_prefix = id.len() - 1;
        Ok(Outbox {
            topic,
            mapper,
            json: Vec::new(),
            key: Vec::new(),
            signature: id.into_bytes(),
            signature_prefix,
            settings,
        })
    }

    /// Maps the record; after `Mapped`, [`Outbox::outgoing`] has it. A panic of the mapping is the record's fault and
    /// costs a fresh mapper.
    pub fn map(&mut self, record: &Record<'_>) -> Result<Outcome<()>, KafkaError> {
        let (json, key) = (&mut self.json, &mut self.key);
        let mapper = &mut self.mapper;
        let map = || {
            fail::fail_point!(&format!("map_record_{}", record.topic));
            mapper.map(record, json, key)
        };
        match catch_unwind(AssertUnwindSafe(map)) {
            Ok(outcome) => Ok(outcome),
            Err(_) => {
                self.mapper = compile(&self.settings)?;
                Ok(Outcome::Dead(Fault {
                    stage: Stage::Map,
                    reason: Reason::Panicked,
                    field: None,
                    detail: "the mapping panicked on this message".to_owned(),
                }))
            }
        }
    }

    /// Size of the mapped record as the brokers count it.
    pub fn wire_bytes(&self) -> usize {
        self.json.len() + self.key.len() + self.signature.len() + RECORD_OVERHEAD_BYTES
    }

    /// The record mapped last.
    pub fn outgoing(
        &mut self,
        sequence: Sequence,
        arrival: Arrival,
        opaque: usize,
    ) -> Outgoing<'_> {
        self.signature.truncate(self.signature_prefix);
        let mut digits = itoa::Buffer::new();
        self.signature.extend_from_slice(digits.format(sequence.0).as_bytes());
        let signature = Header { key: TELEMETRY_ID_HEADER, value: Some(self.signature.as_slice()) };
        Outgoing::with_opaque_to(&self.topic, opaque)
            .key(&self.key)
            .payload(&self.json)
            .timestamp(arrival.as_micros().div_euclid(1000))
            .headers(OwnedHeaders::new_with_capacity(1).insert(signature))
    }

    pub fn observed(&mut self) -> Observed {
        self.mapper.observed()
    }
}

fn compile(settings: &StreamSettings) -> Result<RecordMapper, KafkaError> {
    RecordMapper::compile(settings).map_err(|errors: Vec<MappingError>| KafkaError::Mapping {
        stream: settings.name.to_string(),
        problem: errors.iter().map(MappingError::to_string).collect::<Vec<_>>().join("; "),
    })
}

/// Larger than the brokers take.
pub(super) fn too_large(bytes: usize, limit: usize) -> Fault {
    let error = KafkaError::TooLarge { bytes, limit };
    Fault {
        stage: Stage::Deliver,
        reason: Reason::KafkaTooLarge,
        field: None,
        detail: error.to_string(),
    }
}
