//! Something outside on the board: whether it answers, since when, and its breaker.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::Serialize;

use super::board::lock;
use crate::breaker::{Breaker, BreakerState, BreakerStatus};
use crate::config::BreakerSettings;
use crate::domain::{Arrival, CorrelationId, Incident, Runbook};

/// Something outside: a broker, a Kafka cluster, a database.
#[derive(Debug, Clone, Default, Serialize)]
pub struct DependencyStatus {
    /// `None` until first tried.
    pub up: Option<bool>,
    pub since: Option<Arrival>,
    /// Its last error, for people.
    pub trouble: Option<String>,
    /// Databases only.
    pub migration: Option<MigrationState>,
    pub migrations_pending: u64,
    pub breaker: BreakerShown,
    /// Of the outage that goes on, as in the log.
    pub correlation_id: Option<CorrelationId>,
}

/// The breaker that all parts using the dependency share.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct BreakerShown {
    pub state: BreakerState,
    /// Since the process started.
    pub trips: u64,
    /// While it is open.
    pub next_trial: Option<Arrival>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// Not yet done: the database may be away.
    Waiting,
    Done,
    /// Refused or failed: this database's writers stay off.
    Failed,
}

/// A dependency's line on the board. Several parts may share one; whoever learns something tells it here, and only
/// news goes to the log, with what was held back since.
#[derive(Debug)]
pub struct DependencyView {
    name: String,
    status: Mutex<DependencyStatus>,
    breaker: Arc<Breaker>,
    outage: Arc<Incident>,
    /// Since when it does not answer.
    lost: Mutex<Option<Instant>>,
    /// Failed attempts since the last line in the log.
    attempts: AtomicU64,
}

impl DependencyView {
    pub fn new(name: &str, breaker: BreakerSettings) -> Self {
        let outage = Arc::new(Incident::default());
        DependencyView {
            name: name.to_owned(),
            status: Mutex::default(),
            breaker: Breaker::new(name, breaker, outage.clone()),
            outage,
            lost: Mutex::default(),
            attempts: AtomicU64::default(),
        }
    }

    pub fn breaker(&self) -> &Arc<Breaker> {
        &self.breaker
    }

    /// What goes on while it does not answer.
    pub fn outage(&self) -> &Incident {
        &self.outage
    }

    pub fn status(&self) -> DependencyStatus {
        let mut status = lock(&self.status).clone();
        status.breaker = shown(self.breaker.status());
        status.correlation_id = self.outage.current();
        status
    }

    pub fn update(&self, change: impl FnOnce(&mut DependencyStatus)) {
        change(&mut lock(&self.status));
    }

    /// It answered. Cheap when that is no news.
    pub fn reachable(&self) {
        let mut status = lock(&self.status);
        if status.up == Some(true) {
            return;
        }
        status.up = Some(true);
        status.since = Some(Arrival::now());
        status.trouble = None;
        drop(status);
        let dependency = self.name.as_str();
        let correlation_id = self.outage.end().map(tracing::field::display);
        match lock(&self.lost).take() {
            Some(lost) => {
                let away_seconds = lost.elapsed().as_secs();
                let attempts = self.attempts.swap(0, Ordering::Relaxed);
                tracing::info!(
                    event = "dependency_reached",
                    correlation_id,
                    dependency,
                    away_seconds,
                    attempts,
                    "it answers again"
                );
            }
            None => tracing::info!(event = "dependency_reached", dependency, "it answers"),
        }
    }

    /// It did not answer.
    pub fn unreachable(&self, why: &str) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        let mut status = lock(&self.status);
        let news = status.up != Some(false);
        if news {
            status.up = Some(false);
            status.since = Some(Arrival::now());
            lock(&self.lost).get_or_insert_with(Instant::now);
        }
        status.trouble = Some(why.to_owned());
        drop(status);
        if news {
            tracing::warn!(
                event = "dependency_lost",
                runbook = Runbook::DependencyDown.page(),
                correlation_id = %self.outage.id(),
                dependency = self.name,
                error = why,
                "it does not answer: messages are kept and it is tried again, quietly"
            );
        }
    }
}

fn shown(breaker: BreakerStatus) -> BreakerShown {
    let next_trial = breaker.next_trial_in.map(|left| {
        let left = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
        Arrival(Arrival::now().as_micros().saturating_add(left))
    });
    BreakerShown { state: breaker.state, trips: breaker.trips, next_trial }
}
