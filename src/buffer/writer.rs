//! The writer: one OS thread that owns every append. It takes what waits from all streams, hands it to sled, syncs
//! once and answers everyone.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::block::{Block, BlockBuilder};
use super::generation::{self, Contents, Written};
use super::log::{Entry, Log, StreamCell, lock};
use super::{BufferError, Incoming, disk, threads};
use crate::crash::crash_point;
use crate::domain::{Durable, Sequence, SequenceRange, StreamName};
use crate::observe::Entered;

/// Numbers of a stream set aside at a time, durably, before they are used. Should the newest generation become
/// unreadable, the next start goes on behind them; that many numbers at most are then reported as lost too many.
const RESERVE: u64 = 65_536;

/// Between two looks whether there is room again.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// A sled file is at most about this much larger than the blocks in it; measured 1.6 to 1.8 with full groups.
const FILE_PER_BLOCK_BYTES: (u64, u64) = (9, 5);

/// Below this share of blocks in it a generation is not sealed for its file's size alone: an empty sled database
/// takes up some space already.
pub(super) const BLOCK_SHARE_MIN: u64 = 16;

pub(super) enum Order {
    Append(Pending),
    Close,
}

/// A batch on its way; dropping it unanswered tells the stream that it is not kept.
pub(super) struct Pending {
    cell: Arc<StreamCell>,
    batch: Vec<Incoming>,
    since: Instant,
    answer: oneshot::Sender<Durable>,
    /// Given back when the batch is answered.
    place: Place,
}

/// One of the batches that may wait.
struct Place {
    _permit: OwnedSemaphorePermit,
    _shown: Entered,
}

/// The way in for one stream.
pub struct Appender {
    pub(super) cell: Arc<StreamCell>,
    pub(super) orders: mpsc::Sender<Order>,
}

impl Appender {
    /// Hands a batch to the writer, in order. `Err` gives the batch back when [`super::APPEND_QUEUE_BATCHES`] are
    /// waiting. The receiver answers once the whole batch is durable (with the sequence of its last record), or is
    /// dropped when the buffer stopped. Answers arrive in the order of the calls. While the quota is reached the
    /// answer simply waits.
    pub fn try_append(
        &self,
        batch: Vec<Incoming>,
    ) -> Result<oneshot::Receiver<Durable>, Vec<Incoming>> {
        let (answer, answered) = oneshot::channel();
        let permit = match self.cell.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(tokio::sync::TryAcquireError::NoPermits) => return Err(batch),
            // Stopped: `answer` is dropped, which is the answer.
            Err(tokio::sync::TryAcquireError::Closed) => return Ok(answered),
        };
        let place = Place { _permit: permit, _shown: self.cell.queued.enter() };
        let cell = self.cell.clone();
        let pending = Pending { cell, batch, since: Instant::now(), answer, place };
        // An ended writer drops the batch with its answer.
        let _ = self.orders.send(Order::Append(pending));
        Ok(answered)
    }

    /// Pends until `try_append` may succeed again.
    pub async fn ready(&self) {
        let _ = self.cell.permits.acquire().await;
    }
}

/// The writer's own state.
pub(super) struct Writer {
    log: Arc<Log>,
    number: u64,
    store: Written,
    contents: Contents,
    /// Said so already.
    refusing: bool,
}

/// Owed to a stream once its batch is durable.
struct Answer {
    answer: oneshot::Sender<Durable>,
    last: Sequence,
    _place: Place,
}

/// Blocks of one stream in one group.
struct Appended {
    cell: Arc<StreamCell>,
    blocks: Vec<Block>,
    stored_bytes: usize,
}

impl Appended {
    fn range(&self) -> Option<SequenceRange> {
        let first = self.blocks.first()?.range().first;
        Some(SequenceRange { first, last: self.blocks.last()?.range().last })
    }
}

impl Writer {
    /// Goes on in the generation `number`, which holds `contents`.
    pub(super) fn new(log: Arc<Log>, number: u64, store: Written, contents: Contents) -> Self {
        Writer { log, number, store, contents, refusing: false }
    }

