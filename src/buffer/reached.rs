//! How far each stream was durable when it was last answered: what the newest generation cannot tell of itself. sled
//! takes a damaged place for the torn end of a crash and goes on before it, without a word about what stood behind.
//!
//! Written after each group and before its answers, in place and without a sync of its own: it costs microseconds,
//! survives the end of the process, and never says more than was durable. The janitor syncs it, so that after a power
//! cut it is a second old at most.
//!
//! Each line: stream, a space, sequence in 20 digits.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::BufferError;
use super::checked_file::{self, CheckedFile};
use super::log::lock;
use crate::domain::{Sequence, StreamName};

const NAME: &str = "reached";

/// The open file.
#[derive(Debug)]
pub(super) struct Reached {
    file: CheckedFile,
    positions: Mutex<BTreeMap<StreamName, Sequence>>,
    unsynced: AtomicBool,
}

impl Reached {
    /// Makes or takes over the file and writes where the streams are now.
    pub(super) fn open(
        buffer: &Path,
        positions: BTreeMap<StreamName, Sequence>,
    ) -> Result<Self, BufferError> {
        let file = CheckedFile::open(buffer.join(NAME), &encode(&positions))?;
        Ok(Reached { file, positions: Mutex::new(positions), unsynced: AtomicBool::new(false) })
    }

    /// A group is durable.
    pub(super) fn advance(
        &self,
        group: impl Iterator<Item = (StreamName, Sequence)>,
    ) -> Result<(), BufferError> {
        let mut positions = lock(&self.positions);
        positions.extend(group);
        let lines = encode(&positions);
        drop(positions);
        let written = self.file.write(&lines);
        self.unsynced.store(true, Ordering::Release);
        written.map(drop)
    }

    /// Costs nothing when nothing was written since.
    pub(super) fn sync(&self) -> Result<(), BufferError> {
        if !self.unsynced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync()
    }
}

/// Empty when there is no such file, or it is damaged.
pub(super) fn read(buffer: &Path) -> Result<BTreeMap<StreamName, Sequence>, BufferError> {
    checked_file::read(&buffer.join(NAME), decode)
}

fn encode(positions: &BTreeMap<StreamName, Sequence>) -> String {
    let mut lines = String::with_capacity(positions.len() * 40);
    for (stream, at) in positions {
        // A string takes all that is written to it.
        let _ = writeln!(lines, "{stream} {:020}", at.0);
    }
    lines
}

fn decode(lines: &str) -> Option<BTreeMap<StreamName, Sequence>> {
    let position = |line: &str| {
        let (stream, at) = line.split_once(' ')?;
        Some((StreamName::parse(stream).ok()?, Sequence(at.parse().ok()?)))
    };
    lines.lines().map(position).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(at: &[(&str, u64)]) -> BTreeMap<StreamName, Sequence> {
        at.iter().map(|(name, at)| (StreamName::parse(name).unwrap(), Sequence(*at))).collect()
    }

    #[test]
    fn it_says_what_was_written_last_and_nothing_when_damaged() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), BTreeMap::new());
        let reached = Reached::open(folder.path(), positions(&[("a", 9), ("b", 0)])).unwrap();
        reached.advance(positions(&[("a", 1_000_000), ("c", 3)]).into_iter()).unwrap();
        let written = positions(&[("a", 1_000_000), ("b", 0), ("c", 3)]);
        assert_eq!(read(folder.path()).unwrap(), written);
        reached.sync().unwrap();
        let reached = Reached::open(folder.path(), positions(&[("a", 7)])).unwrap();
        assert_eq!(read(folder.path()).unwrap(), positions(&[("a", 7)]), "another, shorter log");
        drop(reached);
        let path = folder.path().join(NAME);
        let text = std::fs::read_to_string(&path).unwrap().replace('7', "8");
        std::fs::write(&path, text).unwrap();
        assert_eq!(read(folder.path()).unwrap(), BTreeMap::new());
    }
}
