//! Opening: what is on the disk becomes an index, what cannot be read is set aside, what is missing is written down.
//! There is no other way in: a start after a crash and a start after a stop are the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::generation::{self, Contents};
use super::log::{Entry, Loss, Marks, gaps, set_aside};
use super::state_store::StateStore;
use super::store::Store;
use super::{BufferError, disk, misplaced, sync_shim};
use crate::config::BufferSettings;
use crate::domain::{Arrival, LogIdentity, Runbook, Sequence, StreamName};

const FORMAT: u32 = 1;

/// How often something is read before it is called unreadable.
const READS_MAX: u32 = 3;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct IdentityFile {
    pub format: u32,
    pub identity: LogIdentity,
    pub created: Arrival,
}

/// The lock of the state directory; free again when it is dropped.
pub(super) fn take_lock(state_dir: &Path) -> Result<File, BufferError> {
    let path = state_dir.join("lock");
    let file = File::create(&path).map_err(|error| BufferError::io("make", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(BufferError::Locked { path }),
        Err(std::fs::TryLockError::Error(error)) => Err(BufferError::io("lock", &path, error)),
    }
}

/// The identity of the log, made with it.
pub(super) fn identity(buffer: &Path) -> Result<LogIdentity, BufferError> {
    let path = buffer.join("identity");
    match disk::read_json::<IdentityFile>(&path) {
        Ok(Some(file)) if file.format == FORMAT => return Ok(file.identity),
        Ok(Some(file)) => {
            let reason = format!("format {} is not known to this program", file.format);
            return Err(BufferError::corrupt(&path, reason));
        }
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
        match Store::open(&folder).and_then(|store| generation::read_header(&store)) {
            Ok(header) => return Ok(Some(header.identity)),
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

/// Opens the state database; one that cannot be read is set aside, and the node goes on with a fresh one.
pub(super) fn state(
    state_dir: &Path,
    quarantine: &Path,
    settings: &BufferSettings,
) -> Result<StateStore, BufferError> {
    let folder = state_dir.join("state");
    let open = || {
        let fresh = !folder.exists();
        if fresh && !generation::list(&state_dir.join("buffer"))?.is_empty() {
            tracing::error!(
                event = "state_missing",
                runbook = Runbook::DataLost.page(),
                folder = %folder.display(),
                "the database of books, dead letters and Kafka cursors is gone, though the log is there: a fresh one \
                 is made; its dead letters are lost, and Kafka is sent again what the log holds"
            );
        }
        let store = Store::open(&folder)?;
        if fresh {
            store.sync_creation()?;
        }
        StateStore::new(store, settings.dead_letter_quota_bytes)
    };
    match patiently(open) {
        Err(error) if error.is_damage() => {
            set_aside(&folder, quarantine, &error)?;
            open()
        }
        opened => opened,
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

/// Refuses to start with a binary whose syncs do not reach the disk.
pub(super) fn check_shim(state: &StateStore) -> Result<(), BufferError> {
    let before = sync_shim::calls();
    state.count_start()?;
    state.store.flush()?;
    if sync_shim::calls() > before { Ok(()) } else { Err(BufferError::ShimNotLive) }
}

/// A generation as it was found.
struct Known {
    number: u64,
    folder: PathBuf,
    contents: Contents,
    /// Open when it may be written on.
    store: Option<Store>,
}

impl Known {
    fn in_place(&self) -> bool {
        [0, self.number].contains(&self.contents.number)
    }
}

/// What the log consists of.
pub(super) struct Recovered {
    pub entries: BTreeMap<u64, Entry>,
    /// The generation to go on in.
    pub number: u64,
    pub store: Store,
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
        let marks: Option<Marks> = match disk::read_json(&marks_path) {
            Err(error) if error.is_damage() => {
                tracing::error!(event = "marks_damaged", error = %error);
                None
            }
            read => read?,
        };
        let (known, set_aside) = self.generations()?;
        let whole = marks.is_some() || known.last().is_some_and(|last| last.store.is_some());
        if !whole && (set_aside > 0 || !known.is_empty()) {
            let reason = "neither it nor the newest generation tells where the numbers go on";
            return Err(BufferError::corrupt(&marks_path, reason));
        }
        self.assemble(known, marks.unwrap_or_default(), set_aside)
    }

    /// All readable generations, oldest first, and how many were set aside. The newest is verified block by block.
    fn generations(&self) -> Result<(Vec<Known>, u64), BufferError> {
        misplaced::finish(self.buffer, self.quarantine)?;
        let (known, unreadable) = self.load()?;
        if known.iter().all(Known::in_place) {
            return Ok((known, unreadable));
        }
        drop(known);
        misplaced::sort_out(self.buffer, self.quarantine)?;
        let (known, further) = self.load()?;
        Ok((known, unreadable + further))
    }

    fn load(&self) -> Result<(Vec<Known>, u64), BufferError> {
        let list = generation::list(self.buffer)?;
        let newest = list.last().map(|(number, _)| *number);
        let (mut known, mut unreadable) = (Vec::new(), 0);
        for (number, folder) in list {
            match patiently(|| load(number, &folder, newest == Some(number))) {
                Ok(found) => known.push(found),
                Err(error) if error.is_damage() => {
                    set_aside(&folder, self.quarantine, &error)?;
                    unreadable += 1;
                }
                Err(error) => return Err(error),
            }
            (self.on_read)(known.len() as u64 + unreadable);
            fail::fail_point!("recovery_generation");
        }
        Ok((known, unreadable))
    }

    fn assemble(
        self,
        mut known: Vec<Known>,
        mut marks: Marks,
        set_aside: u64,
    ) -> Result<Recovered, BufferError> {
        let written = known.last().is_some_and(|last| last.store.is_some());
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
            next.insert(stream.clone(), at);
        }
        let newest = known
            .last_mut()
            .and_then(|last| Some((last.number, last.store.take()?, last.contents.clone())));
        let (number, store, mut contents) = match newest {
            Some(newest) => newest,
            None => self.fresh(&mut known, next.clone(), set_aside)?,
        };
        contents.next = next;
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
    ) -> Result<(u64, Store, Contents), BufferError> {
        let number = known.last().map_or(0, |last| last.number) + set_aside + 1;
        let header = generation::header(self.identity, number, next);
        let store = generation::create(self.buffer, &header)?;
        let contents = Contents { number, next: header.next, ..Contents::default() };
        let folder = store.folder().to_owned();
        known.push(Known { number, folder, contents: contents.clone(), store: None });
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
    (known.number, Entry { folder: known.folder, bytes, ranges: known.contents.ranges })
}

/// A drive may fail to read and do it at the next attempt: only what stays unreadable is set aside.
fn patiently<T>(mut read: impl FnMut() -> Result<T, BufferError>) -> Result<T, BufferError> {
    for _ in 1..READS_MAX {
        match read() {
            Err(error) if error.is_damage() => {
                tracing::warn!(event = "read_failed", error = %error, "once more");
            }
            outcome => return outcome,
        }
    }
    read()
}

fn load(number: u64, folder: &Path, newest: bool) -> Result<Known, BufferError> {
    if let Some(contents) = generation::read_sidecar(folder) {
        return Ok(Known { number, folder: folder.to_owned(), contents, store: None });
    }
    let store = Store::open(folder)?;
    let contents = generation::verify(&store)?;
    if contents.number != number {
        return Ok(Known { number, folder: folder.to_owned(), contents, store: None });
    }
    if newest {
        generation::trim(&store, &contents)?;
        return Ok(Known { number, folder: folder.to_owned(), contents, store: Some(store) });
    }
    drop(store);
    generation::write_sidecar(folder, &contents)?;
    Ok(Known { number, folder: folder.to_owned(), contents, store: None })
}
