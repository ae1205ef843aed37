//! A narrow door to one sled database: every call is guarded, because sled panics on some damaged files.

use std::fs;
use std::io;
use std::ops::{ControlFlow, Deref};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::shims::{self, Opening};
use super::{BufferError, disk, threads};

/// The file in which sled keeps all values that are not too large for it.
pub(super) const FILE: &str = "db";
/// Measured: a database grew by up to 9 % when sled opened it.
const OPENING_SHARE: u64 = 8;
/// By what a small one grows, and more.
const OPENING_BYTES: u64 = 4 << 20;
/// Pages sled keeps in memory per open database.
const CACHE_BYTES: u64 = 8 << 20;
/// A database that was given up over damage closes a moment after it was dropped, on sled's own threads. No other process
/// can have it: the state directory is locked.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// An open sled database. Clones share it; it closes with the last one.
#[derive(Debug, Clone)]
pub(super) struct Store {
    db: Handle,
    folder: Arc<Path>,
}

/// Taken when it closes.
#[derive(Debug, Clone)]
struct Handle(Option<sled::Db>);

impl Deref for Handle {
    type Target = sled::Db;

    fn deref(&self) -> &sled::Db {
        self.0.as_ref().expect("it is open until it is dropped")
    }
}

/// sled panics when its last sync fails.
impl Drop for Store {
    fn drop(&mut self) {
        let db = self.db.0.take();
        if let Err(error) = guarded(&self.folder, || {
            drop(db);
            Ok(())
        }) {
            shims::end_over(&error);
        }
    }
}

impl Store {
    /// Opens or makes the database in `folder`. Opening writes: sled mends a torn end, and takes a read that fails for
    /// one, so whatever the drive cannot read must be found before.
    pub(super) fn open(folder: &Path) -> Result<Store, BufferError> {
        for snapshot in harmed_snapshots(folder)? {
            disk::remove_file(&snapshot)?;
        }
        disk::read_through(folder)?;
        let config = sled::Config::new()
            .path(folder)
            .cache_capacity(CACHE_BYTES)
            // Its flusher thread would log a failed sync and go on.
            .flush_every_ms(None);
        let began = Instant::now();
        // Of a generation that is being made there is nothing to read, and others are read meanwhile.
        let _opening = folder.join(FILE).exists().then(Opening::begin);
        loop {
            match guarded(folder, || config.open()) {
                Err(error) if is_locked(&error) && began.elapsed() < LOCK_WAIT => sleep(LOCK_PAUSE),
                opened => return Ok(Store { db: Handle(Some(opened?)), folder: folder.into() }),
            }
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn insert(&self, key: &[u8], value: &[u8]) -> Result<(), BufferError> {
        guarded(&self.folder, || self.db.insert(key, value)).map(drop)
    }

    /// All or nothing, also across a crash.
    pub(super) fn apply(&self, batch: sled::Batch) -> Result<(), BufferError> {
        guarded(&self.folder, || self.db.apply_batch(batch))
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<sled::IVec>, BufferError> {
        guarded(&self.folder, || self.db.get(key))
    }

    /// The last key at or before `key`.
    pub(super) fn at_or_before(&self, key: &[u8]) -> Result<Option<sled::IVec>, BufferError> {
        let found = guarded(&self.folder, || self.db.range(..=key).next_back().transpose())?;
        Ok(found.map(|(key, _)| key))
    }

    /// Visits keys in order from `from` on, until told to stop.
    pub(super) fn scan(
        &self,
        from: &[u8],
        mut visit: impl FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), BufferError> {
        guarded(&self.folder, || {
            for item in self.db.range(from..) {
                let (key, value) = item?;
                threads::beat();
                if visit(&key, &value).is_break() {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Returns once everything written is on stable storage. After an error nothing may be retried: the kernel
    /// reports a lost write once.
    pub(super) fn flush(&self) -> Result<(), BufferError> {
        guarded(&self.folder, || self.db.flush()).map(drop)
    }

    /// Bytes of the database's files.
    pub(super) fn size_on_disk(&self) -> Result<u64, BufferError> {
        guarded(&self.folder, || self.db.size_on_disk())
    }

    /// What sled leaves to the system after making a database: its settings file and the names of its files.
    pub(super) fn sync_creation(&self) -> Result<(), BufferError> {
        self.flush()?;
        let files = ["conf", "db"].map(|file| self.folder.join(file));
        let folders = std::iter::once(&*self.folder).chain(self.folder.parent());
        for path in files.iter().map(PathBuf::as_path).chain(folders) {
            match disk::sync(path) {
                // Closed, sled would sync it once more.
                Err(error @ BufferError::Io { .. }) => shims::end_over(&error),
                synced => synced?,
            }
        }
        Ok(())
    }
}

/// A write of sled's that the disk refuses ends the process: before a copy is opened, room for what is written then is asked
/// for.
pub(super) fn demand_room_to_open(copy: &Path) -> Result<(), BufferError> {
    disk::demand_room(copy, disk::folder_bytes(copy) / OPENING_SHARE + OPENING_BYTES)
}

/// sled was writing it when a process ended, and misses nothing without it.
pub(super) fn is_unfinished(snapshot: &Path) -> bool {
    snapshot.extension().is_some_and(|extension| extension == "generating")
}

/// Snapshots that are not whole, which are removed: for one of them sled refuses all, and it takes one that it was writing
/// when a process ended for its newest. Without any it reads its log; where that has begun anew since, and its first parts
/// are written over, it finds nothing. A whole one stays, whatever else there is: without it sled would take harm in its log
/// for the end of it.
pub(super) fn harmed_snapshots(folder: &Path) -> Result<Vec<PathBuf>, BufferError> {
    let unreadable = |error| BufferError::io("list", folder, error);
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(unreadable)?,
    };
    let mut harmed = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.starts_with("snap.") {
            continue;
        }
        let bytes = fs::read(&path).map_err(|error| BufferError::io("read", &path, error))?;
        if is_unfinished(&path) || !is_whole_snapshot(&bytes) {
            harmed.push(path);
        }
    }
    Ok(harmed)
}

/// As sled writes it: what it holds, the length of that, a check sum of it.
fn is_whole_snapshot(snapshot: &[u8]) -> bool {
    let Some((rest, sum)) = snapshot.split_last_chunk::<4>() else { return false };
    let Some((held, _)) = rest.split_last_chunk::<8>() else { return false };
    !held.is_empty() && crc32fast::hash(held) == u32::from_le_bytes(*sum)
}

/// Sled tells it in words alone.
fn is_locked(error: &BufferError) -> bool {
    match error {
        BufferError::Io { source, .. } => source.to_string().contains("could not acquire lock"),
        _ => false,
    }
}

/// Runs a sled call; a panic becomes an error like any other.
fn guarded<T>(folder: &Path, call: impl FnOnce() -> sled::Result<T>) -> Result<T, BufferError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(error))) => Err(BufferError::io("use the database", folder, error)),
        Ok(Err(error)) => Err(store_error(folder, error.to_string())),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("sled panicked");
            Err(store_error(folder, text.to_owned()))
        }
    }
}

fn store_error(folder: &Path, reason: String) -> BufferError {
    BufferError::Store { path: PathBuf::from(folder), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_is_just_closing_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let before = Store::open(folder.path()).unwrap();
        let closing = std::thread::spawn(move || {
            sleep(LOCK_PAUSE * 10);
            drop(before);
        });
        Store::open(folder.path()).unwrap();
        closing.join().unwrap();
    }
}
