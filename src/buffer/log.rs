//! What all threads of the buffer share: which generation holds which records, how far each stream and sink is, what
//! was lost, and whether the buffer still works.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};

use super::frames::Frames;
use super::generation::{self, Contents, Written};
use super::reached::Reached;
use super::reader::Handles;
use super::state::Owner;
use super::tail::Tail;
use super::threads::{self, Threads};
use super::writer::BLOCK_SHARE_MIN;
use super::{APPEND_QUEUE_BATCHES, BufferError, LostLetters, disk, lost_letters};
use crate::config::BufferSettings;
use crate::domain::{
    Arrival, Delivered, Durable, Incident, LogIdentity, Runbook, Sequence, SequenceRange, SinkName,
    StreamName,
};
use crate::observe::{Board, Edge, EdgeMeter, StreamView};

/// Every critical section leaves its value whole, so a panic elsewhere does not spoil it.
pub(super) fn lock<T>(cell: &Mutex<T>) -> MutexGuard<'_, T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One stream's side of the log.
#[derive(Debug)]
pub(super) struct StreamCell {
    pub name: StreamName,
    /// Of its keys.
    pub prefix: Vec<u8>,
    pub durable: watch::Sender<Durable>,
    /// One per batch that may wait at the writer.
    pub permits: Arc<Semaphore>,
    pub queued: EdgeMeter,
    /// `None` for a stream that is in the log and not configured.
    view: Mutex<Option<Arc<StreamView>>>,
}

impl StreamCell {
    pub(super) fn new(name: StreamName, durable: Sequence, board: &Board) -> Self {
        StreamCell {
            prefix: generation::key_prefix(&name),
            durable: watch::Sender::new(Durable(durable)),
            permits: Arc::new(Semaphore::new(APPEND_QUEUE_BATCHES)),
            queued: board.stream_edge(Edge::AppendQueue, &name, APPEND_QUEUE_BATCHES),
            view: Mutex::default(),
            name,
        }
    }

    /// Where it is shown from now on.
    fn show_on(&self, view: Option<Arc<StreamView>>) {
        *lock(&self.view) = view;
        let durable = self.durable.borrow().0;
        self.publish(durable);
    }

    /// Tells everyone that the stream is durable up to here.
    pub(super) fn publish(&self, durable: Sequence) {
        self.durable.send_replace(Durable(durable));
        if let Some(view) = &*lock(&self.view) {
            view.update(|status| status.sequence = durable);
        }
    }
}

/// One generation, open or not.
#[derive(Debug)]
pub(super) struct Entry {
    pub folder: PathBuf,
    /// On disk.
    pub bytes: u64,
    /// Of the one that is written: the ranges alone.
    pub contents: Contents,
}

/// Sealed generations that are kept although everybody has passed them.
const KEPT_MAX: usize = 64;

/// A generation is at most a quarter of the quota, so that there is always a drained one to drop.
pub(super) fn generation_bytes(settings: &BufferSettings) -> u64 {
    settings.generation_bytes.min(settings.quota_bytes / 4)
}

/// Records that the disk lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    pub stream: StreamName,
    pub range: SequenceRange,
    pub noticed: Arrival,
    pub reason: String,
}

/// Small facts that must outlive any generation.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Marks {
    /// The last stop was orderly: `reserved` is exact.
    pub clean: bool,
    /// Numbers up to here may have been given out: none of them is ever given out again.
    pub reserved: BTreeMap<StreamName, Sequence>,
    /// Records up to here were dropped, because every sink had passed them.
    pub dropped: BTreeMap<StreamName, Sequence>,
}

/// Where the record after a position is.
#[derive(Debug, PartialEq)]
pub(super) enum Place {
    /// In this generation, which should hold the range from there on.
    In { number: u64, wanted: SequenceRange },
    /// Nowhere: the log lost or dropped these.
    Missing(SequenceRange),
}

