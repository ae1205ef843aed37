//! The buffer's threads against the clock: a disk that hangs gives no error, and nobody who waits for it can tell.

use std::sync::Arc;
use std::time::Duration;

use super::watch::Watch;
use crate::buffer::Buffer;
use crate::domain::{Incident, Runbook};
use crate::observe::Board;

/// Says once that the disk hangs, and once that it goes on.
pub struct DiskWatch {
    buffer: Buffer,
    board: Arc<Board>,
    limit: Duration,
    stall: Incident,
}

impl DiskWatch {
    pub fn new(buffer: Buffer, board: Arc<Board>, limit: Duration) -> Self {
        DiskWatch { buffer, board, limit, stall: Incident::default() }
    }
}

impl Watch for DiskWatch {
    const NAME: &'static str = "disk";
    const INTERVAL: Duration = Duration::from_secs(1);

    async fn look(&mut self) {
        let hung = hung_thread(&self.buffer, self.limit);
        self.board.update_buffer(|status| status.stalled_thread = hung);
        let Some(thread) = hung else {
            if let Some(correlation_id) = self.stall.end() {
                tracing::info!(event = "buffer_moves", %correlation_id, "the disk answers again");
            }
            return;
        };
        if self.stall.current().is_none() {
            tracing::error!(
                event = "buffer_stalled",
                runbook = Runbook::PartStalled.page(),
                correlation_id = %self.stall.id(),
                thread,
                after_seconds = self.limit.as_secs(),
                "a thread of the buffer makes no progress, the disk does not answer: the watchdog is not fed"
            );
        }
    }
}

/// The thread of the buffer that has had work for longer than any part may take.
pub fn hung_thread(buffer: &Buffer, limit: Duration) -> Option<&'static str> {
    buffer.stalled().filter(|stall| stall.lasting > limit).map(|stall| stall.thread)
}
