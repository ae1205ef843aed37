//! Files and folders: atomic replacement, folder syncs, free space, the ballast.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, chown};
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags};
use rustix::io::{Errno, retry_on_intr};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{BufferError, threads};

/// How often something is read before it is called unreadable.
pub(super) const READS_MAX: u32 = 3;

pub(super) const EIO: i32 = 5;
/// What a drive fails to read at a time, at least.
const PAGE_BYTES: u64 = 4096;

/// Size and free space of the file system below a folder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Space {
    pub free_bytes: u64,
    pub total_bytes: u64,
}

/// Free as an unprivileged process sees it.
pub(super) fn space(folder: &Path) -> Result<Space, BufferError> {
    let stat = rustix::fs::statvfs(folder)
        .map_err(|error| BufferError::io("ask for the free space of", folder, error.into()))?;
    Ok(Space {
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
    })
}

/// There is room for so many bytes in a folder, by what the file system says and by any quota.
pub(super) fn has_room(folder: &Path, bytes: u64) -> Result<bool, BufferError> {
    // What is asked for and is not there may be taken up to the last block before that is noticed, and others on the same
    // disk find it full.
    if space(folder)?.free_bytes < bytes {
        return Ok(false);
    }
    let path = folder.join("room");
    let file = File::create(&path).map_err(|error| BufferError::io("make", &path, error))?;
    // Before it is large: what a kill leaves behind takes no room.
    fs::remove_file(&path).map_err(|error| BufferError::io("remove", &path, error))?;
    match retry_on_intr(|| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)) {
        Ok(()) => Ok(true),
        Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Ok(false),
        Err(Errno::OPNOTSUPP) => Ok(true),
        Err(error) => Err(BufferError::io("take room in", folder, error.into())),
    }
}

/// Where there is not that much room, the disk is full.
pub(super) fn demand_room(folder: &Path, bytes: u64) -> Result<(), BufferError> {
    if has_room(folder, bytes)? {
        Ok(())
    } else {
        Err(BufferError::DiskFull { path: folder.to_owned() })
    }
}

/// With those above it; its name is on stable storage when there was only one to make.
pub(super) fn make_folder(folder: &Path) -> Result<(), BufferError> {
    fs::create_dir_all(folder).map_err(|error| BufferError::io("make", folder, error))?;
    folder.parent().map_or(Ok(()), sync)
}

/// False only where there is nothing: not where it cannot be told, nor behind a link that leads nowhere.
pub(super) fn exists(path: &Path) -> Result<bool, BufferError> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => Ok(false),
        found => found.map(|_| true).map_err(|error| BufferError::io("look for", path, error)),
    }
}

/// Syncs a file, or a folder's list of names.
pub(super) fn sync(path: &Path) -> Result<(), BufferError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|error| BufferError::io("sync", path, error))
}

/// Syncs every file in a folder, and their names.
pub(super) fn sync_files(folder: &Path) -> Result<(), BufferError> {
    let unreadable = |error| BufferError::io("list", folder, error);
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        sync(&entry.map_err(unreadable)?.path())?;
    }
    sync(folder)
}

/// What a process that died has written to the files of a folder is on the drive afterwards, and is read from there. The
/// kernel shows it to the next process at once, though a power cut would still take it; and what the drive refused at a
/// sync that failed it shows too, and calls it written. Who took that for kept would acknowledge it.
pub(super) fn bring_to_rest(folder: &Path) -> Result<(), BufferError> {
    let unreadable = |error| BufferError::io("list", folder, error);
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        // What cannot be opened is told by who reads it.
        let Ok(file) = File::open(&path) else { continue };
        file.sync_all().map_err(|error| BufferError::io("sync", &path, error))?;
        // In vain for a folder, and where memory is all there is.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    }
    sync(folder)
}

/// Renames and syncs both parents: after it returns, a power cut does not undo it.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), BufferError> {
    fs::rename(from, to).map_err(|error| BufferError::io("move", from, error))?;
    for parent in [from.parent(), to.parent()].into_iter().flatten() {
        sync(parent)?;
    }
    Ok(())
}

/// Removes a file, which may be gone already, and syncs its folder.
pub(super) fn remove_file(path: &Path) -> Result<(), BufferError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(BufferError::io("remove", path, error));
        }
        _ => {}
    }
    path.parent().map_or(Ok(()), sync)
}

