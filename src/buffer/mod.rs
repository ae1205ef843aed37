//! The durable buffer.

mod block;
mod disk;
mod error;
mod generation;
pub mod inspect;
mod janitor;
mod log;
mod reader;
mod recovery;
mod state;
mod state_store;
mod store;
mod sync_shim;
mod tail;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

pub use block::Block;
pub use error::BufferError;
pub use log::Loss;
pub use reader::{Chunk, Reader};
pub use state::{DeadLetterFilter, State};
pub use writer::Appender;

use crate::config::BufferSettings;
use crate::domain::{
    Arrival, Delivered, DeliveryFlags, Durable, LogIdentity, Sequence, SinkName, StreamName,
};
use crate::observe::Board;
use log::{Bell, Index, Log, StreamCell, lock};
use recovery::Recovered;
use state_store::StateStore;

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
    requests: mpsc::Sender<reader::Request>,
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
        disk::release_ballast(&state_dir.join("ballast"), settings.ballast_bytes)?;
        let identity = recovery::identity(&folder)?;
        let state = recovery::state(state_dir, &quarantine, settings)?;
        recovery::check_shim(&state)?;
        let configured: Vec<StreamName> = streams.iter().map(|(name, _)| name.clone()).collect();
        let books = state.all_books()?;
        let mut delivered: BTreeMap<StreamName, Sequence> = BTreeMap::new();
        let mut behind: BTreeMap<StreamName, Sequence> = BTreeMap::new();
        for (stream, _, books) in books {
            let cursor = books.cursor;
            let most = delivered.entry(stream.clone()).or_default();
            *most = cursor.max(*most);
            let least = behind.entry(stream).or_insert(cursor);
            *least = cursor.min(*least);
        }
        let mut recovered = recovery::Recovery {
            buffer: &folder,
            quarantine: &quarantine,
            identity,
            configured: &configured,
            delivered,
        }
        .run()?;
        let losses =
            disk::read_json(&folder.join("losses")).unwrap_or_default().unwrap_or_default();
        let cell = |name: &StreamName| {
            let next = recovered.contents.next.get(name).copied().unwrap_or(Sequence(1));
            let cell = StreamCell::new(name.clone(), Sequence(next.0 - 1), &board);
            (name.clone(), Arc::new(cell))
        };
        let cells = recovered.streams.iter().map(cell).collect();
        let quarantined =
            std::fs::read_dir(&quarantine).map_or(0, |entries| entries.count() as u64);
        let no_position = |(name, sinks): &(StreamName, Vec<SinkName>)| {
            (name.clone(), sinks.iter().map(|sink| (sink.clone(), None)).collect())
        };
        let sinks: BTreeMap<StreamName, BTreeMap<SinkName, Option<Sequence>>> =
            streams.iter().map(no_position).collect();
        behind.retain(|stream, _| !sinks.contains_key(stream));
        let index = Index {
            generations: std::mem::take(&mut recovered.entries),
            current: Some((recovered.number, recovered.store.clone())),
            sinks,
            unconfigured: behind,
            losses,
            quarantined,
            retired: Vec::new(),
        };
        let log = Arc::new(Log {
            folder,
            settings: settings.clone(),
            identity,
            cells,
            index: Mutex::new(index),
            marks: Mutex::new(recovered.marks.clone()),
            tail: Mutex::new(tail::Tail::new(settings.tail_bytes_max)),
            handles: Mutex::new(reader::Handles::new()),
            failure: watch::Sender::new(None),
            draining: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            news: Bell::default(),
            space: Bell::default(),
            board,
        });
        log.lose(recovered.losses.clone());
        if let Some(stopped) = log.stopped() {
            return Err(stopped);
        }
        log.show_losses(&lock(&log.index));
        log.show_opened();
        Buffer::start(log, recovered, state, directory)
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

    fn cell(&self, stream: &StreamName) -> Arc<StreamCell> {
        self.log.cells.get(stream).cloned().expect("every configured stream was named to open")
    }

    /// The way in for one stream. One appender per stream is alive at a time.
    pub fn appender(&self, stream: &StreamName) -> Appender {
        Appender { cell: self.cell(stream), orders: self.orders.clone() }
    }

    /// The newest kept records of a stream, oldest first, at most `count`: what a broker may send again with DUP.
    /// Blocking; called once when a stream starts, on a blocking thread. The first block may hold some more.
    pub fn recent(&self, stream: &StreamName, count: usize) -> Result<Vec<Block>, BufferError> {
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

    /// Durable values that are not records: books, dead letters. See [`State`].
    pub fn state(&self) -> State {
        self.state.clone()
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
        for thread in threads {
            let _ = thread.join();
        }
        lock(&self.log.handles).close_all();
        let mut index = lock(&self.log.index);
        index.current = None;
        index.retired.clear();
        drop(index);
        for cell in self.log.cells.values() {
            cell.permits.close();
        }
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

/// A thread whose panic stops the buffer: nobody else would notice that nothing is answered any more.
fn spawn(
    log: &Arc<Log>,
    name: &str,
    body: impl FnOnce(&Log) + Send + 'static,
) -> Result<JoinHandle<()>, BufferError> {
    let log = log.clone();
    let named = name.to_owned();
    let guarded = move || {
        let run = std::panic::AssertUnwindSafe(|| body(&log));
        if std::panic::catch_unwind(run).is_err() {
            log.fail(&BufferError::Stopped { reason: format!("its thread {named} panicked") });
        }
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(guarded)
        .map_err(|error| BufferError::io("start a thread for", Path::new(name), error))
}
