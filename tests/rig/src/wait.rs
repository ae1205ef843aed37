//! Waiting for a condition, never for a time.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const PAUSE: Duration = Duration::from_millis(20);

/// Asks again and again until the answer is `Some`.
///
/// # Errors
/// Names `what` when the deadline passes; an error of the question ends the waiting at once.
pub fn until<T>(
    within: Duration,
    what: impl Display,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if started.elapsed() > within {
            bail!("{what}: not so after {within:?}");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Waits until the condition holds; for tests.
///
/// # Panics
/// When it does not hold within the time.
#[track_caller]
pub fn eventually(within: Duration, what: impl Display, mut holds: impl FnMut() -> bool) {
    let outcome = until(within, what, || Ok(holds().then_some(())));
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