#[derive(Debug)]
pub(super) struct Index {
    pub generations: BTreeMap<u64, Entry>,
    /// The generation that is written; `None` once the buffer has closed.
    pub current: Option<(u64, Written)>,
    /// Of each configured stream: its sinks, and how far each says it is.
    pub sinks: BTreeMap<StreamName, BTreeMap<SinkName, Option<Sequence>>>,
    /// Of each stream that recognises what a broker sends again: records after this one are its memory of that.
    pub remembered: BTreeMap<StreamName, Sequence>,
    /// Of each stream that is in the log and not configured: records after this one hold their generation back.
    pub unconfigured: BTreeMap<StreamName, Sequence>,
    pub losses: Vec<Loss>,
    pub quarantined: u64,
    /// Sealed and not yet closed: the janitor does that, it takes some milliseconds.
    pub retired: Vec<(u64, Written)>,
    /// When one is full.
    pub generation_bytes: u64,
}

impl Index {
    /// The handle of the generation that is written.
    pub(super) fn written(&self, number: u64) -> Option<Written> {
        self.current.as_ref().filter(|(found, _)| *found == number).map(|(_, store)| store.clone())
    }

    /// It was reported as lost.
    pub(super) fn is_known_hole(
        &self,
        number: u64,
        stream: &StreamName,
        hole: SequenceRange,
    ) -> bool {
        let Some(entry) = self.generations.get(&number) else { return false };
        let holes = entry.contents.holes.iter().filter(|(name, _)| name == stream);
        holes.into_iter().any(|(_, known)| known.first <= hole.first && known.last >= hole.last)
    }

    /// A sink that stays keeps its position. The nearest position of a stream that goes holds its records back, as at a
    /// start without it.
    pub(super) fn configure(&mut self, streams: &[(StreamName, Vec<SinkName>)]) {
        let mut before = std::mem::take(&mut self.sinks);
        for (name, sinks) in streams {
            let known = before.remove(name).unwrap_or_default();
            let at = |sink: &SinkName| (sink.clone(), known.get(sink).copied().flatten());
            self.sinks.insert(name.clone(), sinks.iter().map(at).collect());
            self.unconfigured.remove(name);
        }
        for (name, sinks) in before {
            self.remembered.remove(&name);
            if let Some(nearest) = sinks.into_values().map(Option::unwrap_or_default).min() {
                self.unconfigured.insert(name, nearest);
            }
        }
        self.warn_of_unconfigured();
    }

    pub(super) fn bytes(&self) -> u64 {
        self.generations.values().map(|entry| entry.bytes).sum()
    }

    /// Says which records nobody is configured to take.
    pub(super) fn warn_of_unconfigured(&self) {
        let mut held: BTreeMap<&StreamName, u64> = BTreeMap::new();
        for (stream, range) in self.generations.values().flat_map(|entry| &entry.contents.ranges) {
            if !self.sinks.contains_key(stream) {
                *held.entry(stream).or_default() += range.count();
            }
        }
        for (stream, records) in held {
            let owed = self.unconfigured.contains_key(stream);
            tracing::warn!(
                event = "stream_not_configured",
                stream = %stream,
                records,
                owed,
                "the buffer holds records of a stream that is not configured; configure it again to deliver them \
                 (owed = a sink had not taken them all: they are kept as long)"
            );
        }
    }

    pub(super) fn oldest(&self, stream: &StreamName) -> Option<Sequence> {
        self.generations
            .values()
            .find_map(|entry| entry.contents.ranges.get(stream))
            .map(|r| r.first)
    }

