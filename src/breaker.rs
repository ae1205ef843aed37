//! The circuit breaker of one dependency, shared by every part that uses it: after several failures nobody asks it
//! anything but one trial at a time, and the first success lets everybody go on at once.
//!
//! ```text
//!            failures in a row, or half of the last calls             cool-down over, one trial
//!   closed ──────────────────────────────────────────────► open ◄──────────────────────────────► half open
//!      ▲                                                        trial failed: a new cool-down        │
//!      └───────────────────────────────────────────────────────────────────────────── any success ──┘
//! ```
//! Below the trip the back-off of whoever fails is the pace; above it the cool-down is, for all of them together.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;

use crate::config::BreakerSettings;
use crate::domain::{Incident, Runbook};

/// Calls that are looked at together.
const CALLS_MAX: usize = 20;
/// Fewer calls say nothing about the share that fails.
const CALLS_MIN: usize = 10;
/// Calls longer ago than this say nothing about now.
const CALLS_AGE_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Everybody may ask.
    #[default]
    Closed,
    /// Nobody asks until the cool-down is over.
    Open,
    /// One trial is under way.
    HalfOpen,
}

impl BreakerState {
    pub const ALL: [BreakerState; 3] =
        [BreakerState::Closed, BreakerState::Open, BreakerState::HalfOpen];

    /// The metric label.
    pub fn code(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::Open => "open",
            BreakerState::HalfOpen => "half_open",
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Position {
    Closed,
    Open { until: Instant },
    HalfOpen { trial: u64 },
}

/// The state machine, without a clock of its own.
#[derive(Debug)]
struct Circuit {
    settings: BreakerSettings,
    position: Position,
    failures_in_a_row: u32,
    /// When each of the last calls ended, and whether it failed.
    calls: VecDeque<(Instant, bool)>,
    trips: u64,
    trials: u64,
}

/// What a call that may be made is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Ordinary,
    Trial(u64),
}

impl Circuit {
    fn new(settings: BreakerSettings) -> Self {
        Circuit {
            settings,
            position: Position::Closed,
            failures_in_a_row: 0,
            calls: VecDeque::new(),
            trips: 0,
            trials: 0,
        }
    }

    /// May a call be made? If not, how long until it is worth asking again.
    fn pass(&mut self, now: Instant) -> Result<Pass, Duration> {
        match self.position {
            Position::Closed => Ok(Pass::Ordinary),
            Position::Open { until } if until > now => Err(until - now),
            Position::Open { .. } => {
                self.trials += 1;
                self.position = Position::HalfOpen { trial: self.trials };
                Ok(Pass::Trial(self.trials))
            }
            Position::HalfOpen { .. } => Err(self.settings.cool_down),
        }
    }

    /// True when it is a recovery: there had been failures.
    fn succeeded(&mut self, now: Instant) -> bool {
        let failures = std::mem::take(&mut self.failures_in_a_row);
        if matches!(self.position, Position::Closed) {
            self.note(now, false);
        } else {
            self.position = Position::Closed;
            self.calls.clear();
        }
        failures > 0
    }

    /// True when it trips the breaker.
    fn failed(&mut self, pass: Pass, now: Instant) -> bool {
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        match (self.position, pass) {
            (Position::Closed, _) => {
                self.note(now, true);
                let trips = self.is_too_much();
                if trips {
                    self.trips += 1;
                    self.position = Position::Open { until: now + self.settings.cool_down };
                }
                trips
            }
            (Position::HalfOpen { trial }, Pass::Trial(own)) if trial == own => {
                self.position = Position::Open { until: now + self.settings.cool_down };
                false
            }
            // A call from before the trip: no news.
            _ => false,
        }
    }

    /// A trial ended without an answer for us to judge: the next one need not wait.
    fn abandoned(&mut self, pass: Pass, now: Instant) {
        if let (Position::HalfOpen { trial }, Pass::Trial(own)) = (self.position, pass)
            && trial == own
        {
            self.position = Position::Open { until: now };
        }
    }

    fn note(&mut self, now: Instant, failed: bool) {
        if self.calls.len() == CALLS_MAX {
            self.calls.pop_front();
        }
        self.calls.push_back((now, failed));
        let old = |at: Instant| now.saturating_duration_since(at) > CALLS_AGE_MAX;
        while self.calls.front().is_some_and(|(at, _)| old(*at)) {
            self.calls.pop_front();
        }
    }

    fn is_too_much(&self) -> bool {
        let failed = self.calls.iter().filter(|(_, failed)| *failed).count();
        let half = self.calls.len() >= CALLS_MIN && failed * 2 >= self.calls.len();
        half || self.failures_in_a_row >= self.settings.failures
    }

