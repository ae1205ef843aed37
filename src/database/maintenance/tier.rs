//! What the database offers beside PostgreSQL.

use std::fmt;

use tokio_postgres::Client;

use crate::database::error::{DatabaseError, postgres};

/// Told apart at start; the node asks of a database only what its tier can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tier {
    /// No TimescaleDB: partitions, retention and roll-ups by the node.
    None,
    /// Hypertables and `drop_chunks`, no policies, no compression.
    Apache { schema: String, version: String },
    /// Everything.
    Timescale { schema: String, version: String },
}

impl Tier {
    /// The schema the extension's functions are in.
    pub fn schema(&self) -> Option<&str> {
        match self {
            Tier::None => None,
            Tier::Apache { schema, .. } | Tier::Timescale { schema, .. } => Some(schema),
        }
    }

    fn told_by(schema: String, version: String, license: Option<&str>) -> Self {
        match license {
            Some("timescale") => Tier::Timescale { schema, version },
            _ => Tier::Apache { schema, version },
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tier::None => f.write_str("plain PostgreSQL"),
            Tier::Apache { version, .. } => write!(f, "TimescaleDB {version}, apache license"),
            Tier::Timescale { version, .. } => write!(f, "TimescaleDB {version}"),
        }
    }
}

/// Asks the database which extension and license it has.
pub async fn detect_tier(client: &Client) -> Result<Tier, DatabaseError> {
    let sql = "SELECT nspname, extversion, current_setting('timescaledb.license', true) \
               FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace \
               WHERE extname = 'timescaledb'";
    let row = client.query_opt(sql, &[]).await.map_err(postgres("look for timescaledb"))?;
    Ok(row.map_or(Tier::None, |row| Tier::told_by(row.get(0), row.get(1), row.get(2))))
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{BackoffSettings, DatabaseSettings, DatabaseTls};

    pub(in crate::database::maintenance) fn settings() -> DatabaseSettings {
        let second = Duration::from_secs(1);
        DatabaseSettings {
            host: "127.0.0.1".to_owned(),
            port: 5432,
            dbname: "telemetry".to_owned(),
            user: "telemetry".to_owned(),
            password: None,
            migrator: None,
            tls_mode: DatabaseTls::Off,
            tls: None,
            schema: "public".to_owned(),
            connections_max: 4,
            connect_timeout: second,
            pool_timeout: second,
            statement_timeout: second,
            query_timeout: second,
            retry: BackoffSettings { min: second, max: second },
            breaker: Default::default(),
            migrations_dir: None,
            migration_wait: second,
            jobs: Default::default(),
        }
    }

    #[test]
    fn the_license_tells_the_tier() {
        let tell = |license| Tier::told_by("public".to_owned(), "2.22.1".to_owned(), license);
        assert_eq!(tell(Some("timescale")).to_string(), "TimescaleDB 2.22.1");
        assert_eq!(tell(Some("apache")).to_string(), "TimescaleDB 2.22.1, apache license");
        assert!(matches!(tell(None), Tier::Apache { .. }), "when in doubt the smaller promise");
        assert_eq!(Tier::None.schema(), None);
    }
}
