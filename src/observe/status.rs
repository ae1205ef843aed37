//! What the board shows: the plain values a part writes and everybody else reads.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::config::{StreamSettings, TableKind};
use crate::domain::{Arrival, Books, Sequence, SinkName};

/// What the whole process says of itself.
#[derive(Debug, Clone, Default, Serialize)]
pub struct NodeStatus {
    pub name: String,
    pub log_identity: String,
    /// Started and not yet draining.
    pub running: bool,
    pub draining: bool,
    /// How often the wall clock was set since the start.
    pub clock_jumps_forward: u64,
    pub clock_jumps_backward: u64,
}

/// The buffer, as its writer sees it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct BufferStatus {
    /// False while the quota, the disk or a failed sync keeps it from taking messages.
    pub accepting: bool,
    /// Why not, for people.
    pub refusing_because: Option<String>,
    /// A thread of it that has work and makes no progress.
    pub stalled_thread: Option<&'static str>,
    pub bytes: u64,
    pub quota_bytes: u64,
    pub generations: u64,
    pub quarantined: u64,
    /// Steps of its opening that are done: while they become more, a long one is not stuck.
    #[serde(skip)]
    pub opening_steps: u64,
    /// Records that the disk lost, by stream.
    pub lost: BTreeMap<String, u64>,
    /// Dead letters that the disk lost, by stream and sink.
    pub dead_letters_lost: BTreeMap<String, BTreeMap<String, u64>>,
    pub free_bytes: u64,
    pub filesystem_bytes: u64,
    pub dead_letter_bytes: u64,
    pub dead_letter_quota_bytes: u64,
    /// Dead letters not yet copied, by the Kafka cluster that is to have a copy of each.
    pub dead_letter_copies_waiting: BTreeMap<String, u64>,
}

/// One supervised part.
#[derive(Debug, Clone, Default, Serialize, serde::Deserialize)]
pub struct PartStatus {
    pub state: PartState,
    pub restarts: u64,
    pub stalls: u64,
    pub last_failure: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartState {
    #[default]
    Running,
    /// Waiting out its back-off before a fresh start.
    Restarting,
    /// Failed too often: tried again slowly, or by hand.
    Parked,
    Paused,
    Finished,
}

/// What a stream's reader shows.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StreamStatus {
    pub connected: bool,
    /// The subscription is granted: only now is the stream active.
    pub subscribed: bool,
    pub granted_qos: Option<u8>,
    /// What the configuration asks for; a lower granted one may lose what is under way.
    pub asked_qos: u8,
    pub unacknowledged: usize,
    /// At this many the socket is not read.
    pub unacknowledged_max: usize,
    /// Of this life or an earlier one.
    pub last_message: Option<Arrival>,
    /// When that was, by the clock that is never set; from the start of the node while there is none.
    #[serde(skip)]
    pub heard: Option<Instant>,
    /// When the node began to listen.
    pub since: Option<Arrival>,
    /// The last durable record.
    pub sequence: Sequence,
    /// Why it is not receiving, for people.
    pub trouble: Option<String>,
    /// Members of payloads that no mapping uses, with how often they were seen; bounded.
    pub unmapped: BTreeMap<String, u64>,
    /// From the configuration: (severity, seconds).
    pub silence_limits_seconds: Vec<(&'static str, f64)>,
}

/// A stream is longer without a message than the configuration allows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Silence {
    pub severity: &'static str,
    pub limit_seconds: f64,
    pub silent_seconds: f64,
}

impl Silence {
    pub const CRITICAL: &str = "critical";
}

impl StreamStatus {
    /// The most severe limit that is passed. A stream that is not subscribed is another matter.
    pub fn silence(&self) -> Option<Silence> {
        let silent_seconds = self.heard?.elapsed().as_secs_f64();
        let limits = self.silence_limits_seconds.iter().filter(|_| self.subscribed);
        let mut from_severest = limits.rev();
        let (severity, limit_seconds) =
            *from_severest.find(|(_, limit)| silent_seconds > *limit)?;
        Some(Silence { severity, limit_seconds, silent_seconds })
    }

