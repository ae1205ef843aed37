//! A look at a database: what it promises, how much room it has, whether the tables fit. Changes nothing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::timeout;
use tokio_postgres::Client;

use super::catalog::{self, Expected, LiveTable};
use super::connect::connect;
use super::error::{DatabaseError, postgres};
use super::rights;
use crate::config::{DatabaseSettings, DatabaseTls, StreamSettings, TableSettings};
use crate::domain::{Finding, Findings};
use crate::mapping::RowMapper;

/// Clocks further apart than this make arrival times misleading.
const SKEW_WARN: Duration = Duration::from_secs(1);
const SKEW_FAIL: Duration = Duration::from_secs(60);

/// Of sessions of other roles a role without special rights sees no more than whose they are and where.
const SERVER: &str = "\
    SELECT current_setting('server_version'), current_setting('fsync'), \
    current_setting('full_page_writes'), current_setting('synchronous_commit'), pg_is_in_recovery(), \
    least(\
        current_setting('max_connections')::int8 - current_setting('superuser_reserved_connections')::int8 \
            - coalesce(current_setting('reserved_connections', true), '0')::int8 - count(*), \
        (SELECT d.datconnlimit FROM pg_catalog.pg_database d \
            WHERE d.datname = current_database() AND d.datconnlimit >= 0) \
            - count(*) FILTER (WHERE s.datname = current_database()), \
        (SELECT r.rolconnlimit FROM pg_catalog.pg_roles r \
            WHERE r.rolname = current_user AND r.rolconnlimit >= 0) \
            - count(*) FILTER (WHERE s.usename = current_user)), \
    extract(epoch FROM clock_timestamp())::float8 \
    FROM pg_catalog.pg_stat_activity s WHERE s.datid IS NOT NULL AND s.usesysid IS NOT NULL \
    AND coalesce(s.backend_type, 'client backend') = 'client backend'";

/// What one database says to the tables of these streams.
pub async fn probe(
    name: &str,
    settings: &DatabaseSettings,
    streams: &[&StreamSettings],
) -> Vec<Finding> {
    let mut findings = Findings::about(format!("postgresql:{name}"));
    match connect(settings).await {
        Err(error) => findings.failed("reachable", &error),
        Ok(client) => {
            let limit = settings.statement_timeout;
            let looked = timeout(limit, look(&client, name, settings, streams, &mut findings));
            let looked = looked.await;
            match looked {
                Ok(Ok(())) => {}
                Ok(Err(error)) => findings.failed("answers", &error),
                Err(_) => {
                    let doing = "look at the database";
                    findings.failed("answers", &DatabaseError::TimedOut { doing, limit });
                }
            }
        }
    }
    findings.done()
}

async fn look(
    client: &Client,
    name: &str,
    settings: &DatabaseSettings,
    streams: &[&StreamSettings],
    findings: &mut Findings,
) -> Result<(), DatabaseError> {
    server(client, settings, findings).await?;
    if !rights::look(client, settings, findings).await? {
        return Ok(());
    }
    for stream in streams {
        for table in stream.tables.values().filter(|table| table.database == name) {
            look_at_table(client, settings, stream, table, findings).await?;
        }
    }
    Ok(())
}

/// What [`SERVER`] answers.
struct Server {
    version: String,
    fsync: String,
    full_page_writes: String,
    synchronous_commit: String,
    read_only: bool,
    connections_left: i64,
    clock: f64,
}

async fn server(
    client: &Client,
    settings: &DatabaseSettings,
    findings: &mut Findings,
) -> Result<(), DatabaseError> {
    let failed = || postgres("ask for the server's settings");
    let rows = client.query(SERVER, &[]).await.map_err(failed())?;
    let Some(row) = rows.first() else { return Ok(()) };
    let read = || {
        Ok(Server {
            version: row.try_get(0)?,
            fsync: row.try_get(1)?,
            full_page_writes: row.try_get(2)?,
            synchronous_commit: row.try_get(3)?,
            read_only: row.try_get(4)?,
            connections_left: row.try_get(5)?,
            clock: row.try_get(6)?,
        })
    };
    let server: Server = read().map_err(failed())?;
    let way = match settings.tls_mode {
        DatabaseTls::VerifyFull => "over TLS",
        DatabaseTls::Off => "in clear text",
    };
    findings.ok("reachable", format!("PostgreSQL {} lets the node in, {way}", server.version));
    durability(&server, findings);
    room(&server, settings, findings);
    clock(server.clock, findings);
    Ok(())
}

