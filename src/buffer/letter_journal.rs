//! Which dead letters there are, kept beside the state database, which cannot tell it of itself: where the end of its file
//! was cut off, sled opens what is left without a word, and one that is gone says nothing at all. So what the disk lost is
//! known by its sequences, and what was removed does not come back with the old pages that sled leaves behind.
//!
//! Each line: check sum (8 hex digits) of what follows, version (20 digits), and
//!
//! ```text
//!  =                            the file begins: what has this version or a lower one and is not named below was removed
//!  + sink stream first last     letters kept
//!  - sink stream first last     letters to be removed
//!  .                            the database has all up to this version on stable storage; also behind what it began with
//! ```
//!
//! What was kept is written after the sync of the database that made it durable, and left to the kernel to sync within half a
//! minute. What is to be removed is written here before it leaves there, and synced before that is: a letter is removed when
//! its record is where it belongs, or because somebody wants it, and may not come back. The file begins anew at each start,
//! and when it has grown long.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::fates::{Fate, Fates};
use super::state_value::Names;
use super::{BufferError, disk};
use crate::domain::{DeadLetterKey, Sequence, SequenceRange, SinkName, StreamName};

pub(super) const NAME: &str = "letters";

/// Lines that are added before the file begins anew, whatever it began with.
const ADDED_BYTES_MIN: u64 = 1 << 20;

/// By sink: the version in which the number of letters changed last, and that number.
pub(super) type Counts = BTreeMap<Names, (u64, u64)>;

/// The open file.
#[derive(Debug)]
pub(super) struct LetterJournal {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// At this length it is worth while to begin anew.
    long_bytes: u64,
    /// Lines to be written after the next sync of the database.
    kept: String,
    /// Letters were removed since the last one.
    removed: bool,
    /// There is something to write after it.
    changed: bool,
}

impl LetterJournal {
    /// Replaces the file: as of this version these are all letters.
    pub(super) fn begin<'l>(
        buffer: &Path,
        version: u64,
        letters: impl Iterator<Item = (&'l Names, SequenceRange)>,
    ) -> Result<Self, BufferError> {
        let path = buffer.join(NAME);
        let draft = path.with_extension("draft");
        let mut lines = line(version, "=");
        for ((sink, stream), SequenceRange { first, last }) in letters {
            lines += &line(version, &format!("+ {sink} {stream} {first} {last}"));
        }
        lines += &line(version, ".");
        let write = || -> io::Result<File> {
            match fs::remove_file(&draft) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = File::options().append(true).create_new(true).open(&draft)?;
            file.write_all(lines.as_bytes())?;
            file.sync_all()?;
            Ok(file)
        };
        let file = write().map_err(|error| BufferError::io("write", &draft, error))?;
        disk::rename(&draft, &path)?;
        let bytes = lines.len() as u64;
        let long_bytes = bytes.saturating_mul(2).saturating_add(ADDED_BYTES_MIN);
        Ok(LetterJournal {
            path,
            file,
            bytes,
            long_bytes,
            kept: String::new(),
            removed: false,
            changed: false,
        })
    }

