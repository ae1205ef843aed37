//! One runtime for all async clients of the rig, so that its own calls can simply block.

use std::future::Future;
use std::sync::LazyLock;
use std::sync::mpsc;

use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("rig")
        .enable_all()
        .build()
        .expect("a runtime can be built")
});

/// Starts a task on the rig's runtime.
pub fn spawn<F>(future: F) -> tokio::task::JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    RUNTIME.spawn(future)
}

/// Waits for a future on the rig's runtime. Unlike a runtime's own `block_on` this may be called within another
/// runtime, whose thread it blocks.
///
/// # Panics
/// When the future panics.
pub fn block_on<F>(future: F) -> F::Output
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let (send, receive) = mpsc::sync_channel(1);
    let task = RUNTIME.spawn(future);
    RUNTIME.spawn(async move {
        let _ = send.send(task.await);
    });
    match receive.recv().expect("the runtime lives as long as the process") {
        Ok(output) => output,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
