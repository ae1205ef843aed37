//! The table writers against a real PostgreSQL: rows, books and cursors under everything a database does to them.

#[path = "database/bench.rs"]
mod bench;
#[path = "database/breaker.rs"]
mod breaker;
#[path = "database/faults.rs"]
mod faults;
#[path = "database/latest.rs"]
mod latest;
#[path = "database/outages.rs"]
mod outages;
#[path = "database/replay.rs"]
mod replay;
#[path = "database/rows.rs"]
mod rows;
