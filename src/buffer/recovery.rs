//! Opening: what is on the disk becomes an index, what cannot be read is set aside, what is missing is written down.
//! There is no other way in: a start after a crash and a start after a stop are the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::frames::Frames;
use super::generation::{self, Contents, FORMAT, Written};
use super::log::{Entry, Loss, Marks, gaps, set_aside};
use super::state_store::StateStore;
use super::{BufferError, disk, misplaced, shims};
use crate::crash::crash_point;
use crate::domain::{Arrival, LogIdentity, Runbook, Sequence, StreamName};

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct IdentityFile {
    pub format: u32,
    pub identity: LogIdentity,
    pub created: Arrival,
}

/// Whoever has it may be about to end, as most commands of an operator are.
const LOCK_WAIT: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The lock of the state directory; free again when it is dropped.
pub(super) fn take_lock(state_dir: &Path) -> Result<File, BufferError> {
    let path = state_dir.join("lock");
    let file = File::create(&path).map_err(|error| BufferError::io("make", &path, error))?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if began.elapsed() < LOCK_WAIT => sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => return Err(BufferError::Locked { path }),
            Err(TryLockError::Error(error)) => return Err(BufferError::io("lock", &path, error)),
        }
    }
}

/// The identity of the log, made with it.
pub(super) fn identity(buffer: &Path) -> Result<LogIdentity, BufferError> {
    let path = buffer.join("identity");
    match disk::read_json::<IdentityFile>(&path) {
        Ok(Some(file)) if file.format == FORMAT => return Ok(file.identity),
        Ok(Some(file)) => return Err(BufferError::Format { path, format: file.format }),
        Ok(None) => {}
        Err(error) if error.is_damage() => {
            tracing::error!(event = "identity_damaged", error = %error, "its generations know it too");
        }
        Err(error) => return Err(error),
    }
    let known = identity_in_generations(buffer)?;
    if let Some(identity) = known {
        tracing::warn!(event = "identity_restored", identity = %identity,
            "the file that names the log was missing or damaged; it was made again from the log");
    }
    let identity = known.unwrap_or_else(|| LogIdentity(uuid::Uuid::new_v4()));
    disk::write_json(&path, &IdentityFile { format: FORMAT, identity, created: Arrival::now() })?;
    Ok(identity)
}

