//! Ways in which a file comes to harm.

use std::fs;
use std::path::{Path, PathBuf};

const BLOCK: usize = 4096;

/// The folder of a generation, by its place: 0 is the oldest.
pub fn generation(state: &Path, place: usize) -> PathBuf {
    generations(state).swap_remove(place)
}

/// The one that is written.
pub fn newest(state: &Path) -> PathBuf {
    generations(state).pop().unwrap()
}

pub fn generations(state: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state.join("buffer")).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> =
        entries.filter(|path| path.to_string_lossy().contains("/generation-")).collect();
    found.sort();
    found
}

pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn change(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}

/// The byte in the middle of what is not zero.
fn middle(bytes: &[u8]) -> usize {
    let used: Vec<usize> = (0..bytes.len()).filter(|place| bytes[*place] != 0).collect();
    used.get(used.len() / 2).copied().unwrap_or(bytes.len() / 2)
}

pub fn flip(file: &Path) {
    change(file, |bytes| {
        let place = middle(bytes);
        bytes[place] ^= 0x10;
    });
}

/// One block of the file system.
pub fn zero(file: &Path) {
    change(file, |bytes| {
        let begin = middle(bytes) / BLOCK * BLOCK;
        let end = bytes.len().min(begin + BLOCK);
        bytes[begin..end].fill(0);
    });
}

/// Where sled keeps what all else hangs on.
pub fn zero_begin(file: &Path) {
    change(file, |bytes| bytes[..BLOCK].fill(0));
}

pub fn cut_short(file: &Path) {
    change(file, |bytes| {
        let place = middle(bytes);
        bytes.truncate(place);
    });
}

pub fn empty(file: &Path) {
    fs::write(file, "").unwrap();
}

/// Its length stays.
pub fn overwrite(file: &Path) {
    change(file, |bytes| bytes.fill(0xa5));
}

pub fn replace(file: &Path) {
    fs::write(file, [0xa5; 300]).unwrap();
}

/// A file, or a folder with all that is in it.
pub fn delete(path: &Path) {
    if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
}

pub fn exchange(one: &Path, other: &Path) {
    let aside = one.parent().unwrap().join("aside");
    fs::rename(one, &aside).unwrap();
    fs::rename(other, one).unwrap();
    fs::rename(aside, other).unwrap();
}
