//! The threads parts live on. Each has a few more for calls that block, such as librdkafka's: hundreds of streams that
//! ask at once wait for each other instead of filling the unit's `TasksMax=`.

use actix::prelude::*;
use tokio::runtime::{Builder, Runtime};

/// Calls that block, under way for the parts of one thread.
const BLOCKING_CALLS_MAX: usize = 4;

/// A thread for parts.
pub fn arbiter() -> ArbiterHandle {
    Arbiter::with_tokio_rt(runtime).handle()
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
