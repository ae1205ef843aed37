//! The buffer's writer against the clock: a disk that hangs gives no error, and nobody who waits for it can tell.

use std::time::Duration;

use crate::buffer::Buffer;
use crate::domain::{Incident, Runbook};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Says once that the disk hangs, and once that it goes on.
pub async fn watch(buffer: &Buffer, limit: Duration) -> ! {
    let stall = Incident::default();
    loop {
        tokio::time::sleep(INTERVAL).await;
        if !hangs(buffer, limit) {
            if let Some(correlation_id) = stall.end() {
                tracing::info!(event = "buffer_moves", %correlation_id, "the disk answers again");
            }
        } else if stall.current().is_none() {
            tracing::error!(
                event = "buffer_stalled",
                runbook = Runbook::PartStalled.page(),
                correlation_id = %stall.id(),
                after_seconds = limit.as_secs(),
                "the disk does not answer: nothing is acknowledged, and the watchdog is not fed"
            );
        }
    }
}

/// The writer has had something to write for longer than any part may take.
pub fn hangs(buffer: &Buffer, limit: Duration) -> bool {
    buffer.stalled_for().is_some_and(|stalled| stalled > limit)
}
