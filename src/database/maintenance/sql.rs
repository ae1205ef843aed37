//! Names inside SQL, and the session every maintenance statement runs in.

use tokio_postgres::Client;

use crate::config::DatabaseSettings;
use crate::database::error::{DatabaseError, postgres};
use crate::database::sql::quoted;

/// `schema.name` or `name`, each part quoted.
pub fn quoted_path(path: &str) -> String {
    path.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

/// Sets what a file or a job may rely on: unqualified names mean the configured schema, and no statement outlives
/// `query_timeout`. `public` (and the schema TimescaleDB is installed in) stay visible for the functions of extensions.
pub async fn prepare_session(
    client: &Client,
    settings: &DatabaseSettings,
) -> Result<(), DatabaseError> {
    let timescale = "SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace \
                     WHERE extname = 'timescaledb'";
    let row = client.query_opt(timescale, &[]).await.map_err(postgres("look for timescaledb"))?;
    let extension: Option<String> = row.map(|row| row.get(0));
    let wanted = [Some(settings.schema.as_str()), extension.as_deref(), Some("public")];
    let mut path: Vec<String> = wanted.into_iter().flatten().map(quoted).collect();
    path.dedup();
    let statement = format!(
        "RESET ALL; SET search_path TO {}; SET statement_timeout TO {}; SET application_name TO 'telemetry-migrator'",
        path.join(", "),
        settings.query_timeout.as_millis()
    );
    client.batch_execute(&statement).await.map_err(postgres("prepare the session"))?;
    // So that the server ends (and rolls back) what it works on when the node is gone. Older servers do not have it.
    let notice = "SELECT set_config(name, '1s', false) FROM pg_settings \
                  WHERE name = 'client_connection_check_interval'";
    client.batch_execute(notice).await.map_err(postgres("prepare the session"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_only_a_name() {
        assert_eq!(quoted_path("energy"), "\"energy\"");
        assert_eq!(quoted_path("a\"; DROP TABLE b; --"), "\"a\"\"; DROP TABLE b; --\"");
        assert_eq!(quoted_path("public.refresh"), "\"public\".\"refresh\"");
    }
}
