//! One judgement of the whole node, used by `/health`, `/health/ready`, the metrics and `telemetry status`.

use jiff::Timestamp;
use serde::Serialize;

use super::board::Board;
use super::dependency::MigrationState;
use super::expiry::Nearness;
use super::status::{PartState, Silence, SinkState};
use crate::breaker::BreakerState;
use crate::domain::Runbook;

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
        let page = Runbook::BufferFull.page();
        verdict.not_ready(&format!("not accepting: {why} (runbook {page})"));
    }
    if let Some(thread) = buffer.stalled_thread {
        let text = format!("the buffer's thread {thread} has work and makes no progress");
        verdict.unhealthy_page(&text, Runbook::PartStalled);
    }
    if buffer.lost.values().any(|lost| *lost > 0) {
        let text = "the disk lost kept records: see /health, buffer.lost";
        verdict.unhealthy_page(text, Runbook::DataLost);
    }
    if !buffer.dead_letters_lost.is_empty() {
        let text = "the disk lost dead letters: see /health, buffer.dead_letters_lost";
        verdict.unhealthy_page(text, Runbook::DataLost);
    }
    for (name, dependency) in board.dependencies() {
        match dependency.migration {
            Some(MigrationState::Failed) => {
                let why = dependency.trouble.clone().unwrap_or_default();
                let page = Runbook::MigrationFailed.page();
                verdict.not_ready(&format!("migrations of {name} failed: {why} (runbook {page})"));
            }
            Some(MigrationState::Waiting) => {
                verdict.not_ready_but_degraded(&format!("{name}: migrations not applied yet"));
            }
            Some(MigrationState::Done) | None => {}
        }
        if dependency.up == Some(false) {
            let why = dependency.trouble.unwrap_or_default();
            let pace = match dependency.breaker.state {
                BreakerState::Closed => "",
                BreakerState::Open | BreakerState::HalfOpen => " (its breaker is open)",
            };
            let text = format!("{name} is away{pace}: {why}");
            verdict.degraded_page(&text, Runbook::DependencyDown);
        }
    }
    judge_streams(board, &mut verdict);
    judge_certificates(board, &mut verdict);
    for (part, status) in board.parts() {
        if status.state == PartState::Parked {
            let why = status.last_failure.unwrap_or_default();
            let text = format!("part {part} is parked: {why}");
            verdict.unhealthy_page(&text, Runbook::PartParked);
        }
    }
    verdict.done()
}

fn judge_streams(board: &Board, verdict: &mut Verdict) {
    for (name, view) in board.streams() {
        let status = view.status();
        if !status.subscribed {
            let why = status.trouble.as_deref().unwrap_or("not connected yet");
            let page = Runbook::StreamNotSubscribed;
            verdict.degraded_page(&format!("stream {name} is not subscribed: {why}"), page);
        }
        let asked = status.asked_qos;
        if let Some(granted) = status.granted_qos.filter(|granted| *granted < asked) {
            let text =
                format!("stream {name}: the broker granted QoS {granted}, asked for {asked}");
            verdict.degraded_page(&text, Runbook::StreamNotSubscribed);
        }
        if let Some(silence) = status.silence() {
            let Silence { severity, limit_seconds, silent_seconds } = silence;
            let text = format!(
                "stream {name} is silent for {silent_seconds:.0} s, longer than the {limit_seconds:.0} s of \
                 silent_{severity}_after_seconds"
            );
            match severity {
                Silence::CRITICAL => verdict.unhealthy_page(&text, Runbook::StreamSilent),
                _ => verdict.degraded_page(&text, Runbook::StreamSilent),
            }
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
                let page = match status.state {
                    SinkState::Fenced => Runbook::SinkFenced,
                    _ => Runbook::SinkHeld,
                };
                verdict.unhealthy_page(&format!("{stream} → {sink} is {state}: {why}"), page);
            }
        }
        if status.books.is_some_and(|books| books.difference() != 0) {
            let text = format!("the books of {stream} → {sink} do not balance");
            verdict.unhealthy_page(&text, Runbook::BooksDoNotBalance);
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

    fn unhealthy_page(&mut self, why: &str, page: Runbook) {
        self.unhealthy(&format!("{why} (runbook {})", page.page()));
    }

    fn degraded_page(&mut self, why: &str, page: Runbook) {
        self.degraded(&format!("{why} (runbook {})", page.page()));
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
