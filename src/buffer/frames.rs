//! A generation read without sled: every value stands in its file as a frame (`frame.rs`), so the file is searched for
//! frames once, when it is opened, and read by their places.
//!
//! sled only writes generations. Opening one that exists, it goes by its own book-keeping: one flipped bit in that, and it
//! refuses all that is there, or takes the place for the torn end of a crash and overwrites what stands behind. A frame
//! needs nothing but itself: damage costs what it hits.
//!
//! That several frames of one key may stand in the file, because sled writes a page again and again, does not matter: a
//! generation is written by one run of the node, which gives each number to one record. What is no copy of the other is
//! nobody's, and left out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::frame::{self, Frame, HEAD_BYTES, MAGIC, Owner};
use super::generation::{self, HEADER_KEY, Header, Source, Visit};
use super::store::FILE;
use super::{BufferError, disk, threads};
use crate::domain::{Sequence, StreamName};

/// Bytes searched at a time: many times the longest frame.
const WINDOW_BYTES: usize = 1 << 20;
const _: () = assert!(WINDOW_BYTES > frame::BYTES_MAX);

/// A frame of the file.
#[derive(Debug, Clone, Copy)]
struct Place {
    first: Sequence,
    offset: u64,
    crc: u32,
    part: u16,
    bytes: u32,
}

impl Place {
    fn order(&self) -> (Sequence, u16, u32) {
        (self.first, self.part, self.crc)
    }
}

/// An open generation.
#[derive(Debug)]
pub(super) struct Frames {
    folder: PathBuf,
    file: File,
    owner: Owner,
    /// `None`: it is damaged.
    header: Option<Header>,
    /// By the keys' beginning; in the order of the keys.
    streams: BTreeMap<Vec<u8>, Vec<Place>>,
}

/// What was found of one owner.
#[derive(Default)]
struct Found {
    frames: u64,
    header: Option<Vec<u8>>,
    streams: BTreeMap<Vec<u8>, Vec<Place>>,
}

impl Found {
    fn add(&mut self, frame: &Frame<'_>, offset: u64) {
        self.frames += 1;
        let key = frame.key();
        if key == HEADER_KEY {
            self.header = Some(frame.value());
            return;
        }
        let Some((prefix, first, part)) = generation::split_key(&key) else { return };
        let place = Place { first, offset, crc: frame.crc, part, bytes: frame.bytes() as u32 };
        match self.streams.get_mut(prefix) {
            Some(places) => places.push(place),
            None if is_stream(prefix) => drop(self.streams.insert(prefix.to_vec(), vec![place])),
            None => {}
        }
    }

    /// In order, each key once.
    fn sort(&mut self) {
        for places in self.streams.values_mut() {
            places.sort_unstable_by_key(Place::order);
            places.dedup_by_key(|place| place.order());
            let contested = |place: &Place, other: &Place| {
                (place.first, place.part) == (other.first, other.part)
            };
            if places.windows(2).any(|two| contested(&two[0], &two[1])) {
                let all = std::mem::take(places);
                let alone = all.chunk_by(contested).filter(|same| same.len() == 1);
                places.extend(alone.flatten());
            }
            places.shrink_to_fit();
        }
    }
}

fn is_stream(prefix: &[u8]) -> bool {
    let name = prefix.strip_suffix(&[0]).and_then(|name| std::str::from_utf8(name).ok());
    name.is_some_and(|name| StreamName::parse(name).is_ok())
}

