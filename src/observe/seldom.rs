//! For lines that others cause: they must not be able to fill the log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of one kind.
const INTERVAL: Duration = Duration::from_secs(60);

/// Lets one line a minute through.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    told: Option<Instant>,
    back: u64,
}

impl Seldom {
    /// It happened once more. When a line is due: how often since the last one.
    pub fn due(&self) -> Option<u64> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.back += 1;
        if held.told.is_some_and(|told| told.elapsed() < INTERVAL) {
            return None;
        }
        held.told = Some(Instant::now());
        Some(std::mem::take(&mut held.back))
    }
}