    fn state(&self) -> BreakerState {
        match self.position {
            Position::Closed => BreakerState::Closed,
            Position::Open { .. } => BreakerState::Open,
            Position::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    fn rest(&self, now: Instant) -> Option<Duration> {
        match self.position {
            Position::Closed => None,
            Position::Open { until } => Some(until.saturating_duration_since(now)),
            Position::HalfOpen { .. } => Some(self.settings.cool_down),
        }
    }
}

/// What the breaker shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BreakerStatus {
    pub state: BreakerState,
    /// From closed to open, since the process started.
    pub trips: u64,
    /// While it is open.
    pub next_trial_in: Option<Duration>,
}

/// No call now: ask again then, or when [`Breaker::recovered`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resting {
    pub retry_in: Duration,
}

/// Shared by every user of one dependency.
#[derive(Debug)]
pub struct Breaker {
    dependency: String,
    /// The dependency's, for the log.
    outage: Arc<Incident>,
    circuit: Mutex<Circuit>,
    recoveries: watch::Sender<u64>,
}

impl Breaker {
    pub fn new(dependency: &str, settings: BreakerSettings, outage: Arc<Incident>) -> Arc<Self> {
        Arc::new(Breaker {
            dependency: dependency.to_owned(),
            outage,
            circuit: Mutex::new(Circuit::new(settings)),
            recoveries: watch::Sender::new(0),
        })
    }

    fn circuit(&self) -> MutexGuard<'_, Circuit> {
        // No code between two assignments can panic: the value is whole.
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn settings(&self) -> BreakerSettings {
        self.circuit().settings
    }

    /// Leave to make one call, whose outcome the permit is told.
    pub fn pass(self: &Arc<Self>) -> Result<Permit, Resting> {
        match self.circuit().pass(Instant::now()) {
            Ok(pass) => Ok(Permit { breaker: self.clone(), pass, judged: false }),
            Err(retry_in) => Err(Resting { retry_in }),
        }
    }

    /// How long until the next trial; `None` while calls may be made. For those who make no trial themselves.
    pub fn rest(&self) -> Option<Duration> {
        self.circuit().rest(Instant::now())
    }

    /// The dependency showed without a call of ours that it works.
    pub fn succeeded(&self) {
        if self.circuit().succeeded(Instant::now()) {
            self.recoveries.send_modify(|count| *count += 1);
        }
    }

    /// The dependency showed without a call of ours that it does not work.
    pub fn failed(&self) {
        self.judge_failed(Pass::Ordinary);
    }

    fn judge_failed(&self, pass: Pass) {
        let mut circuit = self.circuit();
        if !circuit.failed(pass, Instant::now()) {
            return;
        }
        let (failures, cool_down) = (circuit.failures_in_a_row, circuit.settings.cool_down);
        drop(circuit);
        tracing::warn!(
            event = "breaker_opened",
            runbook = Runbook::DependencyDown.page(),
            correlation_id = %self.outage.id(),
            dependency = self.dependency,
            failures,
            cool_down_seconds = cool_down.as_secs_f32(),
            "it failed too often: one trial at a time until it answers"
        );
    }

    /// Returns at the next success after a failure, whoever had it. Pauses end with it.
    pub async fn recovered(&self) {
        let mut recoveries = self.recoveries.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = recoveries.changed().await;
    }

    pub fn status(&self) -> BreakerStatus {
        let circuit = self.circuit();
        let next_trial_in = match circuit.position {
            Position::Open { .. } => circuit.rest(Instant::now()),
            _ => None,
        };
        BreakerStatus { state: circuit.state(), trips: circuit.trips, next_trial_in }
    }
}

/// Leave for one call. Dropped without a verdict it counts for nothing.
#[derive(Debug)]
pub struct Permit {
    breaker: Arc<Breaker>,
    pass: Pass,
    judged: bool,
}

impl Permit {
    /// The dependency answered, whatever it said.
    pub fn succeeded(mut self) {
        self.judged = true;
        self.breaker.succeeded();
    }

