//! The live table against the mapping, before the first row: every mistake at once, each with the statement that mends
//! it. A writer whose table does not fit holds; its stream is still kept.

use std::collections::HashSet;

use indexmap::IndexMap;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::error::{DatabaseError, postgres};
use super::sql::{qualified, quoted};
use crate::config::{FieldType, StreamSettings, TableKind, TableSettings};
use crate::mapping::Column;

/// The column types a mapping can fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnType {
    Bool,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    /// `text`, or `varchar(n)`.
    Text {
        chars_max: Option<usize>,
    },
    Timestamp,
}

impl ColumnType {
    fn of(type_oid: u32, type_modifier: i32) -> Option<Self> {
        match Type::from_oid(type_oid)? {
            Type::BOOL => Some(ColumnType::Bool),
            Type::INT2 => Some(ColumnType::Int2),
            Type::INT4 => Some(ColumnType::Int4),
            Type::INT8 => Some(ColumnType::Int8),
            Type::FLOAT4 => Some(ColumnType::Float4),
            Type::FLOAT8 => Some(ColumnType::Float8),
            Type::TEXT => Some(ColumnType::Text { chars_max: None }),
            // The modifier of varchar(n) is n + 4; -1 stands for no limit.
            Type::VARCHAR => Some(ColumnType::Text {
                chars_max: usize::try_from(type_modifier).ok().and_then(|n| n.checked_sub(4)),
            }),
            Type::TIMESTAMPTZ => Some(ColumnType::Timestamp),
            _ => None,
        }
    }

    /// What the type can be a key of: its text form is the same here and on the server.
    fn is_key(self) -> bool {
        use ColumnType::{Int2, Int4, Int8, Text};
        matches!(self, Int2 | Int4 | Int8 | Text { .. })
    }
}

/// A column the node fills, as the live table has it.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedColumn {
    pub name: String,
    /// For people, e.g. `character varying(8)`.
    pub type_name: String,
    pub column_type: ColumnType,
    pub not_null: bool,
}

/// A column of the live table.
#[derive(Debug, Clone)]
struct LiveColumn {
    name: String,
    type_name: String,
    column_type: Option<ColumnType>,
    not_null: bool,
    /// Has a default or is an identity.
    filled_by_server: bool,
    generated: bool,
}

/// What encoded rows rely on: a column of another type would take their bytes for something else, and where the width
/// is the same the server cannot tell.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shape {
    /// Qualified and quoted.
    pub table: String,
    /// The types of its columns, in their order.
    pub types: Vec<u32>,
}

/// The live table, as far as a writer needs it.
#[derive(Debug, Clone, Default)]
pub struct LiveTable {
    pub shape: Shape,
    columns: Vec<LiveColumn>,
    /// Columns that alone are a unique key.
    unique: HashSet<String>,
    missing_rights: Vec<String>,
}

const COLUMNS: &str = "\
    SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.atttypid, a.atttypmod, a.attnotnull, \
    a.atthasdef OR a.attidentity <> '', a.attgenerated <> '' OR a.attidentity = 'a' \
    FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

const UNIQUE: &str = "\
    SELECT a.attname::text FROM pg_catalog.pg_index i \
    JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] \
    WHERE i.indrelid = to_regclass($1) AND i.indisunique AND i.indisvalid AND i.indimmediate \
    AND i.indnkeyatts = 1 AND i.indpred IS NULL AND i.indexprs IS NULL";

const RIGHTS: &str = "\
    SELECT r FROM unnest($2::text[]) AS r \
    WHERE to_regclass($1) IS NOT NULL AND NOT has_table_privilege(to_regclass($1), r)";

