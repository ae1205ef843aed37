//! What a reader knows, kept over a restart: how far the broker is proved to have our acknowledgements, the messages it
//! may send again because that is not proved, and the last message of each topic. Records that no note covers yet stay
//! in the log for that, whatever the sinks say. A note holds what was durable when it was taken, never more, so an old
//! one costs a message kept twice, never one lost.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::redelivery::{Acknowledged, Fingerprint, Repeats, UNPROVED_MAX};
use crate::buffer::{Buffer, BufferError, State};
use crate::config::StreamSettings;
use crate::domain::{Sequence, StreamName};

/// Between two saves of a running stream.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// One note. In bytes: two positions, the count of what is not proved and a zero, then pairs; all u64, little endian.
#[derive(Debug, Clone, Default, PartialEq)]
struct Note {
    /// The last record the note covers.
    through: Sequence,
    /// Every PUBACK up to here is known to have reached the broker.
    proved: Sequence,
    /// Packet id and message.
    unproved: Vec<(u16, u64)>,
    fingerprints: Vec<Fingerprint>,
}

impl Note {
    /// `None` when this is no moment for one.
    fn take(repeats: &Repeats, durable: Acknowledged) -> Option<Self> {
        Some(Note {
            through: durable.sequence,
            proved: repeats.proved(),
            unproved: repeats.unproved(durable)?,
            fingerprints: repeats.retained().collect(),
        })
    }

    fn to_bytes(&self) -> Vec<u8> {
        let head = [[self.through.0, self.proved.0], [self.unproved.len() as u64, 0]];
        let unproved = self.unproved.iter().map(|&(id, message)| [u64::from(id), message]);
        let fingerprints = self.fingerprints.iter().map(|one| [one.topic, one.message]);
        let pairs = head.into_iter().chain(unproved).chain(fingerprints);
        pairs.flatten().flat_map(u64::to_le_bytes).collect()
    }

    /// What is no note counts as none.
    fn from_bytes(bytes: &[u8]) -> Self {
        let (pairs, _) = bytes.as_chunks::<16>();
        let mut pairs = pairs.iter().map(|pair| {
            let both = u128::from_le_bytes(*pair);
            (both as u64, (both >> 64) as u64)
        });
        let (through, proved) = pairs.next().unwrap_or_default();
        let (count, _) = pairs.next().unwrap_or_default();
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let unproved = pairs.by_ref().take(count).map(|(id, message)| (id as u16, message));
        Note {
            through: Sequence(through),
            proved: Sequence(proved),
            unproved: unproved.collect(),
            fingerprints: pairs.map(|(topic, message)| Fingerprint { topic, message }).collect(),
        }
    }
}

fn key(stream: &StreamName) -> String {
    format!("stream/{stream}/repeats")
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
        let uncovered = durable.since(note.through).min(UNPROVED_MAX as u64);
        let count = usize::try_from(uncovered).unwrap_or(usize::MAX).max(window);
        let blocks = if count == 0 { Vec::new() } else { buffer.recent(&name, count)? };
        let first = blocks.first().map(|block| block.range().first);
        let gap = durable > note.through && first.is_none_or(|first| first > note.through.next());
        let retained: &[_] = if gap { &[] } else { &note.fingerprints };
        repeats.restore_notes(note.proved, &note.unproved, retained);
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

/// Makes a note durable; only then may the buffer let go of the records it covers.
async fn save(buffer: Buffer, stream: StreamName, note: Note) -> Result<(), BufferError> {
    buffer.state().put_note(&key(&stream), note.to_bytes()).await?;
    buffer.remembered(&stream, note.through);
    Ok(())
}

/// Saves notes now and then, one save at a time, beside the connection.
pub struct Notes {
    buffer: Buffer,
    stream: StreamName,
    /// What the last save covers.
    saved: Option<(Acknowledged, Sequence)>,
    last: Instant,
    saving: Option<JoinHandle<Result<(), BufferError>>>,
}

impl Notes {
    pub fn new(buffer: &Buffer, stream: &StreamName) -> Self {
        Notes {
            buffer: buffer.clone(),
            stream: stream.clone(),
            saved: None,
            last: Instant::now(),
            saving: None,
        }
    }

    /// Starts a save when one is due and something changed.
    pub fn tick(&mut self, repeats: &Repeats, durable: Acknowledged) {
        let busy = self.saving.as_ref().is_some_and(|saving| !saving.is_finished());
        if !busy && self.last.elapsed() >= SAVE_INTERVAL {
            self.note(repeats, durable);
        }
    }

    /// Starts a save behind the running one when something changed: nobody may come by for a long time.
    pub fn note(&mut self, repeats: &Repeats, durable: Acknowledged) {
        let now = Some((durable, repeats.proved()));
        if now == self.saved {
            return;
        }
        let Some(note) = Note::take(repeats, durable) else { return };
        let before = self.saving.take();
        let saving = save(self.buffer.clone(), self.stream.clone(), note);
        self.saving = Some(tokio::spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            saving.await
        }));
        (self.saved, self.last) = (now, Instant::now());
    }

    /// The last save of a clean stop. A failure costs what a crash costs.
    pub async fn finish(self, repeats: &Repeats, durable: Acknowledged, limit: Duration) {
        let saving = async {
            if let Some(saving) = self.saving {
                let _ = saving.await;
            }
            match Note::take(repeats, durable) {
                Some(note) => save(self.buffer, self.stream, note).await,
                None => Ok(()),
            }
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
            unproved: vec![(1, 5), (u16::MAX, u64::MAX)],
            fingerprints: fingerprints.collect(),
        };
        assert_eq!(Note::from_bytes(&note.to_bytes()), note);
        assert_eq!(Note::from_bytes(b"rubbish"), Note::default());
    }
}
