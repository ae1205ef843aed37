//! What every supervised part of the node has in common: one async body, run on its arbiter inside one actix actor,
//! told to drain and to stop, showing progress.
//!
//! A body that panics ends its own actor and nothing else. The node's supervisor builds the next one from a
//! fresh constructor; what must survive is in the buffer or the database, never in the part.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::domain::CorrelationId;

/// Where the node is in its life. Parts watch it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Running,
    /// Intake has ended; sinks deliver what they can until the deadline.
    Draining {
        deadline: Instant,
    },
    /// End now: keep what is pending where it is.
    Stopping,
}

/// How a body ended when it did not panic.
pub type PartResult = Result<(), anyhow::Error>;

/// One supervised part. `run` returns `Ok` only when the phase told it to end; an `Err` or a panic makes the
/// supervisor build a fresh part.
pub trait Part: Unpin + 'static {
    fn run(self, control: Control) -> impl Future<Output = PartResult>;
}

/// A part's line to its supervisor.
#[derive(Debug, Clone)]
pub struct Control {
    phase: watch::Receiver<Phase>,
    paused: watch::Receiver<bool>,
    pub progress: Arc<Progress>,
}

impl Control {
    pub fn new(
        phase: watch::Receiver<Phase>,
        paused: watch::Receiver<bool>,
        progress: Arc<Progress>,
    ) -> Self {
        Control { phase, paused, progress }
    }

    /// For one of several things this part does side by side, which may be told to end alone: it hears of `phase`, pauses
    /// with the part, and its progress is watched by itself.
    pub fn child(&self, phase: watch::Receiver<Phase>) -> Control {
        Control { phase, paused: self.paused.clone(), progress: self.progress.child() }
    }

    /// For one of several things this part does side by side: its progress is watched by itself.
    pub fn beside(&self) -> Control {
        self.child(self.phase.clone())
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub fn paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Returns at the next change of phase or pause; pends for ever once the supervisor is gone and the phase is
    /// `Stopping` has been seen by the caller through [`Control::phase`].
    pub async fn changed(&mut self) {
        tokio::select! {
            gone = self.phase.changed() => if gone.is_err() { std::future::pending::<()>().await },
            gone = self.paused.changed() => if gone.is_err() { std::future::pending::<()>().await },
        }
    }

    /// Waits out `pause`, or less when the phase or the pause changes. True when it slept the whole pause.
    pub async fn sleep(&mut self, pause: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            () = self.changed() => false,
        }
    }
}

/// Shared between a part and its supervisor: the watchdog is fed only while every part beats or has nothing to do.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    last_beat_ms: AtomicU64,
    work_waiting: AtomicBool,
    /// When its thread last got round to it.
    last_turn_ms: AtomicU64,
    /// Of what the part does side by side: one that hangs shows although the others beat.
    children: Mutex<Vec<Arc<Progress>>>,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            started: Instant::now(),
            last_beat_ms: AtomicU64::new(0),
            work_waiting: AtomicBool::new(false),
            last_turn_ms: AtomicU64::new(0),
            children: Mutex::default(),
        }
    }
}

/// How often a part beats that waits for an answer.
const BEAT: Duration = Duration::from_secs(1);

impl Progress {
    /// Beats until `answer` is there, which has a limit of its own: to wait for as long as the settings allow is no stall.
    pub async fn waiting<T>(&self, answer: impl Future<Output = T>) -> T {
        let mut answer = std::pin::pin!(answer);
        loop {
            self.beat();
            tokio::select! {
                answer = &mut answer => return answer,
                () = tokio::time::sleep(BEAT) => {}
            }
        }
    }

    /// Something got done (a batch delivered, an attempt made and its failure classified, a packet handled).
    pub fn beat(&self) {
        self.last_beat_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// The thread got round to the part's actor, whatever its body waits for.
    pub fn turn(&self) {
        self.last_turn_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// How long work waits without a beat, or the thread has not got round to the part: where nobody has work, nothing else
    /// would show that it could not be done.
    pub fn hung_for(&self) -> Duration {
        self.stalled_for().unwrap_or_default().max(self.since(&self.last_turn_ms))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn since(&self, moment: &AtomicU64) -> Duration {
        let moment = Duration::from_millis(moment.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(moment)
    }

    /// True from the moment there is something to do until there is nothing. Idle parts never stall.
    pub fn set_work_waiting(&self, waiting: bool) {
        if waiting && !self.work_waiting.swap(true, Ordering::Relaxed) {
            self.beat();
        } else if !waiting {
            self.work_waiting.store(false, Ordering::Relaxed);
        }
    }

    /// The progress of one of several things this part does side by side; it lives as long as the part.
    fn child(&self) -> Arc<Progress> {
        let child = Arc::new(Progress::default());
        self.children.lock().unwrap_or_else(PoisonError::into_inner).push(child.clone());
        child
    }

    /// How long work has been waiting without a beat, here or at the child that waits longest; `None` when there is
    /// nothing to do.
    pub fn stalled_for(&self) -> Option<Duration> {
        let children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children.iter().filter_map(|child| child.stalled_for()).chain(self.own_stall()).max()
    }

    fn own_stall(&self) -> Option<Duration> {
        if !self.work_waiting.load(Ordering::Relaxed) {
            return None;
        }
        Some(self.since(&self.last_beat_ms))
    }
}

/// What a person may tell one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartOrder {
    Restart,
    Pause,
    Resume,
}

/// Order to the supervisor; false when there is no such part.
#[derive(actix::Message, Debug, Clone)]
#[rtype(result = "bool")]
pub struct OrderPart {
    pub name: String,
    pub order: PartOrder,
    /// Of the request that brought it.
    pub correlation_id: CorrelationId,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beats and turns are kept in whole milliseconds.
    const CLOCK_STEP: Duration = Duration::from_millis(1);

    #[test]
    fn a_thread_that_does_not_get_round_shows_although_nothing_waits() {
        let progress = Progress::default();
        while progress.hung_for() < Duration::from_millis(20) {
            std::thread::yield_now();
        }
        assert_eq!(progress.stalled_for(), None);
        let turned = Instant::now();
        progress.turn();
        assert!(progress.hung_for() <= turned.elapsed() + CLOCK_STEP);
    }

    #[test]
    fn a_child_that_hangs_shows_although_its_sibling_beats() {
        let progress = Progress::default();
        let (hung, busy) = (progress.child(), progress.child());
        assert_eq!(progress.stalled_for(), None);
        hung.set_work_waiting(true);
        while hung.stalled_for().unwrap() < Duration::from_millis(20) {
            std::thread::yield_now();
        }
        busy.set_work_waiting(true);
        let beaten = Instant::now();
        busy.beat();
        assert!(progress.stalled_for().unwrap() >= Duration::from_millis(20));
        hung.set_work_waiting(false);
        assert!(progress.stalled_for().unwrap() <= beaten.elapsed() + CLOCK_STEP);
    }
}
