//! From a full buffer: into PostgreSQL, into Kafka; start and memory with a large one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::baseline::{copy, produce};
use crate::lab::{BATCH_ROWS, DATABASE, Lab, Plan, Sink, Subject, delivered, kept};
use crate::load::flood;
use crate::outage;
use crate::process::resident_mib;
use crate::report::{Bar, Measure};
use crate::throughput::check_rows;

/// A node's folder with records that no sink has had.
pub struct Full {
    pub identity: String,
    pub state: PathBuf,
    pub count: u64,
}

/// # Errors
/// When the run fails.
pub fn fill(lab: &mut Lab, sink: Sink, count: u64) -> Result<Full> {
    let mut subject = lab.start(&Plan::new(sink))?;
    let load = flood(lab.mosquitto.port(), &subject.topic, count);
    subject.wait_for(count, kept)?;
    load.join()?;
    // What the broker has not read of the acknowledgements by the end of the connection it sends again.
    lab.broker_idle()?;
    subject.stop()?;
    Ok(Full { identity: subject.identity, state: subject.state, count })
}

impl Full {
    /// A node on a copy of the folder.
    ///
    /// # Errors
    /// When it cannot be copied, or the node not started.
    pub fn start(&self, lab: &mut Lab, sink: Sink) -> Result<Subject> {
        let state = self.state.with_file_name("copy");
        if state.exists() {
            std::fs::remove_dir_all(&state).context("remove the last copy")?;
        }
        copy_folder(&self.state, &state)?;
        self.start_in(lab, sink, state)
    }

    /// A node on this folder.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_in(&self, lab: &mut Lab, sink: Sink, state: PathBuf) -> Result<Subject> {
        let identity = Some(self.identity.clone());
        lab.spawn(&Plan { state: Some(state), identity, ..Plan::new(sink) })
    }

    /// Records per second between the first look that shows progress and the end.
    fn rate(&self, subject: &mut Subject) -> Result<f64> {
        subject.wait_subscribed()?;
        let started = subject.wait_for(1, delivered)?;
        let already = delivered(&subject.look()?);
        let started = started.max(Instant::now());
        let ended = subject.wait_for(self.count, delivered)?;
        Ok((self.count - already) as f64 / (ended - started).as_secs_f64())
    }
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().context("run cp")?;
    anyhow::ensure!(status.success(), "cp -a {} failed", from.display());
    Ok(())
}

/// # Errors
/// When a run fails, or rows are missing.
pub fn to_postgres(lab: &mut Lab, count: u64, rounds: usize) -> Result<Vec<Measure>> {
    let mut rate = Measure::new("drain to PostgreSQL", "rows/s", Bar::RatioAtLeast(0.5));
    let full = fill(lab, Sink::TableAway, count)?;
    for _ in 0..rounds {
        lab.fresh_database()?;
        let mut subject = full.start(lab, Sink::Table)?;
        rate.ours.push(full.rate(&mut subject)?);
        subject.stop()?;
        check_rows(lab, count)?;
        lab.empty_table()?;
        rate.baseline.push(copy(&lab.postgres.connection_string(DATABASE), count, BATCH_ROWS)?);
    }
    std::fs::remove_dir_all(&full.state).context("remove the full buffer")?;
    Ok(vec![rate])
}

/// Ready-made records of the baseline; enough that none is in any cache by chance.
const READY_MADE: usize = 20_000;

/// # Errors
/// When a run fails, or records are missing.
pub fn to_kafka(lab: &mut Lab, count: u64, rounds: usize) -> Result<Vec<Measure>> {
    let mut rate = Measure::new("drain to Kafka", "records/s", Bar::RatioAtLeast(0.6));
    let full = fill(lab, Sink::KafkaAway, count)?;
    // One more, which does not count: a Kafka that has just started runs its own code the slow way, and whoever comes
    // first pays for that.
    for round in 0..=rounds {
        let (topic, bare) = (lab.fresh(), lab.fresh());
        let mut subject = full.start(lab, Sink::Kafka { topic: topic.clone() })?;
        let ours = full.rate(&mut subject)?;
        subject.stop()?;
        let found = lab.kafka.count(&topic)?;
        anyhow::ensure!(found == count, "{count} records published, {found} in {topic}");
        let ready = lab.kafka.read_first(&topic, READY_MADE)?;
        lab.kafka.create_topic(&bare, 1)?;
        let baseline = produce(&lab.kafka.bootstrap(), &bare, &ready, count)?;
        if round > 0 {
            rate.ours.push(ours);
            rate.baseline.push(baseline);
        }
        lab.kafka.delete_topics(&[&topic, &bare])?;
    }
    std::fs::remove_dir_all(&full.state).context("remove the full buffer")?;
    Ok(vec![rate])
}

/// Start and memory with a large backlog.
///
/// # Errors
/// When the run fails, or rows are missing.
pub fn backlog(lab: &mut Lab, count: u64, seconds: u64) -> Result<Vec<Measure>> {
    let mut start = Measure::new("start with a backlog until accepting", "s", Bar::Promised(2.0));
    let memory_bar = Bar::Promised(256.0);
    let mut memory = Measure::new("resident memory, draining a backlog", "MiB", memory_bar);
    let name = "resident memory, both sinks away, 2,000 msg/s";
    let mut away = Measure::new(name, "MiB", memory_bar);
    let full = outage::both_away(lab, count, seconds, &mut away)?;
    let count = full.count;
    for _ in 0..3 {
        let mut subject = full.start_in(lab, Sink::TableAway, full.state.clone())?;
        subject.wait_subscribed()?;
        start.ours.push(subject.started.elapsed().as_secs_f64());
        subject.stop()?;
    }
    lab.fresh_database()?;
    let mut subject = full.start_in(lab, Sink::Table, full.state.clone())?;
    subject.wait_subscribed()?;
    subject.wait_for(count, delivered)?;
    let (_, most) = resident_mib(subject.pid()?)?;
    memory.ours.push(most);
    subject.stop()?;
    check_rows(lab, count)?;
    Ok(vec![start, memory, away])
}
