//! One judgement of the whole node, used by `/health`, `/health/ready`, the metrics and `telemetry status`.

use jiff::Timestamp;
use serde::Serialize;

use super::board::{Board, MigrationState, PartState, SinkState};
use super::expiry::Nearness;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    Healthy,
    /// Nothing is lost, something waits.
    Degraded,
    /// Messages are not accepted, or a person must act.
    Unhealthy,
}

impl HealthState {
    pub const ALL: [HealthState; 3] =
        [HealthState::Healthy, HealthState::Degraded, HealthState::Unhealthy];

    pub fn code(self) -> &'static str {
        match self {
            HealthState::Healthy => "healthy",
            HealthState::Degraded => "degraded",
            HealthState::Unhealthy => "unhealthy",
        }
    }
}

/// The verdict with its reasons, worst first.
#[derive(Debug, Clone, Serialize)]
pub struct Health {
    pub state: HealthState,
    /// False when it cannot accept, or while a database's migrations failed, or before the sinks have begun.
    pub ready: bool,
    pub because: Vec<String>,
    /// Nothing is wrong yet.
    pub warnings: Vec<String>,
}

/// Reads the board; touches nothing outside.
pub fn judge(board: &Board) -> Health {
    let mut verdict = Verdict::default();
    let node = board.node();
    if !node.running {
        verdict.not_ready(if node.draining {
            "the node is stopping"
        } else {
            "the node is starting"
        });
    }
    let buffer = board.buffer();
    if !buffer.accepting {
        let why =
            buffer.refusing_because.unwrap_or_else(|| "the buffer is not open yet".to_owned());
        verdict.not_ready(&format!("not accepting: {why}"));
    }
    if buffer.lost.values().any(|lost| *lost > 0) {
        verdict.unhealthy("the disk lost kept records: see /health, buffer.lost");
    }
    for (name, dependency) in board.dependencies() {
        match dependency.migration {
            Some(MigrationState::Failed) => {
                let why = dependency.trouble.clone().unwrap_or_default();
                verdict.not_ready(&format!("migrations of {name} failed: {why}"));
            }
            Some(MigrationState::Waiting) => {
                verdict.not_ready_but_degraded(&format!("{name}: migrations not applied yet"));
            }
            Some(MigrationState::Done) | None => {}
        }
        if dependency.up == Some(false) {
            let why = dependency.trouble.unwrap_or_default();
            verdict.degraded(&format!("{name} is away: {why}"));
        }
    }
    judge_streams(board, &mut verdict);
    judge_certificates(board, &mut verdict);
    for (part, status) in board.parts() {
        if status.state == PartState::Parked {
            let why = status.last_failure.unwrap_or_default();
            verdict.unhealthy(&format!("part {part} is parked: {why}"));
        }
    }
    verdict.done()
}

fn judge_streams(board: &Board, verdict: &mut Verdict) {
    for (name, view) in board.streams() {
        let status = view.status();
        if !status.subscribed {
            let why = status.trouble.unwrap_or_else(|| "not connected yet".to_owned());
            verdict.degraded(&format!("stream {name} is not subscribed: {why}"));
        }
    }
    for (stream, sink, view) in board.sinks() {
        let status = view.status();
        let why = status.trouble.unwrap_or_default();
        match status.state {
            SinkState::Delivering | SinkState::Paused => {}
            SinkState::Waiting => verdict.degraded(&format!("{stream} → {sink} waits: {why}")),
            SinkState::Held | SinkState::Parked | SinkState::Fenced => {
                let state = status.state.code();
                verdict.unhealthy(&format!("{stream} → {sink} is {state}: {why}"));
            }
        }
        if status.books.is_some_and(|books| books.difference() != 0) {
            verdict.unhealthy(&format!("the books of {stream} → {sink} do not balance"));
        }
    }
}

fn judge_certificates(board: &Board, verdict: &mut Verdict) {
    let now = Timestamp::now();
    for (peer, status) in board.certificates() {
        match status.nearness(now) {
            Nearness::Far => {}
            Nearness::Soon => verdict.warnings.push(status.story(&peer, now)),
            Nearness::VerySoon | Nearness::Over => verdict.degraded(&status.story(&peer, now)),
        }
    }
}

#[derive(Default)]
struct Verdict {
    not_ready: bool,
    unhealthy: Vec<String>,
    degraded: Vec<String>,
    warnings: Vec<String>,
}

impl Verdict {
    fn not_ready(&mut self, why: &str) {
        self.not_ready = true;
        self.unhealthy(why);
    }

    fn not_ready_but_degraded(&mut self, why: &str) {
        self.not_ready = true;
        self.degraded(why);
    }

    fn unhealthy(&mut self, why: &str) {
        self.unhealthy.push(why.to_owned());
    }

    fn degraded(&mut self, why: &str) {
        self.degraded.push(why.to_owned());
    }

    fn done(self) -> Health {
        let state = if !self.unhealthy.is_empty() {
            HealthState::Unhealthy
        } else if !self.degraded.is_empty() {
            HealthState::Degraded
        } else {
            HealthState::Healthy
        };
        let because = self.unhealthy.into_iter().chain(self.degraded).collect();
        Health { state, ready: !self.not_ready, because, warnings: self.warnings }
    }
}