    /// It did not answer, or not in time.
    pub fn failed(mut self) {
        self.judged = true;
        self.breaker.judge_failed(self.pass);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.judged {
            self.breaker.circuit().abandoned(self.pass, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOL_DOWN: Duration = Duration::from_secs(3);

    fn circuit() -> (Circuit, Instant) {
        let settings = BreakerSettings { failures: 5, cool_down: COOL_DOWN };
        (Circuit::new(settings), Instant::now())
    }

    fn tripped() -> (Circuit, Instant) {
        let (mut circuit, now) = circuit();
        for _ in 0..4 {
            assert!(!circuit.failed(Pass::Ordinary, now));
        }
        assert!(circuit.failed(Pass::Ordinary, now), "the fifth in a row");
        (circuit, now)
    }

    #[test]
    fn five_failures_in_a_row_open_it_and_a_success_between_starts_over() {
        let (mut circuit, now) = circuit();
        for _ in 0..4 {
            circuit.failed(Pass::Ordinary, now);
        }
        assert!(circuit.succeeded(now), "a recovery");
        for _ in 0..4 {
            assert!(!circuit.failed(Pass::Ordinary, now));
        }
        assert_eq!(circuit.state(), BreakerState::Closed);
        assert!(circuit.failed(Pass::Ordinary, now));
        assert_eq!((circuit.state(), circuit.trips), (BreakerState::Open, 1));
        assert_eq!(circuit.pass(now), Err(COOL_DOWN));
    }

    #[test]
    fn half_of_at_least_ten_calls_opens_it_and_old_calls_do_not_count() {
        let (mut circuit, mut now) = circuit();
        let mut calls = 0;
        while circuit.state() == BreakerState::Closed {
            circuit.succeeded(now);
            circuit.failed(Pass::Ordinary, now);
            calls += 2;
            assert!(calls <= 10);
        }
        assert_eq!(calls, 10);

        let (mut circuit, _) = self::circuit();
        for _ in 0..100 {
            circuit.failed(Pass::Ordinary, now);
            circuit.succeeded(now);
            now += CALLS_AGE_MAX / 8;
        }
        assert_eq!(circuit.state(), BreakerState::Closed, "never ten within a minute");
    }

    #[test]
    fn one_trial_at_a_time_and_a_failed_one_starts_the_cool_down_anew() {
        let (mut circuit, tripped_at) = tripped();
        let later = tripped_at + COOL_DOWN;
        let first = circuit.pass(later).unwrap();
        assert_eq!(circuit.state(), BreakerState::HalfOpen);
        assert_eq!(circuit.pass(later), Err(COOL_DOWN), "one at a time");
        circuit.failed(Pass::Ordinary, later);
        assert_eq!(circuit.state(), BreakerState::HalfOpen, "a call from before the trip");
        let failed_at = later + COOL_DOWN * 4;
        circuit.failed(first, failed_at);
        assert_eq!(circuit.pass(failed_at + COOL_DOWN / 2), Err(COOL_DOWN / 2));
        let second = circuit.pass(failed_at + COOL_DOWN).unwrap();
        assert_ne!(first, second);
        circuit.failed(first, failed_at + COOL_DOWN);
        assert_eq!(circuit.state(), BreakerState::HalfOpen, "an earlier trial is no news");
        assert!(circuit.succeeded(failed_at + COOL_DOWN));
        assert_eq!((circuit.state(), circuit.trips), (BreakerState::Closed, 1));
    }

    #[test]
    fn a_trial_without_a_verdict_lets_the_next_one_in() {
        let (mut circuit, now) = tripped();
        let trial = circuit.pass(now + COOL_DOWN).unwrap();
        circuit.abandoned(trial, now + COOL_DOWN);
        assert!(circuit.pass(now + COOL_DOWN).is_ok());
        circuit.abandoned(trial, now + COOL_DOWN);
        assert_eq!(circuit.state(), BreakerState::HalfOpen, "not of the trial under way");
    }

    #[tokio::test]
    async fn a_recovery_ends_every_pause_at_once() {
        let settings = BreakerSettings { failures: 2, cool_down: Duration::from_secs(3600) };
        let breaker = Breaker::new("test", settings, Arc::default());
        breaker.pass().unwrap().failed();
        breaker.pass().unwrap().failed();
        assert_eq!(breaker.status().trips, 1);
        assert!(breaker.status().next_trial_in.unwrap() > Duration::from_secs(3000));
        assert!(breaker.pass().is_err());
        let everybody = async { tokio::join!(breaker.recovered(), breaker.recovered()) };
        let recovery = async { tokio::join!(everybody, async { breaker.succeeded() }) };
        let ended = tokio::time::timeout(Duration::from_secs(5), recovery).await;
        assert!(ended.is_ok(), "a pause goes on");
        assert_eq!(breaker.status(), BreakerStatus { trips: 1, ..BreakerStatus::default() });
        assert!(breaker.pass().is_ok());
    }
}
