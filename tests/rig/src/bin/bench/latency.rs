//! From publish to a row that another connection sees, at 1,000 messages a second; and the memory meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio_postgres::NoTls;

use crate::lab::{DATABASE, Lab, Plan, Sink, Subject, TABLE};
use crate::load::{FIRST, pace};
use crate::process::resident_mib;
use crate::report::{Bar, Measure, quantile};

const PAUSE: Duration = Duration::from_millis(1);
/// Between two looks at the table: the measure's own error, and low enough a load on the server.
const LOOK_PAUSE: Duration = Duration::from_micros(300);
/// Connections, caches and plans are warm after it.
const WARM_UP_MESSAGES: usize = 1_000;
const LAST_ROW_WITHIN: Duration = Duration::from_secs(30);

/// # Errors
/// When a run fails.
pub fn measure(lab: &mut Lab, seconds: u64, rounds: usize) -> Result<Vec<Measure>> {
    let new = |name, bar| Measure::new(name, "ms", Bar::AtMost(bar));
    let mut usual = [
        new("latency p50, defaults, 1,000 msg/s", 12.0),
        new("latency p99, defaults, 1,000 msg/s", 30.0),
    ];
    let mut lowest = [
        new("latency p50, lowest-latency setting", 3.0),
        new("latency p99, lowest-latency setting", 8.0),
    ];
    let bar = Bar::AtMost(96.0);
    let mut memory = Measure::new("resident memory, steady at 1,000 msg/s", "MiB", bar);
    for _ in 0..rounds {
        for (lowest_latency, measures) in [(false, &mut usual), (true, &mut lowest)] {
            lab.fresh_database()?;
            let mut subject = lab.start(&Plan { lowest_latency, ..Plan::new(Sink::Table) })?;
            let latencies = run(lab, &subject, seconds * 1_000)?;
            measures[0].ours.push(quantile(&latencies, 0.5));
            measures[1].ours.push(quantile(&latencies, 0.99));
            if !lowest_latency {
                memory.ours.push(resident_mib(subject.pid()?)?.1);
            }
            subject.stop()?;
        }
    }
    Ok(usual.into_iter().chain(lowest).chain([memory]).collect())
}

/// Milliseconds, sorted.
fn run(lab: &Lab, subject: &Subject, count: u64) -> Result<Vec<f64>> {
    let stop = Arc::new(AtomicBool::new(false));
    let target = lab.postgres.connection_string(DATABASE);
    let watcher = {
        let stop = stop.clone();
        std::thread::spawn(move || watch(&target, FIRST + count - 1, &stop))
    };
    let sent = pace(lab.mosquitto.port(), &subject.topic, 0..count, PAUSE).join();
    // The watcher ends with the last row; when that does not come, somebody must tell it to.
    let deadline = Instant::now() + LAST_ROW_WITHIN;
    while !watcher.is_finished() && Instant::now() < deadline && sent.is_ok() {
        std::thread::sleep(Duration::from_millis(20));
    }
    stop.store(true, Ordering::Relaxed);
    let seen = watcher.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))??;
    let latencies = latencies(&sent?, &seen)?;
    Ok(latencies)
}

/// Each time the newest counter in the table had grown: counter and moment.
fn watch(target: &str, last: u64, stop: &AtomicBool) -> Result<Vec<(u64, Instant)>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(target, NoTls).await?;
        let driver = tokio::spawn(connection);
        // Messages of one read share their arrival time.
        let newest = format!(
            "SELECT active_energy_total FROM {TABLE} WHERE device_serial = 'SE-4471-K' \
             ORDER BY time DESC, active_energy_total DESC LIMIT 1"
        );
        let newest = client.prepare(&newest).await?;
        let mut seen: Vec<(u64, Instant)> = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            if let Some(row) = client.query_opt(&newest, &[]).await? {
                let counter = u64::try_from(row.get::<_, i64>(0)).context("a counter")?;
                if seen.last().is_none_or(|(known, _)| counter > *known) {
                    seen.push((counter, Instant::now()));
                }
                if counter >= last {
                    break;
                }
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        driver.abort();
        Ok(seen)
    })
}

/// Messages of one stream become visible in their order: one is there when a later one is.
fn latencies(sent: &[Instant], seen: &[(u64, Instant)]) -> Result<Vec<f64>> {
    let mut looks = seen.iter().peekable();
    let mut all = Vec::with_capacity(sent.len());
    for (number, at) in sent.iter().enumerate() {
        let counter = FIRST + number as u64;
        while looks.peek().is_some_and(|(newest, _)| *newest < counter) {
            looks.next();
        }
        let (_, visible) =
            looks.peek().with_context(|| format!("message {number} was never visible"))?;
        all.push((*visible - *at).as_secs_f64() * 1e3);
    }
    let mut measured = all.split_off(WARM_UP_MESSAGES.min(all.len() / 2));
    measured.sort_by(f64::total_cmp);
    Ok(measured)
}
