//! What the state database does: books, dead letters with their counts and copies, notes. How each of them stands in it:
//! `state_value.rs`. Everything one call changes is one sled batch, so a crash cannot leave a letter without its count.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;

use super::frame::{Frame, Owner};
use super::generation::FORMAT;
use super::held::{Held, Search, Whole};
use super::letter_journal::LetterJournal;
use super::state_value::{
    BOOKS, COPY, COUNT, Count, Counts, LETTER, META, NOTE, Names, PART_MAX, Part, REPLAYED, START,
    copy_key, decode_count, decode_letter, encode_letter, join, letter_key, split_letter_key,
    split_names,
};
use super::store::Store;
use super::{BufferError, state_value, threads};
use crate::domain::{Books, DeadLetter, DeadLetterKey, SinkName, StreamName};

/// Versions of one run of a process; the next one's are all higher.
const VERSIONS_PER_START: u32 = 32;

/// The state database, as its thread sees it.
#[derive(Debug)]
pub(super) struct StateStore {
    store: Store,
    owner: Owner,
    /// Of the next change.
    version: u64,
    /// The highest version that is on stable storage.
    synced: u64,
    pub dead_letter_quota_bytes: u64,
    /// All sinks together.
    pub dead_letter_bytes: u64,
    /// The last batch of letters found no room, and none was made since.
    full: bool,
    /// Letters of the sinks whose number is to be shown: it changed, or was asked for.
    pub counted: BTreeMap<Names, u64>,
    /// Kafka clusters that want a copy of each letter, with how many letters wait for it.
    pub copies_waiting: BTreeMap<String, u64>,
    /// Not of a database on its way to another's place.
    journal: Option<LetterJournal>,
}

/// Shares of the quota, in percent, that are worth a warning.
const LEVELS: [u64; 3] = [70, 90, 100];
/// A million copies in one batch took half a minute, in which their thread shows no sign of life.
const FORGOTTEN_AT_ONCE: usize = 1000;

impl StateStore {
    /// Makes an empty one; [`StateStore::flush`] is the caller's.
    pub(super) fn create(store: Store, dead_letter_quota_bytes: u64) -> Result<Self, BufferError> {
        let owner = Owner::of_state(rand::random());
        let state = Self::with(store, owner, 0, dead_letter_quota_bytes);
        state.insert(META, &FORMAT.to_be_bytes())?;
        Ok(state)
    }

    pub(super) fn open(store: Store, dead_letter_quota_bytes: u64) -> Result<Self, BufferError> {
        let Some(framed) = store.get(META)? else { return Err(without_format(&store)?) };
        let bad = || BufferError::corrupt(store.folder(), "its format does not stand in it");
        let format = Part::read(META, &framed).and_then(|part| part.bytes.try_into().ok());
        let owner = Frame::read(&framed).map(|frame| frame.owner);
        let (Some(format), Some(owner)) = (format.map(u32::from_be_bytes), owner) else {
            return Err(bad());
        };
        if format != FORMAT {
            return Err(BufferError::Format { path: store.folder().to_owned(), format });
        }
        let mut state = Self::with(store, owner, 0, dead_letter_quota_bytes);
        state.version = (state.starts()? + 1) << VERSIONS_PER_START;
        state.dead_letter_bytes = state.counts()?.iter().map(|(.., count)| count.bytes).sum();
        Ok(state)
    }

    fn with(store: Store, owner: Owner, version: u64, dead_letter_quota_bytes: u64) -> Self {
        StateStore {
            store,
            owner,
            version,
            synced: version,
            dead_letter_quota_bytes,
            dead_letter_bytes: 0,
            full: false,
            counted: BTreeMap::new(),
            copies_waiting: BTreeMap::new(),
            journal: None,
        }
    }

    /// From now on `buffer` has which letters there are, whatever becomes of the database.
    pub(super) fn keep_journal(&mut self, buffer: &Path, held: &Held) -> Result<(), BufferError> {
        self.journal = Some(LetterJournal::begin(buffer, self.newest(), held)?);
        Ok(())
    }

    /// As [`Store::flush`].
    pub(super) fn flush(&mut self) -> Result<(), BufferError> {
        self.journal.as_mut().map_or(Ok(()), LetterJournal::before_sync)?;
        self.store.flush()?;
        self.synced = self.version;
        self.version += 1;
        let Some(journal) = &mut self.journal else { return Ok(()) };
        journal.after_sync(self.synced)?;
        if journal.is_long() { self.renew_journal() } else { Ok(()) }
    }