/// A folder of this extension is what the end of a process left of one that was being removed.
const REMOVED: &str = "removed";

/// Removes a folder, which may be gone already, with all that is in it, and syncs its parent. Half of it is never found
/// under its name.
pub(super) fn remove_folder(folder: &Path) -> Result<(), BufferError> {
    let removed = folder.with_extension(REMOVED);
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(BufferError::io("remove", folder, error))
        }
        _ => Ok(()),
    };
    gone(fs::remove_dir_all(&removed))?;
    gone(fs::rename(folder, &removed))?;
    let parent = folder.parent().unwrap_or(Path::new("."));
    sync(parent)?;
    gone(fs::remove_dir_all(&removed))?;
    sync(parent)
}

/// Goes on where a process ended that removed folders in this one.
pub(super) fn finish_removals(parent: &Path) -> Result<(), BufferError> {
    let unreadable = |error| BufferError::io("list", parent, error);
    for entry in fs::read_dir(parent).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let ours = path
            .file_stem()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name == "state" || name.starts_with("generation-"));
        if ours && path.extension().is_some_and(|extension| extension == REMOVED) {
            remove_folder(&path)?;
        }
    }
    Ok(())
}

/// Copies a folder with all that is in it, unsynced. Whoever may remove what is in the one may do so in the other: a command
/// that root runs may end before it has removed its copy.
pub(super) fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    let owner = fs::metadata(from)?;
    // Root only has to, and where it cannot, the copy is none the worse.
    if fs::metadata(to)?.uid() != owner.uid() {
        let _ = chown(to, Some(owner.uid()), Some(owner.gid()));
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Reads every file in a folder, which may be missing, to its end: an error comes out here, and what follows is read
/// from memory.
pub(super) fn read_through(folder: &Path) -> Result<(), BufferError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|error| BufferError::io("list", folder, error))?,
    };
    for entry in entries {
        let read = entry.and_then(|entry| {
            if entry.file_type()?.is_file() {
                io::copy(&mut File::open(entry.path())?, &mut io::sink())?;
            }
            Ok(())
        });
        read.map_err(|error| BufferError::io("read", folder, error))?;
    }
    Ok(())
}

/// A whole file, if it is there. A drive that fails to read it is asked again.
pub(super) fn read_small(path: &Path) -> Result<Option<Vec<u8>>, BufferError> {
    let mut attempts = 1;
    loop {
        match fs::read(path) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(EIO) && attempts < READS_MAX => {
                tracing::warn!(event = "read_failed", error = %error, path = %path.display(), "once more");
                attempts += 1;
            }
            Err(error) => return Err(BufferError::io("read", path, error)),
        }
    }
}

/// Fills `bytes` from `offset` on, as far as the file goes. A page the drive cannot read, at no attempt, is zero.
pub(super) fn read_what_can_be_read(
    file: &File,
    bytes: &mut [u8],
    offset: u64,
) -> io::Result<usize> {
    page_by_page(bytes, offset, |bytes, offset| file.read_at(bytes, offset))
}

/// In as large pieces as can be read.
pub(super) fn page_by_page(
    bytes: &mut [u8],
    offset: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut filled = 0;
    let (mut end, mut attempts) = (bytes.len(), 0);
    while filled < bytes.len() {
        let at = offset + filled as u64;
        match read(&mut bytes[filled..end], at) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() != Some(EIO) => return Err(error),
            Err(error) => {
                attempts += 1;
                end = bytes.len().min(filled + (PAGE_BYTES - at % PAGE_BYTES) as usize);
                if attempts < READS_MAX {
                    continue;
                }
                tracing::warn!(event = "read_failed", error = %error, offset = at, "one page is left out");
                bytes[filled..end].fill(0);
                filled = end;
            }
        }
        (end, attempts) = (bytes.len(), 0);
    }
    Ok(filled)
}

/// Bytes of all files below a folder; what vanishes meanwhile counts nothing.
pub(super) fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => folder_bytes(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Replaces a small JSON file so that a crash leaves the old or the new one: a CRC line, then the text.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), BufferError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| BufferError::io("encode", path, error.into()))?;
    let content = format!("{:08x}\n{text}\n", crc32fast::hash(text.as_bytes()));
    let draft = path.with_extension("draft");
    let write = || -> io::Result<()> {
        let mut file = File::create(&draft)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error| BufferError::io("write", &draft, error))?;
    rename(&draft, path)
}

