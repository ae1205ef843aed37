//! PostgreSQL and TimescaleDB: rows and cursor in one transaction.
//!
//! ```text
//!  buffer ──► Source ──► Batch ──► Target ──► one transaction: rows · books · cursor (last)
//!             maps,      rows and  segment by       │
//!             converts   specials  segment          └─► refused row ──► dead letter, stored first
//! ```
//!
//! [`BatchWriter`] is the part that drives it; [`replay`] gives a dead letter a second chance beside it.

mod append;
mod batch;
mod blame;
pub mod bookkeeping;
mod catalog;
mod connect;
mod cursor;
mod encode;
mod error;
mod fold;
mod halves;
mod latest;
pub mod maintenance;
mod pace;
mod pool;
mod probe;
mod refusal;
mod replay;
mod rights;
mod savepoints;
mod source;
mod sql;
mod steps;
mod table_sink;
mod target;
mod transaction;
mod upserts;
mod waiting;
mod writer;

pub use connect::connect;
pub use error::{DatabaseError, postgres};
pub use pool::{Lease, Pool};
pub use probe::probe;
pub use replay::{ReplayOutcome, replay};
pub use table_sink::TableSink;
pub use writer::BatchWriter;
