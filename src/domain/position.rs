//! Positions in a stream's log, told apart by how safe they are: appended ≥ durable ≥ delivered.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The number of a kept record in its stream: contiguous, starting at 1, never reused. 0 stands before the first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Sequence(pub u64);

impl Sequence {
    /// Before the first record.
    pub const ZERO: Sequence = Sequence(0);

    pub fn next(self) -> Sequence {
        Sequence(self.0 + 1)
    }

    /// The one before; zero stays zero.
    pub fn previous(self) -> Sequence {
        Sequence(self.0.saturating_sub(1))
    }

    /// How many records lie in `(earlier, self]`; 0 when `earlier` is not earlier.
    pub fn since(self, earlier: Sequence) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceRange {
    pub first: Sequence,
    pub last: Sequence,
}

impl SequenceRange {
    pub fn count(self) -> u64 {
        self.last.since(self.first) + 1
    }
}

impl fmt::Display for SequenceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.first, self.last)
    }
}

/// Handed to sled, maybe not yet on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Appended(pub Sequence);

/// On stable storage: may be acknowledged and delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Durable(pub Sequence);

/// Passed by one sink: delivered, filtered or dead-lettered there, confirmed by the sink's own durable cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Delivered(pub Sequence);

/// Which log a sequence belongs to: made with the buffer, so that a node with a fresh buffer, which counts from 1
/// again, is not mistaken for its predecessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LogIdentity(pub Uuid);

impl fmt::Display for LogIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// `<log identity>/<stream>/<sequence>`: the Kafka header `telemetry-id` by which a consumer drops repeats.
#[derive(Debug, Clone, Copy)]
pub struct TelemetryId<'a> {
    pub log: LogIdentity,
    pub stream: &'a super::StreamName,
    pub sequence: Sequence,
}

impl fmt::Display for TelemetryId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.log, self.stream, self.sequence)
    }
}
