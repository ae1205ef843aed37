//! The node's own tables: where each sink stands, what was replayed, what each latest-state row has seen.

use std::time::Duration;

use super::sql::qualified;

const CURSORS: &str = "telemetry_cursors";
const REPLAYED: &str = "telemetry_replayed";
const SEEN: &str = "telemetry_latest_seen";

/// What whoever writes rows does to each of them.
pub const RIGHTS: [(&str, &[&str]); 3] = [
    (CURSORS, &["SELECT", "INSERT", "UPDATE"]),
    (REPLAYED, &["SELECT", "INSERT"]),
    (SEEN, &["SELECT", "INSERT", "UPDATE"]),
];

/// One statement each, safe to repeat, for a schema that exists. The migrator runs them before any migration of the
/// operator's.
pub fn statements(schema: &str) -> Vec<String> {
    let cursors = cursors(schema);
    let replayed = replayed(schema);
    let seen = latest_seen(schema);
    vec![
        // One row per sink, updated with each batch: room in the page keeps these updates out of the index.
        format!(
            "CREATE TABLE IF NOT EXISTS {cursors} (\
             node text NOT NULL, log text NOT NULL, stream text NOT NULL, sink text NOT NULL, \
             sequence bigint NOT NULL, base bigint NOT NULL, \
             delivered bigint NOT NULL DEFAULT 0, filtered bigint NOT NULL DEFAULT 0, \
             incomplete bigint NOT NULL DEFAULT 0, dead_lettered bigint NOT NULL DEFAULT 0, \
             lost bigint NOT NULL DEFAULT 0, unchanged bigint NOT NULL DEFAULT 0, \
             stale bigint NOT NULL DEFAULT 0, updated_at timestamptz NOT NULL DEFAULT now(), \
             PRIMARY KEY (node, log, stream, sink)) WITH (fillfactor = 20)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {replayed} (\
             log text NOT NULL, stream text NOT NULL, sink text NOT NULL, sequence bigint NOT NULL, \
             replayed_at timestamptz NOT NULL DEFAULT now(), \
             PRIMARY KEY (log, stream, sink, sequence))"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {seen} (\
             sink text NOT NULL, key text NOT NULL, seen_at timestamptz NOT NULL, \
             log text, sequence bigint, PRIMARY KEY (sink, key)) WITH (fillfactor = 70)"
        ),
    ]
}

/// Asks for a table (`$1`) whether it has what one of the first versions lacks. To alter one, be it in vain, is its owner's
/// alone, and waits for everyone who uses it.
pub const IS_WHOLE: &str = "SELECT FROM pg_attribute \
     WHERE attrelid = to_regclass($1) AND attname = 'sequence' AND NOT attisdropped";

/// Behind a long query a table that is altered would wait, and every writer behind it: the next attempt comes soon.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Adds to [`latest_seen`] what it lacks.
pub fn addition(schema: &str) -> String {
    format!(
        "SET LOCAL lock_timeout TO {}; ALTER TABLE {} ADD COLUMN log text, ADD COLUMN sequence bigint",
        LOCK_TIMEOUT.as_millis(),
        latest_seen(schema)
    )
}

/// The cursor and books of each sink.
pub fn cursors(schema: &str) -> String {
    qualified(schema, CURSORS)
}

/// The ledger that makes a replay happen once.
pub fn replayed(schema: &str) -> String {
    qualified(schema, REPLAYED)
}

/// The newest message each latest-state row has seen; `sink` holds `<stream>/<sink>`.
pub fn latest_seen(schema: &str) -> String {
    qualified(schema, SEEN)
}
