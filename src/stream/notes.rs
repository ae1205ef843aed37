//! What a reader knows beyond the log, kept over a restart: how far the broker is proved to have our acknowledgements, and
//! the last message of each topic. A note holds what was durable when it was taken, never more, so an old one costs a
//! message kept twice, never one lost.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::redelivery::{Acknowledged, Fingerprint, Repeats, UNPROVED_MAX};
use crate::buffer::{Buffer, BufferError, State};
use crate::config::StreamSettings;
use crate::domain::{Sequence, StreamName};

/// Between two saves of a running stream.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// One note: two positions and the fingerprints, little endian.
#[derive(Debug, Clone, Default, PartialEq)]
struct Note {
    /// The last record the fingerprints cover.
    through: Sequence,
    /// Every PUBACK up to here is known to have reached the broker.
    proved: Sequence,
    fingerprints: Vec<Fingerprint>,
}

impl Note {
    fn take(repeats: &Repeats, through: Sequence) -> Self {
        Note { through, proved: repeats.proved(), fingerprints: repeats.retained().collect() }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let fingerprints = self.fingerprints.iter().flat_map(|one| [one.topic, one.message]);
        [self.through.0, self.proved.0]
            .into_iter()
            .chain(fingerprints)
            .flat_map(u64::to_le_bytes)
            .collect()
    }

    /// What is no note counts as none.
    fn from_bytes(bytes: &[u8]) -> Self {
        let (pairs, _) = bytes.as_chunks::<16>();
        let mut pairs = pairs.iter().map(|pair| {
            let both = u128::from_le_bytes(*pair);
            (both as u64, (both >> 64) as u64)
        });
        let (through, proved) = pairs.next().unwrap_or_default();
        Note {
            through: Sequence(through),
            proved: Sequence(proved),
            fingerprints: pairs.map(|(topic, message)| Fingerprint { topic, message }).collect(),
        }
    }
}

fn key(stream: &StreamName) -> String {
    format!("stream/{stream}/retained")
}

/// The memory of an earlier life: notes first, then the records they do not cover.
pub async fn restore(
    buffer: &Buffer,
    settings: &StreamSettings,
) -> Result<(Repeats, Acknowledged), BufferError> {
    let note = load(&buffer.state(), &settings.name).await?;
    let mut repeats = Repeats::new(settings.dedupe.as_ref());
    let (buffer, name) = (buffer.clone(), settings.name.clone());
    let window = settings.dedupe.as_ref().map_or(0, |dedupe| dedupe.window_messages);
    let reading = tokio::task::spawn_blocking(move || {
        let durable = buffer.durable(&name).0;
        let uncovered = durable.since(note.through.min(note.proved)).min(UNPROVED_MAX as u64);
        let count = usize::try_from(uncovered).unwrap_or(usize::MAX).max(window);
        let blocks = if count == 0 { Vec::new() } else { buffer.recent(&name, count)? };
        let first = blocks.first().map(|block| block.range().first);
        let gap = durable > note.through && first.is_none_or(|first| first > note.through.next());
        repeats.restore_notes(note.proved, if gap { &[] } else { &note.fingerprints });
        for record in blocks.iter().flat_map(|block| block.records_after(Sequence::ZERO)) {
            repeats.restore(&record, record.sequence > note.through);
        }
        let acknowledged = Acknowledged { taken: repeats.taken(), sequence: durable };
        Ok((repeats, acknowledged))
    });
    reading.await.unwrap_or_else(|error| {
        Err(BufferError::Stopped { reason: format!("reading recent records failed: {error}") })
    })
}

async fn load(state: &State, stream: &StreamName) -> Result<Note, BufferError> {
    let bytes = state.note(&key(stream)).await?;
    Ok(Note::from_bytes(&bytes.unwrap_or_default()))
}

async fn save(state: State, stream: StreamName, note: Note) -> Result<(), BufferError> {
    state.put_note(&key(&stream), note.to_bytes()).await
}

/// Saves notes now and then, one save at a time, beside the connection.
pub struct Notes {
    state: State,
    stream: StreamName,
    saved: (Sequence, Sequence),
    last: Instant,
    saving: Option<JoinHandle<Result<(), BufferError>>>,
}

impl Notes {
    pub fn new(buffer: &Buffer, stream: &StreamName) -> Self {
        Notes {
            state: buffer.state(),
            stream: stream.clone(),
            saved: Default::default(),
            last: Instant::now(),
            saving: None,
        }
    }

    /// Starts a save when one is due and something changed.
    pub fn tick(&mut self, repeats: &Repeats, through: Sequence) {
        let busy = self.saving.as_ref().is_some_and(|saving| !saving.is_finished());
        if busy || self.last.elapsed() < SAVE_INTERVAL {
            return;
        }
        let now = (through, repeats.proved());
        if now != self.saved {
            let note = Note::take(repeats, through);
            self.saving = Some(tokio::spawn(save(self.state.clone(), self.stream.clone(), note)));
            (self.saved, self.last) = (now, Instant::now());
        }
    }

    /// The last save of a clean stop. A failure costs what a crash costs.
    pub async fn finish(self, repeats: &Repeats, through: Sequence, limit: Duration) {
        let saving = async {
            if let Some(saving) = self.saving {
                let _ = saving.await;
            }
            save(self.state, self.stream, Note::take(repeats, through)).await
        };
        match tokio::time::timeout(limit, saving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the notes of a stream were not saved"),
            Err(_) => tracing::debug!("the notes of a stream were not saved in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_comes_back_as_it_was_and_rubbish_is_none() {
        let fingerprints = (1..4).map(|i| Fingerprint { topic: i, message: u64::MAX - i });
        let note = Note {
            through: Sequence(9),
            proved: Sequence(7),
            fingerprints: fingerprints.collect(),
        };
        assert_eq!(Note::from_bytes(&note.to_bytes()), note);
        assert_eq!(Note::from_bytes(b"rubbish"), Note::default());
    }
}
