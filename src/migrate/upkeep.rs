//! After the migrations: partitions ahead, old ones dropped, jobs on their interval. A failure here is told and tried
//! again; it never stops the writers.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tokio_postgres::Client;

use super::apply::Session;
use super::error::ends_session;
use crate::config::{DatabaseSettings, JobSettings, TableKind, TableSettings};
use crate::database::DatabaseError;
use crate::database::maintenance::{Tier, apply_retention, detect_tier, make_partitions, run_job};
use crate::domain::Arrival;
use crate::observe::DependencyView;
use crate::part::Control;
use crate::retry::Backoff;

/// Between two looks at the tables.
const TABLES_INTERVAL: Duration = Duration::from_secs(60);

/// Partitions beyond the current one: a database that cannot make any more for a while still takes rows.
const PARTITIONS_AHEAD: i64 = 2;

/// So that a paused part, or a task that is due at once, does not spin.
const PAUSE_MIN: Duration = Duration::from_millis(50);

const READ_ONLY: &str = "25006";

pub(super) struct Upkeep {
    database: String,
    settings: DatabaseSettings,
    view: Arc<DependencyView>,
    tasks: Vec<Task>,
    /// What is failing, by task.
    troubles: BTreeMap<String, String>,
}

#[derive(Clone)]
struct Task {
    name: String,
    work: Work,
    interval: Duration,
    due: Instant,
}

#[derive(Clone)]
enum Work {
    Table(Box<TableSettings>),
    Job(JobSettings),
}

impl Upkeep {
    pub fn new(
        database: String,
        settings: DatabaseSettings,
        tables: Vec<TableSettings>,
        view: Arc<DependencyView>,
    ) -> Self {
        let due = Instant::now();
        let tables = looked_after_once(tables).into_iter().map(|table| Task {
            name: format!("table {}", table.table),
            work: Work::Table(Box::new(table)),
            interval: TABLES_INTERVAL,
            due,
        });
        let jobs = settings.jobs.iter().map(|(name, job)| Task {
            name: format!("job {name}"),
            work: Work::Job(job.clone()),
            interval: job.interval,
            due,
        });
        let tasks = tables.chain(jobs).collect();
        Upkeep { database, settings, view, tasks, troubles: BTreeMap::new() }
    }

    pub async fn run(mut self, session: Session, mut control: Control) -> Infallible {
        let mut session = Some(session);
        let mut backoff = Backoff::new(self.settings.retry);
        loop {
            let connected = match session.take().filter(|s| !s.client().is_closed()) {
                Some(session) => Ok(session),
                None => Session::open_if_let(&self.database, &self.settings, &self.view).await,
            };
            control.progress.beat();
            match connected {
                Ok(connected) => {
                    let lost = self.look_after(connected, &mut control, &mut backoff).await;
                    self.view.unreachable(&lost.to_string());
                }
                Err(error) if error.is_resting() => {}
                Err(error) => self.view.unreachable(&error.to_string()),
            }
            let pause = backoff.next_pause();
            let pause = self.view.breaker().rest().unwrap_or(pause);
            tokio::select! {
                _ = control.sleep(pause) => {}
                () = self.view.breaker().recovered() => {}
            }
        }
    }

    /// Does what is due, for as long as the connection serves.
    async fn look_after(
        &mut self,
        session: Session,
        control: &mut Control,
        backoff: &mut Backoff,
    ) -> DatabaseError {
        let tier = match detect_tier(session.client()).await {
            Ok(tier) => tier,
            Err(error) => return error,
        };
        self.view.reachable();
        loop {
            let now = Instant::now();
            let next = self.tasks.iter().map(|task| task.due).min();
            let pause = next.map_or(TABLES_INTERVAL, |due| due.saturating_duration_since(now));
            if control.paused() || !pause.is_zero() {
                // Only now: a task that ends every session it runs in must not have one after the other.
                backoff.reset();
                control.sleep(pause.max(PAUSE_MIN)).await;
                continue;
            }
            for number in 0..self.tasks.len() {
                if self.tasks[number].due > Instant::now() {
                    continue;
                }
                let task = self.tasks[number].clone();
                let result = self.bounded(&session, &tier, &task).await;
                control.progress.beat();
                let failure = match result {
                    Err(error) if self.is_of_no_more_use(&session, &error).await => {
                        // Should it be the task's own doing, the others have their turn before it.
                        self.tasks[number..].rotate_left(1);
                        return error;
                    }
                    result => result.err(),
                };
                self.note(&task, failure);
                self.tasks[number].due = Instant::now() + task.interval;
            }
        }
    }

    /// A server that does not answer at all is given up on; everything else the server's own limit ends.
    async fn bounded(
        &self,
        session: &Session,
        tier: &Tier,
        task: &Task,
    ) -> Result<(), DatabaseError> {
        let limit = self.settings.query_timeout + self.settings.statement_timeout;
        let work = async {
            match &task.work {
                Work::Table(table) => self.keep_table(session.client(), tier, table).await,
                Work::Job(job) => run_job(session.client(), &self.settings, job).await,
            }
        };
        let timed_out = DatabaseError::TimedOut { doing: "look after the tables", limit };
        timeout(limit, work).await.unwrap_or(Err(timed_out))
    }

    /// A server that a failover made read-only keeps its sessions, and only a new connection leads to the one that took
    /// over.
    async fn is_of_no_more_use(&self, session: &Session, error: &DatabaseError) -> bool {
        let refused_to_write = error.sqlstate() == Some(READ_ONLY);
        ends_session(error) || refused_to_write && !self.can_write(session).await
    }