    fn renew_journal(&mut self) -> Result<(), BufferError> {
        let held = self.held()?;
        let synced = self.synced;
        self.journal.as_mut().map_or(Ok(()), |journal| journal.renew(synced, held))
    }

    /// The last that is written: it tells that all before it is on stable storage.
    pub(super) fn close(&mut self) -> Result<(), BufferError> {
        let starts = self.starts()?;
        self.flush()?;
        self.insert(START, &starts.to_be_bytes())?;
        self.flush()?;
        self.journal.as_ref().map_or(Ok(()), LetterJournal::sync)
    }

    pub(super) fn framed(&self, key: &[u8], length: usize, bytes: &[u8]) -> Vec<u8> {
        state_value::framed(self.owner, key, [self.version, self.synced], length, bytes)
    }

    /// A value that is never longer than a part.
    pub(super) fn insert(&self, key: &[u8], value: &[u8]) -> Result<(), BufferError> {
        self.store.insert(key, &self.framed(key, value.len(), value))
    }

    fn add(&self, batch: &mut sled::Batch, key: Vec<u8>, value: &[u8]) {
        let framed = self.framed(&key, value.len(), value);
        batch.insert(key, framed);
    }

    fn part(&self, key: &[u8], framed: &[u8]) -> Result<Part, BufferError> {
        Part::read(key, framed).ok_or_else(|| self.bad("a value in it is not whole"))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Part>, BufferError> {
        self.store.get(key)?.map(|framed| self.part(key, &framed)).transpose()
    }

    fn number(&self, key: &[u8]) -> Result<u64, BufferError> {
        let value = self.get(key)?.and_then(|part| part.bytes.try_into().ok());
        Ok(value.map_or(0, u64::from_be_bytes))
    }

    fn starts(&self) -> Result<u64, BufferError> {
        self.number(START)
    }

    /// Visits the values whose keys begin with `prefix`, in order; `Err` where one is not whole.
    fn scan(
        &self,
        prefix: &[u8],
        mut visit: impl FnMut(&[u8], Part) -> ControlFlow<()>,
    ) -> Result<(), BufferError> {
        self.scan_from(prefix, prefix, &mut visit)
    }

    fn scan_from(
        &self,
        prefix: &[u8],
        from: &[u8],
        visit: &mut dyn FnMut(&[u8], Part) -> ControlFlow<()>,
    ) -> Result<(), BufferError> {
        let mut broken = None;
        self.store.scan(from, |key, framed| {
            if !key.starts_with(prefix) {
                return ControlFlow::Break(());
            }
            match self.part(key, framed) {
                Ok(part) => visit(key, part),
                Err(error) => {
                    broken = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        broken.map_or(Ok(()), Err)
    }

    /// The highest of [`LEVELS`] that is reached, else 0. A letter that found no room makes it full, whatever is free.
    pub(super) fn level(&self) -> u64 {
        let percent =
            self.dead_letter_bytes.saturating_mul(100) / self.dead_letter_quota_bytes.max(1);
        let percent = if self.full { 100 } else { percent };
        LEVELS.into_iter().filter(|level| percent >= *level).max().unwrap_or(0)
    }

    fn bad(&self, what: impl ToString) -> BufferError {
        BufferError::corrupt(self.store.folder(), what)
    }

    /// Changes a value and returns it: an unchanged one would not make sled write. It tells that all before is on stable
    /// storage, and what an earlier run left of a batch that sled knows nothing of is not: so the counts are made newer first.
    pub(super) fn count_start(&mut self) -> Result<u64, BufferError> {
        let starts = self.version >> VERSIONS_PER_START;
        for (sink, stream, count) in self.counts()? {
            self.insert(&join(COUNT, &[sink.as_str(), stream.as_str()]), &count.encode())?;
        }
        self.journal.iter_mut().for_each(LetterJournal::note_counts);
        self.flush()?;
        self.insert(START, &starts.to_be_bytes())?;
        self.version += 1;
        Ok(starts)
    }

    /// As they were saved: without what [`StateStore::replayed`] counts.
    pub(super) fn books(
        &self,
        stream: &StreamName,
        sink: &SinkName,
    ) -> Result<Option<Books>, BufferError> {
        let value = self.get(&join(BOOKS, &[stream.as_str(), sink.as_str()]))?;
        value
            .map(|part| serde_json::from_slice(&part.bytes).map_err(|error| self.bad(error)))
            .transpose()
    }

    pub(super) fn save_books(
        &mut self,
        stream: &StreamName,
        sink: &SinkName,
        books: &Books,
    ) -> Result<(), BufferError> {
        let value = serde_json::to_vec(books).map_err(|error| self.bad(error))?;
        self.insert(&join(BOOKS, &[stream.as_str(), sink.as_str()]), &value)?;
        self.version += 1;
        Ok(())
    }

    /// The books of every sink, replays entered.
    pub(super) fn all_books(&self) -> Result<Vec<(StreamName, SinkName, Books)>, BufferError> {
        let mut all = Vec::new();
        self.scan(BOOKS, |key, part| {
            let names = &key[BOOKS.len()..];
            let names = std::str::from_utf8(names).unwrap_or_default().trim_end_matches('\0');
            let named = names.split_once('\0').and_then(|(stream, sink)| {
                Some((StreamName::parse(stream).ok()?, SinkName::parse(sink).ok()?))
            });
            if let (Some((stream, sink)), Ok(books)) = (named, serde_json::from_slice(&part.bytes))
            {
                all.push((stream, sink, books));
            }
            ControlFlow::Continue(())
        })?;
        for (stream, sink, books) in &mut all {
            *books = Books::with_replayed(*books, self.replayed(stream, sink)?);
        }
        Ok(all)
    }

    pub(super) fn counts(&self) -> Result<Vec<(SinkName, StreamName, Count)>, BufferError> {
        let mut all = Vec::new();
        self.scan(COUNT, |key, part| {
            let names = split_names(&key[COUNT.len()..]);
            if let (Some((sink, stream)), Some(count)) = (names, decode_count(&part.bytes)) {
                all.push((sink, stream, count));
            }
            ControlFlow::Continue(())
        })?;
        Ok(all)
    }

    pub(super) fn count(&self, sink: &SinkName, stream: &StreamName) -> Result<Count, BufferError> {
        let part = self.get(&join(COUNT, &[sink.as_str(), stream.as_str()]))?;
        Ok(part.and_then(|part| decode_count(&part.bytes)).unwrap_or_default())
    }

    /// The letters of each sink, with the version in which that changed last.
    pub(super) fn versioned_counts(&self) -> Result<Counts, BufferError> {
        let mut all = Counts::new();
        self.scan(COUNT, |key, part| {
            let names = split_names(&key[COUNT.len()..]);
            if let (Some(names), Some(count)) = (names, decode_count(&part.bytes)) {
                all.insert(names, (part.version, count.letters));
            }
            ControlFlow::Continue(())
        })?;
        Ok(all)
    }

    /// The version of a letter that is there, whole.
    pub(super) fn letter_version(&self, key: &DeadLetterKey) -> Result<Option<u64>, BufferError> {
        let mut whole = Whole::default();
        let key = letter_key(key);
        self.scan(&key, |found, part| {
            whole.add(found, &part);
            ControlFlow::Continue(())
        })?;
        Ok(whole.version.filter(|_| whole.is_whole()))
    }

    /// The next versions are all higher than this one, whatever the number of starts says, which may have been lost.
    pub(super) fn go_on_after(&mut self, version: u64) {
        let starts = version >> VERSIONS_PER_START;
        self.version = self.version.max((starts + 1) << VERSIONS_PER_START);
    }

    /// All that was changed has this version or a lower one.
    pub(super) fn newest(&self) -> u64 {
        self.version - 1
    }

    /// Of a value that is never longer than a part.
    pub(super) fn version_of(&self, key: &[u8]) -> Result<Option<u64>, BufferError> {
        Ok(self.get(key)?.map(|part| part.version))
    }

    /// The letters that are there whole, whatever their counts say, and the keys of those that are not.
    pub(super) fn held(&self) -> Result<Held, BufferError> {
        let mut search = Search::default();
        self.scan(LETTER, |key, part| {
            search.add(key, &part);
            ControlFlow::Continue(())
        })?;
        Ok(search.done())
    }

    /// Makes the counts what is there, and removes what is no whole letter. Answers which letters there are.
    pub(super) fn recount(&mut self) -> Result<Held, BufferError> {
        let mut held = self.held()?;
        let known = self.counts()?.into_iter().map(|(sink, stream, _)| (sink, stream));
        let names: BTreeSet<_> = known.chain(held.counts.keys().cloned()).collect();
        let mut batch = sled::Batch::default();
        held.torn.drain(..).for_each(|key| batch.remove(key));
        for (sink, stream) in names {
            let count = held.count(&(sink.clone(), stream.clone()));
            self.add(&mut batch, join(COUNT, &[sink.as_str(), stream.as_str()]), &count.encode());
        }
        self.store.apply(batch)?;
        self.version += 1;
        self.dead_letter_bytes = held.counts.values().map(|count| count.bytes).sum();
        Ok(held)
    }

    /// Reads all there is: sled reads a page when it is asked for it, and damage shows then.
    pub(super) fn read_through(&self) -> Result<(), BufferError> {
        self.scan(&[], |_, _| ControlFlow::Continue(()))
    }

    /// Everything, as it stands.
    pub(super) fn copy_to(&self, other: &Store) -> Result<(), BufferError> {
        let mut failed = Ok(());
        self.store.scan(&[], |key, framed| match other.insert(key, framed) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Err(error);
                ControlFlow::Break(())
            }
        })?;
        failed
    }

    /// Keys and bytes of the parts that are stored below a key.
    fn parts(&self, key: &[u8]) -> Result<(Vec<Vec<u8>>, Vec<u8>), BufferError> {
        let (mut keys, mut bytes) = (Vec::new(), Vec::new());
        self.scan(key, |found, part| {
            if found.len() == key.len() + 2 {
                keys.push(found.to_vec());
                bytes.extend_from_slice(&part.bytes);
            }
            ControlFlow::Continue(())
        })?;
        Ok((keys, bytes))
    }

    /// Replaces the parts below a key; `None` removes them. Returns the bytes that were there.
    fn replace(
        &self,
        batch: &mut sled::Batch,
        key: &[u8],
        value: Option<&[u8]>,
    ) -> Result<usize, BufferError> {
        let (old, bytes) = self.parts(key)?;
        for key in &old {
            batch.remove(key.as_slice());
        }
        // An empty value is one empty part: it is there.
        let parts = value.map(|value| value.len().div_ceil(PART_MAX).max(1)).unwrap_or(0);
        for part in 0..parts {
            let value = value.unwrap_or_default();
            let end = ((part + 1) * PART_MAX).min(value.len());
            let number = u16::try_from(part).map_err(|_| self.bad("a value of over 320 MB"))?;
            let key = [key, number.to_be_bytes().as_slice()].concat();
            let framed = self.framed(&key, value.len(), &value[part * PART_MAX..end]);
            batch.insert(key, framed);
        }
        Ok(if old.is_empty() { usize::MAX } else { bytes.len() })
    }

    pub(super) fn put_letters(&mut self, letters: &[DeadLetter]) -> Result<(), BufferError> {
        let mut batch = sled::Batch::default();
        let mut changes = Changes::default();
        let mut fresh = Vec::new();
        // A key that comes twice in one batch: the last one counts.
        for letter in letters.iter().rev() {
            if !changes.kept.insert(letter.key.clone()) {
                continue;
            }
            let value = encode_letter(letter).map_err(|error| self.bad(error))?;
            let key = letter_key(&letter.key);
            let old = self.replace(&mut batch, &key, Some(&value))?;
            changes.add(&letter.key, 1, value.len() as i64);
            if old != usize::MAX {
                changes.add(&letter.key, -1, -(old as i64));
            } else {
                fresh.push(key);
            }
        }
        let bytes = self.dead_letter_bytes.saturating_add_signed(changes.bytes());
        if bytes > self.dead_letter_quota_bytes && changes.bytes() > 0 {
            self.full = true;
            let quota_bytes = self.dead_letter_quota_bytes;
            return Err(BufferError::DeadLettersFull { quota_bytes });
        }
        for cluster in self.copies_waiting.keys() {
            fresh.iter().for_each(|key| self.add(&mut batch, copy_key(cluster, key), &[]));
        }
        self.copies_waiting.values_mut().for_each(|waiting| *waiting += fresh.len() as u64);
        self.commit(batch, changes)
    }

    pub(super) fn remove_letters(&mut self, keys: &[DeadLetterKey]) -> Result<(), BufferError> {
        let mut batch = sled::Batch::default();
        let mut changes = Changes::default();
        for key in keys.iter().collect::<BTreeSet<_>>() {
            self.remove_letter(&mut batch, &mut changes, key)?;
        }
        self.commit(batch, changes)
    }

    /// False when it is not there (any more).
    fn remove_letter(
        &mut self,
        batch: &mut sled::Batch,
        changes: &mut Changes,
        key: &DeadLetterKey,
    ) -> Result<bool, BufferError> {
        let old = self.replace(batch, &letter_key(key), None)?;
        if old == usize::MAX {
            return Ok(false);
        }
        changes.add(key, -1, -(old as i64));
        changes.removed.insert(key.clone());
        let clusters: Vec<_> = self.copies_waiting.keys().cloned().collect();
        for cluster in clusters {
            self.remove_copy(batch, &cluster, key)?;
        }
        Ok(true)
    }

    /// The letter was delivered after all: it leaves, and is counted, in one step. False when it had left before.
    pub(super) fn remove_replayed(&mut self, key: &DeadLetterKey) -> Result<bool, BufferError> {
        let mut batch = sled::Batch::default();
        let mut changes = Changes::default();
        if !self.remove_letter(&mut batch, &mut changes, key)? {
            return Ok(false);
        }
        let replayed = self.replayed(&key.stream, &key.sink)? + 1;
        let counted = join(REPLAYED, &[key.sink.as_str(), key.stream.as_str()]);
        self.add(&mut batch, counted, &replayed.to_be_bytes());
        self.commit(batch, changes)?;
        Ok(true)
    }

    /// Letters of the sink that left through [`StateStore::remove_replayed`].
    pub(super) fn replayed(
        &self,
        stream: &StreamName,
        sink: &SinkName,
    ) -> Result<u64, BufferError> {
        self.number(&join(REPLAYED, &[sink.as_str(), stream.as_str()]))
    }

    /// From now on each new letter is to be copied to these clusters; what waits for any other is forgotten.
    pub(super) fn copy_letters_to(&mut self, clusters: &[String]) -> Result<(), BufferError> {
        let mut waiting: BTreeMap<_, _> = clusters.iter().map(|name| (name.clone(), 0)).collect();
        let mut forgotten = Vec::new();
        self.scan(COPY, |key, _| {
            let cluster = key[COPY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
            match std::str::from_utf8(cluster).ok().and_then(|name| waiting.get_mut(name)) {
                Some(count) => *count += 1,
                None => forgotten.push(key.to_vec()),
            }
            ControlFlow::Continue(())
        })?;
        for keys in forgotten.chunks(FORGOTTEN_AT_ONCE) {
            let mut batch = sled::Batch::default();
            keys.iter().for_each(|key| batch.remove(key.as_slice()));
            self.store.apply(batch)?;
            threads::beat();
        }
        self.copies_waiting = waiting;
        Ok(())
    }

    /// Letters to be copied to the cluster: at most `limit`, and no more once they have `bytes_max`.
    pub(super) fn letters_to_copy(
        &mut self,
        cluster: &str,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Vec<DeadLetter>, BufferError> {
        let prefix = copy_key(cluster, &[]);
        let mut keys = Vec::new();
        self.scan(&prefix, |key, _| {
            if keys.len() >= limit {
                return ControlFlow::Break(());
            }
            keys.push(key[prefix.len()..].to_vec());
            ControlFlow::Continue(())
        })?;
        let (mut letters, mut bytes) = (Vec::new(), 0);
        let mut orphans = sled::Batch::default();
        for key in keys.into_iter() {
            if bytes >= bytes_max {
                break;
            }
            match decode_letter(&self.parts(&key)?.1) {
                Some(letter) => {
                    bytes += letter.payload.len();
                    letters.push(letter);
                }
                // Purged while the node was stopped, or not found.
                None => {
                    orphans.remove(copy_key(cluster, &key));
                    self.count_copied(cluster);
                }
            }
        }
        self.store.apply(orphans)?;
        Ok(letters)
    }

    /// The cluster has these.
    pub(super) fn copied(
        &mut self,
        cluster: &str,
        keys: &[DeadLetterKey],
    ) -> Result<(), BufferError> {
        let mut batch = sled::Batch::default();
        for key in keys {
            self.remove_copy(&mut batch, cluster, key)?;
        }
        self.store.apply(batch)
    }

    fn remove_copy(
        &mut self,
        batch: &mut sled::Batch,
        cluster: &str,
        key: &DeadLetterKey,
    ) -> Result<(), BufferError> {
        let key = copy_key(cluster, &letter_key(key));
        if self.store.get(&key)?.is_some() {
            batch.remove(key);
            self.count_copied(cluster);
        }
        Ok(())
    }

    fn count_copied(&mut self, cluster: &str) {
        if let Some(waiting) = self.copies_waiting.get_mut(cluster) {
            *waiting = waiting.saturating_sub(1);
        }
    }

    fn commit(&mut self, mut batch: sled::Batch, changes: Changes) -> Result<(), BufferError> {
        let total = changes.bytes();
        let mut counted = BTreeMap::new();
        for ((sink, stream), (letters, bytes)) in changes.counts {
            let mut count = self.count(&sink, &stream)?;
            count.letters = count.letters.saturating_add_signed(letters);
            count.bytes = count.bytes.saturating_add_signed(bytes);
            self.add(&mut batch, join(COUNT, &[sink.as_str(), stream.as_str()]), &count.encode());
            counted.insert((sink, stream), count.letters);
        }
        if let Some(journal) = &mut self.journal {
            journal.remove(self.version, changes.removed.iter())?;
            journal.keep(self.version, changes.kept.iter());
        }
        self.store.apply(batch)?;
        self.version += 1;
        self.counted.append(&mut counted);
        self.full &= total >= 0;
        self.dead_letter_bytes = self.dead_letter_bytes.saturating_add_signed(total);
        Ok(())
    }

    pub(super) fn letter(&self, key: &DeadLetterKey) -> Result<Option<DeadLetter>, BufferError> {
        Ok(decode_letter(&self.parts(&letter_key(key))?.1))
    }

    /// Letters in the order of their keys, those that `wanted` takes: at most `limit`, and no more once their payloads
    /// have `bytes_max` together.
    pub(super) fn letters(
        &self,
        after: Option<&DeadLetterKey>,
        limit: usize,
        bytes_max: usize,
        wanted: impl Fn(&DeadLetter) -> bool,
    ) -> Result<Vec<DeadLetter>, BufferError> {
        let from = after.map_or(LETTER.to_vec(), |key| {
            let beyond = DeadLetterKey { sequence: key.sequence.next(), ..key.clone() };
            letter_key(&beyond)
        });
        let (mut found, mut bytes) = (Vec::new(), 0);
        let mut value: Vec<u8> = Vec::new();
        let mut take = |value: &mut Vec<u8>| {
            let letter = decode_letter(&std::mem::take(value)).filter(&wanted);
            bytes += letter.as_ref().map_or(0, |letter| letter.payload.len());
            found.extend(letter);
            found.len() < limit && bytes < bytes_max
        };
        let mut more = limit > 0;
        self.scan_from(LETTER, &from, &mut |key, part| {
            let Some((_, number)) = split_letter_key(key) else { return ControlFlow::Break(()) };
            if number == 0 && !value.is_empty() {
                more = take(&mut value);
            }
            if !more {
                return ControlFlow::Break(());
            }
            value.extend_from_slice(&part.bytes);
            ControlFlow::Continue(())
        })?;
        if more && !value.is_empty() {
            take(&mut value);
        }
        Ok(found)
    }

    pub(super) fn put_note(&self, key: &str, value: &[u8]) -> Result<(), BufferError> {
        let mut batch = sled::Batch::default();
        self.replace(&mut batch, &join(NOTE, &[key]), Some(value))?;
        self.store.apply(batch)
    }

    pub(super) fn note(&self, key: &str) -> Result<Option<Vec<u8>>, BufferError> {
        let (keys, bytes) = self.parts(&join(NOTE, &[key]))?;
        Ok((!keys.is_empty()).then_some(bytes))
    }
}

/// What a database without its format is: of a version that framed no letters, or with nothing left in it.
fn without_format(store: &Store) -> Result<BufferError, BufferError> {
    const UNFRAMED: u32 = 2;
    let mut framed = None;
    store.scan(&[], |_, value| {
        framed = Some(Frame::read(value).is_some());
        ControlFlow::Break(())
    })?;
    let path = store.folder();
    Ok(match framed {
        Some(false) => BufferError::Format { path: path.to_owned(), format: UNFRAMED },
        Some(true) => BufferError::corrupt(path, "its format is missing"),
        None => BufferError::corrupt(path, "nothing is in it"),
    })
}

/// What a batch does to the letters.
#[derive(Default)]
struct Changes {
    /// Letters and bytes.
    counts: BTreeMap<Names, (i64, i64)>,
    kept: BTreeSet<DeadLetterKey>,
    removed: BTreeSet<DeadLetterKey>,
}

impl Changes {
    fn add(&mut self, key: &DeadLetterKey, letters: i64, bytes: i64) {
        let change = self.counts.entry((key.sink.clone(), key.stream.clone())).or_default();
        change.0 += letters;
        change.1 += bytes;
    }

    fn bytes(&self) -> i64 {
        self.counts.values().map(|(_, bytes)| bytes).sum()
    }
}
