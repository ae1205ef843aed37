//! (the essay on the log, generations, group commit and durability comes here)

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use crate::config::BufferSettings;
use crate::domain::{
    Arrival, Books, DeadLetter, DeadLetterKey, Delivered, DeliveryFlags, Durable, ErrorClass,
    LogIdentity, Record, Sequence, SequenceRange, SinkName, StreamName,
};
use crate::observe::Board;

/// Batches a stream may have waiting at the writer; a stream that finds it full stops reading its socket.
pub const APPEND_QUEUE_BATCHES: usize = 16;

/// Open failed, the disk failed, or the buffer has stopped because of it.
#[derive(Debug, thiserror::Error)]
pub enum BufferError {
    #[error("the buffer has stopped: {reason}")]
    Stopped { reason: String },
}

impl BufferError {
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Standing
    }
}

/// The open buffer: handed to every part, cheap to clone. Dropping the last clone does not close it; [`Buffer::close`]
/// does.
#[derive(Clone)]
pub struct Buffer {}

/// A message on its way into the log.
#[derive(Debug, Clone)]
pub struct Incoming {
    pub topic: Bytes,
    pub payload: Bytes,
    pub arrival: Arrival,
    pub flags: DeliveryFlags,
    pub packet_id: u16,
}

impl Buffer {
    /// Opens or makes the buffer under `state_dir`, sets unreadable generations aside, starts the threads.
    pub fn open(
        state_dir: &std::path::Path,
        settings: &BufferSettings,
        streams: &[StreamName],
        board: Arc<Board>,
    ) -> Result<Buffer, BufferError> {
        todo!()
    }

    pub fn identity(&self) -> LogIdentity {
        todo!()
    }

    /// The way in for one stream. One appender per stream is alive at a time.
    pub fn appender(&self, stream: &StreamName) -> Appender {
        todo!()
    }

    /// The newest kept records of a stream, oldest first, at most `count`: what a broker may send again with DUP.
    /// Blocking; called once when a stream starts, on a blocking thread.
    pub fn recent(&self, stream: &StreamName, count: usize) -> Result<Vec<Block>, BufferError> {
        todo!()
    }

    /// The way out for one sink of one stream.
    pub fn reader(&self, stream: &StreamName) -> Reader {
        todo!()
    }

    /// The first sequence of the stream the log still holds or will hold next (1 for a fresh log).
    pub fn oldest(&self, stream: &StreamName) -> Sequence {
        todo!()
    }

    pub fn durable(&self, stream: &StreamName) -> Durable {
        todo!()
    }

    /// A sink's confirmed position: nothing behind it is dropped. Until it is called for each configured sink, nothing
    /// of the stream is dropped. Never goes back.
    pub fn delivered(&self, stream: &StreamName, sink: &SinkName, position: Delivered) {
        todo!()
    }

    /// Durable values that are not records: books, dead letters. See [`State`].
    pub fn state(&self) -> State {
        todo!()
    }

    /// Syncs what waits, closes every database, ends the threads. Later calls on any clone answer `Stopped`.
    pub async fn close(&self, timeout: Duration) -> Result<(), BufferError> {
        todo!()
    }

    /// Resolves when the first disk error stopped the buffer: the process must end non-zero.
    pub async fn failed(&self) -> BufferError {
        todo!()
    }
}

/// The way in for one stream.
pub struct Appender {}

impl Appender {
    /// Hands a batch to the writer, in order. `Err` gives the batch back when [`APPEND_QUEUE_BATCHES`] are waiting.
    /// The receiver answers once the whole batch is durable (with the sequence of its last record), or is dropped /
    /// answers an error when the buffer stopped. Answers arrive in the order of the calls. While the quota is reached
    /// the answer simply waits.
    pub fn try_append(
        &self,
        batch: Vec<Incoming>,
    ) -> Result<oneshot::Receiver<Durable>, Vec<Incoming>> {
        todo!()
    }

