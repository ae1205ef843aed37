//! Around an outage: how soon rows flow after a crash with a backlog, how soon a backlog is gone while messages go on
//! coming, and the memory while nobody takes anything.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rig::until;

use crate::drain::{Full, fill};
use crate::lab::{Lab, Plan, Sink, delivered, kept};
use crate::load::{flood, pace};
use crate::process::resident_mib;
use crate::report::{Bar, Measure};
use crate::throughput::check_rows;

/// At 1,000 and at 2,000 messages a second.
const LIVE_PAUSE: Duration = Duration::from_millis(1);
const BUSY_PAUSE: Duration = Duration::from_micros(500);
const LIVE_SECONDS: u64 = 30;
const MIGRATED_WITHIN: Duration = Duration::from_secs(60);
const JUDGED_WITHIN: Duration = Duration::from_secs(30);

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
