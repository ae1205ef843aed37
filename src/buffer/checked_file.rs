//! A small file of lines behind a check sum, written over in place: it costs microseconds and survives the end of the
//! process. What is in it tells of a database what that cannot tell of itself, so one that is damaged says nothing, and only
//! matters where the database is damaged too.
//!
//! ```text
//!  crc32 of all that follows, 8 hex digits
//!  lines, each of which never changes its length
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::{BufferError, disk};

/// The open file.
#[derive(Debug)]
pub(super) struct CheckedFile {
    path: PathBuf,
    file: File,
}

impl CheckedFile {
    /// Makes or takes over the file; these lines are in it then, on stable storage.
    pub(super) fn open(path: PathBuf, lines: &str) -> Result<Self, BufferError> {
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|error| BufferError::io("open", &path, error))?;
        let checked = CheckedFile { path, file };
        let bytes = checked.write(lines)?;
        // Longer when it is another database's, or damaged.
        let cut = checked.file.set_len(bytes as u64);
        cut.map_err(|error| BufferError::io("cut", &checked.path, error))?;
        checked.sync()?;
        checked.path.parent().map_or(Ok(()), disk::sync)?;
        Ok(checked)
    }

    /// Answers how many bytes it has now.
    pub(super) fn write(&self, lines: &str) -> Result<usize, BufferError> {
        let text = format!("{:08x}\n{lines}", crc32fast::hash(lines.as_bytes()));
        let written = self.file.write_all_at(text.as_bytes(), 0);
        written.map_err(|error| BufferError::io("write", &self.path, error))?;
        Ok(text.len())
    }

    pub(super) fn sync(&self) -> Result<(), BufferError> {
        self.file.sync_data().map_err(|error| BufferError::io("sync", &self.path, error))
    }
}

/// What its lines say; the empty value when there is no such file, or it is damaged.
pub(super) fn read<T: Default>(
    path: &Path,
    decode: impl FnOnce(&str) -> Option<T>,
) -> Result<T, BufferError> {
    let text = match disk::read_small(path) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(T::default()),
        Err(damage) if damage.is_damage() => Vec::new(),
        Err(other) => return Err(other),
    };
    Ok(checked(&text).and_then(decode).unwrap_or_else(|| {
        tracing::warn!(
            event = "reached_damaged",
            path = %path.display(),
            "this small file is damaged; what stands beside it says how far it goes"
        );
        T::default()
    }))
}

fn checked(bytes: &[u8]) -> Option<&str> {
    let (sum, lines) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
    (sum == format!("{:08x}", crc32fast::hash(lines.as_bytes()))).then_some(lines)
}
