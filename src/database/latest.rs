//! Latest state: how the rows of a table are read, locked, and how those that changed are written.

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row as SqlRow};

use super::bookkeeping;
use super::catalog::{ColumnType, PlannedColumn};
use super::encode::{Cell, convert};
use super::error::{DatabaseError, postgres};
use super::fold::{Message, Row, Rows, Seen};
use super::sql::{Timestamptz, qualified, quoted};
use crate::config::TableSettings;
use crate::domain::{Arrival, LogIdentity, Record, Sequence, SinkName, StreamName};
use crate::mapping::{Column, Fault, Value};

type Parameter = Box<dyn ToSql + Sync + Send>;

/// How rows of this table are read and written.
#[derive(Debug, Clone, PartialEq)]
pub struct LatestPlan {
    pub columns: Vec<PlannedColumn>,
    key: usize,
    /// Columns that are set when a row is made and never again.
    pub fixed: Vec<bool>,
    scope: String,
    log: String,
    select: String,
    select_seen: String,
    upsert: String,
    upsert_seen: String,
}

/// What [`LatestPlan::new`] is made from.
pub struct LatestTable<'a> {
    pub schema: &'a str,
    pub table: &'a TableSettings,
    pub log: LogIdentity,
    pub stream: &'a StreamName,
    pub sink: &'a SinkName,
    pub mapped: &'a [Column],
    /// Field that is the key.
    pub key: &'a str,
    pub updated_at: &'a str,
    /// Column → field; the mapping yields these columns too.
    pub insert_only: &'a indexmap::IndexMap<String, String>,
}

impl LatestPlan {
    /// After the catalog check, which has proven that the key is mapped.
    pub fn new(of: &LatestTable<'_>, columns: Vec<PlannedColumn>) -> Option<LatestPlan> {
        let fixed: Vec<bool> =
            columns.iter().map(|column| of.insert_only.contains_key(&column.name)).collect();
        let key = of
            .mapped
            .iter()
            .zip(&fixed)
            .position(|(column, fixed)| column.field == of.key && !fixed)?;
        let table = qualified(of.schema, &of.table.table);
        let key_name = quoted(&columns[key].name);
        let names: Vec<String> = columns.iter().map(|column| quoted(&column.name)).collect();
        let kept = |name: &String| format!("{name} = COALESCE(EXCLUDED.{name}, present.{name})");
        let is_set = |index: usize| index != key && !fixed[index];
        let mut sets: Vec<String> =
            names.iter().enumerate().filter(|(i, _)| is_set(*i)).map(|(_, n)| kept(n)).collect();
        let updated_at = quoted(of.updated_at);
        sets.push(format!("{updated_at} = EXCLUDED.{updated_at}"));
        let all: Vec<String> = names.iter().cloned().chain([updated_at]).collect();
        let parameters: Vec<String> = (1..=all.len()).map(|n| format!("${n}")).collect();
        let seen = bookkeeping::latest_seen(of.schema);
        let key_array = array_name(columns[key].column_type);
        Some(LatestPlan {
            select: format!(
                "SELECT {key_name}::text, {} FROM {table} WHERE {key_name} = ANY($1::text[]::{key_array}) \
                 ORDER BY {key_name} FOR UPDATE",
                names.join(", ")
            ),
            select_seen: format!(
                "SELECT key, seen_at, CASE WHEN log = $3 THEN sequence END FROM {seen} \
                 WHERE sink = $1 AND key = ANY($2)"
            ),
            upsert: format!(
                "INSERT INTO {table} AS present ({}) SELECT * FROM unnest({}) \
                 ON CONFLICT ({key_name}) DO UPDATE SET {}",
                all.join(", "),
                parameters.join(", "),
                sets.join(", ")
            ),
            upsert_seen: format!(
                "INSERT INTO {seen} AS present (sink, key, log, seen_at, sequence) \
                 SELECT $1, key, $3, seen_at, sequence \
                 FROM unnest($2::text[], $4::timestamptz[], $5::bigint[]) AS new (key, seen_at, sequence) \
                 ON CONFLICT (sink, key) DO UPDATE \
                 SET log = EXCLUDED.log, seen_at = EXCLUDED.seen_at, sequence = EXCLUDED.sequence \
                 WHERE CASE WHEN present.log = EXCLUDED.log THEN present.sequence < EXCLUDED.sequence \
                 ELSE present.seen_at <= EXCLUDED.seen_at END"
            ),
            log: of.log.to_string(),
            scope: format!("{}/{}", of.stream, of.sink),
            columns,
            key,
            fixed,
        })
    }

