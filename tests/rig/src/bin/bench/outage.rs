//! Around an outage: how soon rows flow after a crash with a backlog, how soon a backlog is gone while messages go on
//! coming, what one row that the table refuses costs the others, and the memory while nobody takes anything.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rig::until;
use tokio_postgres::NoTls;

use crate::drain::{Full, fill};
use crate::lab::{DATABASE, Lab, Plan, Sink, Subject, TABLE, delivered, kept};
use crate::load::{FIRST, flood, pace};
use crate::process::resident_mib;
use crate::report::{Bar, Measure};
use crate::throughput::check_rows;

/// At 1,000 and at 2,000 messages a second.
const LIVE_PAUSE: Duration = Duration::from_millis(1);
const BUSY_PAUSE: Duration = Duration::from_micros(500);
const LIVE_SECONDS: u64 = 30;
const BATCH: u64 = 5_000;
const MIGRATED_WITHIN: Duration = Duration::from_secs(60);
const JUDGED_WITHIN: Duration = Duration::from_secs(30);
/// `batch_linger_ms` of a table that does not set it: how long a flush waits.
const BATCH_LINGER_MS: f64 = 5.0;
/// Each is short, and what the machine does beside it is not.
const POISON_ROUNDS: u64 = 15;
const POLL: Duration = Duration::from_millis(1);

/// # Errors
/// When a run fails.
pub fn recovery(lab: &mut Lab, count: u64, rounds: usize) -> Result<Vec<Measure>> {
    let mut first =
        Measure::new("kill -9 with a backlog until the first row", "s", Bar::Promised(3.0));
    let mut subject = lab.start(&Plan::new(Sink::TableAway))?;
    let load = flood(lab.mosquitto.port(), &subject.topic, count);
    subject.wait_for(count, kept)?;
    load.join()?;
    lab.broker_idle()?;
    subject.node.kill();
    let full = Full { identity: subject.identity.clone(), state: subject.state.clone(), count };
    for _ in 0..rounds {
        migrated(lab)?;
        let mut subject = full.start(lab, Sink::Table)?;
        subject.wait_subscribed()?;
        let flowing = subject.wait_for(1, delivered)?;
        first.ours.push((flowing - subject.started).as_secs_f64());
        subject.node.kill();
    }
    std::fs::remove_dir_all(&full.state).context("remove the full buffer")?;
    Ok(vec![first])
}

/// A fresh database with its tables.
fn migrated(lab: &mut Lab) -> Result<()> {
    lab.fresh_database()?;
    let mut subject = lab.start(&Plan::new(Sink::Table))?;
    subject.stop()
}

/// # Errors
/// When a run fails, or rows are missing.
pub fn catch_up(lab: &mut Lab, count: u64) -> Result<Vec<Measure>> {
    let name = "backlog of an outage gone, 1,000 msg/s live";
    let mut gone = Measure::new(name, "s", Bar::Promised(20.0));
    lab.fresh_database()?;
    let mut subject = lab.start(&Plan::new(Sink::Table))?;
    subject.node.wait_ready(MIGRATED_WITHIN)?;
    lab.postgres.stop()?;
    let load = flood(lab.mosquitto.port(), &subject.topic, count);
    subject.wait_for(count, kept)?;
    load.join()?;
    let live = count + LIVE_SECONDS * 1_000;
    let load = pace(lab.mosquitto.port(), &subject.topic, count..live, LIVE_PAUSE);
    subject.wait_for(count + 1_000, kept)?;
    lab.postgres.restart()?;
    let back = Instant::now();
    until(JUDGED_WITHIN * 4, "the backlog gone", || {
        let stream = subject.look()?;
        let left = kept(&stream).saturating_sub(delivered(&stream));
        // What a caught-up sink has in its hands at this rate.
        Ok((left < 100).then_some(()))
    })?;
    gone.ours.push(back.elapsed().as_secs_f64());
    load.join()?;
    subject.wait_for(live, delivered)?;
    subject.stop()?;
    check_rows(lab, live)?;
    Ok(vec![gone])
}

