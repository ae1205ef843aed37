//! What a time series table needs beside its rows: partitions ahead of them, old ones dropped, scheduled functions
//! called. Plain PostgreSQL does none of this by itself, and TimescaleDB's background policies have been seen to fail on
//! every run, so the node makes each of these calls on a connection of its own.

mod jobs;
mod partitions;
mod retention;
mod slots;
mod sql;
mod tier;

pub use jobs::run_job;
pub(crate) use partitions::make_partitions;
pub use partitions::{TableShape, ensure_partitions, shape};
pub use retention::{Dropped, apply_retention};
pub use sql::{prepare_session, quoted_path};
pub use tier::{Tier, detect_tier};

pub use super::sql::quoted;
