//! The durable buffer: what is answered here is on stable storage, and stays until every sink has passed it.
//!
//! # The constraints
//!
//! - An acknowledgement leaves only after an `fdatasync` that covers the message. The first sync that fails ends the
//!   process: the kernel reports a lost write once, so a second try would succeed over missing data. A start reads from
//!   the drive what an earlier run may not have synced, not from the kernel's memory (`disk::bring_to_rest`).
//! - sled 0.34 never gives disk space back, may refuse to open a whole database for one flipped bit, or takes it for the
//!   torn end of a crash and overwrites what stands behind, syncs with `sync_file_range`, which is not durable, never
//!   syncs the blob files it makes of pages above 128 KiB, and keeps pages of all it has read in memory, whatever its
//!   cache setting. Everything below follows from this line.
//! - Bounds: 16 batches per stream wait at the writer ([`APPEND_QUEUE_BATCHES`]); a block has at most 64 records or
//!   32 KiB, unless a single record is larger; a generation is a file of `generation_bytes` (64 MiB), at most a
//!   quarter of the quota; the tail in memory has `tail_bytes_max`; 2 sealed generations are open at a time, with the
//!   places of their blocks in memory; 256 commands wait at the state database.
//!
//! # Record, block, generation
//!
//! A *record* is a message as it was received, with a number of its stream: contiguous, from 1, never used twice.
//! Up to 64 records make a *block* (`block.rs`), compressed, mostly one key of sled: a leaf of its tree holds 16 keys
//! of whatever size, so blocks divide its work by as many. A block carries its own CRC and range, because sled's
//! checksums say nothing about what is missing. 17 values of 7,200 bytes stay below the size of a blob; a larger block
//! is split over keys. Around each value stands a frame (`frame.rs`), by which it is found in the bytes of the file.
//!
//! A *generation* (`generation.rs`) is one sled database in its own folder, which only grows. Space comes back by
//! removing a folder, and damage stays within one. Only the newest is written, through sled, and by one run of the node:
//! a start makes the next one. When it is full the next one is made, with every sync its creation needs, and only then
//! the old one is sealed by a small file with its ranges. So whatever a crash leaves, the newest one that is not sealed is
//! the one written last, and a start reads the small files and verifies only that one: opening takes as long with an
//! hour's backlog as without.
//!
//! From then on sled never opens it again: its frames are read by their places (`frames.rs`). So sled's book-keeping may
//! be harmed as it likes, opening changes no byte, and a number that is given out again after a crash, because its record
//! had not been acknowledged, is never in the same generation as what a torn group left of that record.
//!
//! # Group commit
//!
//! One thread (`writer.rs`) owns appending. It takes what waits from all streams once the oldest message is
//! `sync_linger` old or `group_messages_max` have come, numbers it, hands the blocks to sled, syncs once, and then in
//! this order: index, tail, the streams' durable positions, answers. Whoever hears of a record can read it.
//!
//! A number must not be given out twice even when the newest generation is unreadable after a crash. So numbers are
//! set aside in the file `marks`, 65,536 at a time, before they are used; a start that cannot read the newest
//! generation goes on behind them. An orderly stop writes the exact numbers, so nothing is skipped then. A newest
//! generation that opens and has lost its end does not say so: the file `reached` (`reached.rs`) does.
//!
//! # Reading
//!
//! A sink that keeps up is handed the block the writer made, from the *tail* (`tail.rs`): the newest durable blocks of
//! all streams, the oldest of whatever stream evicted first. A sink that lags asks the reading thread (`reader.rs`).
//! That thread shares the handle of the generation being written and opens sealed ones for as long as they are read.
//!
//! # Dropping
//!
//! Oldest first, a sealed generation is dropped when every configured sink of every stream in it has passed it and each
//! of these streams has noted what its broker may send again ([`Buffer::remembered`]), but never the newest sealed ones
//! that hold as much as one full one: a declared window of repeats is read from them ([`Buffer::recent`]). Streams without sinks hold nothing back. A stream that is in the log and no longer configured
//! holds its records back only when the state database has books of a sink that is behind: its sinks still owe them,
//! should it be configured again. Without books nobody knows who would want them. Either way the start says so.
//! The file `marks` notes what was dropped before the folder goes, so that it is never mistaken for loss.
//!
//! At the quota, or below the minimum of free space, the writer holds the batch it has and takes no other. Nothing is
//! answered, the streams stop reading, the broker keeps the rest. The ballast file is given up at start when the disk
//! is so full that sled could not open.
//!
//! # Loss
//!
//! Damage costs the blocks it hits: each leaves a hole. The ranges before and after tell which numbers are missing: they
//! are written to `losses`, shown on the board, logged as an error, and every sink that comes by is told by
//! [`Chunk::lost`]. A generation with holes is moved to `quarantine/`, as it is, once everybody has passed it; one in which
//! nothing can be found, at once. An error in the generation being written ends the process; the next start reads it as
//! any other. Where nothing is left of it after a crash, the loss is reported up to the numbers set aside, which is too
//! much rather than too little. A full disk, a missing permission or too many open files are no damage, nor is a format
//! this program does not know: nothing is moved for them. What cannot be read is read again before it is called
//! unreadable.
//!
//! A missing or damaged `identity` is made again from the generations, which all carry it; `marks` from what they hold.
//! Generations that stand in each other's place are put right (`misplaced.rs`). A log or a state database that is gone
//! as a whole is told as an error: nobody can count what was in it.
//!
//! # State
//!
//! Books, cursors, dead letters and notes are overwritten, generations never are; so they are a second, small
//! database (`state_store.rs`) with a thread of its own (`state.rs`). Its values are framed as those of generations are:
//! one that cannot be opened, or in which sled finds less than it should, is set aside, and the next one has every dead
//! letter that is whole in its bytes, with the newest books found (`salvage.rs`, `raw_state.rs`). Kafka repeats from there,
//! or from the oldest record kept; tables have their cursor in PostgreSQL. Which letters there should be stands in the file
//! `letters` (`letter_journal.rs`): the others are lost, and named in `letter_losses`; one that was removed does not come
//! back, though sled leaves old pages behind. The database never shrinks; its size follows the dead letters, which have a
//! quota.
//!
//! ```text
//!  <state_dir>/lock                           one process at a time
//!  <state_dir>/ballast                        given up to open on a full disk
//!  <state_dir>/state/                         books, dead letters, notes
//!  <state_dir>/state.trial/                   a copy that shows what sled finds in it; gone again after the start
//!  <state_dir>/state.made/                    a new one that is being made
//!  <state_dir>/state.draft/                   a new one, whole, on its way to take the other's place
//!  <state_dir>/state.old/                     the other, while that is not open
//!  <state_dir>/buffer/identity                which log this is
//!  <state_dir>/buffer/marks                   numbers set aside, numbers dropped
//!  <state_dir>/buffer/reached                 how far each stream was durable when it was last answered
//!  <state_dir>/buffer/letters                 which dead letters there are
//!  <state_dir>/buffer/letters.next            the same of `state.draft`
//!  <state_dir>/buffer/losses                  records that the disk lost
//!  <state_dir>/buffer/letter_losses           dead letters that the disk lost
//!  <state_dir>/*.removed/, buffer/*.removed/   what is left of a folder that was being removed
//!  <state_dir>/buffer/generation-000001/      one sled database, sealed.json beside its files
//!  <state_dir>/buffer/quarantine/             what could not be read
//! ```

