//! Prints the SQL file that a stream's mapping needs, so that a stream of one's own is a mapping plus one file.

use std::fmt::Write as _;

use serde::Serialize;

use crate::config::{FieldType, StreamSettings, TableKind, TableSettings};
use crate::database::maintenance::quoted;

const NOT_NULL: &str = " NOT NULL";

/// A migration for one table of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Draft {
    /// The database it belongs to, as the configuration names it.
    pub database: String,
    pub table: String,
    pub sql: String,
}

/// One draft per table of the stream, in the order of the configuration.
pub fn draft(stream: &StreamSettings) -> Vec<Draft> {
    let one = |table: &TableSettings| Draft {
        database: table.database.clone(),
        table: table.table.clone(),
        sql: sql(stream, table),
    };
    stream.tables.values().map(one).collect()
}

fn sql(stream: &StreamSettings, table: &TableSettings) -> String {
    let mut text = format!(
        "-- database: {}\n--\n-- Rows of stream {}, as its mapping makes them.\n\n",
        table.database, stream.name
    );
    match &table.kind {
        TableKind::Append { time_column, node_column, partition, .. } => {
            let mut columns = vec![column(time_column, "timestamptz", NOT_NULL)];
            columns.extend(mapped_columns(stream, table));
            columns.extend(node_column.as_ref().map(|name| column(name, "text", "")));
            create_table(&mut text, &table.table, &columns);
            divide_by_time(&mut text, &table.table, time_column, partition.as_secs());
            time_index(&mut text, stream, table, time_column);
        }
        TableKind::Latest { updated_at_column, insert_only, .. } => {
            let mut columns = mapped_columns(stream, table);
            columns.extend(insert_only.iter().map(|(name, field)| {
                column(
                    name,
                    type_of(stream, field),
                    if given(stream, field) { NOT_NULL } else { "" },
                )
            }));
            columns.push(column(updated_at_column, "timestamptz", NOT_NULL));
            create_table(&mut text, &table.table, &columns);
            let index = quoted(&format!("{}_{updated_at_column}", table.table));
            let (name, at) = (quoted(&table.table), quoted(updated_at_column));
            let _ = writeln!(text, "\nCREATE INDEX {index} ON {name} ({at} DESC);");
        }
    }
    text
}

fn column(name: &str, sql_type: &str, rule: &str) -> String {
    format!("{} {sql_type}{rule}", quoted(name))
}

fn mapped_columns(stream: &StreamSettings, table: &TableSettings) -> Vec<String> {
    let key = match &table.kind {
        TableKind::Latest { key, .. } => Some(key),
        TableKind::Append { .. } => None,
    };
    let one = |(field, name): (&String, &String)| {
        let rule = match key {
            Some(key) if key == field => " PRIMARY KEY",
            // A row of latest state may begin with a message that lacks a column; a time series never does.
            Some(_) => "",
            None if given(stream, field) => NOT_NULL,
            None => "",
        };
        column(name, type_of(stream, field), rule)
    };
    table.columns.iter().map(one).collect()
}

/// Whether the mapping never yields NULL for the field.
fn given(stream: &StreamSettings, field: &str) -> bool {
    let required = stream.mapping.fields.get(field).is_some_and(|field| field.required);
    field == stream.mapping.device_id || required
}

fn type_of(stream: &StreamSettings, field: &str) -> &'static str {
    let field = stream.mapping.fields.get(field);
    field.map_or(FieldType::Text, |field| field.field_type).sql_type()
}

fn create_table(text: &mut String, table: &str, columns: &[String]) {
    let columns = columns.join(",\n    ");
    let _ = writeln!(text, "CREATE TABLE {} (\n    {columns}\n);", quoted(table));
}

/// The same table with and without TimescaleDB; which one is decided where it is applied.
fn divide_by_time(text: &mut String, table: &str, time_column: &str, seconds: u64) {
    let width = match seconds {
        seconds if seconds.is_multiple_of(86_400) => format!("{} days", seconds / 86_400),
        seconds => format!("{seconds} seconds"),
    };
    let name = quoted(table);
    let columns = quoted(&format!("{table}_columns"));
    let at = quoted(time_column);
    let (name_text, at_text) = (literal(&name), literal(time_column));
    let _ = write!(
        text,
        "
-- A hypertable where TimescaleDB is installed; else range partitions, which the node creates ahead and drops.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        PERFORM create_hypertable({name_text}, {at_text},
            chunk_time_interval => interval '{width}', create_default_indexes => false);
    ELSE
        ALTER TABLE {name} RENAME TO {columns};
        CREATE TABLE {name} (LIKE {columns} INCLUDING ALL) PARTITION BY RANGE ({at});
        DROP TABLE {columns};
    END IF;
END
$$;
"
    );
}

fn time_index(text: &mut String, stream: &StreamSettings, table: &TableSettings, at: &str) {
    let name = quoted(&table.table);
    let at = quoted(at);
    let _ = match table.columns.get(&stream.mapping.device_id) {
        Some(device) => {
            let index = quoted(&format!("{}_device_time", table.table));
            writeln!(text, "\nCREATE INDEX {index} ON {name} ({}, {at} DESC);", quoted(device))
        }
        None => {
            let index = quoted(&format!("{}_time", table.table));
            writeln!(text, "\nCREATE INDEX {index} ON {name} ({at} DESC);")
        }
    };
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