    /// These are about to be removed from the database. In the order of their keys, as everywhere.
    pub(super) fn remove<'l>(
        &mut self,
        version: u64,
        letters: impl Iterator<Item = &'l DeadLetterKey>,
    ) -> Result<(), BufferError> {
        let lines = lines(version, '-', letters);
        if lines.is_empty() {
            return Ok(());
        }
        self.removed = true;
        self.changed = true;
        self.write(&lines)
    }

    /// These were put into the database, which is not synced yet.
    pub(super) fn keep<'l>(
        &mut self,
        version: u64,
        letters: impl Iterator<Item = &'l DeadLetterKey>,
    ) {
        self.kept += &lines(version, '+', letters);
        self.changed |= !self.kept.is_empty();
    }

    /// Counts were written anew, though no letter changed: the file is to be as new as they are.
    pub(super) fn note_counts(&mut self) {
        self.changed = true;
    }

    /// The database is about to be synced.
    pub(super) fn before_sync(&mut self) -> Result<(), BufferError> {
        if std::mem::take(&mut self.removed) { self.sync() } else { Ok(()) }
    }

    /// The database has all up to this version on stable storage.
    pub(super) fn after_sync(&mut self, synced: u64) -> Result<(), BufferError> {
        if !std::mem::take(&mut self.changed) {
            return Ok(());
        }
        let mut lines = std::mem::take(&mut self.kept);
        lines += &line(synced, ".");
        self.write(&lines)
    }

    fn write(&mut self, lines: &str) -> Result<(), BufferError> {
        let written = self.file.write_all(lines.as_bytes());
        written.map_err(|error| BufferError::io("write", &self.path, error))?;
        self.bytes += lines.len() as u64;
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<(), BufferError> {
        self.file.sync_data().map_err(|error| BufferError::io("sync", &self.path, error))
    }

    /// Time to begin anew.
    pub(super) fn is_long(&self) -> bool {
        self.bytes > self.long_bytes
    }

    /// Begins anew.
    pub(super) fn renew<'l>(
        &mut self,
        version: u64,
        letters: impl Iterator<Item = (&'l Names, SequenceRange)>,
    ) -> Result<(), BufferError> {
        let buffer = self.path.parent().unwrap_or(Path::new("."));
        *self = Self::begin(buffer, version, letters)?;
        Ok(())
    }

    /// There is no room to begin anew: the file grows on.
    pub(super) fn put_off(&mut self) {
        self.long_bytes = self.bytes.saturating_mul(2);
    }
}

/// A line for each range.
fn lines<'l>(version: u64, sign: char, letters: impl Iterator<Item = &'l DeadLetterKey>) -> String {
    let mut lines = String::new();
    let mut letters = letters.peekable();
    while let Some(first) = letters.next() {
        let mut last = first;
        while let Some(next) = letters.next_if(|next| follows(next, last)) {
            last = next;
        }
        let DeadLetterKey { sink, stream, sequence } = first;
        let entry = format!("{sign} {sink} {stream} {sequence} {}", last.sequence);
        lines += &line(version, &entry);
    }
    lines
}

fn follows(next: &DeadLetterKey, last: &DeadLetterKey) -> bool {
    next.sequence == last.sequence.next() && next.sink == last.sink && next.stream == last.stream
}

fn line(version: u64, entry: &str) -> String {
    let text = format!("{version:020} {entry}");
    format!("{:08x} {text}\n", crc32fast::hash(text.as_bytes()))
}

/// What the file tells.
#[derive(Debug, Default)]
pub(super) struct LetterRecord {
    /// What has this version or a lower one and is not named was removed. `None`: a part of the file is missing, and nothing
    /// follows from what it does not name.
    complete_from: Option<u64>,
    /// The database had all up to this version on stable storage.
    pub synced: u64,
    letters: BTreeMap<Names, Fates>,
}

impl LetterRecord {
    /// A letter of this version was removed since, or was about to be.
    pub(super) fn removed(&self, key: &DeadLetterKey, version: u64) -> bool {
        match self.fate(key) {
            Some(fate) => !fate.kept && fate.version > version,
            None => self.complete_from.is_some_and(|complete| version <= complete),
        }
    }

    /// A letter of this version was removed since, and that was on stable storage.
    pub(super) fn gone(&self, key: &DeadLetterKey, version: u64) -> bool {
        self.removed(key, version) && self.fate(key).is_none_or(|fate| fate.version <= self.synced)
    }

    /// Nothing older than this can be unknown to it; 0 where a part of it is missing.
    pub(super) fn knows_all_to(&self) -> u64 {
        self.complete_from.map_or(0, |_| self.synced)
    }

    fn fate(&self, key: &DeadLetterKey) -> Option<Fate> {
        let names = (key.sink.clone(), key.stream.clone());
        self.letters.get(&names)?.of(key.sequence)
    }

