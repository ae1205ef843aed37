//! PostgreSQL and TimescaleDB: rows and cursor in one transaction.

mod connect;
mod error;
pub mod maintenance;

pub use connect::connect;
pub use error::{DatabaseError, postgres};