impl LiveTable {
    /// `None` when there is no such table (or no right to see its schema).
    pub async fn read(
        client: &Client,
        schema: &str,
        table: &TableSettings,
    ) -> Result<Option<LiveTable>, DatabaseError> {
        let name = qualified(schema, &table.table);
        let rights: Vec<&str> = match table.kind {
            TableKind::Append { .. } => vec!["INSERT"],
            TableKind::Latest { .. } => vec!["SELECT", "INSERT", "UPDATE"],
        };
        let of_name = [(&name as _, Type::TEXT)];
        let of_rights = [(&name as _, Type::TEXT), (&rights as _, Type::TEXT_ARRAY)];
        let (columns, unique, missing) = tokio::try_join!(
            client.query_typed(COLUMNS, &of_name),
            client.query_typed(UNIQUE, &of_name),
            client.query_typed(RIGHTS, &of_rights),
        )
        .map_err(postgres("read the catalog"))?;
        if columns.is_empty() {
            return Ok(None);
        }
        let first = |row: &Row| row.try_get::<_, String>(0).map_err(postgres("read the catalog"));
        let oid = |row: &Row| row.try_get::<_, u32>(2).map_err(postgres("read the catalog"));
        Ok(Some(LiveTable {
            shape: Shape {
                table: name.clone(),
                types: columns.iter().map(oid).collect::<Result<_, _>>()?,
            },
            columns: columns.iter().map(live_column).collect::<Result<_, _>>()?,
            unique: unique.iter().map(first).collect::<Result<_, _>>()?,
            missing_rights: missing.iter().map(first).collect::<Result<_, _>>()?,
        }))
    }

    fn column(&self, name: &str) -> Option<&LiveColumn> {
        self.columns.iter().find(|column| column.name == name)
    }
}

fn live_column(row: &Row) -> Result<LiveColumn, DatabaseError> {
    let read = || {
        Ok(LiveColumn {
            name: row.try_get(0)?,
            type_name: row.try_get(1)?,
            column_type: ColumnType::of(row.try_get(2)?, row.try_get(3)?),
            not_null: row.try_get(4)?,
            filled_by_server: row.try_get(5)?,
            generated: row.try_get(6)?,
        })
    };
    read().map_err(postgres("read the catalog"))
}

/// What the check needs to know of the sink.
pub struct Expected<'a> {
    pub schema: &'a str,
    pub stream: &'a StreamSettings,
    pub table: &'a TableSettings,
    /// What the mapping yields.
    pub columns: &'a [Column],
}

/// The mapped columns as the live table has them, in the mapping's order; or every mistake at once.
pub fn plan(
    expected: &Expected<'_>,
    live: Option<&LiveTable>,
) -> Result<Vec<PlannedColumn>, DatabaseError> {
    let name = qualified(expected.schema, &expected.table.table);
    let Some(live) = live else {
        return Err(DatabaseError::Standing {
            problem: format!("table {name} does not exist"),
            remedy: format!(
                "apply its migration (`telemetry migrate apply`) or create it; `telemetry migrate draft {}` writes \
                 the statement",
                expected.stream.name
            ),
        });
    };
    let mut check = Check { table: &name, live, mistakes: Vec::new() };
    let planned: Vec<_> =
        expected.columns.iter().filter_map(|column| check.mapped(column)).collect();
    check.kind(expected);
    check.unfilled(expected);
    check.rights();
    if check.mistakes.is_empty() {
        return Ok(planned);
    }
    Err(DatabaseError::Standing {
        problem: format!(
            "table {name} does not fit the mapping of stream {}: {}",
            expected.stream.name,
            check.mistakes.join("; ")
        ),
        remedy: "mend the table or the mapping; this writer then goes on by itself".to_owned(),
    })
}

struct Check<'a> {
    table: &'a str,
    live: &'a LiveTable,
    /// Each with its remedy.
    mistakes: Vec<String>,
}

