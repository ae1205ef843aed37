//! Generations that do not stand where they belong, because a person restored or moved them. What a folder holds
//! counts, not what it is called.

use std::path::{Path, PathBuf};

use super::frames::Frames;
use super::log::set_aside;
use super::recovery::patiently;
use super::{BufferError, disk, generation};

/// On its way from one place to another, by its number; no start may overlook it.
const MOVING: &str = "moving-";

/// Puts every generation that can be read into the folder of its own number. Opens all of them, so it is only called
/// when one was seen in the wrong place. Answers how many were set aside, because they cannot be read: what is in them
/// nobody knows, and they must not stand in the way of those that belong there.
pub(super) fn sort_out(buffer: &Path, quarantine: &Path) -> Result<u64, BufferError> {
    let mut unreadable = 0;
    for (number, folder) in generation::list(buffer)? {
        let held = match patiently(|| Frames::open(&folder)) {
            Ok(frames) => frames.number(),
            Err(error) if error.is_damage() => {
                set_aside(&folder, quarantine, &error)?;
                unreadable += 1;
                continue;
            }
            Err(error) => return Err(error),
        };
        if generation::read_sidecar(&folder).is_some_and(|contents| contents.number != held) {
            generation::remove_sidecar(&folder)?;
        }
        if held == number {
            continue;
        }
        tracing::warn!(
            event = "generation_misplaced",
            folder = %folder.display(),
            generation = held,
            "a generation stands in the wrong place; it is put right"
        );
        move_to(&folder, buffer.join(format!("{MOVING}{held:06}")), held, quarantine)?;
    }
    finish(buffer, quarantine)?;
    Ok(unreadable)
}

/// What an earlier start had begun.
pub(super) fn finish(buffer: &Path, quarantine: &Path) -> Result<(), BufferError> {
    let entries =
        std::fs::read_dir(buffer).map_err(|error| BufferError::io("list", buffer, error))?;
    let moving: Vec<PathBuf> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
    for folder in moving {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = name.strip_prefix(MOVING).and_then(|number| number.parse().ok());
        if let Some(number) = number {
            move_to(&folder, generation::folder_of(buffer, number), number, quarantine)?;
        }
    }
    Ok(())
}

/// A second one of the same number is set aside: nobody can tell which is right.
fn move_to(
    folder: &Path,
    target: PathBuf,
    number: u64,
    quarantine: &Path,
) -> Result<(), BufferError> {
    if target.exists() {
        let path = folder.to_owned();
        return set_aside(folder, quarantine, &BufferError::Misplaced { path, number });
    }
    disk::rename(folder, &target)
}