mod block;
mod checked_file;
mod disk;
mod error;
mod evidence;
mod fates;
mod frame;
mod frames;
mod generation;
mod held;
pub mod inspect;
mod janitor;
mod letter_journal;
mod log;
mod lost_letters;
mod misplaced;
pub mod offline;
mod probe;
mod raw_state;
mod reached;
mod reader;
mod recovery;
mod salvage;
mod shims;
mod state;
mod state_store;
mod state_value;
mod store;
mod tail;
mod threads;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

pub use block::Block;
#[cfg(any(test, fuzzing))]
pub use block::fuzz as fuzz_block;
pub use error::BufferError;
pub use log::Loss;
pub use lost_letters::LostLetters;
pub use probe::{Load, probe};
pub use reader::{Chunk, Reader};
pub use state::{DeadLetterFilter, State};
pub use threads::Stall;
pub use writer::Appender;

use crate::config::BufferSettings;
use crate::domain::{
    Arrival, Delivered, DeliveryFlags, Durable, Incident, LogIdentity, Sequence, SinkName,
    StreamName,
};
use crate::observe::{Board, Edge};
use log::{Bell, Index, Log, StreamCell, lock};
use recovery::Recovered;
use state_store::StateStore;
use threads::{Threads, spawn};

/// Batches a stream may have waiting at the writer; a stream that finds it full stops reading its socket.
pub const APPEND_QUEUE_BATCHES: usize = 16;