    /// The message in the columns' types. `None` when nothing beside the key is present: not a message of this table.
    pub fn message(
        &self,
        values: &[Value<'_>],
        record: &Record<'_>,
    ) -> Result<Option<Message>, Fault> {
        let mut cells = Vec::with_capacity(values.len());
        for (value, column) in values.iter().zip(&self.columns) {
            // Null leaves the column as it is, so NOT NULL matters to the server only, at the first insert.
            let cell = match value {
                Value::Null => Cell::Null,
                value => convert(value, column)?,
            };
            cells.push(cell.into_owned());
        }
        let says_something = cells
            .iter()
            .enumerate()
            .any(|(index, cell)| index != self.key && !self.fixed[index] && !cell.is_null());
        let key = cells.get(self.key).and_then(Cell::key_text).filter(|_| says_something);
        let (sequence, arrival) = (record.sequence, record.arrival);
        Ok(key.map(|key| Message { key, sequence, arrival, cells }))
    }

    /// Adds to `rows` what the table says of these keys, which nobody else changes from here on.
    pub async fn read(
        &self,
        client: &Client,
        keys: &[&str],
        rows: &mut Rows,
    ) -> Result<(), DatabaseError> {
        let of_keys = [(&keys as _, Type::TEXT_ARRAY)];
        let of_seen = [
            (&self.scope as _, Type::TEXT),
            (&keys as _, Type::TEXT_ARRAY),
            (&self.log as _, Type::TEXT),
        ];
        let (current, seen) = tokio::join!(
            client.query_typed(&self.select, &of_keys),
            client.query_typed(&self.select_seen, &of_seen),
        );
        // In the order of the statements: the second is refused because the first was, whatever the reason.
        let current = current.map_err(postgres("read the latest rows"))?;
        let seen = seen.map_err(postgres("read the latest rows"))?;
        let unreadable = postgres_read;
        for row in &current {
            let key: String = row.try_get(0).map_err(unreadable)?;
            let cells = self
                .columns
                .iter()
                .enumerate()
                .map(|(index, column)| cell(row, index + 1, column.column_type))
                .collect::<Result<_, _>>()
                .map_err(unreadable)?;
            rows.entry(key).or_default().cells = Some(cells);
        }
        for row in &seen {
            let key: String = row.try_get(0).map_err(unreadable)?;
            let Timestamptz(micros) = row.try_get(1).map_err(unreadable)?;
            let sequence: Option<i64> = row.try_get(2).map_err(unreadable)?;
            let sequence = sequence.map(|sequence| Sequence(sequence as u64));
            rows.entry(key).or_default().seen = Some(Seen { arrival: Arrival(micros), sequence });
        }
        Ok(())
    }

    /// Writes rows that the fold has changed.
    pub async fn upsert(&self, client: &Client, rows: &[&Row]) -> Result<(), DatabaseError> {
        let mut parameters = Vec::with_capacity(self.columns.len() + 1);
        for (index, column) in self.columns.iter().enumerate() {
            let cells = rows.iter().filter_map(|row| row.cells.as_ref()?.get(index));
            parameters.push(array(column.column_type, cells));
        }
        let times = rows.iter().filter_map(|row| row.updated_at).map(Timestamptz::from);
        parameters.push((Box::new(times.collect::<Vec<_>>()), Type::TIMESTAMPTZ_ARRAY));
        let parameters: Vec<(&(dyn ToSql + Sync), Type)> =
            parameters.iter().map(|(value, ty)| (&**value as _, ty.clone())).collect();
        client
            .query_typed(&self.upsert, &parameters)
            .await
            .map(drop)
            .map_err(postgres("write the latest rows"))
    }

    /// Writes what was seen of these keys.
    pub async fn upsert_seen(
        &self,
        client: &Client,
        rows: &[(&String, &Row)],
    ) -> Result<(), DatabaseError> {
        let (mut keys, mut arrivals, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        for (key, row) in rows {
            let Some(Seen { arrival, sequence: Some(sequence) }) = row.seen else { continue };
            keys.push(key.as_str());
            arrivals.push(Timestamptz::from(arrival));
            sequences.push(sequence.0 as i64);
        }
        let parameters = [
            (&self.scope as _, Type::TEXT),
            (&keys as _, Type::TEXT_ARRAY),
            (&self.log as _, Type::TEXT),
            (&arrivals as _, Type::TIMESTAMPTZ_ARRAY),
            (&sequences as _, Type::INT8_ARRAY),
        ];
        client
            .query_typed(&self.upsert_seen, &parameters)
            .await
            .map(drop)
            .map_err(postgres("write what was seen"))
    }
}

fn postgres_read(error: tokio_postgres::Error) -> DatabaseError {
    postgres("read the latest rows")(error)
}

fn array_name(column: ColumnType) -> &'static str {
    match column {
        ColumnType::Int2 => "smallint[]",
        ColumnType::Int4 => "integer[]",
        ColumnType::Int8 => "bigint[]",
        _ => "text[]",
    }
}

fn cell(
    row: &SqlRow,
    index: usize,
    column: ColumnType,
) -> Result<Cell<'static>, tokio_postgres::Error> {
    let cell = match column {
        ColumnType::Bool => row.try_get::<_, Option<bool>>(index)?.map(Cell::Bool),
        ColumnType::Int2 => row.try_get::<_, Option<i16>>(index)?.map(Cell::Int2),
        ColumnType::Int4 => row.try_get::<_, Option<i32>>(index)?.map(Cell::Int4),
        ColumnType::Int8 => row.try_get::<_, Option<i64>>(index)?.map(Cell::Int8),
        ColumnType::Float4 => row.try_get::<_, Option<f32>>(index)?.map(Cell::Float4),
        ColumnType::Float8 => row.try_get::<_, Option<f64>>(index)?.map(Cell::Float8),
        ColumnType::Text { .. } => {
            row.try_get::<_, Option<String>>(index)?.map(|text| Cell::Text(text.into()))
        }
        ColumnType::Timestamp => row
            .try_get::<_, Option<Timestamptz>>(index)?
            .map(|Timestamptz(micros)| Cell::Timestamp(micros)),
    };
    Ok(cell.unwrap_or(Cell::Null))
}

