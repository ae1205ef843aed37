//! What a database server and its operators do.

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;

use super::{Fault, last};
use crate::lab::Lab;

const DATABASES: [&str; 2] = ["telemetry", "homelab_settings"];

pub static FAULTS: &[Fault] = &[
    Fault::new("postgres-restart", "a fast shutdown and a new start", restart),
    Fault::new("postgres-kill", "kill -9 of every process of the server", kill),
    Fault::new("postgres-freeze", "connections stay, nothing answers", freeze),
    Fault::new("postgres-disconnect", "pg_terminate_backend for all of the node's", disconnect),
    Fault::new("postgres-lock", "someone holds a lock on a table", lock),
    Fault::new(
        "postgres-read-only",
        "the databases take no writes, as after a failover",
        read_only,
    ),
];

fn restart(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.postgres.stop()?;
    last(dice, 0..500);
    lab.postgres.restart()?;
    Ok(true)
}

fn kill(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.postgres.kill();
    last(dice, 0..500);
    lab.postgres.restart()?;
    Ok(true)
}

fn freeze(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.postgres.freeze();
    last(dice, 300..4_000);
    lab.postgres.thaw();
    Ok(true)
}

fn disconnect(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    for _ in 0..dice.random_range(1..4) {
        lab.postgres.execute("postgres", END_SESSIONS)?;
        last(dice, 0..300);
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
    let millis = dice.random_range(300..3_000);
    let hold = format!(
        "BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep({millis} / 1000.0); COMMIT"
    );
    lab.postgres.execute(database, &hold)?;
    Ok(true)
}

fn read_only(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let set = |lab: &Lab, sql: &str| {
        lab.postgres.execute("postgres", sql)?;
        lab.postgres.execute("postgres", "SELECT pg_reload_conf()")
    };
    set(lab, "ALTER SYSTEM SET default_transaction_read_only = on")?;
    last(dice, 300..1_500);
    set(lab, "ALTER SYSTEM RESET default_transaction_read_only")?;
    Ok(true)
}