/// A thread with nothing to do looks this often whether the buffer still runs.
const IDLE_PAUSE: Duration = Duration::from_millis(500);

/// Bytes [`Buffer::recent`] reads at a time.
const RECENT_READ_BYTES: usize = 1 << 20;

/// A message on its way into the log.
#[derive(Debug, Clone)]
pub struct Incoming {
    pub topic: Bytes,
    pub payload: Bytes,
    pub arrival: Arrival,
    pub flags: DeliveryFlags,
    pub packet_id: u16,
}

/// The open buffer: handed to every part, cheap to clone. Dropping the last clone does not close it; [`Buffer::close`]
/// does.
#[derive(Clone)]
pub struct Buffer {
    log: Arc<Log>,
    orders: mpsc::Sender<writer::Order>,
    requests: mpsc::Sender<Option<reader::Request>>,
    state: State,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    /// Held until everything is closed.
    directory: Arc<Mutex<Option<File>>>,
}

impl Buffer {
    /// Opens or makes the buffer under `state_dir`, sets unreadable generations aside, starts the threads. `streams`:
    /// every configured stream with its sinks, each of which holds records back until it has passed them.
    pub fn open(
        state_dir: &Path,
        settings: &BufferSettings,
        streams: &[(StreamName, Vec<SinkName>)],
        board: Arc<Board>,
    ) -> Result<Buffer, BufferError> {
        let folder = state_dir.join("buffer");
        let quarantine = folder.join("quarantine");
        disk::make_folder(&folder)?;
        let directory = recovery::take_lock(state_dir)?;
        disk::finish_removals(state_dir)?;
        disk::finish_removals(&folder)?;
        disk::release_ballast(&state_dir.join("ballast"), settings.ballast_bytes)?;
        let identity = recovery::identity(&folder)?;
        let step = || board.update_buffer(|status| status.opening_steps += 1);
        let mut state = salvage::open(state_dir, settings.dead_letter_quota_bytes, &step)?;
        recovery::check_log(&state, identity)?;
        recovery::check_shims(&mut state)?;
        let cursors = Cursors::of(&state)?;
        let mut recovered = recovery::Recovery {
            buffer: &folder,
            quarantine: &quarantine,
            identity,
            configured: &streams.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(),
            delivered: cursors.furthest.clone(),
            reached: reached::read(&folder)?,
            on_read: &|read| {
                step();
                board.update_buffer(|status| status.generations = read);
            },
        }
        .run()?;
        let cell = |name: &StreamName| {
            let next = recovered.contents.next.get(name).copied().unwrap_or(Sequence(1));
            let cell = StreamCell::new(name.clone(), Sequence(next.0 - 1), &board);
            (name.clone(), Arc::new(cell))
        };
        let cells = recovered.streams.iter().map(cell).collect();
        let index = index(&mut recovered, &folder, cursors, log::generation_bytes(settings));
        let at = |(name, next): (&StreamName, &Sequence)| (name.clone(), Sequence(next.0 - 1));
        let positions = recovered.contents.next.iter().map(at).collect();
        let reached = reached::Reached::open(&folder, positions)?;
        let log = Arc::new(Log {
            folder,
            settings: settings.clone(),
            identity,
            cells: RwLock::new(cells),
            index: Mutex::new(index),
            marks: Mutex::new(recovered.marks.clone()),
            reached,
            tail: Mutex::new(tail::Tail::new(
                settings.tail_bytes_max,
                board.edge(Edge::Tail, settings.tail_bytes_max),
            )),
            handles: Mutex::new(reader::Handles::new()),
            failure: watch::Sender::new(None),
            threads: Threads::default(),
            draining: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            full: Incident::default(),
            news: Bell::default(),
            space: Bell::default(),
            board,
        });
        log.configure(streams);
        log.show_opened();
        log.show_lost_letters(&lost_letters::read(&log.folder, &quarantine)?);
        log.lose(recovered.losses.clone());
        log.show_losses(&lock(&log.index));
        match log.stopped() {
            Some(stopped) => Err(stopped),
            None => Buffer::start(log, recovered, state, directory),
        }
    }