    /// Letters that should be there, with the version in which that was said.
    pub(super) fn kept(&self) -> impl Iterator<Item = (&Names, SequenceRange, u64)> {
        self.letters.iter().flat_map(|(names, fates)| {
            let kept = fates.iter().filter(|(_, fate)| fate.kept);
            kept.map(move |(range, fate)| (names, range, fate.version))
        })
    }

    pub(super) fn counts(&self) -> Counts {
        let count = |fates: &Fates| {
            let version = fates.iter().map(|(_, fate)| fate.version).max();
            let kept = fates.iter().filter(|(_, fate)| fate.kept);
            (version.unwrap_or(0), kept.map(|(range, _)| range.count()).sum())
        };
        self.letters.iter().map(|(names, fates)| (names.clone(), count(fates))).collect()
    }

    /// The newest version in it.
    pub(super) fn newest(&self) -> u64 {
        let changed = self.letters.values().flat_map(Fates::iter).map(|(_, fate)| fate.version);
        changed.max().unwrap_or(0).max(self.synced)
    }
}

/// Knows nothing when there is no such file.
pub(super) fn read(buffer: &Path) -> Result<LetterRecord, BufferError> {
    let path = buffer.join(NAME);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LetterRecord::default()),
        Err(error) => match BufferError::io("read", &path, error) {
            damage if damage.is_damage() => Vec::new(),
            other => return Err(other),
        },
    };
    let record = decode(&bytes);
    if record.complete_from.is_none() {
        tracing::warn!(
            event = "reached_damaged",
            path = %path.display(),
            "this small file is damaged; what stands beside it says how far it goes"
        );
    }
    Ok(record)
}

enum Entry {
    Begin,
    Changed(Names, SequenceRange, bool),
    Synced,
}

/// What stands behind the last end of a line was being written when the node ended, or when the power went.
fn decode(bytes: &[u8]) -> LetterRecord {
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let (mut entries, mut damaged) = (Vec::new(), false);
    for line in bytes[..whole].split_inclusive(|byte| *byte == b'\n') {
        match decode_line(line) {
            Some(entry) => entries.push(entry),
            None => damaged = true,
        }
    }
    // What was removed stands before what was kept earlier, when one sync made both durable.
    entries.sort_by_key(|(version, _)| *version);
    let mut record = LetterRecord::default();
    for (version, entry) in entries {
        match entry {
            Entry::Begin => record.complete_from = Some(version),
            Entry::Changed(names, range, kept) => {
                record.letters.entry(names).or_default().set(range, Fate { version, kept });
            }
            Entry::Synced => record.synced = record.synced.max(version),
        }
    }
    let cut = record.complete_from.is_some_and(|begun| record.synced < begun);
    record.complete_from.take_if(|_| damaged || cut);
    record
}