    /// A message came, or is known to have come at `arrival` in an earlier life.
    pub fn heard_at(&mut self, arrival: Arrival) {
        let age = Arrival::now().as_micros().saturating_sub(arrival.as_micros());
        let age = Duration::from_micros(u64::try_from(age).unwrap_or(0));
        let now = Instant::now();
        self.last_message = Some(arrival);
        self.heard = Some(now.checked_sub(age).unwrap_or(now));
    }
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DisconnectReason {
    Network,
    Keepalive,
    Refused,
    Takeover,
    Tls,
    Protocol,
    Stop,
}

impl DisconnectReason {
    pub const ALL: [DisconnectReason; 7] = [
        DisconnectReason::Network,
        DisconnectReason::Keepalive,
        DisconnectReason::Refused,
        DisconnectReason::Takeover,
        DisconnectReason::Tls,
        DisconnectReason::Protocol,
        DisconnectReason::Stop,
    ];

    pub fn code(self) -> &'static str {
        match self {
            DisconnectReason::Network => "network",
            DisconnectReason::Keepalive => "keepalive",
            DisconnectReason::Refused => "refused",
            DisconnectReason::Takeover => "takeover",
            DisconnectReason::Tls => "tls",
            DisconnectReason::Protocol => "protocol",
            DisconnectReason::Stop => "stop",
        }
    }
}

/// Why a message was acknowledged and not kept again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Redelivery {
    Dup,
    Retained,
    MessageId,
}

impl Redelivery {
    pub const ALL: [Redelivery; 3] = [Redelivery::Dup, Redelivery::Retained, Redelivery::MessageId];

    pub fn code(self) -> &'static str {
        match self {
            Redelivery::Dup => "dup",
            Redelivery::Retained => "retained",
            Redelivery::MessageId => "message_id",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SinkKind {
    Kafka,
    Append,
    Latest,
}

impl SinkKind {
    pub(super) fn of(stream: &StreamSettings, sink: &SinkName) -> Self {
        match stream.tables.get(sink).map(|table| &table.kind) {
            None => SinkKind::Kafka,
            Some(TableKind::Append { .. }) => SinkKind::Append,
            Some(TableKind::Latest { .. }) => SinkKind::Latest,
        }
    }

    pub fn code(self) -> &'static str {
        match self {
            SinkKind::Kafka => "kafka",
            SinkKind::Append => "append",
            SinkKind::Latest => "latest",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SinkState {
    Delivering,
    /// The outside is away; it is tried again by itself.
    #[default]
    Waiting,
    /// A person must mend something; tried again slowly.
    Held,
    Parked,
    Paused,
    /// Another writer moved this sink's cursor: this one stopped writing.
    Fenced,
}

impl SinkState {
    pub const ALL: [SinkState; 6] = [
        SinkState::Delivering,
        SinkState::Waiting,
        SinkState::Held,
        SinkState::Parked,
        SinkState::Paused,
        SinkState::Fenced,
    ];

    pub fn code(self) -> &'static str {
        match self {
            SinkState::Delivering => "delivering",
            SinkState::Waiting => "waiting",
            SinkState::Held => "held",
            SinkState::Parked => "parked",
            SinkState::Paused => "paused",
            SinkState::Fenced => "fenced",
        }
    }
}

/// What a sink shows of one stream.
#[derive(Debug, Clone, Serialize)]
pub struct SinkStatus {
    pub kind: SinkKind,
    pub state: SinkState,
    /// Why it is not delivering and what to do, for people.
    pub trouble: Option<String>,
    /// `None` until the durable cursor has been read.
    pub books: Option<Books>,
    /// Arrival of the first record behind the cursor.
    pub oldest_pending: Option<Arrival>,
    /// Arrival of the newest record delivered.
    pub newest_delivered: Option<Arrival>,
    pub last_success: Option<Arrival>,
    /// Dead letters waiting for a person.
    pub dead_letters: u64,
}