    /// Where the records `(position, durable]` begin; `position` is before `durable`.
    pub(super) fn locate(&self, stream: &StreamName, position: Sequence, last: Sequence) -> Place {
        let first = position.next();
        let found = self.generations.iter().find_map(|(number, entry)| {
            let range = entry.contents.ranges.get(stream).filter(|range| range.last >= first)?;
            Some((*number, *range))
        });
        match found {
            None => Place::Missing(SequenceRange { first, last }),
            Some((_, range)) if range.first > first => {
                let last = Sequence(range.first.0 - 1);
                Place::Missing(SequenceRange { first, last })
            }
            Some((number, range)) => {
                let wanted = SequenceRange { first, last: range.last.min(last) };
                Place::In { number, wanted }
            }
        }
    }

    /// True when it was news and may allow a generation to be dropped.
    pub(super) fn delivered(
        &mut self,
        stream: &StreamName,
        sink: &SinkName,
        position: Delivered,
    ) -> bool {
        let Some(known) = self.sinks.get_mut(stream).and_then(|sinks| sinks.get_mut(sink)) else {
            return false;
        };
        if known.is_some_and(|known| known >= position.0) {
            return false;
        }
        *known = Some(position.0);
        self.droppable().is_some()
    }

    /// True when it was news and may allow a generation to be dropped.
    pub(super) fn remembered(&mut self, stream: &StreamName, through: Sequence) -> bool {
        let before = self.remembered.insert(stream.clone(), through);
        if let Some(before) = before.filter(|before| *before >= through) {
            self.remembered.insert(stream.clone(), before);
            return false;
        }
        self.droppable().is_some()
    }

    /// The oldest generation, when nobody needs it: not the one that is written, nor the newest sealed ones that are as
    /// good as one full one (a declared window of repeats reads them; each start seals one, however little is in it),
    /// passed by every sink, and no memory of what a broker may send again.
    pub(super) fn droppable(&self) -> Option<u64> {
        let current = self.current.as_ref().map(|(number, _)| *number)?;
        let others = || self.generations.range(..current).skip(1).map(|(_, entry)| entry);
        let kept: u64 = others().map(|entry| entry.contents.block_bytes).sum();
        let bytes: u64 = others().map(|entry| entry.bytes).sum();
        let enough = kept >= (self.generation_bytes / BLOCK_SHARE_MIN).max(1)
            || bytes >= self.generation_bytes
            || others().count() >= KEPT_MAX;
        let (number, entry) = self.generations.first_key_value()?;
        let passed = |(stream, range): (&StreamName, &SequenceRange)| match self.sinks.get(stream) {
            Some(sinks) => sinks.values().all(|at| at.is_some_and(|at| at >= range.last)),
            None => self.unconfigured.get(stream).is_none_or(|at| *at >= range.last),
        };
        let remembered = |(stream, range): (&StreamName, &SequenceRange)| {
            self.remembered.get(stream).is_none_or(|through| *through >= range.last)
        };
        let ranges = &entry.contents.ranges;
        let unneeded = ranges.iter().all(passed) && ranges.iter().all(remembered);
        (enough && unneeded).then_some(*number)
    }

    /// Adds durable blocks' range to the generation that is written.
    pub(super) fn extend(&mut self, stream: &StreamName, added: SequenceRange) {
        let Some((number, _)) = self.current else { return };
        let Some(entry) = self.generations.get_mut(&number) else { return };
        match entry.contents.ranges.get_mut(stream) {
            Some(range) => range.last = added.last,
            None => drop(entry.contents.ranges.insert(stream.clone(), added)),
        }
    }
}

/// Shared by the handles and the threads.
#[derive(Debug)]
pub(super) struct Log {
    /// `<state_dir>/buffer`
    pub folder: PathBuf,
    pub settings: BufferSettings,
    pub board: Arc<Board>,
    pub identity: LogIdentity,
    /// Of every stream that is configured, or was, or is in the log.
    pub cells: RwLock<BTreeMap<StreamName, Arc<StreamCell>>>,
    pub index: Mutex<Index>,
    pub marks: Mutex<Marks>,
    pub reached: Reached,
    pub tail: Mutex<Tail>,
    /// See [`Log::handles`].
    pub handles: Mutex<Handles>,
    pub failure: watch::Sender<Option<String>>,
    pub threads: Threads,
    /// Asked to close: the writer keeps what it has, unless it is full.
    pub draining: AtomicBool,
    /// The writer has ended: so does everyone.
    pub closing: AtomicBool,
    /// While nothing is accepted.
    pub full: Incident,
    /// Something to look at for the janitor, or room for the writer.
    pub news: Bell,
    pub space: Bell,
}

