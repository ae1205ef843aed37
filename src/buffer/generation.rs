//! One generation: a small sled database that only grows, written by one run of the node, in a folder of its own,
//! removed as a whole.
//!
//! Keys: stream name, 0x00, first sequence (u64, big-endian), part (u16, big-endian); a block longer than
//! [`PART_BYTES_MAX`] goes over several parts. The header's key begins with 0x00, which no stream name does. Each value
//! has a frame around it (`frame.rs`). Through sled it is read as long as it is written ([`Written`]); from then on sled
//! never opens it again (`frames.rs`).

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::block::{Block, PART_BYTES_MAX, declared_length};
use super::frame::{self, Frame, Owner};
use super::frames::Frames;
use super::store::Store;
use super::{BufferError, disk};
use crate::domain::{Arrival, LogIdentity, Sequence, SequenceRange, StreamName};

pub(super) const HEADER_KEY: &[u8] = b"\0header";
const KEY_TAIL_BYTES: usize = 1 + 8 + 2;
/// Of the buffer with all that is in it. 2: generations are framed. 3: the state database too.
pub(super) const FORMAT: u32 = 3;
const SIDECAR: &str = "sealed.json";

/// Written before the first record: an empty generation still knows how the streams go on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Header {
    pub format: u32,
    pub identity: LogIdentity,
    pub number: u64,
    pub created: Arrival,
    /// The number each stream's next record had when the generation was made.
    pub next: BTreeMap<StreamName, Sequence>,
}

/// What a sealed generation holds, beside it in a small file, so that a start need not open it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Contents {
    pub format: u32,
    /// Of the generation.
    pub number: u64,
    pub ranges: BTreeMap<StreamName, SequenceRange>,
    /// Numbers within the ranges that are not there.
    pub holes: Vec<(StreamName, SequenceRange)>,
    /// The number each stream's next record had when it was sealed.
    pub next: BTreeMap<StreamName, Sequence>,
    /// Stored bytes of the blocks.
    pub block_bytes: u64,
    /// Some of what was in it is gone.
    pub harmed: bool,
}

pub(super) fn folder_of(buffer: &Path, number: u64) -> PathBuf {
    buffer.join(format!("generation-{number:06}"))
}

/// The generations in the buffer's folder, oldest first.
pub(super) fn list(buffer: &Path) -> Result<Vec<(u64, PathBuf)>, BufferError> {
    let unreadable = |error| BufferError::io("list", buffer, error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(buffer).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("generation-").and_then(|number| number.parse().ok());
        found.extend(number.map(|number| (number, path)));
    }
    found.sort_unstable();
    Ok(found)
}

/// The generation that is written.
#[derive(Debug, Clone)]
pub(super) struct Written {
    store: Store,
    owner: Owner,
}

impl Written {
    /// Makes an empty generation; when it returns, the folder and the header are on stable storage.
    pub(super) fn create(buffer: &Path, header: &Header) -> Result<Written, BufferError> {
        let folder = folder_of(buffer, header.number);
        let store = Store::open(&folder)?;
        let owner = Owner::new(header.identity, header.number);
        let text = serde_json::to_vec(header)
            .map_err(|error| BufferError::io("encode the header of", &folder, error.into()))?;
        store.insert(HEADER_KEY, &frame::encode(owner, HEADER_KEY, &text))?;
        store.sync_creation()?;
        Ok(Written { store, owner })
    }

    /// Hands a block to sled, one key per part. Answers its stored size.
    pub(super) fn insert(&self, prefix: &[u8], block: &Block) -> Result<usize, BufferError> {
        let mut stored_bytes = 0;
        for (part, bytes) in block.encode().chunks(PART_BYTES_MAX).enumerate() {
            let part =
                u16::try_from(part).expect("a packet of MQTT, at most 256 MiB, fits 65,536 parts");
            let key = key_at(prefix, block.range().first, part);
            let framed = frame::encode(self.owner, &key, bytes);
            stored_bytes += framed.len();
            self.store.insert(&key, &framed)?;
        }
        Ok(stored_bytes)
    }

    /// As [`Store::flush`].
    pub(super) fn flush(&self) -> Result<(), BufferError> {
        self.store.flush()
    }

    pub(super) fn folder(&self) -> &Path {
        self.store.folder()
    }

    pub(super) fn size_on_disk(&self) -> Result<u64, BufferError> {
        self.store.size_on_disk()
    }
}

/// Takes a part: first sequence of the block, part, bytes.
pub(super) type Visit<'v> = dyn FnMut(Sequence, u16, &[u8]) -> ControlFlow<()> + 'v;

/// Where the parts of blocks are read from. `prefix`: of the keys of one stream.
pub(super) trait Source {
    /// Where the block begins that may hold the record `at`: the last one at or before it; `at` where there is none.
    fn begins(&self, prefix: &[u8], at: Sequence) -> Result<Sequence, BufferError>;