impl Frames {
    /// Searches the whole file. An error is damage only where nothing of a generation is left.
    pub(super) fn open(folder: &Path) -> Result<Frames, BufferError> {
        let path = folder.join(FILE);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => BufferError::corrupt(folder, "its file is gone"),
            _ => BufferError::io("open", &path, error),
        })?;
        let length = file.metadata().map_err(|error| BufferError::io("read", &path, error))?.len();
        let mut owners: BTreeMap<Owner, Found> = BTreeMap::new();
        let read = |bytes: &mut [u8], offset| disk::read_what_can_be_read(&file, bytes, offset);
        search(length, read, |frame, offset| {
            owners.entry(frame.owner).or_default().add(&frame, offset);
        })
        .map_err(|error| BufferError::io("read", &path, error))?;
        let most = owners.into_iter().max_by_key(|(_, found)| found.frames);
        let Some((owner, mut found)) = most else { return Err(without_frames(folder, &file)) };
        found.sort();
        let Found { header, streams, .. } = found;
        let header = header.map(|value| generation::decode_header(folder, &value)).transpose()?;
        Ok(Frames { folder: folder.to_owned(), file, owner, header, streams })
    }

    /// Which generation it is, whatever the folder is called.
    pub(super) fn number(&self) -> u64 {
        u64::from(self.owner.generation)
    }

    pub(super) fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// The beginnings of its keys, one per stream.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = &[u8]> {
        self.streams.keys().map(Vec::as_slice)
    }

    fn value(&self, place: &Place) -> Result<Option<Vec<u8>>, BufferError> {
        let mut bytes = vec![0; place.bytes as usize];
        disk::read_what_can_be_read(&self.file, &mut bytes, place.offset)
            .map_err(|error| BufferError::io("read", &self.folder.join(FILE), error))?;
        let frame = Frame::read(&bytes).filter(|frame| frame.crc == place.crc);
        Ok(frame.map(|frame| frame.value()))
    }
}

impl Source for Frames {
    fn begins(&self, prefix: &[u8], at: Sequence) -> Result<Sequence, BufferError> {
        let places = self.streams.get(prefix).map(Vec::as_slice).unwrap_or_default();
        let behind = places.partition_point(|place| place.first <= at);
        Ok(behind.checked_sub(1).map_or(at, |before| places[before].first))
    }

