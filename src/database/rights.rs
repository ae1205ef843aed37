//! What the roles of a database may do, for `telemetry doctor`: the one that writes rows, and the one that makes tables.

use tokio_postgres::{Client, Row};

use super::bookkeeping;
use super::connect::connect;
use super::error::{DatabaseError, postgres};
use super::sql::{qualified, quoted};
use crate::config::DatabaseSettings;
use crate::domain::Findings;

const CHECK: &str = "rights";

/// One row, also without such a schema.
const SCHEMA: &str = "\
    SELECT current_user::text, current_database()::text, n.oid IS NOT NULL, \
    coalesce(has_schema_privilege(n.oid, 'USAGE'), false), coalesce(has_schema_privilege(n.oid, 'CREATE'), false), \
    has_database_privilege(current_database(), 'CREATE') \
    FROM (SELECT) one LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = $1";

/// Those of the rights $3 to tables $2 that are missing; a table that is not there lacks none.
const TABLES: &str = "\
    SELECT c.relname::text, string_agg(wanted.r, ', ' ORDER BY wanted.r) \
    FROM unnest($2::text[], $3::text[]) wanted(t, r) \
    JOIN pg_catalog.pg_namespace n ON n.nspname = $1 \
    JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.t \
    WHERE NOT has_table_privilege(c.oid, wanted.r) GROUP BY c.relname ORDER BY c.relname";

/// What one role may do to the schema.
struct Rights {
    role: String,
    database: String,
    there: bool,
    may_use: bool,
    may_create: bool,
    may_make_it: bool,
}

impl Rights {
    async fn read(client: &Client, schema: &str) -> Result<Self, DatabaseError> {
        let failed = || postgres("ask for the rights to the schema");
        let row = client.query_one(SCHEMA, &[&schema]).await.map_err(failed())?;
        let read = || {
            Ok(Rights {
                role: row.try_get(0)?,
                database: row.try_get(1)?,
                there: row.try_get(2)?,
                may_use: row.try_get(3)?,
                may_create: row.try_get(4)?,
                may_make_it: row.try_get(5)?,
            })
        };
        read().map_err(failed())
    }
}

/// Tells what is missing. True when the role that writes can see tables at all.
pub async fn look(
    client: &Client,
    settings: &DatabaseSettings,
    findings: &mut Findings,
) -> Result<bool, DatabaseError> {
    let schema = &settings.schema;
    let own = Rights::read(client, schema).await?;
    if settings.migrator.is_some() {
        match connect(&settings.as_migrator()).await {
            Ok(client) => making(&Rights::read(&client, schema).await?, schema, findings),
            Err(error) => findings.failed("migrator", &error),
        }
    } else {
        making(&own, schema, findings);
    }
    if own.there {
        writing(client, &own, schema, findings).await?;
    }
    Ok(own.may_use)
}

/// The node's own tables, the migrations' and partitions.
fn making(rights: &Rights, schema: &str, findings: &mut Findings) {
    let Rights { role, database, .. } = rights;
    let lacks = |what: &str| format!("{role} may not {what}: no row is written before it may");
    if !rights.there && !rights.may_make_it {
        let remedy = format!("GRANT CREATE ON DATABASE {} TO {}", quoted(database), quoted(role));
        findings.fail(CHECK, lacks(&format!("make schema {schema}")), &remedy);
    } else if !rights.there {
        let figure = format!("schema {schema} is not there yet, {role} may make it");
        findings.warn(CHECK, figure, "the node makes it at start");
    } else if !(rights.may_use && rights.may_create) {
        let remedy =
            format!("GRANT USAGE, CREATE ON SCHEMA {} TO {}", quoted(schema), quoted(role));
        findings.fail(CHECK, lacks(&format!("create in schema {schema}")), &remedy);
    } else {
        findings.ok(CHECK, format!("{role} may create in schema {schema}"));
    }
}

/// Into the node's own tables: those of the streams are looked at with their columns.
async fn writing(
    client: &Client,
    rights: &Rights,
    schema: &str,
    findings: &mut Findings,
) -> Result<(), DatabaseError> {
    let role = &rights.role;
    if !rights.may_use {
        let remedy = format!("GRANT USAGE ON SCHEMA {} TO {}", quoted(schema), quoted(role));
        findings.fail(CHECK, format!("{role} may not use schema {schema}"), &remedy);
        return Ok(());
    }
    let failed = || postgres("ask for the rights to the node's own tables");
    let (tables, wanted): (Vec<_>, Vec<_>) = bookkeeping::RIGHTS
        .iter()
        .flat_map(|(table, rights)| rights.iter().map(|right| (*table, *right)))
        .unzip();
    let missing = client.query(TABLES, &[&schema, &tables, &wanted]).await.map_err(failed())?;
    for row in &missing {
        let read = |row: &Row| Ok((row.try_get::<_, String>(0)?, row.try_get::<_, String>(1)?));
        let (table, lacking) = read(row).map_err(failed())?;
        let table = qualified(schema, &table);
        let remedy = format!("GRANT {lacking} ON {table} TO {}", quoted(role));
        findings.fail(CHECK, format!("{role} lacks {lacking} on {table}"), &remedy);
    }
    if missing.is_empty() {
        findings.ok(CHECK, format!("{role} may write the node's own tables in schema {schema}"));
    }
    Ok(())
}
