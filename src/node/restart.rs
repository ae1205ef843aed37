//! When a part that ended is started again: a pure decision over its failures.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::{BackoffSettings, SupervisionSettings};
use crate::retry::Backoff;

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    RestartAfter(Duration),
    /// Too many failures within the window: tried again slowly, or by hand.
    Park {
        retry_after: Duration,
    },
}

/// The failures of one part.
#[derive(Debug)]
pub struct RestartPolicy {
    settings: SupervisionSettings,
    failures: VecDeque<Instant>,
    backoff: Backoff,
}

impl RestartPolicy {
    pub fn new(settings: SupervisionSettings) -> Self {
        let pauses = BackoffSettings { min: settings.backoff_min, max: settings.backoff_max };
        RestartPolicy { failures: VecDeque::new(), backoff: Backoff::new(pauses), settings }
    }

    pub fn failed(&mut self, now: Instant) -> Decision {
        let window = self.settings.restart_window;
        while self.failures.front().is_some_and(|at| now.duration_since(*at) > window) {
            self.failures.pop_front();
        }
        if self.failures.is_empty() {
            self.backoff.reset();
        }
        self.failures.push_back(now);
        if self.failures.len() > self.settings.restarts_max as usize {
            Decision::Park { retry_after: self.settings.parked_retry }
        } else {
            Decision::RestartAfter(self.backoff.next_pause())
        }
    }

    /// By hand: the slate is clean.
    pub fn forgive(&mut self) {
        self.failures.clear();
        self.backoff.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> SupervisionSettings {
        SupervisionSettings {
            restarts_max: 3,
            restart_window: Duration::from_secs(60),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
            parked_retry: Duration::from_secs(300),
            stall_timeout: Duration::from_secs(60),
        }
    }

    #[test]
    fn a_part_that_keeps_failing_is_parked_and_one_that_recovers_is_not() {
        let mut policy = RestartPolicy::new(settings());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for second in 0..3 {
            assert!(matches!(policy.failed(at(second)), Decision::RestartAfter(_)));
        }
        let parked = Decision::Park { retry_after: Duration::from_secs(300) };
        assert_eq!(policy.failed(at(3)), parked);
        assert!(matches!(policy.failed(at(100)), Decision::RestartAfter(_)), "outside the window");
    }

    #[test]
    fn pauses_grow_within_a_window_and_a_person_may_forgive() {
        let mut policy = RestartPolicy::new(settings());
        let now = Instant::now();
        let pauses: Vec<_> = (0..3).map(|_| policy.failed(now)).collect();
        let pause = |decision: &Decision| match decision {
            Decision::RestartAfter(pause) => *pause,
            Decision::Park { .. } => panic!("parked too early"),
        };
        assert!(pause(&pauses[2]) > pause(&pauses[0]));
        policy.forgive();
        assert!(
            matches!(policy.failed(now), Decision::RestartAfter(p) if p < Duration::from_millis(140))
        );
    }
}