/// Every generation carries it; the first that can be read tells.
fn identity_in_generations(buffer: &Path) -> Result<Option<LogIdentity>, BufferError> {
    for (_, folder) in generation::list(buffer)? {
        match Frames::open(&folder) {
            Ok(frames) => {
                if let Some(header) = frames.header() {
                    return Ok(Some(header.identity));
                }
            }
            Err(error) if error.is_damage() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// What the disk lost so far. A damaged list is set aside: what it told was in the journal too.
fn losses(buffer: &Path, quarantine: &Path) -> Result<Vec<Loss>, BufferError> {
    let path = buffer.join("losses");
    match disk::read_json(&path) {
        Err(error) if error.is_damage() => {
            set_aside(&path, quarantine, &error)?;
            Ok(Vec::new())
        }
        read => Ok(read?.unwrap_or_default()),
    }
}

/// Says so when the log was lost as a whole: nobody can count what was in it.
pub(super) fn check_log(state: &StateStore, identity: LogIdentity) -> Result<(), BufferError> {
    const LOG: &str = "buffer/log";
    let now = identity.to_string();
    match state.note(LOG)? {
        Some(before) if before == now.as_bytes() => return Ok(()),
        Some(before) => tracing::error!(
            event = "log_replaced",
            runbook = Runbook::DataLost.page(),
            before = %String::from_utf8_lossy(&before),
            now,
            "the log this node wrote before is gone: what no sink had taken from it is lost, and cannot be counted"
        ),
        None => {}
    }
    state.put_note(LOG, now.as_bytes())
}

/// Refuses to start with a binary whose syncs do not reach the disk, or in which sled makes light of its failures.
pub(super) fn check_shims(state: &mut StateStore) -> Result<(), BufferError> {
    state.count_start()?;
    state.flush()?;
    match shims::not_live() {
        Some(function) => Err(BufferError::ShimNotLive { function }),
        None => Ok(()),
    }
}

/// A generation as it was found.
struct Known {
    number: u64,
    folder: PathBuf,
    contents: Contents,
    /// A small file beside it says what it holds. Where there is none, it has been read; the newest such is the one that
    /// was written last.
    sealed: bool,
}

impl Known {
    fn in_place(&self) -> bool {
        self.number == self.contents.number
    }

    fn is_of_no_use(&self) -> bool {
        self.contents.ranges.is_empty() && !self.contents.harmed
    }
}

/// What the log consists of.
pub(super) struct Recovered {
    pub entries: BTreeMap<u64, Entry>,
    /// The generation to go on in; each start makes one.
    pub number: u64,
    pub store: Written,
    pub contents: Contents,
    /// Found at this start.
    pub losses: Vec<Loss>,
    /// Found before.
    pub noted: Vec<Loss>,
    pub marks: Marks,
    pub streams: BTreeSet<StreamName>,
}

/// What recovery goes by.
pub(super) struct Recovery<'a> {
    pub buffer: &'a Path,
    pub quarantine: &'a Path,
    pub identity: LogIdentity,
    pub configured: &'a [StreamName],
    /// How far the saved books of any sink are, by stream: those numbers were given out.
    pub delivered: BTreeMap<StreamName, Sequence>,
    /// How far each stream was durable at least, as was noted beside the generations.
    pub reached: BTreeMap<StreamName, Sequence>,
    /// Hears how many generations have been read.
    pub on_read: &'a dyn Fn(u64),
}

impl Recovery<'_> {
    pub(super) fn run(self) -> Result<Recovered, BufferError> {
        let marks_path = self.buffer.join("marks");
        let mut marks: Option<Marks> = match disk::read_json(&marks_path) {
            Err(error) if error.is_damage() => {
                tracing::error!(event = "marks_damaged", error = %error);
                None
            }
            read => read?,
        };
        // Before the first generation: one that the end of this start leaves unfinished is known by that.
        if marks.is_none() && generation::list(self.buffer)?.is_empty() {
            marks = Some(Marks::default());
            disk::write_json(&marks_path, &marks)?;
        }
        let given_out = marks.as_ref().is_none_or(|marks| !marks.reserved.is_empty());
        let (known, set_aside) = self.generations(given_out)?;
        let whole = marks.is_some() || known.last().is_some_and(|last| !last.sealed);
        if !whole && (set_aside > 0 || !known.is_empty()) {
            let reason = "neither it nor the newest generation tells where the numbers go on";
            return Err(BufferError::corrupt(&marks_path, reason));
        }
        self.assemble(known, marks.unwrap_or_default(), set_aside)
    }

    /// All readable generations, oldest first, and how many were set aside. What is not sealed is verified block by block.
    /// `given_out`: a number may have been.
    fn generations(&self, given_out: bool) -> Result<(Vec<Known>, u64), BufferError> {
        misplaced::finish(self.buffer, self.quarantine)?;
        let (known, unreadable) = self.load(given_out)?;
        if known.iter().all(Known::in_place) {
            return Ok((known, unreadable));
        }
        let in_the_way = misplaced::sort_out(self.buffer, self.quarantine)?;
        let (known, further) = self.load(given_out)?;
        Ok((known, unreadable + in_the_way + further))
    }

    fn load(&self, given_out: bool) -> Result<(Vec<Known>, u64), BufferError> {
        let list = generation::list(self.buffer)?;
        let (mut known, mut unreadable) = (Vec::<Known>::new(), 0);
        for (at, (number, folder)) in list.iter().enumerate() {
            let before = known.last().map(|before| &before.contents);
            match patiently(|| self.load_one(*number, folder, before, &list[at + 1..])) {
                Ok(found) => known.push(found),
                // The one before is sealed before a record goes into the next, and no record is there without a number.
                Err(BufferError::Corrupt { .. })
                    if !given_out || known.last().is_some_and(|last| !last.sealed) =>
                {
                    tracing::info!(
                        event = "generation_unfinished",
                        folder = %folder.display(),
                        "the node ended while it made a generation; there is no record in it"
                    );
                    disk::remove_folder(folder)?;
                }
                Err(error) if error.is_damage() => {
                    set_aside(folder, self.quarantine, &error)?;
                    unreadable += 1;
                }
                Err(error) => return Err(error),
            }
            (self.on_read)(known.len() as u64 + unreadable);
            fail::fail_point!("recovery_generation");
        }
        Ok((known, unreadable))
    }

    /// `later`: the generations behind it.
    fn load_one(
        &self,
        number: u64,
        folder: &Path,
        before: Option<&Contents>,
        later: &[(u64, PathBuf)],
    ) -> Result<Known, BufferError> {
        let folder = folder.to_owned();
        if let Some(contents) = generation::read_sidecar(&folder) {
            return Ok(Known { number, folder, contents, sealed: true });
        }
        disk::bring_to_rest(&folder)?;
        let frames = Frames::open(&folder)?;
        let mut contents = generation::verify(&frames, before)?;
        let ends = later.iter().find_map(|(_, folder)| begins(folder));
        match ends {
            // What stands behind was never answered, and its numbers were given out again.
            Some(ends) => {
                for stream in contents.next.keys().cloned().collect::<Vec<_>>() {
                    contents.cut(&stream, ends.get(&stream).copied().unwrap_or(Sequence(1)));
                }
            }
            None => self.cut_torn(&mut contents),
        }
        contents.harmed = !contents.holes.is_empty();
        Ok(Known { number, folder, contents, sealed: false })
    }

    /// A group that was on its way when the node ended may be there in part. None of it was answered: where the first of
    /// its records is missing, the others do not count.
    fn cut_torn(&self, contents: &mut Contents) {
        if self.reached.is_empty() {
            return;
        }
        for (stream, hole) in contents.holes.clone() {
            let answered = self.reached.get(&stream).copied().unwrap_or_default();
            if hole.first > answered {
                contents.cut(&stream, hole.first);
            }
        }
    }

    fn assemble(
        self,
        mut known: Vec<Known>,
        mut marks: Marks,
        set_aside: u64,
    ) -> Result<Recovered, BufferError> {
        let written = known.last().is_some_and(|last| !last.sealed);
        let mut streams: BTreeSet<StreamName> = self.configured.iter().cloned().collect();
        streams.extend(known.iter().flat_map(|k| k.contents.next.keys().cloned()));
        streams.extend(marks.reserved.keys().chain(self.reached.keys()).cloned());
        let held = known.last().map(|last| last.contents.next.clone()).unwrap_or_default();
        let mut next = BTreeMap::new();
        let mut losses = Vec::new();
        for stream in &streams {
            let at = self.next(stream, &held, &marks, written);
            let dropped = match marks.dropped.get(stream) {
                Some(dropped) => *dropped,
                None if marks.reserved.is_empty() => before_first(&known, stream, at),
                None => Sequence::ZERO,
            };
            marks.dropped.insert(stream.clone(), dropped);
            let contents: Vec<&Contents> = known.iter().map(|known| &known.contents).collect();
            losses.extend(gaps(stream, dropped, &contents, at).into_iter().map(|range| Loss {
                stream: stream.clone(),
                range,
                noticed: Arrival::now(),
                reason: "missing from the log at start".to_owned(),
            }));
            if at > held.get(stream).copied().unwrap_or(Sequence(1))
                && let Some(last) = known.last_mut().filter(|last| !last.sealed)
            {
                last.contents.harmed = true;
            }
            next.insert(stream.clone(), at);
        }
        let (number, store, contents) = self.fresh(&mut known, next, set_aside)?;
        crash_point("crash_start_generation_made");
        seal(&mut known, number)?;
        marks.clean = false;
        let entries = known.into_iter().map(entry).collect();
        let noted = self::losses(self.buffer, self.quarantine)?;
        Ok(Recovered { entries, number, store, contents, losses, noted, marks, streams })
    }

    /// Where a stream's numbers go on: behind every number that may have been given out.
    fn next(
        &self,
        stream: &StreamName,
        held: &BTreeMap<StreamName, Sequence>,
        marks: &Marks,
        written: bool,
    ) -> Sequence {
        let read = held.get(stream).copied().unwrap_or(Sequence(1));
        let given_out = [self.delivered.get(stream), self.reached.get(stream)];
        let given_out = given_out.into_iter().flatten().max().map_or(Sequence(1), |at| at.next());
        // After a crash the reservation is beyond the last record; that record itself is in the newest generation.
        let trusted = marks.clean || !written;
        let reserved = marks.reserved.get(stream).filter(|_| trusted);
        read.max(given_out).max(reserved.map_or(Sequence(1), |last| last.next()))
    }

    fn fresh(
        &self,
        known: &mut Vec<Known>,
        next: BTreeMap<StreamName, Sequence>,
        set_aside: u64,
    ) -> Result<(u64, Written, Contents), BufferError> {
        let number = known.last().map_or(0, |last| last.number) + set_aside + 1;
        let header = generation::header(self.identity, number, next);
        let store = Written::create(self.buffer, &header)?;
        let contents = Contents { number, next: header.next, ..Contents::default() };
        let folder = store.folder().to_owned();
        known.push(Known { number, folder, contents: contents.clone(), sealed: false });
        Ok((number, store, contents))
    }
}

/// Without marks: what is not in the log any more was dropped.
fn before_first(known: &[Known], stream: &StreamName, next: Sequence) -> Sequence {
    let first = known.iter().find_map(|known| known.contents.ranges.get(stream)).map(|r| r.first);
    Sequence(first.unwrap_or(next).0 - 1)
}

fn entry(known: Known) -> (u64, Entry) {
    let bytes = disk::folder_bytes(&known.folder);
    (known.number, Entry { folder: known.folder, bytes, contents: known.contents })
}

/// A drive may fail to read and do it at the next attempt: only what stays unreadable is set aside.
pub(super) fn patiently<T>(
    mut read: impl FnMut() -> Result<T, BufferError>,
) -> Result<T, BufferError> {
    for _ in 1..disk::READS_MAX {
        match read() {
            Err(error) if error.is_damage() => {
                tracing::warn!(event = "read_failed", error = %error, "once more");
            }
            outcome => return outcome,
        }
    }
    read()
}

/// Where the streams were when the generation was made.
fn begins(folder: &Path) -> Option<BTreeMap<StreamName, Sequence>> {
    Frames::open(folder).ok()?.header().map(|header| header.next.clone())
}

/// What an earlier run had not sealed will never be written again. Only now: until the next generation is there, the one
/// without a small file is the one that was written last. One without records is of no use.
fn seal(known: &mut Vec<Known>, written: u64) -> Result<(), BufferError> {
    let is_left = |known: &Known| !known.sealed && known.number != written;
    for left in known.iter_mut().filter(|known| is_left(known)) {
        if left.is_of_no_use() {
            disk::remove_folder(&left.folder)?;
        } else {
            generation::write_sidecar(&left.folder, &left.contents)?;
        }
    }
    known.retain(|known| !is_left(known) || !known.is_of_no_use());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Incoming;
    use crate::buffer::block::{Block, BlockBuilder};
    use crate::domain::{DeliveryFlags, SequenceRange};

    fn stream() -> StreamName {
        StreamName::parse("a").unwrap()
    }

    fn blocks(first: u64, last: u64, payload: &'static str) -> Vec<Block> {
        let mut builder = BlockBuilder::new(Sequence(first));
        for _ in first..=last {
            builder.push(&Incoming {
                topic: "t".into(),
                payload: payload.into(),
                arrival: Arrival(1),
                flags: DeliveryFlags::default(),
                packet_id: 1,
            });
        }
        builder.finish()
    }

    fn write(store: &Written, blocks: &[Block]) {
        let prefix = generation::key_prefix(&stream());
        for block in blocks {
            store.insert(&prefix, block).unwrap();
        }
        store.flush().unwrap();
    }

    fn start(buffer: &Path, identity: LogIdentity, reached: u64) -> Recovered {
        let recovery = Recovery {
            buffer,
            quarantine: &buffer.join("quarantine"),
            identity,
            configured: &[stream()],
            delivered: BTreeMap::new(),
            reached: BTreeMap::from([(stream(), Sequence(reached))]),
            on_read: &|_| {},
        };
        recovery.run().unwrap()
    }

    fn held(recovered: &Recovered) -> Vec<SequenceRange> {
        let contents = recovered.entries.values().map(|entry| &entry.contents);
        contents.filter_map(|contents| contents.ranges.get(&stream()).copied()).collect()
    }

    /// A group was on its way, and only its end came to the disk. Its numbers are given out again.
    #[test]
    fn what_is_left_of_a_torn_group_is_no_loss_and_never_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let buffer = folder.path();
        let identity = LogIdentity(uuid::Uuid::new_v4());
        let header = generation::header(identity, 1, BTreeMap::new());
        let store = Written::create(buffer, &header).unwrap();
        write(&store, &blocks(1, 64, "old"));
        write(&store, &blocks(129, 300, "torn"));
        drop(store);
        let range = |first, last| SequenceRange { first: Sequence(first), last: Sequence(last) };
        let again = start(buffer, identity, 64);
        assert_eq!(held(&again), [range(1, 64)]);
        assert!(again.losses.is_empty(), "{:?}", again.losses);
        assert_eq!(again.contents.next[&stream()], Sequence(65));
        write(&again.store, &blocks(65, 300, "new"));
        drop(again);
        generation::remove_sidecar(&generation::folder_of(buffer, 1)).unwrap();
        let later = start(buffer, identity, 300);
        assert_eq!(held(&later), [range(1, 64), range(65, 300)]);
        assert!(later.losses.is_empty(), "{:?}", later.losses);
        assert_eq!(later.contents.next[&stream()], Sequence(301));
    }

    /// The same, but it was answered: the disk lost the middle.
    #[test]
    fn a_hole_among_what_was_answered_is_a_loss_and_what_stands_behind_it_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let identity = LogIdentity(uuid::Uuid::new_v4());
        let header = generation::header(identity, 1, BTreeMap::new());
        let store = Written::create(folder.path(), &header).unwrap();
        write(&store, &blocks(1, 64, "x"));
        write(&store, &blocks(129, 300, "x"));
        drop(store);
        let found = start(folder.path(), identity, 320);
        let range = |first, last| SequenceRange { first: Sequence(first), last: Sequence(last) };
        let lost: Vec<_> = found.losses.iter().map(|loss| loss.range).collect();
        assert_eq!(lost, [range(65, 128), range(301, 320)]);
        assert_eq!(held(&found), [range(1, 300)]);
        assert_eq!(found.contents.next[&stream()], Sequence(321));
    }

    /// A start that found no space, again and again, leaves nothing behind and sets nothing aside.
    #[test]
    fn a_generation_that_was_not_made_to_its_end_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let buffer = folder.path();
        let identity = LogIdentity(uuid::Uuid::new_v4());
        let store = start(buffer, identity, 0).store;
        write(&store, &blocks(1, 10, "x"));
        drop(store);
        let unfinished = generation::folder_of(buffer, 2);
        std::fs::create_dir(&unfinished).unwrap();
        std::fs::write(unfinished.join("db"), vec![0; 1 << 19]).unwrap();
        let found = start(buffer, identity, 10);
        assert_eq!(found.number, 2);
        assert!(found.losses.is_empty());
        assert_eq!(found.contents.next[&stream()], Sequence(11));
        assert!(!buffer.join("quarantine").exists());
    }
}
