//! From the broker: accepting, end to end, and what waited at the broker.

use std::time::Instant;

use anyhow::Result;

use crate::baseline::{Subscriber, copy};
use crate::lab::{BATCH_ROWS, DATABASE, Lab, Plan, Sink, TABLE, delivered, kept};
use crate::load::flood;
use crate::process::cpu_seconds;
use crate::report::{Bar, Measure};

/// Messages per second of a bare subscriber on the same broker and publisher.
fn bare(lab: &mut Lab, count: u64) -> Result<f64> {
    let topic = lab.fresh();
    let subscriber = Subscriber::start(lab.mosquitto.port(), &topic, count)?;
    let started = Instant::now();
    let load = flood(lab.mosquitto.port(), &topic, count);
    let ended = subscriber.join()?;
    load.join()?;
    Ok(count as f64 / (ended - started).as_secs_f64())
}

/// MQTT to the durable buffer, and nothing behind it.
///
/// # Errors
/// When a run fails.
pub fn accept(lab: &mut Lab, count: u64, rounds: usize) -> Result<Vec<Measure>> {
    let bar = Bar::RatioAtLeast(0.8);
    let mut rate = Measure::new("accept: MQTT to buffer, fsync before PUBACK", "msg/s", bar);
    for _ in 0..rounds {
        let mut subject = lab.start(&Plan::new(Sink::TableAway))?;
        let started = Instant::now();
        let load = flood(lab.mosquitto.port(), &subject.topic, count);
        let ended = subject.wait_for(count, kept)?;
        load.join()?;
        subject.node.kill();
        rate.ours.push(count as f64 / (ended - started).as_secs_f64());
        rate.baseline.push(bare(lab, count)?);
    }
    Ok(vec![rate])
}

/// MQTT to rows, and the CPU it costs.
///
/// # Errors
/// When a run fails, or rows are missing.
pub fn end_to_end(lab: &mut Lab, count: u64, rounds: usize) -> Result<Vec<Measure>> {
    let bar = Bar::RatioAtLeast(0.7);
    let mut rate = Measure::new("end to end: MQTT QoS 1 to rows", "msg/s", bar);
    let mut cpu = Measure::new("CPU of the node per message, end to end", "µs", Bar::AtMost(14.0));
    for _ in 0..rounds {
        lab.fresh_database()?;
        let mut subject = lab.start(&Plan::new(Sink::Table))?;
        let pid = subject.pid()?;
        let before = cpu_seconds(pid)?;
        let started = Instant::now();
        let load = flood(lab.mosquitto.port(), &subject.topic, count);
        let ended = subject.wait_for(count, delivered)?;
        let spent = cpu_seconds(pid)? - before;
        load.join()?;
        subject.stop()?;
        check_rows(lab, count)?;
        rate.ours.push(count as f64 / (ended - started).as_secs_f64());
        cpu.ours.push(spent * 1e6 / count as f64);
        rate.baseline.push(bare(lab, count)?);
    }
    Ok(vec![rate, cpu])
}

/// A node that was away: the broker holds its messages; from the start of the process until all are rows.
///
/// # Errors
/// When a run fails, or rows are missing.
pub fn queued(lab: &mut Lab, count: u64, rounds: usize) -> Result<Vec<Measure>> {
    let bar = Bar::RatioAtLeast(0.4);
    let name = if count == 300_000 {
        "300,000 queued at the broker to rows"
    } else {
        "messages queued at the broker to rows (fewer)"
    };
    let mut rate = Measure::new(name, "msg/s", bar);
    for _ in 0..rounds {
        lab.fresh_database()?;
        let mut subject = lab.start(&Plan::new(Sink::Table))?;
        subject.stop()?;
        flood(lab.mosquitto.port(), &subject.topic, count).join()?;
        let mut again = lab.spawn(&Plan {
            state: Some(subject.state.clone()),
            identity: Some(subject.identity.clone()),
            ..Plan::new(Sink::Table)
        })?;
        again.wait_subscribed()?;
        let ended = again.wait_for(count, delivered)?;
        rate.ours.push(count as f64 / (ended - again.started).as_secs_f64());
        again.stop()?;
        check_rows(lab, count)?;
        lab.empty_table()?;
        let target = lab.postgres.connection_string(DATABASE);
        rate.baseline.push(copy(&target, count, BATCH_ROWS)?);
    }
    Ok(vec![rate])
}

/// A rate with rows missing is no rate.
pub fn check_rows(lab: &Lab, count: u64) -> Result<()> {
    let rows = lab.postgres.value(
        DATABASE,
        &format!("SELECT count(*) || ' ' || count(DISTINCT active_energy_total) FROM {TABLE}"),
    )?;
    anyhow::ensure!(
        rows == format!("{count} {count}"),
        "{count} messages, rows and distinct: {rows}"
    );
    Ok(())
}
