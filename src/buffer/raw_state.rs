//! A state database read without sled: what its values' frames (`frame.rs`) tell, wherever in its file they stand.
//!
//! sled writes values again and again, and leaves old ones behind: of each letter several versions may be found, also of
//! one that was removed since. The newest one that is whole counts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::frame::{Frame, Owner};
use super::frames::search;
use super::state_value::{self, BOOKS, Count, Kind, Names, Part, REPLAYED};
use super::store::FILE;
use super::{BufferError, disk};
use crate::domain::{DeadLetter, DeadLetterKey, Sequence};

/// Places of one sink's letters that are kept before copies are looked for.
const PLACES_MIN: usize = 4_096;

/// A part of a letter in the file: 40 bytes in memory, where the letter takes some hundred of its quota.
#[derive(Debug, Clone, Copy)]
struct Place {
    sequence: Sequence,
    version: u64,
    offset: u64,
    /// Of the frame.
    bytes: u32,
    /// Of the value in it.
    held: u32,
    /// Of the whole letter.
    length: u32,
    part: u16,
}

impl Place {
    /// Of each letter the newest version first.
    fn order(&self) -> (Sequence, std::cmp::Reverse<u64>, u16) {
        (self.sequence, std::cmp::Reverse(self.version), self.part)
    }
}

/// Parts that make a letter.
fn is_whole(parts: &[Place]) -> bool {
    let held: u64 = parts.iter().map(|place| u64::from(place.held)).sum();
    parts.iter().zip(0..).all(|(place, part)| place.part == part)
        && held == u64::from(parts[0].length)
}

/// Of the versions of a letter, the newest first.
fn newest_whole(versions: &[Place]) -> Option<&[Place]> {
    let mut versions = versions.chunk_by(|one, next| one.version == next.version);
    versions.find(|parts| is_whole(parts))
}

#[derive(Debug, Default)]
struct Places {
    found: Vec<Place>,
    /// Copies are removed when there are so many.
    full: usize,
}

impl Places {
    fn add(&mut self, place: Place) {
        if self.found.len() >= self.full.max(PLACES_MIN) {
            self.sort();
            self.full = self.found.len() * 2;
        }
        self.found.push(place);
    }

    fn sort(&mut self) {
        self.found.sort_unstable_by_key(Place::order);
        self.found.dedup_by_key(|place| place.order());
    }
}

/// What one owner's frames tell.
#[derive(Debug, Default)]
struct Found {
    frames: u64,
    newest: u64,
    synced: u64,
    letters: BTreeMap<Names, Places>,
    /// Letters by version: from the newest that was on stable storage on.
    counts: BTreeMap<Names, BTreeMap<u64, u64>>,
    clusters: BTreeSet<String>,
    /// Books and what was replayed since, by version: from the newest that was on stable storage on.
    books: BTreeMap<Vec<u8>, BTreeMap<u64, Part>>,
}

impl Found {
    fn add(&mut self, frame: &Frame<'_>, offset: u64) {
        let key = frame.key();
        let Some(part) = Part::of(frame) else { return };
        self.frames += 1;
        self.synced = self.synced.max(part.synced);
        self.newest = self.newest.max(part.version);
        match Kind::of(&key) {
            Kind::Letter(letter, number) => {
                let place = Place {
                    sequence: letter.sequence,
                    version: part.version,
                    offset,
                    bytes: frame.bytes() as u32,
                    held: part.bytes.len() as u32,
                    length: part.length,
                    part: number,
                };
                self.letters.entry((letter.sink, letter.stream)).or_default().add(place);
            }
            Kind::Count(sink, stream) => {
                if let Some(Count { letters, .. }) = state_value::decode_count(&part.bytes) {
                    self.count((sink, stream), part.version, letters);
                }
            }
            Kind::Copy(cluster) => drop(self.clusters.insert(cluster)),
            Kind::Other if key.starts_with(BOOKS) || key.starts_with(REPLAYED) => {
                if part.length as usize == part.bytes.len() {
                    let books = self.books.entry(key).or_default();
                    books.insert(part.version, part);
                    forget_older(books, self.synced);
                }
            }
            Kind::Other => {}
        }
    }
}

impl Found {
    fn count(&mut self, names: Names, version: u64, letters: u64) {
        let counts = self.counts.entry(names).or_default();
        counts.insert(version, letters);
        forget_older(counts, self.synced);
    }
}

/// Than the newest that was on stable storage.
fn forget_older<T>(versions: &mut BTreeMap<u64, T>, synced: u64) {
    if let Some(newest) = versions.range(..=synced).next_back().map(|(version, _)| *version) {
        *versions = versions.split_off(&newest);
    }
}

