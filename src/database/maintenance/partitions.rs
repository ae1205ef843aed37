//! Makes partitions.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::slots::{self, Slot};
use crate::config::{DatabaseSettings, TableKind, TableSettings};
use crate::database::error::{DatabaseError, postgres};
use crate::database::sql::{qualified, quoted};

/// One call makes no more than this; a range that needs more comes from a clock that was wrong, not from traffic.
const PARTITIONS_MAX: i64 = 1000;

/// Attempts before it is said that something else is in the way: another node making the same partitions loses us one.
const ROUNDS_MAX: usize = 3;

/// What a configured table is in the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableShape {
    /// `PARTITION BY RANGE`: the node makes and drops partitions.
    Partitioned,
    /// TimescaleDB makes the chunks; the node drops them.
    Hypertable,
    /// One heap; nothing to make, and no retention.
    Plain,
    Missing,
}

/// A partition of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Partition {
    pub schema: String,
    pub name: String,
    /// The default partition has none.
    pub slot: Option<Slot>,
}

/// Looks a table up in the catalog.
pub async fn shape(
    client: &Client,
    settings: &DatabaseSettings,
    table: &str,
) -> Result<TableShape, DatabaseError> {
    let kind = "SELECT c.relkind = 'p' AND p.partstrat = 'r', to_regclass('timescaledb_information.hypertables') \
                IS NOT NULL FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                LEFT JOIN pg_partitioned_table p ON p.partrelid = c.oid \
                WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')";
    let look_up = "look the table up";
    let row = client.query_opt(kind, &[&settings.schema, &table]).await;
    let Some(row) = row.map_err(postgres(look_up))? else { return Ok(TableShape::Missing) };
    if row.get::<_, Option<bool>>(0) == Some(true) {
        return Ok(TableShape::Partitioned);
    }
    if row.get::<_, bool>(1) {
        let hypertable = "SELECT FROM timescaledb_information.hypertables \
                          WHERE hypertable_schema = $1 AND hypertable_name = $2";
        let row = client.query_opt(hypertable, &[&settings.schema, &table]).await;
        if row.map_err(postgres(look_up))?.is_some() {
            return Ok(TableShape::Hypertable);
        }
    }
    Ok(TableShape::Plain)
}

/// Makes every missing partition of an append table that `[from_micros, to_micros]` (since 1970, both ends included)
/// needs. Nothing to do for a hypertable, a plain table, or a table of latest state. Safe when several nodes do it at
/// once; readers and writers of the table are not blocked.
///
/// # Errors
/// `Standing` when the table is missing, when the range needs an absurd number of partitions (a writer with rows from a
/// wrong clock calls this row by row), or when something that is no partition has a partition's name.
pub async fn ensure_partitions(
    client: &Client,
    settings: &DatabaseSettings,
    table: &TableSettings,
    from_micros: i64,
    to_micros: i64,
) -> Result<(), DatabaseError> {
    make_partitions(client, settings, table, from_micros, to_micros).await.map(drop)
}

/// As [`ensure_partitions`]; answers with the names of those it made.
pub(crate) async fn make_partitions(
    client: &Client,
    settings: &DatabaseSettings,
    table: &TableSettings,
    from_micros: i64,
    to_micros: i64,
) -> Result<Vec<String>, DatabaseError> {
    let TableKind::Append { partition, .. } = &table.kind else { return Ok(Vec::new()) };
    match shape(client, settings, &table.table).await? {
        TableShape::Partitioned => {}
        TableShape::Hypertable | TableShape::Plain => return Ok(Vec::new()),
        TableShape::Missing => return Err(missing_table(settings, &table.table)),
    }
    let width = i64::try_from(partition.as_micros()).unwrap_or(i64::MAX).max(1);
    if slots::count(width, from_micros, to_micros) > PARTITIONS_MAX {
        return Err(too_many(&table.table, from_micros, to_micros));
    }
    let (mut made, mut obstacle) = (Vec::new(), None);
    for _ in 0..ROUNDS_MAX {
        let existing = partitions(client, settings, &table.table).await?;
        let covered: Vec<Slot> = existing.iter().filter_map(|p| p.slot).collect();
        let missing = slots::missing(width, from_micros, to_micros, &covered);
        let mut raced = None;
        for slot in missing {
            let name = slots::partition_name(&table.table, slot.start);
            match attach(client, settings, &table.table, &name, slot).await {
                Ok(()) => made.push(name),
                // Rows of this range lie in the default partition, so others of it find their place there too.
                Err(error) if has_default(&existing) && is_taken_by_default(&error) => {}
                Err(error) if is_race(&error) => raced = Some((name, error)),
                Err(error) => return Err(error),
            }
        }
        match raced {
            None => return Ok(made),
            Some((name, error)) => obstacle = Some(in_the_way(&table.table, &name, &error)),
        }
    }
    obstacle.map_or(Ok(made), Err)
}

