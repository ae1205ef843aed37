//! The threads parts live on. Each has a few more for calls that block, such as librdkafka's: hundreds of streams that
//! ask at once wait for each other instead of filling the unit's `TasksMax=`.

use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use actix::prelude::*;
use tokio::runtime::{Builder, Runtime};

/// Calls that block, under way for the parts of one thread.
const BLOCKING_CALLS_MAX: usize = 4;

/// The kernel keeps so many bytes of a thread's name.
const NAME_BYTES_MAX: usize = 15;

/// A thread for parts. Whoever launches a part on it holds the same one: when it is blocked, all of them launch on its
/// successor from then on.
#[derive(Debug, Clone)]
pub struct Thread(Arc<Named>);

#[derive(Debug)]
struct Named {
    name: CString,
    current: Mutex<ArbiterHandle>,
}

impl Thread {
    /// Starts it, under a name that `top -H` and `/proc/PID/task/*/comm` show.
    pub fn start(name: &str) -> Self {
        let bytes: Vec<u8> = name.bytes().take(NAME_BYTES_MAX).collect();
        let name = CString::new(bytes).unwrap_or_default();
        let current = Mutex::new(arbiter(name.clone()));
        Thread(Arc::new(Named { name, current }))
    }

    pub fn arbiter(&self) -> ArbiterHandle {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Another one in its place. The old one ends as soon as it can, with all that was left on it.
    pub fn renew(&self) {
        let mut current = self.0.current.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *current, arbiter(self.0.name.clone())).stop();
    }

    pub fn stop(&self) {
        self.arbiter().stop();
    }

    pub fn is(&self, other: &Thread) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

fn arbiter(name: CString) -> ArbiterHandle {
    let handle = Arbiter::with_tokio_rt(runtime).handle();
    handle.spawn_fn(move || {
        // Without its name it works as well.
        let _ = rustix::thread::set_name(&name);
    });
    handle
}

/// The thread everything is started from.
pub fn system() -> SystemRunner {
    System::with_tokio_rt(runtime)
}

/// As the library makes its own, but for the bound.
fn runtime() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().max_blocking_threads(BLOCKING_CALLS_MAX);
    builder.build().expect("a thread without its loop is of no use")
}
