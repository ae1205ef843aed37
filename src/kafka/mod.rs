//! Kafka: every kept record into its topic, in order per key, none left out.
//!
//! One idempotent producer per cluster serves all streams routed to it ([`KafkaProducer`]); each stream has its own
//! lane, its own bound on what is in flight and its own cursor, so that one that is held does not hold the others.
//! The cursor moves over the prefix that is settled without a hole, and never before that is durable in the state
//! store: a crash repeats the short unconfirmed tail, which a consumer drops by the header
//! [`TELEMETRY_ID_HEADER`].
//!
//! A delivery that fails for good must stop what is queued behind it, or later records would pass it. The shared
//! producer therefore ends at the first such failure (`enable.gapless.guarantee`), and librdkafka never lets a record
//! expire (`message.timeout.ms` = 0); lanes send again from their cursors over a fresh producer. The lane to blame
//! goes on with a producer of its own, one record at a time, until it is past the bad record, which becomes a dead
//! letter, or past the trouble.

mod client_config;
mod copies;
mod delivery;
mod error;
mod health;
mod lane;
mod ledger;
mod outbox;
mod probe;
mod producer;
mod replay;
mod reports;
mod session;
mod topics;
mod window;

pub use client_config::refused_settings;
pub use error::{Access, KafkaError};
pub use outbox::TELEMETRY_ID_HEADER;
pub use probe::probe;
pub use producer::{KafkaParts, KafkaProducer, Routes, lane_basis};
pub use replay::{KafkaReplayer, ReplayOutcome, ReplayerParts};
