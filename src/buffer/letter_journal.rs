//! Which dead letters there are, kept beside the state database, which cannot tell it of itself: where the end of its file
//! was cut off, sled opens what is left without a word, and one that is gone says nothing at all. So what the disk lost is
//! known by its sequences, and what was removed does not come back with the old pages that sled leaves behind.
//!
//! Each line: check sum (8 hex digits) of what follows, version (20 digits), and
//!
//! ```text
//!  =                            the file begins: what has this version or a lower one and is not named below was removed, or lost
//!  + sink stream first last     letters kept
//!  ! sink stream first last     letters kept that sled does not find, for want of room to put them back: no count, however new,
//!                               excuses that they are not there
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

use super::fates::{Fate, Fates, Ranges, Word, ranges, without};
use super::held::Held;
use super::state_value::{Counts, Names};
use super::{BufferError, disk};
use crate::domain::{DeadLetterKey, Sequence, SequenceRange, SinkName, StreamName};

pub(super) const NAME: &str = "letters";

/// Lines that are added before the file begins anew, whatever it began with.
const ADDED_BYTES_MIN: u64 = 1 << 20;

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
    /// Letters that sled does not find.
    hidden: Ranges,
    /// Letters were removed since the last one.
    removed: bool,
    /// There is something to write after it.
    changed: bool,
}

impl LetterJournal {
    /// Replaces the file: as of this version these are all letters.
    pub(super) fn begin(buffer: &Path, version: u64, held: &Held) -> Result<Self, BufferError> {
        Self::begin_at(buffer.join(NAME), version, held)
    }

    /// The same under another name, of a database that is not the node's yet.
    pub(super) fn begin_at(path: PathBuf, version: u64, held: &Held) -> Result<Self, BufferError> {
        let draft = path.with_extension("draft");
        let mut lines = line(version, "=");
        let words = held.words();
        words.for_each(|(word, names, range)| lines += &word_line(version, word, names, range));
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
            hidden: held.hidden.clone(),
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
        let lines = self.lines(version, Word::Removed, letters);
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
        let lines = self.lines(version, Word::Kept, letters);
        self.kept += &lines;
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

    /// Begins anew with the letters that sled finds, and those that are still hidden.
    pub(super) fn renew(&mut self, version: u64, mut held: Held) -> Result<(), BufferError> {
        held.hide(std::mem::take(&mut self.hidden));
        let buffer = self.path.parent().unwrap_or(Path::new("."));
        *self = Self::begin(buffer, version, &held)?;
        Ok(())
    }

    /// A line for each range; none of them is hidden any more.
    fn lines<'l>(
        &mut self,
        version: u64,
        word: Word,
        letters: impl Iterator<Item = &'l DeadLetterKey>,
    ) -> String {
        let mut lines = String::new();
        for (names, ranges) in ranges(letters) {
            if let Some(hidden) = self.hidden.get_mut(&names) {
                *hidden = hidden.iter().flat_map(|range| without(*range, &ranges)).collect();
            }
            ranges.into_iter().for_each(|range| lines += &word_line(version, word, &names, range));
        }
        lines
    }
}

fn word_line(version: u64, word: Word, (sink, stream): &Names, range: SequenceRange) -> String {
    let sign = match word {
        Word::Kept => '+',
        Word::Hidden => '!',
        Word::Removed => '-',
    };
    line(version, &format!("{sign} {sink} {stream} {} {}", range.first, range.last))
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
            Some(fate) => fate.word == Word::Removed && fate.version > version,
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

    /// It was kept, and sled did not find it.
    pub(super) fn hides(&self, key: &DeadLetterKey) -> bool {
        self.fate(key).is_some_and(|fate| fate.word == Word::Hidden)
    }

    /// It should be there.
    pub(super) fn keeps(&self, key: &DeadLetterKey) -> bool {
        self.fate(key).is_some_and(|fate| fate.word != Word::Removed)
    }

    /// Letters that should be there.
    pub(super) fn kept(&self) -> impl Iterator<Item = (&Names, SequenceRange, Fate)> {
        self.letters.iter().flat_map(|(names, fates)| {
            let kept = fates.iter().filter(|(_, fate)| fate.word != Word::Removed);
            kept.map(move |(range, fate)| (names, range, fate))
        })
    }

    pub(super) fn counts(&self) -> Counts {
        let count = |fates: &Fates| {
            let version = fates.iter().map(|(_, fate)| fate.version).max();
            let kept = fates.iter().filter(|(_, fate)| fate.word != Word::Removed);
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
    let bytes = match disk::read_small(&path) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(LetterRecord::default()),
        Err(damage) if damage.is_damage() => Vec::new(),
        Err(other) => return Err(other),
    };
    let record = decode(&bytes);
    if record.complete_from.is_none() {
        tracing::warn!(
            event = "letters_damaged",
            path = %path.display(),
            "this small file is damaged: the database alone tells which dead letters there are, and it is made anew"
        );
    }
    Ok(record)
}

enum Entry {
    Begin,
    Said(Word, Names, SequenceRange),
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
            Entry::Said(word, names, range) => {
                record.letters.entry(names).or_default().set(range, Fate { version, word });
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
            let word = match sign {
                "+" => Word::Kept,
                "!" => Word::Hidden,
                "-" => Word::Removed,
                _ => return None,
            };
            let sink = SinkName::parse(words.next()?).ok()?;
            let stream = StreamName::parse(words.next()?).ok()?;
            let first = Sequence(words.next()?.parse().ok()?);
            let last = Sequence(words.next()?.parse().ok()?);
            Entry::Said(word, (sink, stream), SequenceRange { first, last })
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

    fn held(all: &[u64], hidden: &[u64]) -> Held {
        let sequences = ranges(&keys("one", all));
        Held { sequences, hidden: ranges(&keys("one", hidden)), ..Held::default() }
    }

    /// Begun with letters 1 to 9 at version 5.
    fn journal(folder: &Path) -> LetterJournal {
        LetterJournal::begin(folder, 5, &held(&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[])).unwrap()
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
                journal.renew(version, held(&[1, 2, 3], &[])).unwrap();
                break;
            }
        }
        assert!(!journal.is_long());
        assert_eq!(kept(&read(folder.path()).unwrap()), [("one".to_owned(), 1, 3)]);
    }

    #[test]
    fn what_sled_does_not_find_is_named_until_it_is_kept_or_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal =
            LetterJournal::begin(folder.path(), 5, &held(&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[3, 4, 5]))
                .unwrap();
        let hidden = || {
            let record = read(folder.path()).unwrap();
            keys("one", &[1, 3, 4, 5, 9]).iter().map(|key| record.hides(key)).collect::<Vec<_>>()
        };
        assert_eq!(hidden(), [false, true, true, true, false]);
        journal.keep(6, keys("one", &[3, 4]).iter());
        journal.remove(7, keys("one", &[4]).iter()).unwrap();
        journal.before_sync().unwrap();
        journal.after_sync(8).unwrap();
        assert_eq!(hidden(), [false, false, false, true, false]);
        journal.renew(8, held(&[1, 3], &[])).unwrap();
        assert_eq!(hidden(), [false, false, false, true, false]);
        let kept = kept(&read(folder.path()).unwrap());
        assert_eq!(
            kept,
            [("one", 1, 1), ("one", 3, 3), ("one", 5, 5)].map(|(sink, a, b)| (
                sink.to_owned(),
                a,
                b
            ))
        );
    }
}
