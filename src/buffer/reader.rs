//! Reading: from the tail in memory when a sink is caught up, from the log, on a thread of its own, when it lags.

use std::num::NonZeroUsize;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::{oneshot, watch};

use super::frames::Frames;
use super::generation::{self, Stretch};
use super::log::{Log, Place, StreamCell, lock};
use super::{Block, BufferError, threads};
use crate::domain::{Durable, Sequence, SequenceRange};

/// Sealed generations open at a time: some bytes of memory for each part of a block in them.
const OPEN_SEALED_MAX: NonZeroUsize = NonZeroUsize::new(2).unwrap();

/// A sealed generation nobody has read for this long is closed.
const IDLE_HANDLE_LIMIT: Duration = Duration::from_secs(30);

/// Sealed generations that are open because a sink lags.
#[derive(Debug)]
pub(super) struct Handles {
    open: LruCache<u64, Arc<Frames>>,
    used: Instant,
}

impl Handles {
    pub(super) fn new() -> Self {
        Handles { open: LruCache::new(OPEN_SEALED_MAX), used: Instant::now() }
    }

    pub(super) fn forget(&mut self, number: u64) {
        self.open.pop(&number);
    }

    pub(super) fn close_all(&mut self) {
        self.open.clear();
    }

    /// Gives the memory back once no sink lags any more.
    pub(super) fn close_idle(&mut self) {
        if self.used.elapsed() > IDLE_HANDLE_LIMIT {
            self.open.clear();
        }
    }

    fn get(&mut self, number: u64, folder: &std::path::Path) -> Result<Arc<Frames>, BufferError> {
        if let Some(frames) = self.open.get(&number) {
            return Ok(frames.clone());
        }
        if self.open.len() == OPEN_SEALED_MAX.get() {
            self.open.pop_lru();
        }
        let frames = Arc::new(Frames::open(folder)?);
        let held = frames.number();
        if held != number {
            return Err(BufferError::Misplaced { path: folder.to_owned(), number: held });
        }
        self.open.put(number, frames.clone());
        Ok(frames)
    }
}

/// What `read` found.
#[derive(Debug, Clone, Default)]
pub struct Chunk {
    /// In order, without overlap. The first may begin before what was asked for: use `Block::records_after`.
    pub blocks: Vec<Block>,
    /// The log lost these records (quarantined): the sink counts them as lost and passes on. Only ever together with
    /// no blocks, and beginning right after the position asked for.
    pub lost: Option<SequenceRange>,
}

/// A sink that lags asks for the records after a position. Each [`Reader`] has at most one under way.
pub(super) struct Request {
    cell: Arc<StreamCell>,
    position: Sequence,
    bytes_max: usize,
    answer: oneshot::Sender<Result<Chunk, BufferError>>,
}

/// Pulls blocks for one sink: from memory when it is caught up, from the log when it lags.
pub struct Reader {
    log: Arc<Log>,
    cell: Arc<StreamCell>,
    requests: mpsc::Sender<Option<Request>>,
}

impl Reader {
    pub(super) fn new(
        log: Arc<Log>,
        cell: Arc<StreamCell>,
        requests: mpsc::Sender<Option<Request>>,
    ) -> Self {
        Reader { log, cell, requests }
    }

    /// The records after `position`, at least one block when there is one, at most about `bytes_max`; empty when
    /// `position` is the last durable record.
    pub async fn read(
        &mut self,
        position: Sequence,
        bytes_max: usize,
    ) -> Result<Chunk, BufferError> {
        if let Some(stopped) = self.log.stopped() {
            return Err(stopped);
        }
        if position >= self.cell.durable.borrow().0 {
            return Ok(Chunk::default());
        }
        let at_hand = lock(&self.log.tail).read(&self.cell.name, position, bytes_max);
        if let Some(blocks) = at_hand {
            return Ok(Chunk { blocks, lost: None });
        }
        let (answer, answered) = oneshot::channel();
        let request = Request { cell: self.cell.clone(), position, bytes_max, answer };
        let ended = || BufferError::Stopped { reason: "its reading thread has ended".to_owned() };
        if self.requests.send(Some(request)).is_err() {
            return Err(self.log.stopped().unwrap_or_else(ended));
        }
        answered.await.unwrap_or_else(|_| Err(self.log.stopped().unwrap_or_else(ended)))
    }

    /// The last durable record, to wait for news: `changed().await`.
    pub fn durable(&self) -> watch::Receiver<Durable> {
        self.cell.durable.subscribe()
    }
}

