//! Ctrl-C, SIGTERM and a closed terminal.

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::background::spawn;

/// Calls `act` at every such signal, on a thread of the rig.
///
/// # Errors
/// When signals cannot be listened for.
pub fn on_signal(act: impl Fn() + Send + 'static) -> Result<()> {
    crate::background::block_on(async move {
        let listen = |kind| signal(kind).context("listen for signals");
        let mut interrupt = listen(SignalKind::interrupt())?;
        let mut terminate = listen(SignalKind::terminate())?;
        let mut hang_up = listen(SignalKind::hangup())?;
        spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => act(),
                    _ = terminate.recv() => act(),
                    _ = hang_up.recv() => act(),
                }
            }
        });
        Ok(())
    })
}
