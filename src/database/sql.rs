//! Small pieces of SQL text and of the wire format that tokio-postgres does not bring.

use std::error::Error;

use bytes::{BufMut as _, BytesMut};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

use crate::domain::Arrival;

/// Microseconds between 1970 and PostgreSQL's epoch, 2000-01-01.
pub const EPOCH_OFFSET_MICROS: i64 = 946_684_800_000_000;

/// An identifier, whatever is in it.
pub fn quoted(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

/// `"schema"."name"`.
pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", quoted(schema), quoted(name))
}

/// A `timestamptz` to the microsecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timestamptz(pub i64);

impl From<Arrival> for Timestamptz {
    fn from(arrival: Arrival) -> Self {
        Timestamptz(arrival.as_micros())
    }
}

impl ToSql for Timestamptz {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_i64(self.0.saturating_sub(EPOCH_OFFSET_MICROS));
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Timestamptz {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let micros = i64::from_be_bytes(raw.try_into()?);
        Ok(Timestamptz(micros.saturating_add(EPOCH_OFFSET_MICROS)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_cannot_leave_its_quotes() {
        assert_eq!(
            qualified("public", r#"a"; DROP TABLE b; --"#),
            r#""public"."a""; DROP TABLE b; --""#
        );
    }

    #[test]
    fn a_timestamp_survives_the_way_to_the_wire_and_back() {
        let at = Timestamptz(1_773_472_865_412_908);
        let mut wire = BytesMut::new();
        at.to_sql(&Type::TIMESTAMPTZ, &mut wire).unwrap();
        assert_eq!(Timestamptz::from_sql(&Type::TIMESTAMPTZ, &wire).unwrap(), at);
    }
}