fn decode_line(line: &[u8]) -> Option<(u64, Entry)> {
    let (sum, text) = std::str::from_utf8(line).ok()?.strip_suffix('\n')?.split_once(' ')?;
    if sum != format!("{:08x}", crc32fast::hash(text.as_bytes())) {
        return None;
    }
    let mut words = text.split(' ');
    let version = words.next()?.parse().ok()?;
    let entry = match words.next()? {
        "=" => Entry::Begin,
        "." => Entry::Synced,
        sign => {
            let sink = SinkName::parse(words.next()?).ok()?;
            let stream = StreamName::parse(words.next()?).ok()?;
            let first = Sequence(words.next()?.parse().ok()?);
            let last = Sequence(words.next()?.parse().ok()?);
            Entry::Changed((sink, stream), SequenceRange { first, last }, sign == "+")
        }
    };
    Some((version, entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(sink: &str) -> Names {
        (SinkName::parse(sink).unwrap(), StreamName::parse("a").unwrap())
    }

    fn range(first: u64, last: u64) -> SequenceRange {
        SequenceRange { first: Sequence(first), last: Sequence(last) }
    }

    fn keys(sink: &str, sequences: &[u64]) -> Vec<DeadLetterKey> {
        let (sink, stream) = names(sink);
        let key = |at: &u64| DeadLetterKey {
            sink: sink.clone(),
            stream: stream.clone(),
            sequence: Sequence(*at),
        };
        sequences.iter().map(key).collect()
    }

    fn kept(record: &LetterRecord) -> Vec<(String, u64, u64)> {
        let kept = record.kept();
        kept.map(|((sink, _), range, _)| (sink.to_string(), range.first.0, range.last.0)).collect()
    }

    /// Begun with letters 1 to 9 at version 5.
    fn journal(folder: &Path) -> LetterJournal {
        LetterJournal::begin(folder, 5, [(&names("one"), range(1, 9))].into_iter()).unwrap()
    }

    #[test]
    fn it_tells_what_was_kept_and_what_was_removed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).unwrap().complete_from.is_none());
        let mut journal = journal(folder.path());
        journal.keep(6, keys("one", &[12, 13, 15]).iter());
        journal.remove(7, keys("one", &[2, 13]).iter()).unwrap();
        journal.keep(8, keys("two", &[1]).iter());
        journal.before_sync().unwrap();
        journal.after_sync(9).unwrap();
        let record = read(folder.path()).unwrap();
        let expected =
            [("one", 1, 1), ("one", 3, 9), ("one", 12, 12), ("one", 15, 15), ("two", 1, 1)];
        assert_eq!(kept(&record), expected.map(|(sink, a, b)| (sink.to_owned(), a, b)));
        assert_eq!(
            record.counts(),
            Counts::from([(names("one"), (7, 10)), (names("two"), (8, 1))])
        );
        let gone = |at: u64, version| record.gone(&keys("one", &[at])[0], version);
        assert!(gone(2, 5) && gone(13, 6), "removed");
        assert!(gone(10, 5), "not named, and no newer than the file");
        assert!(!gone(10, 6) && !gone(2, 8), "newer than all that is said of it");
        assert!(!gone(1, 5));
    }

    #[test]
    fn a_removal_that_was_not_made_is_none_to_be_answered_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = journal(folder.path());
        journal.remove(6, keys("one", &[9]).iter()).unwrap();
        journal.before_sync().unwrap();
        let record = read(folder.path()).unwrap();
        assert_eq!(kept(&record), [("one".to_owned(), 1, 8)]);
        let key = &keys("one", &[9])[0];
        assert!(record.removed(key, 5) && !record.gone(key, 5));
    }

    #[test]
    fn an_end_that_was_not_written_whole_is_no_damage_and_a_damaged_line_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = journal(folder.path());
        journal.keep(6, keys("one", &[12]).iter());
        journal.after_sync(7).unwrap();
        let bytes = fs::read(folder.path().join(NAME)).unwrap();
        let cut = decode(&bytes[..bytes.len() - 1]);
        assert_eq!((cut.complete_from, cut.synced), (Some(5), 5));
        assert_eq!(kept(&cut).len(), 2);
        let begins_bytes = line(5, "=").len() + line(5, "+ one a 1 9").len() + line(5, ".").len();
        for at in 0..bytes.len() {
            let begun = decode(&bytes[..at]).complete_from.is_some();
            assert_eq!(begun, at >= begins_bytes, "cut at {at}");
            let mut harmed = bytes.clone();
            harmed[at] ^= 1;
            let record = decode(&harmed);
            let last = at == bytes.len() - 1;
            assert_eq!(record.complete_from.is_some(), last, "byte {at}");
            assert!(kept(&record).len() <= 2);
        }
    }

    #[test]
    fn it_begins_anew_when_it_has_grown_long() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = journal(folder.path());
        for version in 6.. {
            journal.keep(version, keys("one", &[version * 2]).iter());
            journal.after_sync(version).unwrap();
            if journal.is_long() {
                let held = names("one");
                journal.renew(version, [(&held, range(1, 3))].into_iter()).unwrap();
                break;
            }
        }
        assert!(!journal.is_long());
        assert_eq!(kept(&read(folder.path()).unwrap()), [("one".to_owned(), 1, 3)]);
    }
}