impl Owner for Log {
    fn board(&self) -> &Board {
        &self.board
    }

    fn stopped(&self) -> Option<BufferError> {
        Log::stopped(self)
    }

    fn fail(&self, error: &BufferError) {
        Log::fail(self, error);
    }
}

impl Log {
    pub(super) fn cell(&self, stream: &StreamName) -> Option<Arc<StreamCell>> {
        self.cells.read().unwrap_or_else(PoisonError::into_inner).get(stream).cloned()
    }

    pub(super) fn close_permits(&self) {
        let cells = self.cells.read().unwrap_or_else(PoisonError::into_inner);
        cells.values().for_each(|cell| cell.permits.close());
    }

    /// These streams with these sinks are configured from now on.
    pub(super) fn configure(&self, streams: &[(StreamName, Vec<SinkName>)]) {
        let mut cells = self.cells.write().unwrap_or_else(PoisonError::into_inner);
        for (name, _) in streams {
            cells.entry(name.clone()).or_insert_with(|| {
                Arc::new(StreamCell::new(name.clone(), Sequence::ZERO, &self.board))
            });
        }
        let views: BTreeMap<_, _> = self.board.streams().into_iter().collect();
        for (name, cell) in cells.iter() {
            cell.show_on(views.get(name).cloned());
        }
        drop(cells);
        lock(&self.index).configure(streams);
        // What a sink that is gone held back may go.
        self.news.ring();
    }

