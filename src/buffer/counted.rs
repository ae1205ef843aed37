//! How many dead letters each sink had when that was last on stable storage: what the state database cannot tell of itself.
//! Where the end of its file was cut off, sled opens what is left without a word; and one that is gone says nothing at all.
//!
//! Written after each sync that changed a count, without a sync of its own: the kernel does that within half a minute. The
//! version tells whether this or the database is older.
//!
//! Each line: sink, stream, version and letters in 20 digits each, with spaces between.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use super::BufferError;
use super::checked_file::{self, CheckedFile};
use super::state_value::Names;
use crate::domain::{SinkName, StreamName};

const NAME: &str = "letters";

/// By sink: the version in which the count changed last, and the letters.
pub(super) type Counts = BTreeMap<Names, (u64, u64)>;

/// The open file.
#[derive(Debug)]
pub(super) struct Counted(CheckedFile);

impl Counted {
    /// Makes or takes over the file.
    pub(super) fn open(buffer: &Path, counts: &Counts) -> Result<Self, BufferError> {
        CheckedFile::open(buffer.join(NAME), &encode(counts)).map(Counted)
    }

    /// These are on stable storage.
    pub(super) fn advance(&self, counts: &Counts) -> Result<(), BufferError> {
        self.0.write(&encode(counts)).map(drop)
    }

    pub(super) fn sync(&self) -> Result<(), BufferError> {
        self.0.sync()
    }
}

/// Empty when there is no such file, or it is damaged.
pub(super) fn read(buffer: &Path) -> Result<Counts, BufferError> {
    checked_file::read(&buffer.join(NAME), decode)
}

fn encode(counts: &Counts) -> String {
    let mut lines = String::with_capacity(counts.len() * 80);
    for ((sink, stream), (version, letters)) in counts {
        // A string takes all that is written to it.
        let _ = writeln!(lines, "{sink} {stream} {version:020} {letters:020}");
    }
    lines
}

fn decode(lines: &str) -> Option<Counts> {
    let count = |line: &str| {
        let mut words = line.split(' ');
        let names = (SinkName::parse(words.next()?).ok()?, StreamName::parse(words.next()?).ok()?);
        Some((names, (words.next()?.parse().ok()?, words.next()?.parse().ok()?)))
    };
    lines.lines().map(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_was_written_last() {
        let counts = |all: &[(&str, u64, u64)]| -> Counts {
            let names = |sink| (SinkName::parse(sink).unwrap(), StreamName::parse("a").unwrap());
            all.iter().map(|(sink, version, letters)| (names(sink), (*version, *letters))).collect()
        };
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), Counts::new());
        let first = counts(&[("one", 1, 7), ("two", 3, 0)]);
        let counted = Counted::open(folder.path(), &first).unwrap();
        assert_eq!(read(folder.path()).unwrap(), first);
        let next = counts(&[("one", u64::MAX, 8), ("two", 3, 0), ("three", 4, 1)]);
        counted.advance(&next).unwrap();
        assert_eq!(read(folder.path()).unwrap(), next);
    }
}
