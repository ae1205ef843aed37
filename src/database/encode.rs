//! Values as their columns take them. What cannot fit is found here, without a round trip, so the server sees rows
//! that it will almost always accept.

use std::borrow::Cow;

use bytes::{BufMut as _, BytesMut};

use super::catalog::{ColumnType, PlannedColumn};
use super::sql::EPOCH_OFFSET_MICROS;
use crate::domain::{Reason, Stage};
use crate::mapping::{Fault, Value};

/// Signature, flags and header extension of binary COPY.
pub const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// The end of binary COPY.
pub const COPY_TRAILER: &[u8] = &[0xff, 0xff];

/// The first instant PostgreSQL can hold, in 4714 BC; its last one lies beyond what an `i64` of microseconds reaches.
const TIMESTAMP_MIN: i64 = -210_866_803_200_000_000;

/// A value in the type of its column.
#[derive(Debug, Clone)]
pub enum Cell<'a> {
    Null,
    Bool(bool),
    Int2(i16),
    Int4(i32),
    Int8(i64),
    Float4(f32),
    Float8(f64),
    Text(Cow<'a, str>),
    /// Microseconds since 1970.
    Timestamp(i64),
}

/// Equal as PostgreSQL's `IS NOT DISTINCT FROM` has it: NaN equals NaN.
impl PartialEq for Cell<'_> {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Cell::Null, Cell::Null) => true,
            (Cell::Bool(a), Cell::Bool(b)) => a == b,
            (Cell::Int2(a), Cell::Int2(b)) => a == b,
            (Cell::Int4(a), Cell::Int4(b)) => a == b,
            (Cell::Int8(a), Cell::Int8(b)) | (Cell::Timestamp(a), Cell::Timestamp(b)) => a == b,
            (Cell::Float4(a), Cell::Float4(b)) => a == b || (a.is_nan() && b.is_nan()),
            (Cell::Float8(a), Cell::Float8(b)) => a == b || (a.is_nan() && b.is_nan()),
            (Cell::Text(a), Cell::Text(b)) => a == b,
            _ => false,
        }
    }
}

impl Cell<'_> {
    pub fn is_null(&self) -> bool {
        matches!(self, Cell::Null)
    }

    pub fn into_owned(self) -> Cell<'static> {
        match self {
            Cell::Null => Cell::Null,
            Cell::Bool(v) => Cell::Bool(v),
            Cell::Int2(v) => Cell::Int2(v),
            Cell::Int4(v) => Cell::Int4(v),
            Cell::Int8(v) => Cell::Int8(v),
            Cell::Float4(v) => Cell::Float4(v),
            Cell::Float8(v) => Cell::Float8(v),
            Cell::Text(v) => Cell::Text(Cow::Owned(v.into_owned())),
            Cell::Timestamp(v) => Cell::Timestamp(v),
        }
    }

    /// As the server prints it with `::text`, for the types a key may have; `None` for the others.
    pub fn key_text(&self) -> Option<String> {
        match self {
            Cell::Int2(v) => Some(v.to_string()),
            Cell::Int4(v) => Some(v.to_string()),
            Cell::Int8(v) => Some(v.to_string()),
            Cell::Text(v) => Some(v.to_string()),
            _ => None,
        }
    }

    /// Length and bytes of one field of a binary row.
    #[inline]
    pub fn put(&self, out: &mut BytesMut) {
        match self {
            Cell::Null => out.put_i32(-1),
            Cell::Bool(v) => {
                out.put_i32(1);
                out.put_u8(u8::from(*v));
            }
            Cell::Int2(v) => {
                out.put_i32(2);
                out.put_i16(*v);
            }
            Cell::Int4(v) => {
                out.put_i32(4);
                out.put_i32(*v);
            }
            Cell::Int8(v) => put_i64(out, *v),
            Cell::Float4(v) => {
                out.put_i32(4);
                out.put_f32(*v);
            }
            Cell::Float8(v) => {
                out.put_i32(8);
                out.put_f64(*v);
            }
            Cell::Text(v) => {
                // A payload is at most some hundred kilobytes, so the length always fits.
                out.put_i32(i32::try_from(v.len()).unwrap_or(i32::MAX));
                out.put_slice(v.as_bytes());
            }
            Cell::Timestamp(v) => put_i64(out, v - EPOCH_OFFSET_MICROS),
        }
    }
}

fn put_i64(out: &mut BytesMut, value: i64) {
    out.put_i32(8);
    out.put_i64(value);
}

/// Into the column's own type, or the fault that makes the record a dead letter of this table.
#[inline]
pub fn convert<'v>(value: &'v Value<'_>, column: &PlannedColumn) -> Result<Cell<'v>, Fault> {
    let cell = match (value, column.column_type) {
        (Value::Null, _) => {
            return if column.not_null { Err(null_refused(column)) } else { Ok(Cell::Null) };
        }
        (Value::Bool(v), ColumnType::Bool) => Cell::Bool(*v),
        (Value::Int(v), ColumnType::Int2) => {
            Cell::Int2(i16::try_from(*v).map_err(|_| outside(column, v))?)
        }
        (Value::Int(v), ColumnType::Int4) => {
            Cell::Int4(i32::try_from(*v).map_err(|_| outside(column, v))?)
        }
        (Value::Int(v), ColumnType::Int8) => Cell::Int8(*v),
        (Value::Int(v), ColumnType::Float4) => Cell::Float4(*v as f32),
        (Value::Int(v), ColumnType::Float8) => Cell::Float8(*v as f64),
        (Value::Float(v), ColumnType::Float8) => Cell::Float8(*v),
        (Value::Float(v), ColumnType::Float4) => Cell::Float4(narrow(*v, column)?),
        (Value::Text(v), ColumnType::Text { chars_max }) => text(v, chars_max, column)?,
        (Value::Timestamp(v), ColumnType::Timestamp) => {
            if *v < TIMESTAMP_MIN {
                return Err(outside(column, v));
            }
            Cell::Timestamp(*v)
        }
        (other, _) => return Err(wrong_type(other, column)),
    };
    Ok(cell)
}

