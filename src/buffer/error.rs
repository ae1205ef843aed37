//! What can go wrong with the buffer, and what the operator does about it.

use std::io;
use std::path::{Path, PathBuf};

use super::disk;
use crate::domain::ErrorClass;

/// What the drive fails to do says of these that it cannot read. A change that it refuses says nothing of what is there.
const READING: [&str; 6] = ["read", "list", "open", "look for", "copy", "use the database"];

/// Open failed, the disk failed, a bound was reached, or the buffer has stopped because of one of them.
#[derive(Debug, thiserror::Error)]
pub enum BufferError {
    #[error(
        "{} is held by another process: stop the other telemetry node, let the `telemetry dlq` at work there end, or give this \
         node a state_dir of its own",
        path.display()
    )]
    Locked { path: PathBuf },
    #[error(
        "this binary does not use its own {function}, so nothing it acknowledged would be safe: install a binary built from \
         the project's own Makefile"
    )]
    ShimNotLive { function: &'static str },
    #[error("cannot {action} {}: {source}; check the disk, its mount and its owner", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("no space left at {}: free some, or enlarge the file system", path.display())]
    DiskFull { path: PathBuf },
    #[error("the database {} cannot be used: {reason}", path.display())]
    Store { path: PathBuf, reason: String },
    #[error(
        "{} is damaged: {reason}; restore the file from a backup, or move the whole folder away to begin a new log",
        path.display()
    )]
    Corrupt { path: PathBuf, reason: String },
    #[error(
        "{} is of format {format}, which this program does not know: install the version that wrote it, or move the \
         whole state directory away to begin anew",
        path.display()
    )]
    Format { path: PathBuf, format: u32 },
    #[error("{} holds generation {number}, or another one says so: the next start sorts them out", path.display())]
    Misplaced { path: PathBuf, number: u64 },
    #[error(
        "dead letters fill their quota of {quota_bytes} bytes: replay, export or purge some (telemetry dlq), or \
         raise buffer.dead_letter_quota"
    )]
    DeadLettersFull { quota_bytes: u64 },
    #[error("the buffer has stopped: {reason}")]
    Stopped { reason: String },
}

impl BufferError {
    /// Each of them needs a person, or ends the process.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Standing
    }

    /// The files are there and make no sense, or the drive cannot read them: trying again will not help. A full disk, a
    /// missing permission, too many open files or a write that fails is no damage.
    pub(super) fn is_damage(&self) -> bool {
        match self {
            BufferError::Store { .. } | BufferError::Corrupt { .. } => true,
            BufferError::Io { action, source, .. } => {
                let unreadable = [io::ErrorKind::UnexpectedEof, io::ErrorKind::InvalidData];
                let failed = source.raw_os_error() == Some(disk::EIO);
                failed && READING.contains(action) || unreadable.contains(&source.kind())
            }
            _ => false,
        }
    }

    /// It is of what stands in this folder.
    pub(super) fn is_below(&self, folder: &Path) -> bool {
        match self {
            BufferError::Io { path, .. }
            | BufferError::Store { path, .. }
            | BufferError::Corrupt { path, .. } => path.starts_with(folder),
            _ => false,
        }
    }

    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                BufferError::DiskFull { path: path.to_owned() }
            }
            _ => BufferError::Io { action, path: path.to_owned(), source },
        }
    }

    pub(super) fn corrupt(path: &Path, reason: impl ToString) -> Self {
        BufferError::Corrupt { path: path.to_owned(), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_damaged_and_what_cannot_be_changed_is_not() {
        let failed = |action| {
            let source = io::Error::from_raw_os_error(disk::EIO);
            BufferError::io(action, Path::new("x"), source).is_damage()
        };
        assert!(failed("read") && failed("use the database"));
        assert!(!failed("sync") && !failed("move") && !failed("write"));
    }

    #[test]
    fn a_full_disk_and_a_quota_that_is_reached_are_the_same() {
        for number in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
            let error = BufferError::io("write", Path::new("x"), number.into());
            assert!(matches!(error, BufferError::DiskFull { .. }) && !error.is_damage(), "{error}");
        }
    }
}