    /// Only the session itself knows: a task may fail with any code on its own, as one that asks another server (`dblink`).
    async fn can_write(&self, session: &Session) -> bool {
        let sql = "SELECT current_setting('transaction_read_only') = 'off'";
        let asked = session.client().query_one(sql, &[]);
        let answer = timeout(self.settings.statement_timeout, asked).await;
        matches!(answer, Ok(Ok(row)) if row.get(0))
    }

    async fn keep_table(
        &self,
        client: &Client,
        tier: &Tier,
        table: &TableSettings,
    ) -> Result<(), DatabaseError> {
        let TableKind::Append { partition, retention, .. } = &table.kind else { return Ok(()) };
        let now = Arrival::now().as_micros();
        let width = i64::try_from(partition.as_micros()).unwrap_or(i64::MAX);
        let ahead = now.saturating_add(width.saturating_mul(PARTITIONS_AHEAD));
        let made = make_partitions(client, &self.settings, table, now, ahead).await?;
        if !made.is_empty() {
            tracing::info!(
                event = "partitions_made",
                database = self.database,
                table = table.table,
                partitions = made.join(" "),
                "partitions were made ahead"
            );
        }
        let dropped = apply_retention(client, &self.settings, tier, table).await?;
        if !dropped.names.is_empty() {
            tracing::info!(
                event = "partitions_dropped",
                database = self.database,
                table = table.table,
                partitions = dropped.names.join(" "),
                retention_days = retention.map_or(0, |kept| kept.as_secs() / 86_400),
                "partitions older than the retention were dropped"
            );
        }
        if dropped.not_partitioned {
            return Err(DatabaseError::Standing {
                problem: format!(
                    "retention has no effect on {}: it is not partitioned",
                    table.table
                ),
                remedy: "partition it by a migration, or take `retention_days` out".to_owned(),
            });
        }
        Ok(())
    }

    /// Tells a task's failure once, and its end.
    fn note(&mut self, task: &Task, failure: Option<DatabaseError>) {
        let name = &task.name;
        match failure.map(|error| error.to_string()) {
            // Shown again all the same: an outage takes it from the board.
            Some(text) if self.troubles.get(name) == Some(&text) => {}
            Some(text) => {
                tracing::warn!(
                    event = "upkeep_failed",
                    database = self.database,
                    task = name,
                    retry_seconds = task.interval.as_secs(),
                    error = text,
                    "a task of the database failed; rows are written all the same"
                );
                self.troubles.insert(name.clone(), text);
            }
            None if self.troubles.remove(name).is_some() => {
                tracing::info!(
                    event = "upkeep_recovered",
                    database = self.database,
                    task = name,
                    "a task of the database works again"
                );
            }
            None => return,
        }
        let troubles = self.troubles.iter().map(|(name, text)| format!("{name}: {text}"));
        let trouble = troubles.collect::<Vec<_>>().join("; ");
        self.view.update(|status| {
            // What other parts say of a database that is away comes first.
            if status.up == Some(true) {
                status.trouble = (!trouble.is_empty()).then_some(trouble);
            }
        });
    }
}

/// Several sinks may share a table: it is kept for as long as the longest of them asks.
fn looked_after_once(tables: Vec<TableSettings>) -> Vec<TableSettings> {
    let mut once: Vec<TableSettings> = Vec::new();
    for table in tables {
        let TableKind::Append { retention, .. } = &table.kind else { continue };
        let same = once.iter_mut().find(|other| other.table == table.table);
        match same.map(|other| &mut other.kind) {
            Some(TableKind::Append { retention: kept, .. }) => {
                *kept = kept.zip(*retention).map(|(a, b)| a.max(b));
            }
            _ => once.push(table),
        }
    }
    once
}

#[cfg(test)]
mod tests {
    use indexmap::IndexMap;

    use super::*;
    use crate::domain::SinkName;

    fn table(name: &str, days: Option<u64>) -> TableSettings {
        TableSettings {
            sink: SinkName::parse(name).unwrap(),
            database: "telemetry".to_owned(),
            table: name.to_owned(),
            kind: TableKind::Append {
                time_column: "time".to_owned(),
                node_column: None,
                retention: days.map(|days| Duration::from_secs(days * 86_400)),
                partition: Duration::from_secs(86_400),
            },
            columns: IndexMap::new(),
            batch_rows_max: 1,
            batch_bytes_max: 1,
            batch_linger: Duration::ZERO,
        }
    }

    fn kept(tables: Vec<TableSettings>) -> Vec<(String, Option<u64>)> {
        let days = |table: TableSettings| match table.kind {
            TableKind::Append { retention, .. } => {
                (table.table, retention.map(|kept| kept.as_secs() / 86_400))
            }
            TableKind::Latest { .. } => unreachable!("only append tables are looked after"),
        };
        looked_after_once(tables).into_iter().map(days).collect()
    }

    #[test]
    fn a_shared_table_is_kept_for_the_longest_that_is_asked() {
        let days = |days| table("temperature_sensors", days);
        let name = || "temperature_sensors".to_owned();
        assert_eq!(kept(vec![days(Some(60)), days(Some(90))]), [(name(), Some(90))]);
        assert_eq!(kept(vec![days(Some(60)), days(None)]), [(name(), None)]);
        assert_eq!(kept(vec![days(None), table("energy", Some(1))]).len(), 2);
    }
}