fn durability(server: &Server, findings: &mut Findings) {
    if server.read_only {
        let remedy = "connect to the primary: a standby takes no rows";
        findings.fail("writable", "no, it is a standby", remedy);
    }
    for (check, value) in [("fsync", &server.fsync), ("full_page_writes", &server.full_page_writes)]
    {
        if value == "on" {
            findings.ok(check, value);
        } else {
            findings.fail(
                check,
                value,
                "set it on: a crash of the server can lose what the node has trimmed",
            );
        }
    }
    if server.synchronous_commit == "off" {
        let remedy = "set it on: a crash of the server loses the last transactions";
        findings.warn("synchronous_commit", "off", remedy);
    } else {
        findings.ok("synchronous_commit", &server.synchronous_commit);
    }
}

fn room(server: &Server, settings: &DatabaseSettings, findings: &mut Findings) {
    // Each sink may have partitions made at the same time, but hardly ever does.
    let (beside, for_whom) = match settings.migrator {
        None => (1, "one for the migrator"),
        Some(_) => (2, "two for the migrator's role"),
    };
    let figure = format!(
        "{} left, the node takes up to {} for its sinks and {for_whom}",
        server.connections_left.max(0),
        settings.connections_max
    );
    if server.connections_left < 1 {
        let remedy =
            "raise max_connections of the server, or the CONNECTION LIMIT of the role or database";
        findings.fail("connections", figure, remedy);
    } else if server.connections_left < i64::from(settings.connections_max) + beside {
        let remedy = "raise max_connections of the server, or lower connections_max of the node";
        findings.warn("connections", figure, remedy);
    } else {
        findings.ok("connections", figure);
    }
}

fn clock(theirs: f64, findings: &mut Findings) {
    let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let apart = (ours - theirs).abs();
    let figure = format!("{apart:.1} s apart from this machine's");
    let remedy = "set both clocks by NTP: rows carry the node's arrival time";
    if apart > SKEW_FAIL.as_secs_f64() {
        findings.fail("clock", figure, remedy);
    } else if apart > SKEW_WARN.as_secs_f64() {
        findings.warn("clock", figure, remedy);
    } else {
        findings.ok("clock", figure);
    }
}

/// The same check the writer makes before its first row.
async fn look_at_table(
    client: &Client,
    settings: &DatabaseSettings,
    stream: &StreamSettings,
    table: &TableSettings,
    findings: &mut Findings,
) -> Result<(), DatabaseError> {
    // A mapping that does not compile is in the report of the configuration.
    let Ok(mapper) = RowMapper::compile(stream, table) else { return Ok(()) };
    let schema = &settings.schema;
    let live = LiveTable::read(client, schema, table).await?;
    if live.is_none() && settings.migrations_dir.is_some() {
        let figure = format!("{} is not there yet", table.table);
        let remedy = "the node applies its migrations at start: see `telemetry migrate plan`";
        findings.warn("table", figure, remedy);
        return Ok(());
    }
    let expected = Expected { schema, stream, table, columns: mapper.columns() };
    match catalog::plan(&expected, live.as_ref()) {
        Ok(columns) => {
            let figure =
                format!("{}: {} columns fit stream {}", table.table, columns.len(), stream.name);
            findings.ok("table", figure);
        }
        Err(error) => findings.failed("table", &error),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Verdict;

    #[test]
    fn clocks_apart_are_doubtful_or_wrong() {
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        for (apart, wanted) in [(0.0, Verdict::Ok), (10.0, Verdict::Warn), (-90.0, Verdict::Fail)] {
            let mut findings = Findings::about("postgresql:x");
            clock(ours + apart, &mut findings);
            assert_eq!(findings.done().remove(0).verdict, wanted, "{apart} s");
        }
    }
}