    fn start(
        log: Arc<Log>,
        recovered: Recovered,
        state: StateStore,
        directory: File,
    ) -> Result<Buffer, BufferError> {
        let (orders, waiting) = mpsc::channel();
        let (requests, asked) = mpsc::channel();
        let (handle, commands) = State::new(log.clone());
        let writer =
            writer::Writer::new(log.clone(), recovered.number, recovered.store, recovered.contents);
        let threads = vec![
            spawn(&log, "buffer-writer", move |_| writer.run(&waiting))?,
            spawn(&log, "buffer-reader", move |log| reader::run(log, &asked))?,
            spawn(&log, "buffer-janitor", janitor::run)?,
            spawn(&log, "buffer-state", move |log| state::run(log, state, commands))?,
        ];
        Ok(Buffer {
            log,
            orders,
            requests,
            state: handle,
            threads: Arc::new(Mutex::new(threads)),
            directory: Arc::new(Mutex::new(Some(directory))),
        })
    }

    pub fn identity(&self) -> LogIdentity {
        self.log.identity
    }

    /// These streams and sinks are configured from now on: [`Buffer::open`] while it is open. Nothing that was kept is
    /// touched: the records of a stream that is left out stay until it is configured again, where a sink still owes them.
    pub fn configure(&self, streams: &[(StreamName, Vec<SinkName>)]) {
        self.log.configure(streams);
    }

    fn cell(&self, stream: &StreamName) -> Arc<StreamCell> {
        self.log.cell(stream).expect("every configured stream was named to open or configure")
    }

    /// The way in for one stream. One appender per stream is alive at a time.
    pub fn appender(&self, stream: &StreamName) -> Appender {
        Appender { cell: self.cell(stream), orders: self.orders.clone() }
    }

    /// The newest kept records of a stream, oldest first, at most `count`: what a broker may send again with DUP.
    /// Blocking; called once when a stream starts, on a blocking thread. The first block may hold some more.
    pub fn recent(&self, stream: &StreamName, count: usize) -> Result<Vec<Block>, BufferError> {
        let _entered = self.log.threads.enter("buffer-recent");
        threads::set_work_waiting(true);
        let cell = self.cell(stream);
        let durable = cell.durable.borrow().0;
        let held = self.oldest(stream).0.saturating_sub(1);
        let mut position = Sequence(durable.0.saturating_sub(count as u64).max(held));
        let mut blocks = Vec::new();
        while position < durable {
            let chunk = reader::fetch(&self.log, &cell, position, RECENT_READ_BYTES)?;
            let read = chunk.blocks.last().map(|block| block.range().last);
            position = match read.or(chunk.lost.map(|lost| lost.last)) {
                Some(last) => last,
                None => break,
            };
            blocks.extend(chunk.blocks);
        }
        Ok(blocks)
    }

    /// The way out for one sink of one stream.
    pub fn reader(&self, stream: &StreamName) -> Reader {
        Reader::new(self.log.clone(), self.cell(stream), self.requests.clone())
    }

    /// The first sequence of the stream the log still holds or will hold next (1 for a fresh log).
    pub fn oldest(&self, stream: &StreamName) -> Sequence {
        let held = lock(&self.log.index).oldest(stream);
        held.unwrap_or_else(|| self.durable(stream).0.next())
    }

    pub fn durable(&self, stream: &StreamName) -> Durable {
        *self.cell(stream).durable.borrow()
    }

    /// A sink's confirmed position: nothing behind it is dropped. Until it is called for each configured sink, nothing
    /// of the stream is dropped. Never goes back.
    pub fn delivered(&self, stream: &StreamName, sink: &SinkName, position: Delivered) {
        if lock(&self.log.index).delivered(stream, sink, position) {
            self.log.news.ring();
        }
    }

