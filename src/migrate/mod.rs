//! Numbered SQL files bring a database to the shape its writers need, before they write: each file once, in order, in
//! one transaction, under a lock against a second node. Then the same part keeps the tables in shape.
//!
//! The decision ([`plan`]) is a pure function of the files and the ledger; [`apply`] carries it out; [`Migrator`] is the
//! supervised part that waits for the database, retries, and opens the gate of the database's writers.

mod apply;
mod draft;
mod error;
mod migrator;
mod plan;
mod source;
mod upkeep;

pub use apply::{Session, Standing};
pub use draft::{Draft, draft};
pub use error::MigrateError;
pub use migrator::Migrator;
pub use plan::{Applied, Migration, Plan, Refusal, plan};
pub use source::{SourceFile, next_number, read_folder};
