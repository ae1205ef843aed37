//! A kept record as sinks see it: a view into a block, nothing copied.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Sequence;

/// When a message arrived: microseconds since 1970-01-01 UTC. It becomes `ts` of the record and `time` of the row.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Arrival(pub i64);

impl Arrival {
    /// The wall clock, now. A clock before 1970 counts as 1970.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arrival(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    pub fn as_micros(self) -> i64 {
        self.0
    }
}

/// How the broker handed the message over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeliveryFlags {
    /// 0 or 1 (a subscription never asks for 2).
    pub qos: u8,
    pub retain: bool,
    pub dup: bool,
    /// Only the first bytes were kept: the message was larger than `max_packet_bytes`.
    pub truncated: bool,
}

/// One kept message: the raw payload as received, so that a wrong mapping can be corrected and replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    pub sequence: Sequence,
    pub arrival: Arrival,
    /// UTF-8 by the protocol; a topic that is not ends as a protocol error before it is kept.
    pub topic: &'a str,
    pub payload: &'a [u8],
    pub flags: DeliveryFlags,
    /// 0 with QoS 0.
    pub packet_id: u16,
}