    /// Visits parts in the order of their keys until told to stop; no bytes where they are damaged.
    fn scan(&self, prefix: &[u8], from: Sequence, visit: &mut Visit<'_>)
    -> Result<(), BufferError>;
}

impl Source for Written {
    fn begins(&self, prefix: &[u8], at: Sequence) -> Result<Sequence, BufferError> {
        let before = self.store.at_or_before(&key_at(prefix, at, u16::MAX))?;
        let before = before.as_deref().and_then(split_key);
        Ok(before.filter(|(found, ..)| *found == prefix).map_or(at, |(_, first, _)| first))
    }

    fn scan(
        &self,
        prefix: &[u8],
        from: Sequence,
        visit: &mut Visit<'_>,
    ) -> Result<(), BufferError> {
        self.store.scan(&key_at(prefix, from, 0), |key, framed| {
            let Some((found, first, part)) = split_key(key) else {
                return ControlFlow::Continue(());
            };
            if found != prefix {
                return ControlFlow::Break(());
            }
            let whole = Frame::read(framed).filter(|frame| {
                frame.owner == self.owner && frame.bytes() == framed.len() && frame.key() == key
            });
            visit(first, part, &whole.map(|frame| frame.value()).unwrap_or_default())
        })
    }
}

pub(super) fn header(
    identity: LogIdentity,
    number: u64,
    next: BTreeMap<StreamName, Sequence>,
) -> Header {
    Header { format: FORMAT, identity, number, created: Arrival::now(), next }
}

pub(super) fn decode_header(folder: &Path, value: &[u8]) -> Result<Header, BufferError> {
    let header: Header =
        serde_json::from_slice(value).map_err(|error| BufferError::corrupt(folder, error))?;
    match header.format {
        FORMAT => Ok(header),
        format => Err(BufferError::Format { path: folder.to_owned(), format }),
    }
}

/// The format in a header without a frame: the beginning of its text.
pub(super) fn format_before_frames(bytes: &[u8]) -> Option<u32> {
    const BEGIN: &[u8] = b"{\"format\":";
    let found = memchr::memmem::find(bytes, BEGIN)?;
    let digits = bytes[found + BEGIN.len()..].split(|byte| *byte == b',').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

pub(super) fn write_sidecar(folder: &Path, contents: &Contents) -> Result<(), BufferError> {
    let contents = Contents { format: FORMAT, ..contents.clone() };
    disk::write_json(&folder.join(SIDECAR), &contents)
}

pub(super) fn remove_sidecar(folder: &Path) -> Result<(), BufferError> {
    disk::remove_file(&folder.join(SIDECAR))
}

/// `None` when there is none, it is damaged or of another format: then the generation itself is read.
pub(super) fn read_sidecar(folder: &Path) -> Option<Contents> {
    let contents: Option<Contents> = disk::read_json(&folder.join(SIDECAR)).ok().flatten();
    contents.filter(|contents| contents.format == FORMAT)
}

/// Where blocks begin in a generation, as a key without the sequence.
pub(super) fn key_prefix(stream: &StreamName) -> Vec<u8> {
    let mut key = Vec::with_capacity(stream.as_str().len() + KEY_TAIL_BYTES);
    key.extend_from_slice(stream.as_str().as_bytes());
    key.push(0);
    key
}

fn key_at(prefix: &[u8], first: Sequence, part: u16) -> Vec<u8> {
    let mut key = Vec::with_capacity(prefix.len() + KEY_TAIL_BYTES);
    key.extend_from_slice(prefix);
    key.extend_from_slice(&first.0.to_be_bytes());
    key.extend_from_slice(&part.to_be_bytes());
    key
}

/// (stream with its 0x00, first sequence, part)
pub(super) fn split_key(key: &[u8]) -> Option<(&[u8], Sequence, u16)> {
    let (rest, part) = key.split_last_chunk::<2>()?;
    let (prefix, first) = rest.split_last_chunk::<8>()?;
    let named = prefix.len() > 1 && prefix.last() == Some(&0);
    named.then(|| (prefix, Sequence(u64::from_be_bytes(*first)), u16::from_be_bytes(*part)))
}

/// A block whose parts are being collected.
struct Parts {
    first: Sequence,
    parts: u16,
    length: usize,
    bytes: Vec<u8>,
}

impl Parts {
    /// `None` where parts are missing, or the bytes are no block: it shows as the hole it leaves.
    fn finish(self) -> Option<Block> {
        Block::decode(&self.bytes).ok().filter(|block| block.range().first == self.first)
    }
}

/// Visits the blocks of a stream that are whole, in order, with their stored bytes.
fn walk(
    source: &impl Source,
    prefix: &[u8],
    from: Sequence,
    mut visit: impl FnMut(Block, usize) -> ControlFlow<()>,
) -> Result<(), BufferError> {
    let mut open: Option<Parts> = None;
    source.scan(prefix, from, &mut |first, part, value| {
        if part > 0 {
            let next = |parts: &&mut Parts| (parts.first, parts.parts) == (first, part);
            if let Some(parts) = open.as_mut().filter(next) {
                parts.parts += 1;
                parts.bytes.extend_from_slice(value);
            }
        } else {
            let length = declared_length(value).unwrap_or(0);
            open = Some(Parts { first, parts: 1, length, bytes: value.to_vec() });
        }
        let Some(whole) = open.take_if(|parts| parts.bytes.len() >= parts.length) else {
            return ControlFlow::Continue(());
        };
        let stored_bytes = whole.bytes.len();
        match whole.finish() {
            Some(block) => visit(block, stored_bytes),
            None => ControlFlow::Continue(()),
        }
    })
}

/// What a read found: blocks without a hole between them, or, when there is none at the place asked for, the hole.
#[derive(Debug, Default)]
pub(super) struct Stretch {
    pub blocks: Vec<Block>,
    pub hole: Option<SequenceRange>,
}

/// Reads blocks of a stream within `wanted` (which the generation should hold), up to about `bytes_max`. The first
/// block may begin before.
pub(super) fn read(
    source: &impl Source,
    prefix: &[u8],
    wanted: SequenceRange,
    bytes_max: usize,
) -> Result<Stretch, BufferError> {
    let mut stretch = Stretch::default();
    let mut expected = wanted.first;
    let mut bytes = 0;
    let begin = source.begins(prefix, wanted.first)?;
    walk(source, prefix, begin, |block, _| {
        let range = block.range();
        if range.first > wanted.last || (range.first > expected && !stretch.blocks.is_empty()) {
            return ControlFlow::Break(());
        }
        if range.last < expected {
            return ControlFlow::Continue(());
        }
        if range.first > expected {
            let last = Sequence(range.first.0 - 1);
            stretch.hole = Some(SequenceRange { first: expected, last });
            return ControlFlow::Break(());
        }
        expected = range.last.next();
        bytes += block.bytes();
        stretch.blocks.push(block);
        let more = bytes < bytes_max && expected <= wanted.last;
        if more { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    if stretch.blocks.is_empty() && stretch.hole.is_none() {
        stretch.hole = Some(wanted);
    }
    Ok(stretch)
}

/// Reads and checks every block: what the generation holds, and the numbers missing within. `before`: what the one before
/// it holds; where the header is damaged, it goes on behind that.
pub(super) fn verify(frames: &Frames, before: Option<&Contents>) -> Result<Contents, BufferError> {
    let begin = frames.header().map(|header| &header.next);
    let begin = begin.or(before.map(|before| &before.next)).cloned();
    let mut contents = Contents { number: frames.number(), ..Contents::default() };
    contents.next = begin.clone().unwrap_or_default();
    for prefix in frames.prefixes() {
        let name = std::str::from_utf8(&prefix[..prefix.len() - 1]).ok();
        let Some(stream) = name.and_then(|name| StreamName::parse(name).ok()) else { continue };
        walk(frames, prefix, Sequence::ZERO, |block, stored_bytes| {
            let range = block.range();
            if begin.is_none() && !contents.ranges.contains_key(&stream) {
                contents.next.insert(stream.clone(), range.first);
            }
            let next = contents.next.get(&stream).copied().unwrap_or(Sequence(1));
            if range.first >= next {
                contents.add(stream.clone(), range, stored_bytes);
            }
            ControlFlow::Continue(())
        })?;
    }
    Ok(contents)
}

impl Contents {
    /// The next block of a stream.
    pub(super) fn add(&mut self, stream: StreamName, block: SequenceRange, stored_bytes: usize) {
        let SequenceRange { first, last } = block;
        self.block_bytes += stored_bytes as u64;
        let begins = self.next.get(&stream).copied().unwrap_or(Sequence(1));
        if first > begins {
            let hole = SequenceRange { first: begins, last: Sequence(first.0 - 1) };
            self.holes.push((stream.clone(), hole));
        }
        self.next.insert(stream.clone(), last.next());
        self.ranges
            .entry(stream)
            .and_modify(|range| range.last = last)
            .or_insert(SequenceRange { first, last });
    }

    /// From this number on nothing of the stream counts.
    pub(super) fn cut(&mut self, stream: &StreamName, next: Sequence) {
        if self.next.get(stream).is_none_or(|known| *known <= next) {
            return;
        }
        self.next.insert(stream.clone(), next);
        self.holes.retain(|(name, hole)| name != stream || hole.first < next);
        let last = Sequence(next.0 - 1);
        match self.ranges.get_mut(stream) {
            Some(range) if range.first < next => range.last = range.last.min(last),
            _ => drop(self.ranges.remove(stream)),
        }
    }
}
