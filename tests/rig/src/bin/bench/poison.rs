//! What one row that a table refuses costs the others of its batch.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio_postgres::{Client, NoTls};

use crate::lab::{DATABASE, Lab, PLUGS, Plan, Sink, Subject, TABLE, kept};
use crate::load::{FIRST, Messages, burst, meter, plugs};
use crate::report::{Bar, Measure};

const BATCH: u64 = 5_000;
/// `batch_linger_ms` of a table that does not set it: how long a flush waits.
const BATCH_LINGER_MS: f64 = 5.0;
/// Each is short, and what the machine does beside it is not.
const ROUNDS: u64 = 15;
const READY_WITHIN: Duration = Duration::from_secs(60);
const JUDGED_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(1);

/// A table that refuses one row of a batch.
struct Case {
    name: &'static str,
    table: &'static str,
    /// Where the counter of a message is found.
    counter: &'static str,
    /// `None`: each message is a row.
    plugs: Option<u64>,
}

const CASES: [Case; 3] = [
    Case {
        name: "5,000 rows, one of them refused",
        table: TABLE,
        counter: "active_energy_total",
        plugs: None,
    },
    Case {
        name: "5,000 messages of 50 plugs, one refused",
        table: "power_plugs",
        counter: "uptime_seconds",
        plugs: Some(50),
    },
    Case {
        name: "5,000 messages of 5,000 plugs, one refused",
        table: "power_plugs",
        counter: "uptime_seconds",
        plugs: Some(5_000),
    },
];

/// Of a time series the refused row's half of the batch is sent up to it, what was before it once more, then it alone: it
/// costs the more the later it comes in its half. Of latest state it is found among the folded rows, and then among the
/// messages of its plug. In all cases it is the last but one.
///
/// # Errors
/// When a run fails, or rows are missing.
pub fn measure(lab: &mut Lab) -> Result<Vec<Measure>> {
    let mut measures = Vec::new();
    for case in &CASES {
        let mut delay = Measure::new(case.name, "ms", Bar::RatioAtMost(3.0));
        let name = "… the good ones later than without it";
        let mut later = Measure::new(name, "ms", Bar::AtMost(2.0 * BATCH_LINGER_MS));
        lab.fresh_database()?;
        let stream = if case.plugs.is_some() { PLUGS } else { Plan::new(Sink::Table).stream };
        let mut subject = lab.start(&Plan { stream, ..Plan::new(Sink::Table) })?;
        subject.node.wait_ready(READY_WITHIN)?;
        // Makes the rows that the others change.
        case.batch(lab, &mut subject, FIRST, false)?;
        for round in 0..ROUNDS {
            let first = FIRST + (2 * round + 1) * BATCH;
            let poisoned = case.batch(lab, &mut subject, first, true)?;
            let clean = case.batch(lab, &mut subject, first + BATCH, false)?;
            delay.ours.push(poisoned.as_secs_f64() * 1e3);
            delay.baseline.push(clean.as_secs_f64() * 1e3);
            later.ours.push((poisoned.as_secs_f64() - clean.as_secs_f64()) * 1e3);
        }
        subject.stop()?;
        measures.extend([delay, later]);
    }
    Ok(measures)
}

impl Case {
    /// From the moment the table can be written to until the last good row of the batch is there. The batch gathers while
    /// another session holds the table.
    fn batch(
        &self,
        lab: &Lab,
        subject: &mut Subject,
        first: u64,
        poisoned: bool,
    ) -> Result<Duration> {
        let Case { table, counter, .. } = self;
        let refused = poisoned.then_some(BATCH - 2);
        let rule = format!(
            "ALTER TABLE {table} DROP CONSTRAINT IF EXISTS poison; \
             ALTER TABLE {table} ADD CONSTRAINT poison CHECK ({counter} <> {}) NOT VALID",
            refused.map_or(0, |place| first + place)
        );
        lab.postgres.execute(DATABASE, &rule)?;
        if self.plugs.is_none() {
            // Else each look below would take longer than the one before.
            lab.postgres.execute(DATABASE, &format!("TRUNCATE {table}"))?;
        }
        lab.postgres.execute(DATABASE, "CHECKPOINT")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let database = lab.postgres.connection_string(DATABASE);
            let connect = tokio_postgres::connect(&database, NoTls);
            let (client, connection) = connect.await.context("connect")?;
            let driving = tokio::spawn(connection);
            let held = format!("BEGIN; LOCK TABLE {table} IN SHARE MODE");
            client.batch_execute(&held).await.context("hold the table")?;
            let before = kept(&subject.look()?);
            let messages = self.messages(&subject.topic)?;
            let load = burst(lab.mosquitto.port(), messages, first..first + BATCH);
            subject.wait_for(before + BATCH, kept)?;
            load.join()?;
            client.batch_execute("COMMIT").await.context("let the table go")?;
            let began = Instant::now();
            self.wait_for_rows(&client, first, self.expected(refused)).await?;
            let took = began.elapsed();
            driving.abort();
            Ok(took)
        })
    }

    fn messages(&self, topic: &str) -> Result<Messages> {
        match self.plugs {
            Some(count) => Ok(plugs(topic, count)),
            None => meter(topic),
        }
    }

    /// Places in the batch of the messages that the table shows in the end, added up.
    fn expected(&self, refused: Option<u64>) -> i64 {
        let good = (0..BATCH).rev().filter(|place| Some(*place) != refused);
        let shown: u64 = match self.plugs {
            None => good.sum(),
            // Of each plug the newest good one.
            Some(plugs) => {
                let mut seen = HashSet::new();
                good.filter(|place| seen.insert(place % plugs)).sum()
            }
        };
        shown as i64
    }

    async fn wait_for_rows(&self, client: &Client, first: u64, expected: i64) -> Result<()> {
        let Case { table, counter, .. } = self;
        let began = Instant::now();
        let sum = format!(
            "SELECT coalesce(sum(({counter} - {first})::integer), 0) FROM {table} \
             WHERE {counter} BETWEEN {first} AND {}",
            first + BATCH - 1
        );
        let rows = client.prepare(&sum).await.context("prepare")?;
        loop {
            let found: i64 = client.query_one(&rows, &[]).await.context("add up")?.get(0);
            if found == expected {
                return Ok(());
            }
            let waited = began.elapsed();
            anyhow::ensure!(waited < JUDGED_WITHIN, "{table}: {found} instead of {expected}");
            tokio::time::sleep(POLL).await;
        }
    }
}
