//! A telemetry node: MQTT streams are kept durably before they are acknowledged, and from there feed Kafka topics
//! and PostgreSQL tables.
//!
//! Where is a message at any moment? The number on an edge is the constant that bounds it.
//!
//! ```text
//!  MQTT broker                              the node (one process)
//!  ───────────   ┌────────────────────────────────────────────────────────────────────────────────┐
//!                │ stream::StreamReader           buffer's writer (one OS thread)                 │
//!   PUBLISH ───► │  session, unacknowledged ────► group ─► blocks ─► sled ─► fdatasync            │
//!                │  ≤ unacknowledged_messages_max │ ≤ group_messages_max  │                       │
//!                │            ≤ APPEND_QUEUE_BATCHES                      │                       │
//!   PUBACK  ◄─── │ ◄─────────── kept, in order ◄──────────────────────────┤                       │
//!                │                                                        ▼                       │
//!                │        tail in memory (≤ tail_bytes_max) · log of generations (≤ quota_bytes)  │
//!                │                                        │ pulled, never pushed                  │
//!                │            ┌───────────────────────────┼──────────────────┐                    │
//!                │            ▼                           ▼                  ▼                    │
//!                │  kafka::KafkaProducer        database::BatchWriter    BatchWriter …            │
//!                │  ≤ in_flight_max             ≤ batch_rows_max, batch_bytes_max                 │
//!                └────────────┬───────────────────────────┬──────────────────┬────────────────────┘
//!                             ▼                           ▼                  ▼
//!                        Kafka topic           rows + cursor, one transaction each
//! ```
//!
//! A sink that cannot take a record for a reason of the record's own writes it to the dead letters ([`buffer`]'s
//! state store) before its cursor passes it. Everything else waits in the log.
//!
//! Imports point down this list, never up; siblings talk by the types of [`domain`] and [`buffer`].

pub mod cli;
pub mod node;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub mod http;
pub mod migrate;

pub mod database;
pub mod kafka;
pub mod stream;

pub mod buffer;
pub mod mapping;
pub mod simulate;

mod crash;
pub mod observe;

pub mod certificates;
pub mod part;
pub mod private_file;
pub mod retry;
pub mod tls;

pub mod breaker;

pub mod config;
pub mod domain;
