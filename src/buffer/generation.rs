//! One generation: a small sled database that only grows, in a folder of its own, removed as a whole.
//!
//! Keys: stream name, 0x00, first sequence (u64, big-endian), part (u16, big-endian); a block longer than
//! [`PART_BYTES_MAX`] goes over several parts. The header's key begins with 0x00, which no stream name does.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::block::{Block, PART_BYTES_MAX, declared_length};
use super::store::Store;
use super::{BufferError, disk};
use crate::domain::{Arrival, LogIdentity, Sequence, SequenceRange, StreamName};

const HEADER_KEY: &[u8] = b"\0header";
const KEY_TAIL_BYTES: usize = 1 + 8 + 2;
const FORMAT: u32 = 1;
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
    /// Of the generation; 0 in what earlier versions wrote.
    #[serde(default)]
    pub number: u64,
    pub ranges: BTreeMap<StreamName, SequenceRange>,
    /// Numbers within the ranges that are not there.
    pub holes: Vec<(StreamName, SequenceRange)>,
    /// The number each stream's next record had when it was sealed.
    pub next: BTreeMap<StreamName, Sequence>,
    /// Stored bytes of the blocks.
    pub block_bytes: u64,
}

pub(super) fn folder_of(buffer: &Path, number: u64) -> PathBuf {
    buffer.join(format!("generation-{number:06}"))
}

