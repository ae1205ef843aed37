//! The buffer's threads against the clock. A call that does not return gives no error, and whoever waits for such a thread
//! cannot mend it by being made anew. So each shows that it moves, from as far down as a loop over the disk goes: what is
//! slow is not hung, however much of it there is.

use std::cell::RefCell;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::BufferError;
use super::log::{Log, lock};
use crate::part::Progress;

thread_local! {
    /// `None` outside of the buffer, where the same loops run for a start or a command.
    static OWN: RefCell<Option<Arc<Progress>>> = const { RefCell::new(None) };
}

/// A thread that works for the buffer, and how long it has had work and got nothing done.
#[derive(Debug, Clone, Copy)]
pub struct Stall {
    pub thread: &'static str,
    pub lasting: Duration,
}

/// Everyone who works for an open buffer.
#[derive(Debug, Default)]
pub(super) struct Threads(Mutex<Vec<(&'static str, Arc<Progress>)>>);

impl Threads {
    /// This thread is watched until the guard is dropped.
    pub(super) fn enter(&self, name: &'static str) -> Entered<'_> {
        let progress = Arc::new(Progress::default());
        OWN.set(Some(progress.clone()));
        lock(&self.0).push((name, progress));
        Entered(self)
    }

    /// The one that stands still longest.
    pub(super) fn stalled(&self) -> Option<Stall> {
        let threads = lock(&self.0);
        let stalls = threads.iter().filter_map(|(thread, progress)| {
            Some(Stall { thread, lasting: progress.stalled_for()? })
        });
        stalls.max_by_key(|stall| stall.lasting)
    }
}

pub(super) struct Entered<'t>(&'t Threads);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(own) = OWN.take() {
            lock(&self.0.0).retain(|(_, known)| !Arc::ptr_eq(known, &own));
        }
    }
}

/// This thread has something to do from now on, or nothing.
pub(super) fn set_work_waiting(waiting: bool) {
    OWN.with_borrow(|own| own.iter().for_each(|own| own.set_work_waiting(waiting)));
}

/// This thread got something done.
pub(super) fn beat() {
    OWN.with_borrow(|own| own.iter().for_each(|own| own.beat()));
}

/// In the middle of its work this thread waits for another: while that one moves neither hangs, and when it hangs, that
/// one is told of.
pub(super) fn yield_to<T>(wait: impl FnOnce() -> T) -> T {
    set_work_waiting(false);
    let given = wait();
    set_work_waiting(true);
    given
}

/// A thread whose panic stops the buffer: nobody else would notice that nothing is answered any more.
pub(super) fn spawn(
    log: &Arc<Log>,
    name: &'static str,
    body: impl FnOnce(&Log) + Send + 'static,
) -> Result<JoinHandle<()>, BufferError> {
    let log = log.clone();
    let guarded = move || {
        let _entered = log.threads.enter(name);
        let run = std::panic::AssertUnwindSafe(|| body(&log));
        if std::panic::catch_unwind(run).is_err() {
            log.fail(&BufferError::Stopped { reason: format!("its thread {name} panicked") });
        }
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(guarded)
        .map_err(|error| BufferError::io("start a thread for", Path::new(name), error))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn stands_still(threads: &Threads, name: &str) -> bool {
        threads
            .stalled()
            .is_some_and(|stall| stall.thread == name && stall.lasting >= Duration::from_millis(20))
    }

    #[test]
    fn who_waits_for_another_is_not_hung_and_who_has_left_is_not_watched() {
        let threads = Threads::default();
        let entered = threads.enter("one");
        assert!(threads.stalled().is_none(), "it has nothing to do");
        set_work_waiting(true);
        while !stands_still(&threads, "one") {
            thread::yield_now();
        }
        let beaten = Instant::now();
        beat();
        // Beats are kept in whole milliseconds.
        let most = || beaten.elapsed() + Duration::from_millis(1);
        assert!(threads.stalled().is_some_and(|stall| stall.lasting <= most()));
        assert!(yield_to(|| threads.stalled().is_none()));
        assert!(threads.stalled().is_some(), "it goes on with its work");
        drop(entered);
        assert!(threads.stalled().is_none());
    }
}