/// One column of many rows as an array parameter.
fn array<'c>(
    column: ColumnType,
    cells: impl Iterator<Item = &'c Cell<'static>>,
) -> (Parameter, Type) {
    macro_rules! values {
        ($variant:ident, $ty:ident) => {{
            let values: Vec<_> = cells
                .map(|cell| match cell {
                    Cell::$variant(value) => Some(value.clone()),
                    _ => None,
                })
                .collect();
            (Box::new(values) as Parameter, Type::$ty)
        }};
    }
    match column {
        ColumnType::Bool => values!(Bool, BOOL_ARRAY),
        ColumnType::Int2 => values!(Int2, INT2_ARRAY),
        ColumnType::Int4 => values!(Int4, INT4_ARRAY),
        ColumnType::Int8 => values!(Int8, INT8_ARRAY),
        ColumnType::Float4 => values!(Float4, FLOAT4_ARRAY),
        ColumnType::Float8 => values!(Float8, FLOAT8_ARRAY),
        ColumnType::Text { .. } => values!(Text, TEXT_ARRAY),
        ColumnType::Timestamp => {
            let values: Vec<Option<Timestamptz>> = cells
                .map(|cell| match cell {
                    Cell::Timestamp(micros) => Some(Timestamptz(*micros)),
                    _ => None,
                })
                .collect();
            (Box::new(values), Type::TIMESTAMPTZ_ARRAY)
        }
    }
}
