//! Drops what is older than a table's retention.

use std::time::{Duration, SystemTime};

use tokio_postgres::Client;

use super::partitions::{TableShape, partitions, shape};
use super::tier::Tier;
use crate::config::{DatabaseSettings, TableKind, TableSettings};
use crate::database::error::{DatabaseError, postgres};
use crate::database::sql::{qualified, quoted};
use crate::domain::Arrival;

/// Dropping locks the table for a moment. Behind a long query it would wait, and every writer behind it: it gives up
/// instead and the next round tries again.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// What one round did for one table.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Partitions or chunks.
    pub names: Vec<String>,
    /// Retention is configured but the table is one heap: only people can divide it.
    pub not_partitioned: bool,
}

/// Drops the partitions (chunks) whose whole range is older than the table's retention.
pub async fn apply_retention(
    client: &Client,
    settings: &DatabaseSettings,
    tier: &Tier,
    table: &TableSettings,
) -> Result<Dropped, DatabaseError> {
    let TableKind::Append { retention: Some(retention), .. } = &table.kind else {
        return Ok(Dropped::default());
    };
    let cutoff = cutoff_micros(client, *retention).await?;
    match shape(client, settings, &table.table).await? {
        TableShape::Partitioned => drop_partitions(client, settings, &table.table, cutoff).await,
        TableShape::Hypertable => drop_chunks(client, settings, tier, &table.table, cutoff).await,
        TableShape::Plain => Ok(Dropped { names: Vec::new(), not_partitioned: true }),
        TableShape::Missing => Ok(Dropped::default()),
    }
}

/// By whichever clock is behind, the node's or the database's: one that leapt ahead must not delete everything.
async fn cutoff_micros(client: &Client, retention: Duration) -> Result<i64, DatabaseError> {
    let row = client.query_one("SELECT now()", &[]).await.map_err(postgres("read the clock"))?;
    let since = row.get::<_, SystemTime>(0).duration_since(SystemTime::UNIX_EPOCH);
    let theirs = i64::try_from(since.unwrap_or_default().as_micros()).unwrap_or(i64::MAX);
    let kept = i64::try_from(retention.as_micros()).unwrap_or(i64::MAX);
    Ok(theirs.min(Arrival::now().as_micros()).saturating_sub(kept))
}

async fn drop_partitions(
    client: &Client,
    settings: &DatabaseSettings,
    table: &str,
    cutoff: i64,
) -> Result<Dropped, DatabaseError> {
    let mut dropped = Dropped::default();
    for partition in partitions(client, settings, table).await? {
        if partition.slot.is_some_and(|slot| slot.end <= cutoff) {
            let sql = format!(
                "SET LOCAL lock_timeout TO {}; DROP TABLE {}.{}",
                LOCK_TIMEOUT.as_millis(),
                quoted(&partition.schema),
                quoted(&partition.name)
            );
            client.batch_execute(&sql).await.map_err(postgres("drop an old partition"))?;
            dropped.names.push(partition.name);
        }
    }
    Ok(dropped)
}

/// Our own call, whatever policies there are: a policy's job may fail on every run, and this works in every tier that has
/// hypertables.
async fn drop_chunks(
    client: &Client,
    settings: &DatabaseSettings,
    tier: &Tier,
    table: &str,
    cutoff: i64,
) -> Result<Dropped, DatabaseError> {
    let Some(extension) = tier.schema() else { return Ok(Dropped::default()) };
    let sql = drop_chunks_sql(extension);
    let hypertable = qualified(&settings.schema, table);
    let rows = client.query(&sql, &[&hypertable, &cutoff]).await;
    let rows = rows.map_err(postgres("drop old chunks"))?;
    Ok(Dropped { names: rows.iter().map(|row| row.get(0)).collect(), not_partitioned: false })
}

fn drop_chunks_sql(extension_schema: &str) -> String {
    format!(
        "SELECT chunk::text FROM {}.drop_chunks($1::text::regclass, \
         older_than => to_timestamp($2::bigint / 1000000)) AS chunk",
        quoted(extension_schema)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_dropped_by_a_call_of_our_own() {
        assert_eq!(
            drop_chunks_sql("public"),
            "SELECT chunk::text FROM \"public\".drop_chunks($1::text::regclass, older_than => \
             to_timestamp($2::bigint / 1000000)) AS chunk"
        );
    }
}
