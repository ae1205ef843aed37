//! What a reader knows beyond the log, kept over a restart: how far the broker is proved to have our acknowledgements, and
//! the last message of each topic. A note holds what was durable when it was taken, never more, so an old one costs a
//! message kept twice, never one lost.

use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::redelivery::{Acknowledged, Fingerprint, Repeats};
use crate::buffer::{Buffer, BufferError, State};
use crate::config::StreamSettings;
use crate::domain::{Sequence, StreamName};

/// Between two saves of a running stream.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);

/// Fingerprints of one note: the state store writes large values badly.
const FINGERPRINTS_PER_NOTE: usize = 400;

/// Records a broker may send again: as many as there are packet ids.
const RECENT_RECORDS_MAX: u64 = 65_535;

/// One note. Fingerprints are spread over several; those that do not agree are not used.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
struct Note {
    /// The last record the fingerprints cover.
    through: Sequence,
    /// Every PUBACK up to here is known to have reached the broker.
    proved: Sequence,
    /// How many notes there are.
    notes: usize,
    fingerprints: Vec<Fingerprint>,
}

fn key(stream: &StreamName, index: usize) -> String {
    format!("stream/{stream}/retained/{index}")
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
        let uncovered = durable.since(note.through.min(note.proved)).min(RECENT_RECORDS_MAX);
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
    let Some(mut whole) = load_one(state, stream, 0).await? else { return Ok(Note::default()) };
    for index in 1..whole.notes {
        match load_one(state, stream, index).await? {
            Some(part) if part.through == whole.through => {
                whole.fingerprints.extend(part.fingerprints);
            }
            // Cut short while it was saved: as if there were none.
            _ => return Ok(Note { proved: whole.proved, ..Note::default() }),
        }
    }
    Ok(whole)
}

async fn load_one(
    state: &State,
    stream: &StreamName,
    index: usize,
) -> Result<Option<Note>, BufferError> {
    let bytes = state.note(&key(stream, index)).await?;
    Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

async fn save(state: State, stream: StreamName, notes: Vec<Note>) -> Result<(), BufferError> {
    for (index, note) in notes.iter().enumerate() {
        // Numbers and lists always have a JSON form.
        let bytes = serde_json::to_vec(note).unwrap_or_default();
        state.put_note(&key(&stream, index), bytes).await?;
    }
    Ok(())
}

fn take(repeats: &Repeats, through: Sequence) -> Vec<Note> {
    let proved = repeats.proved();
    let all: Vec<Fingerprint> = repeats.retained().collect();
    let notes = all.len().div_ceil(FINGERPRINTS_PER_NOTE).max(1);
    (0..notes)
        .map(|index| {
            let rest = &all[index * FINGERPRINTS_PER_NOTE..];
            let fingerprints = rest.iter().take(FINGERPRINTS_PER_NOTE).copied().collect();
            Note { through, proved, notes, fingerprints }
        })
        .collect()
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
            let notes = take(repeats, through);
            self.saving = Some(tokio::spawn(save(self.state.clone(), self.stream.clone(), notes)));
            (self.saved, self.last) = (now, Instant::now());
        }
    }

    /// The last save of a clean stop. A failure costs what a crash costs.
    pub async fn finish(self, repeats: &Repeats, through: Sequence, limit: Duration) {
        let saving = async {
            if let Some(saving) = self.saving {
                let _ = saving.await;
            }
            save(self.state, self.stream, take(repeats, through)).await
        };
        match tokio::time::timeout(limit, saving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the notes of a stream were not saved"),
            Err(_) => tracing::debug!("the notes of a stream were not saved in time"),
        }
    }
}