impl Check<'_> {
    fn mapped(&mut self, column: &Column) -> Option<PlannedColumn> {
        let live = self.present(&column.name, column.field_type.sql_type())?;
        if live.generated {
            self.mistakes.push(format!(
                "column {} is generated by the server: leave it unmapped",
                live.name
            ));
        }
        let column_type = match (live.column_type, fit(column.field_type, live.column_type)) {
            (Some(column_type), Fit::Fits) => column_type,
            (_, Fit::TooNarrow) => {
                self.wrong_type(&live, column.field_type, "is too narrow for");
                return None;
            }
            _ => {
                self.wrong_type(&live, column.field_type, "cannot take");
                return None;
            }
        };
        if live.not_null && !column.required {
            self.mistakes.push(format!(
                "column {0} is NOT NULL, but field {1} may be missing (make the field required, give it a default, or \
                 ALTER TABLE {2} ALTER COLUMN {3} DROP NOT NULL)",
                live.name,
                column.field,
                self.table,
                quoted(&live.name)
            ));
        }
        Some(PlannedColumn {
            name: live.name,
            type_name: live.type_name,
            column_type,
            not_null: live.not_null,
        })
    }

    fn present(&mut self, name: &str, sql_type: &str) -> Option<LiveColumn> {
        let live = self.live.column(name).cloned();
        if live.is_none() {
            self.mistakes.push(format!(
                "column {name} is missing (ALTER TABLE {} ADD COLUMN {} {sql_type})",
                self.table,
                quoted(name)
            ));
        }
        live
    }

    fn wrong_type(&mut self, live: &LiveColumn, field_type: FieldType, verdict: &str) {
        let wanted = field_type.sql_type();
        self.mistakes.push(format!(
            "column {} is {} and {verdict} {wanted} (ALTER TABLE {} ALTER COLUMN {} TYPE {wanted})",
            live.name,
            live.type_name,
            self.table,
            quoted(&live.name)
        ));
    }

    /// A column the node fills by itself.
    fn own(&mut self, name: &str, wanted: &str, fits: impl FnOnce(ColumnType) -> bool) {
        let Some(live) = self.present(name, wanted) else { return };
        if !live.column_type.is_some_and(fits) {
            self.mistakes.push(format!(
                "column {name} is {} and must be {wanted} (ALTER TABLE {} ALTER COLUMN {} TYPE {wanted})",
                live.type_name,
                self.table,
                quoted(name)
            ));
        }
    }

    fn kind(&mut self, expected: &Expected<'_>) {
        let is_time = |column: ColumnType| column == ColumnType::Timestamp;
        match &expected.table.kind {
            TableKind::Append { time_column, node_column, .. } => {
                self.own(time_column, "timestamptz", is_time);
                if let Some(node) = node_column {
                    self.own(node, "text", |column| matches!(column, ColumnType::Text { .. }));
                }
            }
            TableKind::Latest { key, updated_at_column, insert_only } => {
                self.own(updated_at_column, "timestamptz", is_time);
                self.key(key, insert_only, expected.columns);
                for (column, field) in insert_only {
                    if !expected.columns.iter().any(|mapped| mapped.name == *column) {
                        self.mistakes.push(format!(
                            "column {column} is set once from field {field}, which the mapping does not yield"
                        ));
                    }
                }
            }
        }
    }

    fn key(&mut self, field: &str, fixed: &IndexMap<String, String>, columns: &[Column]) {
        let is_key = |column: &&Column| column.field == field && !fixed.contains_key(&column.name);
        let Some(mapped) = columns.iter().find(is_key) else {
            self.mistakes.push(format!("the key field {field} is not among the table's columns"));
            return;
        };
        let Some(live) = self.live.column(&mapped.name) else { return };
        if !live.column_type.is_some_and(ColumnType::is_key) {
            self.mistakes.push(format!(
                "the key column {} is {}: a key is a text or an integer",
                live.name, live.type_name
            ));
        }
        if !self.live.unique.contains(&mapped.name) {
            self.mistakes.push(format!(
                "no unique index on the key column {0} (CREATE UNIQUE INDEX ON {1} ({2}))",
                mapped.name,
                self.table,
                quoted(&mapped.name)
            ));
        }
    }

    /// Columns that refuse NULL and that nobody fills.
    fn unfilled(&mut self, expected: &Expected<'_>) {
        let own: Vec<&str> = match &expected.table.kind {
            TableKind::Append { time_column, node_column, .. } => {
                [Some(time_column), node_column.as_ref()]
                    .into_iter()
                    .flatten()
                    .map(String::as_str)
                    .collect()
            }
            TableKind::Latest { updated_at_column, insert_only, .. } => {
                insert_only.keys().chain([updated_at_column]).map(String::as_str).collect()
            }
        };
        for live in &self.live.columns {
            let filled = own.contains(&live.name.as_str())
                || expected.columns.iter().any(|column| column.name == live.name);
            if live.not_null && !live.filled_by_server && !live.generated && !filled {
                self.mistakes.push(format!(
                    "column {0} is NOT NULL without a default and nothing fills it (map a field to it or ALTER TABLE \
                     {1} ALTER COLUMN {2} DROP NOT NULL)",
                    live.name,
                    self.table,
                    quoted(&live.name)
                ));
            }
        }
    }

    fn rights(&mut self) {
        if !self.live.missing_rights.is_empty() {
            let rights = self.live.missing_rights.join(", ");
            self.mistakes.push(format!(
                "the node's user lacks rights (GRANT {rights} ON {} TO CURRENT_USER, as the table's owner and with the \
                 node's user in place of CURRENT_USER)",
                self.table
            ));
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Fit {
    Fits,
    TooNarrow,
    Wrong,
}

/// Whether every value the mapping may yield has a place in the column.
fn fit(field: FieldType, column: Option<ColumnType>) -> Fit {
    use ColumnType as C;
    use FieldType as F;
    let Some(column) = column else { return Fit::Wrong };
    match (field, column) {
        (F::Int2, C::Int2 | C::Int4 | C::Int8 | C::Float4 | C::Float8)
        | (F::Int4, C::Int4 | C::Int8 | C::Float8)
        | (F::Int8, C::Int8)
        // A `real` column is a choice: the value is rounded to it, and refused only outside its range.
        | (F::Float8, C::Float4 | C::Float8)
        | (F::Boolean, C::Bool)
        | (F::Text, C::Text { .. })
        | (F::Timestamp, C::Timestamp) => Fit::Fits,
        (F::Int4, C::Int2 | C::Float4) | (F::Int8, C::Int2 | C::Int4 | C::Float4 | C::Float8) => {
            Fit::TooNarrow
        }
        _ => Fit::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_must_hold_every_value_the_mapping_may_yield() {
        let text = ColumnType::Text { chars_max: Some(8) };
        for (field, column, expected) in [
            (FieldType::Int2, ColumnType::Int8, Fit::Fits),
            (FieldType::Int4, ColumnType::Int2, Fit::TooNarrow),
            (FieldType::Int4, ColumnType::Float8, Fit::Fits),
            (FieldType::Int8, ColumnType::Float8, Fit::TooNarrow),
            (FieldType::Float8, ColumnType::Int8, Fit::Wrong),
            (FieldType::Float8, ColumnType::Float4, Fit::Fits),
            (FieldType::Boolean, ColumnType::Float8, Fit::Wrong),
            (FieldType::Text, text, Fit::Fits),
            (FieldType::Timestamp, ColumnType::Int8, Fit::Wrong),
        ] {
            assert_eq!(fit(field, Some(column)), expected, "{field:?} into {column:?}");
        }
    }

    #[test]
    fn the_length_of_a_varchar_is_its_modifier_less_four() {
        assert_eq!(ColumnType::of(1043, 12), Some(ColumnType::Text { chars_max: Some(8) }));
        assert_eq!(ColumnType::of(1043, -1), Some(ColumnType::Text { chars_max: None }));
        assert_eq!(ColumnType::of(1700, -1), None);
    }
}