/// # Errors
/// When a run fails, or rows are missing.
pub fn poison(lab: &mut Lab) -> Result<Vec<Measure>> {
    let name = "5,000 rows, one of them refused";
    // Its half of the batch is sent up to it, what was before it once more, then it alone, and the table is looked at; its
    // dead letter is synced. It costs the more the later it comes in its half: here it is the last but one of all.
    let mut delay = Measure::new(name, "ms", Bar::RatioAtMost(3.0));
    let name = "… the good ones later than without it";
    let mut later = Measure::new(name, "ms", Bar::AtMost(2.0 * BATCH_LINGER_MS));
    lab.fresh_database()?;
    let mut subject = lab.start(&Plan::new(Sink::Table))?;
    subject.node.wait_ready(MIGRATED_WITHIN)?;
    for round in 0..POISON_ROUNDS {
        let first = 2 * round * BATCH;
        let poisoned = batch(lab, &mut subject, first, true)?;
        let clean = batch(lab, &mut subject, first + BATCH, false)?;
        delay.ours.push(poisoned.as_secs_f64() * 1e3);
        delay.baseline.push(clean.as_secs_f64() * 1e3);
        later.ours.push((poisoned.as_secs_f64() - clean.as_secs_f64()) * 1e3);
    }
    subject.stop()?;
    Ok(vec![delay, later])
}

/// From the moment the table can be written to until the last good row of the batch is there. The batch gathers while
/// another session holds the table.
fn batch(lab: &Lab, subject: &mut Subject, first: u64, poisoned: bool) -> Result<Duration> {
    let forbidden = if poisoned { FIRST + first + BATCH - 2 } else { 0 };
    let rule = format!(
        "ALTER TABLE {TABLE} DROP CONSTRAINT IF EXISTS poison; \
         ALTER TABLE {TABLE} ADD CONSTRAINT poison CHECK (active_energy_total <> {forbidden}) NOT VALID"
    );
    lab.postgres.execute(DATABASE, &rule)?;
    // Else each look below would take longer than the one before.
    lab.empty_table()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let database = lab.postgres.connection_string(DATABASE);
        let connect = tokio_postgres::connect(&database, NoTls);
        let (client, connection) = connect.await.context("connect")?;
        let driving = tokio::spawn(connection);
        let held = format!("BEGIN; LOCK TABLE {TABLE} IN SHARE MODE");
        client.batch_execute(&held).await.context("hold the table")?;
        let before = kept(&subject.look()?);
        let load = pace_all(lab, subject, first);
        subject.wait_for(before + BATCH, kept)?;
        load.join()?;
        client.batch_execute("COMMIT").await.context("let the table go")?;
        let began = Instant::now();
        let good = BATCH - u64::from(poisoned);
        let count = format!(
            "SELECT count(*) FROM {TABLE} WHERE active_energy_total BETWEEN {} AND {}",
            FIRST + first,
            FIRST + first + BATCH - 1
        );
        let rows = client.prepare(&count).await.context("prepare")?;
        loop {
            let found: i64 = client.query_one(&rows, &[]).await.context("count")?.get(0);
            if found as u64 == good {
                break;
            }
            anyhow::ensure!(began.elapsed() < JUDGED_WITHIN, "{found} rows of {good}");
            tokio::time::sleep(POLL).await;
        }
        let took = began.elapsed();
        driving.abort();
        Ok(took)
    })
}

fn pace_all(lab: &Lab, subject: &Subject, first: u64) -> crate::load::Load<Vec<Instant>> {
    let pause = Duration::from_micros(100);
    pace(lab.mosquitto.port(), &subject.topic, first..first + BATCH, pause)
}

/// Memory while neither sink can be reached, messages pending and more coming; the folder it leaves.
///
/// # Errors
/// When the run fails.
pub fn both_away(lab: &mut Lab, count: u64, seconds: u64, most: &mut Measure) -> Result<Full> {
    let full = fill(lab, Sink::BothAway, count)?;
    let state: PathBuf = full.state.clone();
    let mut subject = full.start_in(lab, Sink::BothAway, state)?;
    subject.wait_subscribed()?;
    let all = count + seconds * 2_000;
    pace(lab.mosquitto.port(), &subject.topic, count..all, BUSY_PAUSE).join()?;
    subject.wait_for(all, kept)?;
    most.ours.push(resident_mib(subject.pid()?)?.1);
    lab.broker_idle()?;
    subject.stop()?;
    Ok(Full { count: all, ..full })
}
