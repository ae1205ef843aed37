//! The buffer's writer against the clock: a disk that hangs gives no error, and nobody who waits for it can tell.

use std::time::Duration;

use super::watch::Watch;
use crate::buffer::Buffer;
use crate::domain::{Incident, Runbook};

/// Says once that the disk hangs, and once that it goes on.
pub struct DiskWatch {
    buffer: Buffer,
    limit: Duration,
    stall: Incident,
}

impl DiskWatch {
    pub fn new(buffer: Buffer, limit: Duration) -> Self {
        DiskWatch { buffer, limit, stall: Incident::default() }
    }
}

impl Watch for DiskWatch {
    const NAME: &'static str = "disk";
    const INTERVAL: Duration = Duration::from_secs(1);

    async fn look(&mut self) {
        if !hangs(&self.buffer, self.limit) {
            if let Some(correlation_id) = self.stall.end() {
                tracing::info!(event = "buffer_moves", %correlation_id, "the disk answers again");
            }
        } else if self.stall.current().is_none() {
            tracing::error!(
                event = "buffer_stalled",
                runbook = Runbook::PartStalled.page(),
                correlation_id = %self.stall.id(),
                after_seconds = self.limit.as_secs(),
                "the disk does not answer: nothing is acknowledged, and the watchdog is not fed"
            );
        }
    }
}

/// The writer has had something to write for longer than any part may take.
pub fn hangs(buffer: &Buffer, limit: Duration) -> bool {
    buffer.stalled_for().is_some_and(|stalled| stalled > limit)
}
