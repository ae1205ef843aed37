//! Migrations, partitions, retention and roll-ups against a real PostgreSQL.

#[path = "migrate/database.rs"]
mod database;
#[path = "migrate/drafts.rs"]
mod drafts;
#[path = "migrate/files.rs"]
mod files;
#[path = "migrate/part.rs"]
mod part;
#[path = "migrate/partitions.rs"]
mod partitions;
#[path = "migrate/rollups.rs"]
mod rollups;
#[path = "migrate/timescale.rs"]
mod timescale;
