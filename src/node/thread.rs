//! The threads parts live on. Each has a few more for calls that block, such as librdkafka's: hundreds of streams that
//! ask at once wait for each other instead of filling the unit's `TasksMax=`.

use std::ffi::CString;

use actix::prelude::*;
use tokio::runtime::{Builder, Runtime};

/// Calls that block, under way for the parts of one thread.
const BLOCKING_CALLS_MAX: usize = 4;

/// The kernel keeps so many bytes of a thread's name.
const NAME_BYTES_MAX: usize = 15;

/// A thread for parts, under a name that `top -H` and `/proc/PID/task/*/comm` show.
pub fn arbiter(name: &str) -> ArbiterHandle {
    let handle = Arbiter::with_tokio_rt(runtime).handle();
    let bytes: Vec<u8> = name.bytes().take(NAME_BYTES_MAX).collect();
    let name = CString::new(bytes).unwrap_or_default();
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