    /// Pends until `try_append` may succeed again.
    pub async fn ready(&self) {
        todo!()
    }
}

/// Up to some 16 records, or one large one, as they stand in the log: encoded once by the writer, checked once by CRC
/// when read back, shared by every sink.
#[derive(Debug, Clone)]
pub struct Block {}

impl Block {
    pub fn range(&self) -> SequenceRange {
        todo!()
    }

    /// Encoded size.
    pub fn bytes(&self) -> usize {
        todo!()
    }

    /// The records of the block; those up to and including `after` are left out.
    pub fn records_after(&self, after: Sequence) -> impl Iterator<Item = Record<'_>> {
        std::iter::empty()
    }
}

/// Pulls blocks for one sink: from memory when it is caught up, from the log when it lags.
pub struct Reader {}

/// What `read` found.
#[derive(Debug, Clone, Default)]
pub struct Chunk {
    /// In order, without overlap. The first may begin before what was asked for: use `Block::records_after`.
    pub blocks: Vec<Block>,
    /// The log lost these records (quarantined): the sink counts them as lost and passes on. Only ever together with
    /// no blocks, and beginning right after the position asked for.
    pub lost: Option<SequenceRange>,
}

impl Reader {
    /// The records after `position`, at least one block when there is one, at most about `bytes_max`; empty when
    /// `position` is the last durable record.
    pub async fn read(
        &mut self,
        position: Sequence,
        bytes_max: usize,
    ) -> Result<Chunk, BufferError> {
        todo!()
    }

    /// The last durable record, to wait for news: `changed().await`.
    pub fn durable(&self) -> watch::Receiver<Durable> {
        todo!()
    }
}

/// The small second database: books (with the Kafka cursors), dead letters, presence, retained-message fingerprints.
/// Calls go to its own thread; what answers `Ok` is on stable storage.
#[derive(Clone)]
pub struct State {}

/// Which dead letters: every field given must match.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct DeadLetterFilter {
    pub stream: Option<StreamName>,
    pub sink: Option<SinkName>,
    pub reason: Option<crate::domain::Reason>,
    /// Dead at or after.
    pub since: Option<Arrival>,
}

impl State {
    /// The saved books of a sink. For a table sink a lower bound: its truth is the cursor row in the database.
    pub async fn books(
        &self,
        stream: &StreamName,
        sink: &SinkName,
    ) -> Result<Option<Books>, BufferError> {
        todo!()
    }

    /// Saves books, synced before it answers.
    pub async fn save_books(
        &self,
        stream: &StreamName,
        sink: &SinkName,
        books: Books,
    ) -> Result<(), BufferError> {
        todo!()
    }

    /// Stores dead letters, synced before it answers; one that is already there (same key) is replaced, so a repeated
    /// batch doubles nothing. `DeadLettersFull` when the quota would be passed: nothing of the batch is stored then.
    pub async fn put_dead_letters(&self, letters: Vec<DeadLetter>) -> Result<(), BufferError> {
        todo!()
    }

    /// By key order, at most `limit`, after `after`.
    pub async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: Option<DeadLetterKey>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, BufferError> {
        todo!()
    }

    pub async fn remove_dead_letters(&self, keys: Vec<DeadLetterKey>) -> Result<(), BufferError> {
        todo!()
    }

    /// How many a sink of a stream has.
    pub async fn dead_letter_count(
        &self,
        stream: &StreamName,
        sink: &SinkName,
    ) -> Result<u64, BufferError> {
        todo!()
    }

    /// A small durable value of a part's own, e.g. a stream's fingerprints of retained messages. Key: `<part>/<what>`.
    pub async fn put_note(&self, key: &str, value: Vec<u8>) -> Result<(), BufferError> {
        todo!()
    }

    pub async fn note(&self, key: &str) -> Result<Option<Vec<u8>>, BufferError> {
        todo!()
    }
}