    /// Kept by whoever reads, for as long as that takes.
    pub(super) fn handles(&self) -> MutexGuard<'_, Handles> {
        threads::yield_to(|| lock(&self.handles))
    }

    pub(super) fn ballast(&self) -> PathBuf {
        self.folder.with_file_name("ballast")
    }

    pub(super) fn quarantine_folder(&self) -> PathBuf {
        self.folder.join("quarantine")
    }

    pub(super) fn closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Why nothing works any more, if so.
    pub(super) fn stopped(&self) -> Option<BufferError> {
        let reason = self.failure.borrow().clone();
        let closed = || self.closing().then(|| "it was closed".to_owned());
        reason.or_else(closed).map(|reason| BufferError::Stopped { reason })
    }

    /// The first disk error ends everything: after it no later success can be believed.
    pub(super) fn fail(&self, error: &BufferError) {
        let first = self.failure.send_if_modified(|reason| {
            let first = reason.is_none();
            if first {
                *reason = Some(error.to_string());
            }
            first
        });
        if !first {
            return;
        }
        tracing::error!(event = "buffer_failed", error = %error, "the buffer has stopped; the node ends");
        self.board.update_buffer(|status| {
            status.accepting = false;
            status.refusing_because = Some(error.to_string());
        });
        self.close_permits();
        self.space.ring();
        self.news.ring();
    }

    pub(super) fn generation_bytes(&self) -> u64 {
        generation_bytes(&self.settings)
    }

    pub(super) fn show_opened(&self) {
        let index = lock(&self.index);
        let (bytes, generations) = (index.bytes(), index.generations.len() as u64);
        drop(index);
        self.board.update_buffer(|status| {
            status.accepting = true;
            status.refusing_because = None;
            status.bytes = bytes;
            status.generations = generations;
            status.dead_letter_quota_bytes = self.settings.dead_letter_quota_bytes;
        });
        self.board.update_node(|status| status.log_identity = self.identity.to_string());
        tracing::info!(
            event = "buffer_opened",
            identity = %self.identity,
            generations,
            bytes,
            "the buffer is open"
        );
    }

    /// Tells that the buffer takes messages, or why it does not.
    pub(super) fn show_accepting(&self, refusing_because: Option<String>) {
        match &refusing_because {
            None => {
                let correlation_id = self.full.end().map(tracing::field::display);
                tracing::info!(
                    event = "buffer_accepting",
                    correlation_id,
                    "the buffer takes messages again"
                );
            }
            Some(why) => tracing::error!(
                           event = "buffer_full",
                           correlation_id = %self.full.id(),
            runbook = Runbook::BufferFull.page(),
                           reason = %why,
                           "the buffer is full: nothing is acknowledged until a sink has caught up or the disk has room"
                       ),
        }
        self.board.update_buffer(|status| {
            status.accepting = refusing_because.is_none();
            status.refusing_because = refusing_because;
        });
    }

    pub(super) fn save_marks(&self, change: impl FnOnce(&mut Marks)) -> Result<(), BufferError> {
        let mut marks = lock(&self.marks);
        change(&mut marks);
        disk::write_json(&self.folder.join("marks"), &*marks)
    }

    /// Writes down what the disk lost, once per range, and says so.
    pub(super) fn lose(&self, lost: Vec<Loss>) {
        let mut index = lock(&self.index);
        let news: Vec<Loss> = lost
            .into_iter()
            .filter(|loss| !index.losses.iter().any(|known| covers(known, loss)))
            .collect();
        if news.is_empty() {
            return;
        }
        for loss in &news {
            tracing::error!(
                event = "records_lost",
                runbook = Runbook::DataLost.page(),
                stream = %loss.stream,
                first = loss.range.first.0,
                last = loss.range.last.0,
                records = loss.range.count(),
                reason = %loss.reason,
                "the disk lost records of the buffer; sinks that had not passed them count them as lost"
            );
        }
        index.losses.extend(news);
        self.show_losses(&index);
        let saved = disk::write_json(&self.folder.join("losses"), &index.losses);
        drop(index);
        if let Err(error) = saved {
            self.fail(&error);
        }
    }

    pub(super) fn show_lost_letters(&self, list: &[LostLetters]) {
        let counts = lost_letters::counts(list);
        self.board.update_buffer(|status| status.dead_letters_lost = counts);
    }

    pub(super) fn show_losses(&self, index: &Index) {
        let mut lost: BTreeMap<String, u64> = BTreeMap::new();
        for loss in &index.losses {
            *lost.entry(loss.stream.to_string()).or_default() += loss.range.count();
        }
        self.board.update_buffer(|status| {
            status.lost = lost;
            status.quarantined = index.quarantined;
        });
    }

    /// Sets a sealed generation aside that cannot be read; what it held is lost, its neighbours go on.
    pub(super) fn quarantine(&self, number: u64, error: &BufferError) {
        let mut index = lock(&self.index);
        let Some(entry) = index.generations.remove(&number) else { return };
        index.quarantined += 1;
        drop(index);
        self.handles().forget(number);
        if let Err(error) = set_aside(&entry.folder, &self.quarantine_folder(), error) {
            return self.fail(&error);
        }
        let loss = |(stream, range)| Loss {
            stream,
            range,
            noticed: Arrival::now(),
            reason: format!("generation {number} was unreadable"),
        };
        self.lose(entry.contents.ranges.into_iter().map(loss).collect());
    }

    /// Finds out what a sealed generation has lost, as a whole, and reports it.
    pub(super) fn examine(&self, number: u64, frames: &Frames) -> Result<(), BufferError> {
        let mut index = lock(&self.index);
        let Some(entry) = index.generations.get_mut(&number) else { return Ok(()) };
        let known = entry.contents.clone();
        let folder = entry.folder.clone();
        drop(index);
        let first = |(stream, range): (&StreamName, &SequenceRange)| (stream.clone(), range.first);
        let begin = Contents { next: known.ranges.iter().map(first).collect(), ..known.clone() };
        let found = generation::verify(frames, Some(&begin))?;
        let mut holes = Vec::new();
        for (stream, range) in &known.ranges {
            let mut found = found.clone();
            found.cut(stream, range.last.next());
            let before = Sequence(range.first.0 - 1);
            let gaps = gaps(stream, before, &[&found], range.last.next());
            holes.extend(gaps.into_iter().map(|hole| (stream.clone(), hole)));
        }
        let records: u64 = known.ranges.values().map(|range| range.count()).sum();
        let lost: u64 = holes.iter().map(|(_, hole)| hole.count()).sum();
        let contents = Contents { holes, harmed: true, ..known };
        // First: a drive that is gone as a whole has lost nothing that is known, and does not take this.
        generation::write_sidecar(&folder, &contents)?;
        tracing::error!(
            event = "generation_harmed",
            runbook = Runbook::DataLost.page(),
            generation = number,
            folder = %folder.display(),
            readable = records - lost,
            lost,
            "the disk lost a part of a generation; everything else in it is delivered, then it is set aside"
        );
        let loss = |(stream, range): &(StreamName, SequenceRange)| Loss {
            stream: stream.clone(),
            range: *range,
            noticed: Arrival::now(),
            reason: format!("not in generation {number}, or damaged there"),
        };
        let lost = contents.holes.iter().map(loss).collect();
        if let Some(entry) = lock(&self.index).generations.get_mut(&number) {
            entry.contents = contents;
        }
        self.lose(lost);
        Ok(())
    }
}

