//! What a database server and its operators do.

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;
use rig::Link;

use super::{Fault, linger};
use crate::lab::{Lab, ROLE};

const DATABASES: [&str; 2] = ["telemetry", "homelab_settings"];

pub static FAULTS: &[Fault] = &[
    Fault::new("postgres-restart", "a fast shutdown and a new start", restart),
    Fault::new("postgres-kill", "kill -9 of every process of the server", kill),
    Fault::new("postgres-freeze", "connections stay, nothing answers", freeze),
    Fault::new("postgres-disconnect", "pg_terminate_backend for all of the node's", disconnect),
    Fault::new("postgres-lock", "someone holds a lock on a table", lock),
    Fault::new("postgres-read-only", "no writes are taken, as after a failover", read_only),
    Fault::new("postgres-revoked", "the node's role may not write a table any more", revoked),
    Fault::new("postgres-no-login", "the node's role may not log in any more", no_login),
    Fault::new("postgres-crowded", "no connection is left for the node's role", crowded),
    Fault::new("postgres-table-gone", "a table is renamed, and later back", table_gone),
    Fault::new("postgres-type-changed", "a column has another type for a while", type_changed),
    Fault::new("postgres-disk-full", "the server has no space for rows", disk_full),
    Fault::new("postgres-rolls-back", "COMMIT is answered by ROLLBACK, no error", rolls_back),
];

/// Tables of rows, by the database they are in.
const TABLES: [(&str, &str); 3] = [
    (DATABASES[0], "energy_consumption"),
    (DATABASES[0], "temperature_sensors"),
    (DATABASES[1], "power_plugs"),
];

fn restart(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.postgres.stop()?;
    linger(lab, dice, 0..500)?;
    lab.postgres.restart()?;
    Ok(true)
}

fn kill(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.postgres.kill();
    linger(lab, dice, 0..500)?;
    lab.postgres.restart()?;
    Ok(true)
}

fn freeze(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.postgres.freeze();
    linger(lab, dice, 300..4_000)?;
    lab.postgres.thaw();
    Ok(true)
}

fn disconnect(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    for _ in 0..dice.random_range(1..4) {
        lab.postgres.execute("postgres", END_SESSIONS)?;
        linger(lab, dice, 0..300)?;
    }
    Ok(true)
}

const END_SESSIONS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
    WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'";

fn lock(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let (database, table) = match dice.random_range(0..3) {
        0 => (DATABASES[0], "energy_consumption"),
        1 => (DATABASES[0], "telemetry_cursors"),
        _ => (DATABASES[1], "power_plugs"),
    };
    let lock = format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
    let held = lab.postgres.hold(database, &lock)?;
    linger(lab, dice, 300..3_000)?;
    drop(held);
    Ok(true)
}

fn read_only(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let set = |lab: &Lab, sql: &str| {
        lab.postgres.execute("postgres", sql)?;
        lab.postgres.execute("postgres", "SELECT pg_reload_conf()")
    };
    set(lab, "ALTER SYSTEM SET default_transaction_read_only = on")?;
    linger(lab, dice, 300..1_500)?;
    set(lab, "ALTER SYSTEM RESET default_transaction_read_only")?;
    Ok(true)
}

fn revoked(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let (database, table) = TABLES[dice.random_range(0..TABLES.len())];
    let rights = "INSERT, UPDATE, DELETE";
    let revoke = format!("REVOKE {rights} ON {table} FROM {ROLE}");
    let grant = format!("GRANT {rights} ON {table} TO {ROLE}");
    for_a_while(lab, dice, database, &revoke, &grant)
}

fn no_login(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let refuse = format!("ALTER ROLE {ROLE} NOLOGIN; {END_SESSIONS}");
    for_a_while(lab, dice, "postgres", &refuse, &format!("ALTER ROLE {ROLE} LOGIN"))
}

/// The same answer as of a server whose connections others use up.
fn crowded(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let refuse = format!("ALTER ROLE {ROLE} CONNECTION LIMIT 0; {END_SESSIONS}");
    for_a_while(lab, dice, "postgres", &refuse, &format!("ALTER ROLE {ROLE} CONNECTION LIMIT -1"))
}

/// As if dropped, but what it holds can be judged later.
fn table_gone(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let (database, table) = TABLES[dice.random_range(0..TABLES.len())];
    let away = format!("ALTER TABLE {table} RENAME TO set_aside");
    for_a_while(lab, dice, database, &away, &format!("ALTER TABLE set_aside RENAME TO {table}"))
}

fn type_changed(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let (database, table, column) = (DATABASES[0], "temperature_sensors", "temperature_c");
    let of = format!(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute \
         WHERE attrelid = '{table}'::regclass AND attname = '{column}'"
    );
    let before = lab.postgres.value(database, &of)?;
    let change = |to: &str| {
        format!("ALTER TABLE {table} ALTER {column} TYPE {to} USING {column}::text::{to}")
    };
    for_a_while(lab, dice, database, &change("text"), &change(&before))
}

fn disk_full(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let (database, table) = TABLES[dice.random_range(0..TABLES.len())];
    let full = format!(
        "CREATE OR REPLACE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; \
         END $$; \
         CREATE TRIGGER no_space BEFORE INSERT ON {table} \
         FOR EACH STATEMENT EXECUTE FUNCTION no_space()"
    );
    for_a_while(lab, dice, database, &full, &format!("DROP TRIGGER no_space ON {table}"))
}

/// On its way each COMMIT becomes a ROLLBACK: what a server does that ends a transaction without a word.
fn rolls_back(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let before = lab.to_database.replaced();
    lab.to_database.set(Link::Replacing(COMMIT, ROLLBACK));
    linger(lab, dice, 300..1_500)?;
    lab.to_database.set(Link::Fine);
    Ok(lab.to_database.replaced() > before)
}

const COMMIT: &[u8] = b"Q\0\0\0\x0bCOMMIT\0";
const ROLLBACK: &[u8] = b"Q\0\0\0\x0dROLLBACK\0";

fn for_a_while(
    lab: &mut Lab,
    dice: &mut StdRng,
    database: &str,
    begin: &str,
    end: &str,
) -> Result<bool> {
    lab.postgres.execute(database, begin)?;
    linger(lab, dice, 300..2_500)?;
    lab.postgres.execute(database, end)?;
    Ok(true)
}