fn narrow(value: f64, column: &PlannedColumn) -> Result<f32, Fault> {
    let narrowed = value as f32;
    if narrowed.is_infinite() && value.is_finite() {
        Err(outside(column, &value))
    } else {
        Ok(narrowed)
    }
}

fn text<'v>(
    value: &'v str,
    chars_max: Option<usize>,
    column: &PlannedColumn,
) -> Result<Cell<'v>, Fault> {
    if value.as_bytes().contains(&0) {
        let detail = "the text contains U+0000, which PostgreSQL cannot hold".to_owned();
        return Err(fault(Reason::NulInText, column, detail));
    }
    // Bytes are at least as many as characters: the count is only taken where it matters.
    if let Some(max) = chars_max
        && value.len() > max
        && value.chars().count() > max
    {
        let count = value.chars().count();
        let detail = format!("a text of {count} characters does not fit {}", column.type_name);
        return Err(fault(Reason::OutOfRange, column, detail));
    }
    Ok(Cell::Text(Cow::Borrowed(value)))
}

#[cold]
fn null_refused(column: &PlannedColumn) -> Fault {
    fault(Reason::WrongType, column, format!("null, but column {} is NOT NULL", column.name))
}

#[cold]
fn outside(column: &PlannedColumn, value: &dyn std::fmt::Display) -> Fault {
    fault(Reason::OutOfRange, column, format!("{value} does not fit {}", column.type_name))
}

#[cold]
fn wrong_type(value: &Value<'_>, column: &PlannedColumn) -> Fault {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Int(_) => "an integer",
        Value::Float(_) => "a number with a fraction",
        Value::Text(_) => "a text",
        Value::Timestamp(_) => "a timestamp",
    };
    fault(Reason::WrongType, column, format!("{kind} cannot be stored as {}", column.type_name))
}

fn fault(reason: Reason, column: &PlannedColumn, detail: String) -> Fault {
    Fault { stage: Stage::Map, reason, field: Some(column.name.clone()), detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(column_type: ColumnType) -> PlannedColumn {
        PlannedColumn {
            name: "c".to_owned(),
            type_name: "the type".to_owned(),
            column_type,
            not_null: false,
        }
    }

    fn bytes(value: &Value<'_>, column_type: ColumnType) -> Result<Vec<u8>, Reason> {
        let column = column(column_type);
        let mut out = BytesMut::new();
        convert(value, &column).map_err(|fault| fault.reason)?.put(&mut out);
        Ok(out.to_vec())
    }

    #[test]
    fn a_value_takes_the_form_of_its_column_not_of_the_mapping() {
        assert_eq!(bytes(&Value::Int(-2), ColumnType::Int2).unwrap(), [0, 0, 0, 2, 0xff, 0xfe]);
        assert_eq!(bytes(&Value::Int(1), ColumnType::Int4).unwrap(), [0, 0, 0, 4, 0, 0, 0, 1]);
        assert_eq!(
            bytes(&Value::Int(1), ColumnType::Int8).unwrap(),
            [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]
        );
        assert_eq!(
            bytes(&Value::Int(2), ColumnType::Float8).unwrap(),
            [0, 0, 0, 8, 0x40, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            bytes(&Value::Float(2.0), ColumnType::Float4).unwrap(),
            [0, 0, 0, 4, 0x40, 0, 0, 0]
        );
        assert_eq!(bytes(&Value::Bool(true), ColumnType::Bool).unwrap(), [0, 0, 0, 1, 1]);
        assert_eq!(bytes(&Value::Null, ColumnType::Bool).unwrap(), [0xff; 4]);
        let text = ColumnType::Text { chars_max: Some(2) };
        assert_eq!(bytes(&Value::Text("ö".into()), text).unwrap(), [0, 0, 0, 2, 0xc3, 0xb6]);
        let at = Value::Timestamp(EPOCH_OFFSET_MICROS + 1);
        assert_eq!(
            bytes(&at, ColumnType::Timestamp).unwrap(),
            [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]
        );
    }

    #[test]
    fn what_cannot_fit_is_a_fault_with_its_reason() {
        let text = ColumnType::Text { chars_max: Some(2) };
        for (value, column_type, reason) in [
            (Value::Int(33_700), ColumnType::Int2, Reason::OutOfRange),
            (Value::Int(1 << 31), ColumnType::Int4, Reason::OutOfRange),
            (Value::Float(1e300), ColumnType::Float4, Reason::OutOfRange),
            (Value::Text("öäü".into()), text, Reason::OutOfRange),
            (Value::Text("a\0".into()), text, Reason::NulInText),
            (Value::Timestamp(i64::MIN), ColumnType::Timestamp, Reason::OutOfRange),
            (Value::Bool(true), ColumnType::Float8, Reason::WrongType),
            (Value::Float(0.5), ColumnType::Int4, Reason::WrongType),
        ] {
            assert_eq!(bytes(&value, column_type), Err(reason), "{value:?} into {column_type:?}");
        }
        let mut column = column(ColumnType::Bool);
        column.not_null = true;
        assert!(convert(&Value::Null, &column).is_err());
    }
}