/// The file, and what was found in it.
#[derive(Debug)]
pub(super) struct RawState {
    path: PathBuf,
    file: Option<File>,
    found: Found,
}

/// A letter that is whole in the file.
pub(super) struct RawLetter<'r> {
    pub key: DeadLetterKey,
    pub version: u64,
    parts: &'r [Place],
}

impl RawState {
    /// Searches the whole file, which may be missing.
    pub(super) fn search(folder: &Path) -> Result<RawState, BufferError> {
        let path = folder.join(FILE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(RawState { path, file: None, found: Found::default() });
            }
            opened => opened.map_err(|error| BufferError::io("open", &path, error))?,
        };
        let unreadable = |error| BufferError::io("read", &path, error);
        let length = file.metadata().map_err(unreadable)?.len();
        let mut owners: BTreeMap<Owner, Found> = BTreeMap::new();
        let read = |bytes: &mut [u8], offset| disk::read_what_can_be_read(&file, bytes, offset);
        search(length, read, |frame, offset| {
            if frame.owner.is_state() {
                owners.entry(frame.owner).or_default().add(&frame, offset);
            }
        })
        .map_err(unreadable)?;
        let most = owners.into_values().max_by_key(|found| found.frames);
        let mut found = most.unwrap_or_default();
        found.letters.values_mut().for_each(Places::sort);
        Ok(RawState { path, file: Some(file), found })
    }

    /// There are some, or should be.
    pub(super) fn has_letters(&self) -> bool {
        !self.found.letters.is_empty() || self.counts().any(|(.., letters)| letters > 0)
    }

    pub(super) fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// The highest version in it.
    pub(super) fn newest(&self) -> u64 {
        self.found.newest
    }

    /// All up to this version was on stable storage.
    pub(super) fn synced(&self) -> u64 {
        self.found.synced
    }

    /// Kafka clusters to which letters were to be copied.
    pub(super) fn clusters(&self) -> Vec<String> {
        self.found.clusters.iter().cloned().collect()
    }

    /// By version: the newest that was on stable storage, and those of which that is not known.
    pub(super) fn books(&self) -> impl Iterator<Item = (&[u8], &BTreeMap<u64, Part>)> {
        self.found.books.iter().map(|(key, books)| (key.as_slice(), books))
    }

    /// How many letters each sink had when that was on stable storage last, with the version.
    pub(super) fn counts(&self) -> impl Iterator<Item = (&Names, u64, u64)> {
        self.found.counts.iter().filter_map(|(names, counts)| {
            let (version, letters) = counts.range(..=self.found.synced).next_back()?;
            Some((names, *version, *letters))
        })
    }

    /// The newest whole version of each letter.
    pub(super) fn letters(&self) -> impl Iterator<Item = RawLetter<'_>> {
        self.found.letters.iter().flat_map(|((sink, stream), places)| {
            let letters = places.found.chunk_by(|one, next| one.sequence == next.sequence);
            letters.filter_map(move |versions| {
                let parts = newest_whole(versions)?;
                let sequence = parts[0].sequence;
                let key = DeadLetterKey { sink: sink.clone(), stream: stream.clone(), sequence };
                Some(RawLetter { key, version: parts[0].version, parts })
            })
        })
    }

    /// The newest one of this letter that is whole.
    pub(super) fn letter_version(&self, key: &DeadLetterKey) -> Option<u64> {
        let found = &self.found.letters.get(&(key.sink.clone(), key.stream.clone()))?.found;
        let begin = found.partition_point(|place| place.sequence < key.sequence);
        let end = found.partition_point(|place| place.sequence <= key.sequence);
        newest_whole(&found[begin..end]).map(|parts| parts[0].version)
    }

    /// `None` where it was whole when the file was searched, and is not any more.
    pub(super) fn read(&self, letter: &RawLetter<'_>) -> Result<Option<DeadLetter>, BufferError> {
        let Some(file) = &self.file else { return Ok(None) };
        let mut value = Vec::new();
        for place in letter.parts {
            let mut bytes = vec![0; place.bytes as usize];
            disk::read_what_can_be_read(file, &mut bytes, place.offset)
                .map_err(|error| BufferError::io("read", &self.path, error))?;
            let part = Frame::read(&bytes).and_then(|frame| Part::of(&frame));
            let Some(part) = part.filter(|part| part.version == letter.version) else {
                return Ok(None);
            };
            value.extend_from_slice(&part.bytes);
        }
        Ok(state_value::decode_letter(&value).filter(|found| found.key == letter.key))
    }
}