    /// Records of the stream up to `through` are not needed any more to recognise what its broker sends again. From the
    /// first call on those behind it are not dropped, whatever the sinks say. Never goes back.
    pub fn remembered(&self, stream: &StreamName, through: Sequence) {
        if lock(&self.log.index).remembered(stream, through) {
            self.log.news.ring();
        }
    }

    /// Durable values that are not records: books, dead letters. See [`State`].
    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// The thread that has had work for longest and got nothing done; a full buffer is no stall.
    pub fn stalled(&self) -> Option<Stall> {
        self.log.threads.stalled()
    }

    /// What the disk has lost since the log began, oldest notice first.
    pub fn losses(&self) -> Vec<Loss> {
        lock(&self.log.index).losses.clone()
    }

    /// Syncs what waits, closes every database, ends the threads. Later calls on any clone answer `Stopped`.
    pub async fn close(&self, timeout: Duration) -> Result<(), BufferError> {
        let buffer = self.clone();
        let closing = async move {
            let _ = buffer.orders.send(writer::Order::Close);
            buffer.state.close().await;
            tokio::task::spawn_blocking(move || buffer.join()).await
        };
        match tokio::time::timeout(timeout, closing).await {
            Ok(_) => match self.log.failure.borrow().clone() {
                None => Ok(()),
                Some(reason) => Err(BufferError::Stopped { reason }),
            },
            Err(_) => {
                let reason = "it did not close in time; what was acknowledged is safe".to_owned();
                Err(BufferError::Stopped { reason })
            }
        }
    }

    fn join(&self) {
        let mut threads = std::mem::take(&mut *lock(&self.threads)).into_iter();
        // The writer first: what it has taken is synced while the others still run.
        self.log.draining.store(true, Ordering::Release);
        self.log.space.ring();
        if let Some(writer) = threads.next() {
            let _ = writer.join();
        }
        self.log.closing.store(true, Ordering::Release);
        self.log.news.ring();
        let _ = self.requests.send(None);
        for thread in threads {
            let _ = thread.join();
        }
        self.log.handles().close_all();
        let mut index = lock(&self.log.index);
        index.current = None;
        index.retired.clear();
        drop(index);
        self.log.close_permits();
        *lock(&self.directory) = None;
    }

    /// Resolves when the first disk error stopped the buffer: the process must end non-zero.
    pub async fn failed(&self) -> BufferError {
        let mut failure = self.log.failure.subscribe();
        match failure.wait_for(Option::is_some).await {
            Ok(reason) => BufferError::Stopped { reason: reason.clone().unwrap_or_default() },
            Err(_) => std::future::pending().await,
        }
    }
}

/// What the saved books say of each stream.
struct Cursors {
    furthest: BTreeMap<StreamName, Sequence>,
    nearest: BTreeMap<StreamName, Sequence>,
}

impl Cursors {
    fn of(state: &StateStore) -> Result<Self, BufferError> {
        let mut cursors = Cursors { furthest: BTreeMap::new(), nearest: BTreeMap::new() };
        for (stream, _, books) in state.all_books()? {
            let furthest = cursors.furthest.entry(stream.clone()).or_default();
            *furthest = books.cursor.max(*furthest);
            let nearest = cursors.nearest.entry(stream).or_insert(books.cursor);
            *nearest = books.cursor.min(*nearest);
        }
        Ok(cursors)
    }
}

/// Nothing is configured yet.
fn index(
    recovered: &mut Recovered,
    folder: &Path,
    cursors: Cursors,
    generation_bytes: u64,
) -> Index {
    Index {
        generations: std::mem::take(&mut recovered.entries),
        current: Some((recovered.number, recovered.store.clone())),
        sinks: BTreeMap::new(),
        remembered: BTreeMap::new(),
        unconfigured: cursors.nearest,
        losses: std::mem::take(&mut recovered.noted),
        quarantined: std::fs::read_dir(folder.join("quarantine"))
            .map_or(0, |entries| entries.count() as u64),
        retired: Vec::new(),
        generation_bytes,
    }
}
