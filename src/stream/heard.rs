//! When the last message came, over restarts: a stream that is silent must not look fresh because the node is.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::buffer::{Buffer, BufferError, State};
use crate::domain::{Arrival, Sequence, StreamName};

/// Between two saves: what a crash may forget, unless the buffer still holds the message.
const SAVE_INTERVAL: Duration = Duration::from_secs(30);

fn key(stream: &StreamName) -> String {
    format!("stream/{stream}/heard")
}

/// The later of what was saved and the newest record in the buffer.
pub async fn restore(buffer: &Buffer, stream: &StreamName) -> Result<Option<Arrival>, BufferError> {
    let note = buffer.state().note(&key(stream)).await?;
    let saved = note.and_then(|bytes| bytes.try_into().ok().map(i64::from_le_bytes)).map(Arrival);
    let (buffer, stream) = (buffer.clone(), stream.clone());
    let reading = tokio::task::spawn_blocking(move || {
        let blocks = buffer.recent(&stream, 1)?;
        let newest = blocks.iter().flat_map(|block| block.records_after(Sequence::ZERO)).last();
        Ok(newest.map(|record| record.arrival))
    });
    let kept = reading.await.unwrap_or_else(|error| {
        Err(BufferError::Stopped { reason: format!("reading the newest record failed: {error}") })
    })?;
    Ok(saved.max(kept))
}

/// Saves now and then, one save at a time, beside the connection.
pub struct Heard {
    state: State,
    stream: StreamName,
    saved: Option<Arrival>,
    last: Instant,
    saving: Option<JoinHandle<Result<(), BufferError>>>,
}

impl Heard {
    pub fn new(buffer: &Buffer, stream: &StreamName, saved: Option<Arrival>) -> Self {
        let (state, stream) = (buffer.state(), stream.clone());
        Heard { state, stream, saved, last: Instant::now(), saving: None }
    }

    /// Starts a save when one is due and something came.
    pub fn tick(&mut self, arrival: Option<Arrival>) {
        let busy = self.saving.as_ref().is_some_and(|saving| !saving.is_finished());
        if busy || self.last.elapsed() < SAVE_INTERVAL || arrival == self.saved {
            return;
        }
        let Some(arrival) = arrival else { return };
        self.saving = Some(tokio::spawn(save(self.state.clone(), self.stream.clone(), arrival)));
        (self.saved, self.last) = (Some(arrival), Instant::now());
    }

    /// The last save of a clean stop. A failure costs what a crash costs.
    pub async fn finish(self, arrival: Option<Arrival>, limit: Duration) {
        let Some(arrival) = arrival.filter(|arrival| self.saved != Some(*arrival)) else { return };
        let saving = async {
            if let Some(saving) = self.saving {
                let _ = saving.await;
            }
            save(self.state, self.stream, arrival).await
        };
        if !matches!(tokio::time::timeout(limit, saving).await, Ok(Ok(()))) {
            tracing::debug!("when the last message came was not saved");
        }
    }
}

async fn save(state: State, stream: StreamName, arrival: Arrival) -> Result<(), BufferError> {
    state.put_note(&key(&stream), arrival.as_micros().to_le_bytes().to_vec()).await
}