    /// Until it is told to close or the disk fails.
    pub(super) fn run(mut self, orders: &mpsc::Receiver<Order>) {
        let ended = loop {
            let (group, closing) = self.collect(orders);
            threads::set_work_waiting(!group.is_empty());
            fail::fail_point!("buffer_writer");
            if !group.is_empty()
                && let Err(error) = self.keep(group)
            {
                break Err(error);
            }
            threads::set_work_waiting(false);
            if closing || self.log.stopped().is_some() {
                break self.finish();
            }
        };
        if let Err(error) = ended {
            self.log.fail(&error);
        }
    }

    /// The next group: whatever waits, once the oldest has waited long enough or there is enough; and whether to end.
    fn collect(&self, orders: &mpsc::Receiver<Order>) -> (Vec<Pending>, bool) {
        let settings = &self.log.settings;
        let (mut group, mut messages) = (Vec::new(), 0);
        let mut deadline = Instant::now() + super::IDLE_PAUSE;
        while messages < settings.group_messages_max {
            let patience = deadline.saturating_duration_since(Instant::now());
            match orders.recv_timeout(patience) {
                Ok(Order::Append(pending)) => {
                    if group.is_empty() {
                        deadline = pending.since + settings.sync_linger;
                    }
                    messages += pending.batch.len();
                    group.push(pending);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => break,
                Ok(Order::Close) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return (group, true);
                }
            }
        }
        (group, false)
    }

    /// Makes a group durable and answers it. `Ok` without answers when the buffer closes while it is full.
    fn keep(&mut self, group: Vec<Pending>) -> Result<(), BufferError> {
        if !self.wait_for_room()? {
            return Ok(());
        }
        let (mut appended, answers, messages) = self.encode(group);
        self.reserve(&appended)?;
        for stream in &mut appended {
            for block in &stream.blocks {
                stream.stored_bytes += self.store.insert(&stream.cell.prefix, block)?;
            }
        }
        crash_point("crash_inserted");
        let started = Instant::now();
        fail::fail_point!("buffer_sync");
        self.store.flush()?;
        crash_point("crash_flushed");
        let meters = &self.log.board.buffer_meters;
        meters.sync_duration.observe(started.elapsed().as_secs_f64());
        meters.group_messages.observe(messages as f64);
        let last = |stream: &Appended| Some((stream.cell.name.clone(), stream.range()?.last));
        self.log.reached.advance(appended.iter().filter_map(last))?;
        self.publish(appended)?;
        for waiting in answers {
            // The stream may have gone; its messages are kept all the same.
            let _ = waiting.answer.send(Durable(waiting.last));
        }
        if self.full()? { self.switch() } else { Ok(()) }
    }

    fn next_of(&self, stream: &StreamName) -> Sequence {
        self.contents.next.get(stream).copied().unwrap_or(Sequence(1))
    }

    fn encode(&self, group: Vec<Pending>) -> (Vec<Appended>, Vec<Answer>, usize) {
        let mut builders: Vec<(Arc<StreamCell>, BlockBuilder)> = Vec::new();
        let mut answers = Vec::with_capacity(group.len());
        let mut messages = 0;
        for pending in group {
            let cell = pending.cell;
            let place = builders.iter().position(|(known, _)| Arc::ptr_eq(known, &cell));
            let place = place.unwrap_or_else(|| {
                builders.push((cell.clone(), BlockBuilder::new(self.next_of(&cell.name))));
                builders.len() - 1
            });
            let builder = &mut builders[place].1;
            for message in &pending.batch {
                builder.push(message);
            }
            messages += pending.batch.len();
            let (answer, last) = (pending.answer, builder.last());
            answers.push(Answer { answer, last, _place: pending.place });
        }
        let appended = builders
            .into_iter()
            .map(|(cell, builder)| Appended { cell, blocks: builder.finish(), stored_bytes: 0 })
            .collect();
        (appended, answers, messages)
    }

    /// No number is used before it is durably set aside.
    fn reserve(&self, appended: &[Appended]) -> Result<(), BufferError> {
        let marks = lock(&self.log.marks);
        let mut wanted = Vec::new();
        for stream in appended {
            let reserved = marks.reserved.get(&stream.cell.name).copied().unwrap_or_default();
            if let Some(range) = stream.range()
                && range.last > reserved
            {
                wanted.push((stream.cell.name.clone(), Sequence(range.last.0 + RESERVE)));
            }
        }
        drop(marks);
        if wanted.is_empty() {
            return Ok(());
        }
        self.log.save_marks(|marks| marks.reserved.extend(wanted))
    }