/// The generations in the buffer's folder, oldest first.
pub(super) fn list(buffer: &Path) -> Result<Vec<(u64, PathBuf)>, BufferError> {
    let entries =
        std::fs::read_dir(buffer).map_err(|error| BufferError::io("list", buffer, error))?;
    let mut found: Vec<_> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix("generation-")?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Makes an empty generation; when it returns, the folder and the header are on stable storage.
pub(super) fn create(buffer: &Path, header: &Header) -> Result<Store, BufferError> {
    let folder = folder_of(buffer, header.number);
    let store = Store::open(&folder)?;
    let text = serde_json::to_vec(header)
        .map_err(|error| BufferError::io("encode the header of", &folder, error.into()))?;
    store.insert(HEADER_KEY, &text)?;
    store.sync_creation()?;
    Ok(store)
}

pub(super) fn header(
    identity: LogIdentity,
    number: u64,
    next: BTreeMap<StreamName, Sequence>,
) -> Header {
    Header { format: FORMAT, identity, number, created: Arrival::now(), next }
}

pub(super) fn read_header(store: &Store) -> Result<Header, BufferError> {
    let value = store.get(HEADER_KEY)?;
    let value = value.ok_or_else(|| BufferError::corrupt(store.folder(), "it has no header"))?;
    let header: Header = serde_json::from_slice(&value)
        .map_err(|error| BufferError::corrupt(store.folder(), error))?;
    if header.format == FORMAT {
        return Ok(header);
    }
    let reason = format!("format {} is not known to this program", header.format);
    Err(BufferError::corrupt(store.folder(), reason))
}

pub(super) fn write_sidecar(folder: &Path, contents: &Contents) -> Result<(), BufferError> {
    disk::write_json(&folder.join(SIDECAR), contents)
}

pub(super) fn remove_sidecar(folder: &Path) -> Result<(), BufferError> {
    disk::remove_file(&folder.join(SIDECAR))
}

/// `None` when there is none or it is damaged: then the generation itself is read.
pub(super) fn read_sidecar(folder: &Path) -> Option<Contents> {
    disk::read_json(&folder.join(SIDECAR)).ok().flatten()
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
fn split_key(key: &[u8]) -> Option<(&[u8], Sequence, u16)> {
    let (rest, part) = key.split_last_chunk::<2>()?;
    let (prefix, first) = rest.split_last_chunk::<8>()?;
    let named = prefix.len() > 1 && prefix.last() == Some(&0);
    named.then(|| (prefix, Sequence(u64::from_be_bytes(*first)), u16::from_be_bytes(*part)))
}

/// Hands a block to sled, one key per part. Answers its stored size.
pub(super) fn insert(store: &Store, prefix: &[u8], block: &Block) -> Result<usize, BufferError> {
    let stored = block.encode();
    for (part, bytes) in stored.chunks(PART_BYTES_MAX).enumerate() {
        let part =
            u16::try_from(part).expect("a packet of MQTT, at most 256 MiB, fits 65,536 parts");
        store.insert(&key_at(prefix, block.range().first, part), bytes)?;
    }
    Ok(stored.len())
}

/// What stands at a place of the log.
pub(super) enum Found {
    Block {
        block: Block,
        stored_bytes: usize,
    },
    /// Parts are missing, or the bytes are no block: it shows as the hole it leaves.
    Damaged,
}

/// A block whose parts are being collected.
struct Parts {
    prefix: Vec<u8>,
    first: Sequence,
    parts: u16,
    length: usize,
    bytes: Vec<u8>,
}

impl Parts {
    fn finish(self) -> Found {
        match Block::decode(&self.bytes) {
            Ok(block) if block.range().first == self.first => {
                Found::Block { block, stored_bytes: self.bytes.len() }
            }
            _ => Found::Damaged,
        }
    }
}

/// Visits blocks from a key on, in the order of the keys: (stream with its 0x00, block).
fn walk(
    store: &Store,
    from: &[u8],
    mut visit: impl FnMut(&[u8], Found) -> ControlFlow<()>,
) -> Result<(), BufferError> {
    let mut open: Option<Parts> = None;
    store.scan(from, |key, value| {
        let Some((prefix, first, part)) = split_key(key) else { return ControlFlow::Continue(()) };
        if part > 0 {
            if let Some(parts) = open.as_mut()
                && (parts.first, parts.parts) == (first, part)
                && parts.prefix == prefix
            {
                parts.parts += 1;
                parts.bytes.extend_from_slice(value);
            }
        } else {
            if let Some(torn) = open.take() {
                let prefix = torn.prefix.clone();
                visit(&prefix, torn.finish())?;
            }
            let length = declared_length(value).unwrap_or(0);
            let bytes = value.to_vec();
            open = Some(Parts { prefix: prefix.to_vec(), first, parts: 1, length, bytes });
        }
        match open.take_if(|parts| parts.bytes.len() >= parts.length) {
            Some(whole) => visit(prefix, whole.finish()),
            None => ControlFlow::Continue(()),
        }
    })?;
    if let Some(torn) = open {
        let prefix = torn.prefix.clone();
        let _ = visit(&prefix, torn.finish());
    }
    Ok(())
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
    store: &Store,
    prefix: &[u8],
    wanted: SequenceRange,
    bytes_max: usize,
) -> Result<Stretch, BufferError> {
    let before = store.at_or_before(&key_at(prefix, wanted.first, u16::MAX))?;
    let begin = before
        .as_deref()
        .and_then(split_key)
        .filter(|(found, ..)| *found == prefix)
        .map_or(wanted.first, |(_, first, _)| first);
    let mut stretch = Stretch::default();
    let mut expected = wanted.first;
    let mut bytes = 0;
    walk(store, &key_at(prefix, begin, 0), |found, what| {
        if found != prefix {
            return ControlFlow::Break(());
        }
        let Found::Block { block, .. } = what else { return ControlFlow::Continue(()) };
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

/// Reads and checks every block: what the generation holds, and the numbers missing within.
pub(super) fn verify(store: &Store) -> Result<Contents, BufferError> {
    let Header { number, next, .. } = read_header(store)?;
    let mut contents = Contents { number, next, ..Contents::default() };
    let mut unnamed = false;
    walk(store, &[1], |prefix, found| {
        let name = prefix.strip_suffix(&[0]).and_then(|name| std::str::from_utf8(name).ok());
        let Some(stream) = name.and_then(|name| StreamName::parse(name).ok()) else {
            unnamed = true;
            return ControlFlow::Break(());
        };
        // A damaged block shows as the hole it leaves; at the very end it was never acknowledged.
        if let Found::Block { block, stored_bytes } = found {
            contents.add(stream, block.range(), stored_bytes);
        }
        ControlFlow::Continue(())
    })?;
    if unnamed {
        return Err(BufferError::corrupt(store.folder(), "it holds a key that names no stream"));
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
}

/// Removes what a crash left of a block that was never acknowledged: keys at or after `next` of each stream.
pub(super) fn trim(store: &Store, contents: &Contents) -> Result<(), BufferError> {
    let mut batch = sled::Batch::default();
    let mut torn = 0;
    store.scan(&[1], |key, _| {
        let beyond = split_key(key).is_some_and(|(prefix, first, _)| {
            let name = std::str::from_utf8(&prefix[..prefix.len() - 1]).unwrap_or_default();
            let next =
                StreamName::parse(name).ok().and_then(|name| contents.next.get(&name).copied());
            first >= next.unwrap_or(Sequence(1))
        });
        if beyond {
            batch.remove(key);
            torn += 1;
        }
        ControlFlow::Continue(())
    })?;
    if torn == 0 {
        return Ok(());
    }
    store.apply(batch)?;
    store.flush()
}