fn covers(known: &Loss, loss: &Loss) -> bool {
    known.stream == loss.stream
        && known.range.first <= loss.range.first
        && known.range.last >= loss.range.last
}

/// Moves an unreadable folder to the quarantine, under a name that tells when.
pub(super) fn set_aside(
    folder: &std::path::Path,
    quarantine: &std::path::Path,
    why: &BufferError,
) -> Result<(), BufferError> {
    disk::make_folder(quarantine)?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let aside = quarantine.join(format!("{name}-{}", Arrival::now().as_micros()));
    tracing::error!(
        event = "buffer_quarantined",
        runbook = Runbook::DataLost.page(),
        folder = %folder.display(),
        moved_to = %aside.display(),
        error = %why,
        "a database of the buffer is unreadable and was set aside; keep it for a repair or remove it"
    );
    disk::rename(folder, &aside)
}

/// The gaps of a stream's numbering across the generations, from what was dropped to what comes next.
pub(super) fn gaps(
    stream: &StreamName,
    dropped: Sequence,
    contents: &[&Contents],
    next: Sequence,
) -> Vec<SequenceRange> {
    let mut gaps = Vec::new();
    let mut expected = dropped.next();
    for held in contents {
        let holes = held.holes.iter().filter(|(name, _)| name == stream).map(|(_, hole)| *hole);
        gaps.extend(holes.filter(|hole| hole.last >= expected));
        let Some(range) = held.ranges.get(stream) else { continue };
        let known =
            gaps.last().map_or(expected, |gap: &SequenceRange| expected.max(gap.last.next()));
        if range.first > known {
            gaps.push(SequenceRange { first: known, last: Sequence(range.first.0 - 1) });
        }
        expected = range.last.next();
    }
    if next > expected {
        gaps.push(SequenceRange { first: expected, last: Sequence(next.0 - 1) });
    }
    gaps
}

/// Wakes one thread that waits for news.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    pub(super) fn ring(&self) {
        *lock(&self.rung) = true;
        self.heard.notify_all();
    }

    /// Returns at a ring, also one before the call, or after `limit`.
    pub(super) fn wait(&self, limit: Duration) {
        let rung = lock(&self.rung);
        let waited = self.heard.wait_timeout_while(rung, limit, |rung| !*rung);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}
