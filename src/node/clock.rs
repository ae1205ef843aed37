//! The wall clock against the monotonic one: every timer runs by the latter, so a jump of the former moves no wait; but
//! arrival times follow it, so a person must know.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::watch::Watch;
use crate::domain::{Arrival, Runbook};
use crate::observe::Board;

/// What a clock that is steered, not set, never drifts between two looks.
const JUMP_MICROS_MIN: i64 = 1_000_000;

/// Both clocks at the last look.
struct Clocks {
    wall: Arrival,
    monotonic: Instant,
}

impl Clocks {
    fn now() -> Self {
        Clocks { wall: Arrival::now(), monotonic: Instant::now() }
    }

    /// By how many microseconds the wall clock was set between the two looks; small steps are none.
    fn jump_until(&self, later: &Clocks) -> Option<i64> {
        let passed = later.monotonic.saturating_duration_since(self.monotonic).as_micros();
        let passed = i64::try_from(passed).unwrap_or(i64::MAX);
        let shown = later.wall.as_micros().saturating_sub(self.wall.as_micros());
        let jump = shown.saturating_sub(passed);
        (jump.saturating_abs() >= JUMP_MICROS_MIN).then_some(jump)
    }
}

/// Tells and counts each jump, once.
pub struct ClockWatch {
    board: Arc<Board>,
    last: Clocks,
}

impl ClockWatch {
    pub fn new(board: Arc<Board>) -> Self {
        ClockWatch { board, last: Clocks::now() }
    }
}

impl Watch for ClockWatch {
    const NAME: &'static str = "clock";
    const INTERVAL: Duration = Duration::from_secs(1);

    async fn look(&mut self) {
        let now = Clocks::now();
        if let Some(jump) = self.last.jump_until(&now) {
            tell(&self.board, jump);
        }
        self.last = now;
    }
}

fn tell(board: &Board, jump_micros: i64) {
    let forward = jump_micros > 0;
    board.update_node(|node| match forward {
        true => node.clock_jumps_forward += 1,
        false => node.clock_jumps_backward += 1,
    });
    tracing::warn!(
        event = "clock_jumped",
        direction = if forward { "forward" } else { "backward" },
        seconds = jump_micros as f64 / 1e6,
        runbook = Runbook::ClockJumped.page(),
        "the wall clock was set: arrival times follow it, order and waits do not"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_clock_is_a_jump_and_a_late_look_is_none() {
        let start = Clocks::now();
        let after = |wall: i64, monotonic: u64| Clocks {
            wall: Arrival(start.wall.0 + wall * 1_000_000),
            monotonic: start.monotonic + Duration::from_secs(monotonic),
        };
        assert_eq!(start.jump_until(&after(1, 1)), None);
        assert_eq!(start.jump_until(&after(600, 600)), None, "the node itself stood still");
        assert_eq!(start.jump_until(&after(3601, 1)), Some(3_600_000_000));
        assert_eq!(start.jump_until(&after(-3599, 1)), Some(-3_600_000_000));
    }
}