/// What [`write_json`] wrote; `None` when there is no such file, `Corrupt` when it does not match its CRC.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, BufferError> {
    let Some(bytes) = read_small(path)? else { return Ok(None) };
    let content = String::from_utf8(bytes).map_err(|_| BufferError::corrupt(path, "not a text"))?;
    let (sum, text) = content.split_once('\n').unwrap_or_default();
    let text = text.trim_end_matches('\n');
    if sum != format!("{:08x}", crc32fast::hash(text.as_bytes())) {
        return Err(BufferError::corrupt(path, "its check sum does not match"));
    }
    serde_json::from_str(text).map(Some).map_err(|error| BufferError::corrupt(path, error))
}

/// Synced at a time: the slowest of drives manages that within the shortest time after which a thread counts as hung.
const BALLAST_STEP_BYTES: u64 = 8 << 20;

/// Gives the ballast up when the disk is too full for sled to open a database.
pub(super) fn release_ballast(path: &Path, ballast_bytes: u64) -> Result<(), BufferError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    if path.exists() && space(folder)?.free_bytes < ballast_bytes {
        fs::remove_file(path).map_err(|error| BufferError::io("remove", path, error))?;
        tracing::warn!(
            event = "ballast_released",
            path = %path.display(),
            "the disk is full: the ballast file was given up so that the buffer can open"
        );
    }
    Ok(())
}

/// Makes the ballast when it is missing and leaves the minimum free; quietly does nothing otherwise.
pub(super) fn restore_ballast(
    path: &Path,
    ballast_bytes: u64,
    free_bytes_min: u64,
) -> Result<(), BufferError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let whole = fs::metadata(path).is_ok_and(|meta| meta.len() == ballast_bytes);
    let needed = free_bytes_min.saturating_add(ballast_bytes.saturating_mul(2));
    if whole || ballast_bytes == 0 || space(folder)?.free_bytes < needed {
        return Ok(());
    }
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        let mut left = ballast_bytes;
        while left > 0 {
            let step = left.min(BALLAST_STEP_BYTES);
            left -= io::copy(&mut io::Read::take(io::repeat(0), step), &mut file)?;
            file.sync_all()?;
            threads::beat();
        }
        Ok(())
    };
    write().map_err(|error| BufferError::io("write", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_file_reads_back_and_a_damaged_one_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("value");
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), None);
        write_json(&path, &vec![1, 2, 3]).unwrap();
        write_json(&path, &vec![4, 5]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), Some(vec![4, 5]));
        let damaged = fs::read_to_string(&path).unwrap().replace('4', "7");
        fs::write(&path, damaged).unwrap();
        assert!(matches!(read_json::<Vec<u32>>(&path), Err(BufferError::Corrupt { .. })));
        fs::write(&path, b"").unwrap();
        assert!(matches!(read_json::<Vec<u32>>(&path), Err(BufferError::Corrupt { .. })));
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(read_json::<Vec<u32>>(&path), Err(BufferError::Corrupt { .. })));
    }

    /// Root only can tell them apart.
    #[test]
    fn a_copied_folder_belongs_to_the_owner_of_the_original() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("inner")).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(from.join("inner"), Some(4_711), None).unwrap();
        }
        copy_folder(&from, &to).unwrap();
        let owner = |path: &Path| fs::metadata(path.join("inner")).unwrap().uid();
        assert_eq!(owner(&to), owner(&from));
    }

    #[test]
    fn room_is_what_the_file_system_has() {
        let folder = tempfile::tempdir().unwrap();
        let has = |bytes| has_room(folder.path(), bytes).unwrap();
        let free = space(folder.path()).unwrap().free_bytes;
        assert!(has(1 << 20) && !has(free.saturating_mul(8)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "it is given back");
    }

    #[test]
    fn ballast_is_made_once_and_counts_its_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ballast");
        restore_ballast(&path, 4096, u64::MAX).unwrap();
        assert!(!path.exists(), "no ballast where space is short");
        restore_ballast(&path, 4096, 0).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
        release_ballast(&path, 4096).unwrap();
        assert!(path.exists(), "kept while there is space");
        release_ballast(&path, u64::MAX).unwrap();
        assert!(!path.exists());
    }
}
