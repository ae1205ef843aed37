//! The one place for back-off: exponential, jittered, capped, without end.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff as _;

use crate::config::BackoffSettings;

/// Pauses of one thing that is retried until it works.
#[derive(Debug)]
pub struct Backoff {
    inner: ExponentialBackoff,
    max: Duration,
}

impl Backoff {
    pub fn new(settings: BackoffSettings) -> Self {
        let inner = ExponentialBackoff {
            current_interval: settings.min,
            initial_interval: settings.min,
            max_interval: settings.max,
            multiplier: 2.0,
            randomization_factor: 0.3,
            // The library gives up after 15 minutes by default; an outage has no limit in time.
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        Backoff { inner, max: settings.max }
    }

    /// The pause before the next attempt.
    pub fn next_pause(&mut self) -> Duration {
        self.inner.next_backoff().unwrap_or(self.max)
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.inner.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_cap_never_end_and_start_over_after_a_success() {
        let settings =
            BackoffSettings { min: Duration::from_millis(100), max: Duration::from_secs(2) };
        let mut backoff = Backoff::new(settings);
        let first = backoff.next_pause();
        assert!(first >= Duration::from_millis(70) && first <= Duration::from_millis(130));
        let late: Vec<_> = (0..1000).map(|_| backoff.next_pause()).skip(20).collect();
        assert!(late.iter().all(|p| *p >= Duration::from_millis(1400)));
        assert!(late.iter().all(|p| *p <= Duration::from_millis(2600)));
        assert!(late.windows(2).any(|pair| pair[0] != pair[1]), "jitter");
        backoff.reset();
        assert!(backoff.next_pause() <= Duration::from_millis(130));
    }
}
