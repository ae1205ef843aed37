//! How far each stream was durable when it was last answered: what the newest generation cannot tell of itself. sled
//! takes a damaged place for the torn end of a crash and goes on before it, without a word about what stood behind.
//!
//! Written after each group and before its answers, in place and without a sync of its own: it costs microseconds,
//! survives the end of the process, and never says more than was durable. The janitor syncs it, so that after a power
//! cut it is a second old at most.
//!
//! ```text
//!  crc32 of all that follows, 8 hex digits
//!  stream, a space, sequence in 20 digits     (so that a line never changes its length)
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::log::lock;
use super::{BufferError, disk};
use crate::domain::{Sequence, StreamName};

const NAME: &str = "reached";

/// The open file.
#[derive(Debug)]
pub(super) struct Reached {
    path: PathBuf,
    file: File,
    positions: Mutex<BTreeMap<StreamName, Sequence>>,
    unsynced: AtomicBool,
}

impl Reached {
    /// Makes or takes over the file and writes where the streams are now.
    pub(super) fn open(
        buffer: &Path,
        positions: BTreeMap<StreamName, Sequence>,
    ) -> Result<Self, BufferError> {
        let path = buffer.join(NAME);
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|error| BufferError::io("open", &path, error))?;
        let reached = Reached {
            path,
            file,
            positions: Mutex::new(positions),
            unsynced: AtomicBool::new(false),
        };
        let text = encode(&lock(&reached.positions));
        reached.write(&text)?;
        // Longer when it is another log's, or damaged.
        let cut = reached.file.set_len(text.len() as u64);
        cut.map_err(|error| BufferError::io("cut", &reached.path, error))?;
        reached.sync()?;
        disk::sync(buffer)?;
        Ok(reached)
    }

    /// A group is durable.
    pub(super) fn advance(
        &self,
        group: impl Iterator<Item = (StreamName, Sequence)>,
    ) -> Result<(), BufferError> {
        let mut positions = lock(&self.positions);
        positions.extend(group);
        let text = encode(&positions);
        drop(positions);
        self.write(&text)
    }

    fn write(&self, text: &str) -> Result<(), BufferError> {
        let written = self.file.write_all_at(text.as_bytes(), 0);
        self.unsynced.store(true, Ordering::Release);
        written.map_err(|error| BufferError::io("write", &self.path, error))
    }

    /// Costs nothing when nothing was written since.
    pub(super) fn sync(&self) -> Result<(), BufferError> {
        if !self.unsynced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync_data().map_err(|error| BufferError::io("sync", &self.path, error))
    }
}

/// Empty when there is no such file. One that is damaged says nothing: it only matters where the newest generation is
/// damaged too.
pub(super) fn read(buffer: &Path) -> Result<BTreeMap<StreamName, Sequence>, BufferError> {
    let path = buffer.join(NAME);
    let text = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => match BufferError::io("read", &path, error) {
            damage if damage.is_damage() => Vec::new(),
            other => return Err(other),
        },
    };
    Ok(decode(&text).unwrap_or_else(|| {
        tracing::warn!(
            event = "reached_damaged",
            path = %path.display(),
            "this small file is damaged; the generations say how far the log goes"
        );
        BTreeMap::new()
    }))
}

fn encode(positions: &BTreeMap<StreamName, Sequence>) -> String {
    let mut lines = String::with_capacity(positions.len() * 40);
    for (stream, at) in positions {
        // A string takes all that is written to it.
        let _ = writeln!(lines, "{stream} {:020}", at.0);
    }
    format!("{:08x}\n{lines}", crc32fast::hash(lines.as_bytes()))
}

fn decode(bytes: &[u8]) -> Option<BTreeMap<StreamName, Sequence>> {
    let (sum, lines) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
    if sum != format!("{:08x}", crc32fast::hash(lines.as_bytes())) {
        return None;
    }
    lines
        .lines()
        .map(|line| {
            let (stream, at) = line.split_once(' ')?;
            Some((StreamName::parse(stream).ok()?, Sequence(at.parse().ok()?)))
        })
        .collect()
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