    /// The group is durable: sinks may have it.
    fn publish(&mut self, appended: Vec<Appended>) -> Result<(), BufferError> {
        let bytes = self.store.size_on_disk()?;
        let mut index = lock(&self.log.index);
        for stream in &appended {
            if let Some(range) = stream.range() {
                self.contents.add(stream.cell.name.clone(), range, stream.stored_bytes);
                index.extend(&stream.cell.name, range);
            }
        }
        if let Some(entry) = index.generations.get_mut(&self.number) {
            entry.bytes = bytes;
        }
        drop(index);
        for stream in appended {
            let Some(range) = stream.range() else { continue };
            lock(&self.log.tail).push(&stream.cell.name, stream.blocks);
            stream.cell.publish(range.last);
        }
        Ok(())
    }

    fn full(&self) -> Result<bool, BufferError> {
        let limit = self.log.generation_bytes();
        let (file, per) = FILE_PER_BLOCK_BYTES;
        let blocks = self.contents.block_bytes;
        let large = self.store.size_on_disk()? >= limit && blocks >= limit / BLOCK_SHARE_MIN;
        Ok(large || blocks * file / per >= limit)
    }

    /// The next generation is whole on the disk before the old one is called sealed: whatever a crash leaves, the
    /// newest one is the one that was written last.
    fn switch(&mut self) -> Result<(), BufferError> {
        let number = self.number + 1;
        let header = generation::header(self.log.identity, number, self.contents.next.clone());
        let store = Written::create(&self.log.folder, &header)?;
        crash_point("crash_generation_made");
        let sealed_folder = self.store.folder().to_owned();
        generation::write_sidecar(&sealed_folder, &self.contents)?;
        crash_point("crash_generation_sealed");
        let entry = Entry {
            folder: store.folder().to_owned(),
            bytes: store.size_on_disk()?,
            contents: Contents::default(),
        };
        let mut index = lock(&self.log.index);
        if let Some(sealed) = index.generations.get_mut(&self.number) {
            sealed.bytes = disk::folder_bytes(&sealed_folder);
            sealed.contents = self.contents.clone();
        }
        index.generations.insert(number, entry);
        if let Some(retired) = index.current.replace((number, store.clone())) {
            index.retired.push(retired);
        }
        drop(index);
        self.number = number;
        self.store = store;
        let next = header.next;
        self.contents = Contents { number, next, ..Contents::default() };
        self.log.news.ring();
        Ok(())
    }

    /// False when the buffer closes or fails before there is room.
    fn wait_for_room(&mut self) -> Result<bool, BufferError> {
        loop {
            let refusal = self.refusal()?;
            let was = std::mem::replace(&mut self.refusing, refusal.is_some());
            match refusal {
                None => {
                    if was {
                        self.log.show_accepting(None);
                    }
                    return Ok(true);
                }
                Some(why) if !was => self.log.show_accepting(Some(why)),
                Some(_) => {}
            }
            if self.log.stopped().is_some() || self.log.draining.load(Ordering::Acquire) {
                return Ok(false);
            }
            self.log.news.ring();
            threads::beat();
            self.log.space.wait(FULL_PAUSE);
        }
    }

    fn refusal(&self) -> Result<Option<String>, BufferError> {
        let settings = &self.log.settings;
        let bytes = lock(&self.log.index).bytes();
        if bytes >= settings.quota_bytes {
            let why =
                format!("the buffer holds {bytes} bytes, its quota is {}", settings.quota_bytes);
            return Ok(Some(why));
        }
        let free = disk::space(&self.log.folder)?.free_bytes;
        let why = || {
            format!("the disk has {free} bytes free, the minimum is {}", settings.free_bytes_min)
        };
        Ok((free < settings.free_bytes_min).then(why))
    }

    /// An orderly end: everything is synced, and the next start knows exactly where the numbers go on.
    fn finish(&mut self) -> Result<(), BufferError> {
        if self.log.failure.borrow().is_some() {
            return Ok(());
        }
        self.store.flush()?;
        let last =
            |(stream, next): (&StreamName, &Sequence)| (stream.clone(), Sequence(next.0 - 1));
        let reserved = self.contents.next.iter().map(last).collect();
        self.log.save_marks(|marks| {
            marks.clean = true;
            marks.reserved = reserved;
        })
    }
}