/// `CREATE TABLE … PARTITION OF` would lock the whole table against readers and writers; a table of its own that is then
/// attached does not. One round trip, one implicit transaction.
async fn attach(
    client: &Client,
    settings: &DatabaseSettings,
    table: &str,
    name: &str,
    slot: Slot,
) -> Result<(), DatabaseError> {
    let sql = attach_sql(settings, table, name, slot);
    client.batch_execute(&sql).await.map_err(postgres("make a partition"))
}

fn attach_sql(settings: &DatabaseSettings, table: &str, name: &str, slot: Slot) -> String {
    let parent = qualified(&settings.schema, table);
    let child = qualified(&settings.schema, name);
    format!(
        "CREATE TABLE {child} (LIKE {parent} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE INCLUDING GENERATED); \
         ALTER TABLE {parent} ATTACH PARTITION {child} FOR VALUES FROM ({}) TO ({})",
        slots::literal(slot.start),
        slots::literal(slot.end),
    )
}

/// The partitions of a table with their bounds. Bounds are written and read back within one statement, so the session's
/// time zone and date style do not matter.
pub(super) async fn partitions(
    client: &Client,
    settings: &DatabaseSettings,
    table: &str,
) -> Result<Vec<Partition>, DatabaseError> {
    let sql = "SELECT nspname, relname, bound = 'DEFAULT', \
                 (extract(epoch FROM (regexp_match(bound, 'FROM \\(''([^'']*)''\\)'))[1]::timestamptz) * 1000000)::bigint, \
                 (extract(epoch FROM (regexp_match(bound, 'TO \\(''([^'']*)''\\)'))[1]::timestamptz) * 1000000)::bigint \
               FROM (SELECT n.nspname, c.relname, pg_get_expr(c.relpartbound, c.oid) AS bound \
                     FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid \
                     JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE i.inhparent = $1::text::regclass) AS children";
    let parent = qualified(&settings.schema, table);
    let rows = client.query(sql, &[&parent]).await.map_err(postgres("list the partitions"))?;
    let partition = |row: &tokio_postgres::Row| Partition {
        schema: row.get(0),
        name: row.get(1),
        slot: (!row.get::<_, bool>(2)).then(|| Slot {
            start: row.get::<_, Option<i64>>(3).unwrap_or(i64::MIN),
            end: row.get::<_, Option<i64>>(4).unwrap_or(i64::MAX),
        }),
    };
    Ok(rows.iter().map(partition).collect())
}

fn has_default(partitions: &[Partition]) -> bool {
    partitions.iter().any(|partition| partition.slot.is_none())
}

fn is_taken_by_default(error: &DatabaseError) -> bool {
    error.sqlstate() == Some(SqlState::CHECK_VIOLATION.code())
}

/// Another node made the same partition (duplicate table, or its row type), or one that overlaps.
fn is_race(error: &DatabaseError) -> bool {
    let codes = [
        SqlState::DUPLICATE_TABLE,
        SqlState::UNIQUE_VIOLATION,
        SqlState::DUPLICATE_OBJECT,
        SqlState::INVALID_OBJECT_DEFINITION,
    ];
    codes.iter().any(|code| error.sqlstate() == Some(code.code()))
}

fn missing_table(settings: &DatabaseSettings, table: &str) -> DatabaseError {
    DatabaseError::Standing {
        problem: format!("table {}.{table} does not exist", settings.schema),
        remedy: "make it by a migration: `telemetry migrate draft STREAM` prints one".to_owned(),
    }
}

fn too_many(table: &str, from: i64, to: i64) -> DatabaseError {
    let (from, to) = (slots::literal(from), slots::literal(to));
    DatabaseError::Standing {
        problem: format!(
            "rows from {from} to {to} would need more than {PARTITIONS_MAX} partitions of {table}"
        ),
        remedy: "raise `partition_days` of this table, or look for a clock that was wrong"
            .to_owned(),
    }
}

fn in_the_way(table: &str, name: &str, error: &DatabaseError) -> DatabaseError {
    DatabaseError::Standing {
        problem: format!("partition {} of {table} cannot be made: {error}", quoted(name)),
        remedy: "rename or drop what is in its way".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::maintenance::slots::Slot;

    #[test]
    fn a_partition_is_made_apart_and_attached() {
        let settings = crate::database::maintenance::tier::tests::settings();
        let day = 1_773_446_400_000_000;
        let slot = Slot { start: day, end: day + 86_400_000_000 };
        assert_eq!(
            attach_sql(&settings, "energy", "energy_p20260314", slot),
            "CREATE TABLE \"public\".\"energy_p20260314\" (LIKE \"public\".\"energy\" INCLUDING DEFAULTS INCLUDING \
             CONSTRAINTS INCLUDING STORAGE INCLUDING GENERATED); ALTER TABLE \"public\".\"energy\" ATTACH PARTITION \
             \"public\".\"energy_p20260314\" FOR VALUES FROM ('2026-03-14T00:00:00Z') TO ('2026-03-15T00:00:00Z')"
        );
    }
}