    fn scan(
        &self,
        prefix: &[u8],
        from: Sequence,
        visit: &mut Visit<'_>,
    ) -> Result<(), BufferError> {
        let places = self.streams.get(prefix).map(Vec::as_slice).unwrap_or_default();
        let begin = places.partition_point(|place| place.first < from);
        for place in &places[begin..] {
            // It was whole when the file was searched; now it is a hole as any other.
            let value = self.value(place)?.unwrap_or_default();
            threads::beat();
            if visit(place.first, place.part, &value).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// What a file without a frame is: of a version that knew none, or harmed beyond reading.
fn without_frames(folder: &Path, file: &File) -> BufferError {
    let mut begin = vec![0; WINDOW_BYTES];
    let read = disk::read_what_can_be_read(file, &mut begin, 0);
    match read.ok().and_then(|read| generation::format_before_frames(&begin[..read])) {
        Some(format) => BufferError::Format { path: folder.to_owned(), format },
        None => BufferError::corrupt(folder, "there is no record of a buffer in it"),
    }
}

/// Visits every frame with its offset.
pub(super) fn search(
    length: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
    mut visit: impl FnMut(Frame<'_>, u64),
) -> io::Result<()> {
    let finder = memchr::memmem::Finder::new(&MAGIC);
    let mut window = vec![0; WINDOW_BYTES];
    let mut begin = 0;
    while begin < length {
        let filled = read(&mut window, begin)?;
        threads::beat();
        if filled == 0 {
            break;
        }
        let last = begin + filled as u64 >= length;
        let mut at = 0;
        let next = loop {
            let Some(found) = finder.find(&window[at..filled]) else {
                break filled.saturating_sub(HEAD_BYTES).max(at);
            };
            at += found;
            let rest = &window[at..filled];
            match Frame::read(rest) {
                Some(frame) => {
                    let bytes = frame.bytes();
                    visit(frame, begin + at as u64);
                    at += bytes;
                }
                // Its end, if it has one, comes with the next window.
                None if !last && frame::declared_bytes(rest).is_none_or(|all| all > rest.len()) => {
                    break at;
                }
                None => at += 1,
            }
        };
        if last {
            break;
        }
        // A frame is shorter than a window, so there is always a step.
        begin += next.max(1) as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::domain::LogIdentity;

    const PAGE: usize = 4096;

    /// First sequence, value.
    type Parts = Vec<(u64, Vec<u8>)>;

    fn places(bytes: &[u8], unreadable: Option<usize>) -> Vec<u64> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let read = |window: &mut [u8], offset: u64| {
            disk::page_by_page(window, offset, |piece, offset| {
                let bad = unreadable.map_or(u64::MAX, |page| (page * PAGE) as u64);
                if (bad..bad.saturating_add(PAGE as u64)).contains(&offset) {
                    return Err(io::Error::from_raw_os_error(5));
                }
                let before = if bad > offset { bad - offset } else { u64::MAX };
                let whole = piece.len().min(usize::try_from(before).unwrap_or(usize::MAX));
                file.read_at(&mut piece[..whole], offset)
            })
        };
        let mut found = Vec::new();
        search(bytes.len() as u64, read, |_, offset| found.push(offset)).unwrap();
        found
    }

    /// As it stands in the file `db`: stream `a`, and what of it is read.
    fn read(frames: &[Vec<u8>]) -> Result<(u64, Parts), BufferError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), frames.concat()).unwrap();
        let frames = Frames::open(folder.path())?;
        let mut read = Vec::new();
        frames.scan(b"a\0", Sequence::ZERO, &mut |first, _, value| {
            read.push((first.0, value.to_vec()));
            ControlFlow::Continue(())
        })?;
        Ok((frames.number(), read))
    }

    fn key(first: u64) -> Vec<u8> {
        [b"a\0".as_slice(), &first.to_be_bytes(), &[0, 0]].concat()
    }

    #[test]
    fn copies_are_one_and_what_is_no_copy_or_another_generations_is_nobodys() {
        let log = LogIdentity(uuid::Uuid::new_v4());
        let [here, elsewhere] = [3, 4].map(|number| Owner::new(log, number));
        let one = frame::encode(here, &key(1), b"one");
        let two = [b"two", b"TWO"].map(|value| frame::encode(here, &key(2), value));
        let three = frame::encode(here, &key(3), b"three");
        let foreign = frame::encode(elsewhere, &key(4), b"four");
        let unnamed = frame::encode(here, b"\xff\xff\0\0\0\0\0\0\0\0\x01\0\0", b"?");
        let [two, other] = two;
        let all = [three.clone(), foreign, two, one.clone(), unnamed, other, three, one];
        let (number, read) = read(&all).unwrap();
        assert_eq!(number, 3);
        assert_eq!(read, [(1, b"one".to_vec()), (3, b"three".to_vec())]);
    }

    #[test]
    fn a_file_without_a_frame_is_damaged_or_of_another_format_and_that_is_no_damage() {
        let nothing = read(&[vec![0; 100], vec![0xa5; 100]]).unwrap_err();
        assert!(nothing.is_damage(), "{nothing}");
        let before = br#".....header.{"format":1,"identity":"1","number":1}"#;
        let before = read(&[before.to_vec()]).unwrap_err();
        assert!(matches!(before, BufferError::Format { format: 1, .. }), "{before}");
        assert!(!before.is_damage());
        let owner = Owner::new(LogIdentity(uuid::Uuid::new_v4()), 1);
        let mut header = generation::header(LogIdentity(uuid::Uuid::new_v4()), 1, BTreeMap::new());
        header.format += 1;
        let text = serde_json::to_vec(&header).unwrap();
        let later = read(&[frame::encode(owner, HEADER_KEY, &text)]).unwrap_err();
        assert!(matches!(later, BufferError::Format { .. }), "{later}");
    }

    #[test]
    fn every_frame_is_found_wherever_the_windows_end_and_whatever_page_cannot_be_read() {
        let owner = Owner::new(LogIdentity(uuid::Uuid::new_v4()), 3);
        let mut bytes = Vec::new();
        let mut frames = Vec::new();
        while bytes.len() < 3 * WINDOW_BYTES {
            let frame = frame::encode(owner, b"key", &vec![7; bytes.len() * 31 % 7_000]);
            frames.push((bytes.len() as u64, frame.len() as u64));
            bytes.extend_from_slice(&frame);
            // What a damaged one leaves.
            bytes.extend_from_slice(&MAGIC[..frames.len() % 5]);
            bytes.extend_from_slice(&frame[..frame.len() / 3]);
        }
        let all: Vec<u64> = frames.iter().map(|(offset, _)| *offset).collect();
        assert!(places(&bytes, None) == all);
        for page in [0, 100, WINDOW_BYTES / PAGE, bytes.len() / PAGE - 1] {
            let (begin, end) = ((page * PAGE) as u64, ((page + 1) * PAGE) as u64);
            let whole = frames.iter().filter(|(at, bytes)| at + bytes <= begin || *at >= end);
            let whole: Vec<u64> = whole.map(|(offset, _)| *offset).collect();
            assert!(whole.len() < all.len());
            assert!(places(&bytes, Some(page)) == whole, "page {page}");
        }
    }
}