/// The reading thread: until it is sent `None` or every asker is gone.
pub(super) fn run(log: &Log, requests: &mpsc::Receiver<Option<Request>>) {
    while let Ok(Some(request)) = requests.recv() {
        threads::set_work_waiting(true);
        fail::fail_point!("buffer_reader");
        let found = fetch(log, &request.cell, request.position, request.bytes_max);
        threads::set_work_waiting(false);
        // The asker may have been stopped meanwhile.
        let _ = request.answer.send(found);
    }
}

/// Reads from the log, blocking.
pub(super) fn fetch(
    log: &Log,
    cell: &StreamCell,
    position: Sequence,
    bytes_max: usize,
) -> Result<Chunk, BufferError> {
    let mut tried = None;
    loop {
        if let Some(stopped) = log.stopped() {
            return Err(stopped);
        }
        threads::beat();
        let durable = cell.durable.borrow().0;
        if position >= durable {
            return Ok(Chunk::default());
        }
        let place = lock(&log.index).locate(&cell.name, position, durable);
        let (number, wanted) = match place {
            Place::Missing(lost) => return Ok(Chunk { blocks: Vec::new(), lost: Some(lost) }),
            Place::In { number, wanted } => (number, wanted),
        };
        let read = read(log, cell, number, wanted, bytes_max);
        match read {
            Ok(Some(Stretch { hole: Some(hole), .. }))
                if !lock(&log.index).is_known_hole(number, &cell.name, hole) =>
            {
                let once_more = tried != Some(number);
                tried = Some(number);
                found_hole(log, cell, number, hole, once_more)?;
            }
            Ok(Some(Stretch { blocks, hole })) => return Ok(Chunk { blocks, lost: hole }),
            // Dropped between the look into the index and the opening: look again.
            Ok(None) => {}
            // A drive may fail to read once; what it then cached is given up with the handle.
            Err(error) if error.is_damage() && tried != Some(number) => {
                tracing::warn!(event = "read_failed", generation = number, error = %error,
                    "a generation could not be read: once more");
                log.handles().forget(number);
                tried = Some(number);
            }
            Err(BufferError::Misplaced { path, number }) => {
                // Without its small file the next start looks into it.
                generation::remove_sidecar(&path)?;
                log.fail(&BufferError::Misplaced { path, number });
            }
            Err(error) if error.is_damage() => give_up(log, number, &error),
            Err(error) => return Err(error),
        }
    }
}

/// `None`: the generation is no longer there. The handles stay locked for the whole read: so nobody closes or removes
/// what is being read.
fn read(
    log: &Log,
    cell: &StreamCell,
    number: u64,
    wanted: SequenceRange,
    bytes_max: usize,
) -> Result<Option<Stretch>, BufferError> {
    let mut handles = log.handles();
    handles.used = Instant::now();
    let (held, folder) = {
        let index = lock(&log.index);
        let Some(entry) = index.generations.get(&number) else { return Ok(None) };
        (index.written(number), entry.folder.clone())
    };
    let stretch = match held {
        Some(written) => generation::read(&written, &cell.prefix, wanted, bytes_max),
        None => {
            let frames = handles.get(number, &folder)?;
            generation::read(frames.as_ref(), &cell.prefix, wanted, bytes_max)
        }
    };
    stretch.map(Some)
}

/// What the drive did not read is looked for once more. Then it is lost, and the whole generation is looked through; the
/// one that is written ends the process, so that the next start finds what else its file holds.
fn found_hole(
    log: &Log,
    cell: &StreamCell,
    number: u64,
    hole: SequenceRange,
    once_more: bool,
) -> Result<(), BufferError> {
    let SequenceRange { first, last } = hole;
    let mut handles = log.handles();
    let (written, folder) = {
        let index = lock(&log.index);
        let Some(entry) = index.generations.get(&number) else { return Ok(()) };
        (index.written(number).is_some(), entry.folder.clone())
    };
    if written {
        let missing = format!("{} {} to {} cannot be read", cell.name, first.0, last.0);
        log.fail(&BufferError::corrupt(&folder, missing));
    } else if once_more {
        handles.forget(number);
    } else {
        let frames = handles.get(number, &folder)?;
        log.examine(number, &frames)?;
        let index = lock(&log.index);
        let is_there = index.generations.contains_key(&number);
        if is_there && !index.is_known_hole(number, &cell.name, hole) {
            let reason = format!("{} {} to {} is read now and then", cell.name, first.0, last.0);
            return Err(BufferError::corrupt(&folder, reason));
        }
    }
    Ok(())
}

/// A sealed generation is set aside. The one that is written ends the process: the next start verifies it.
fn give_up(log: &Log, number: u64, error: &BufferError) {
    let written = lock(&log.index).current.as_ref().is_some_and(|(current, _)| *current == number);
    if written { log.fail(error) } else { log.quarantine(number, error) }
}
