//! How the state database holds its values: keys, and what stands in the frames.
//!
//! ```text
//!  meta 0 format                         u32
//!  meta 0 start                          rises with each opening (the probe of the sync self-check), u64
//!  books 0 stream 0 sink                 Books, JSON
//!  letter 0 sink 0 stream 0 sequence     parts of: length u32, DeadLetter as JSON without payload, payload
//!  count 0 sink 0 stream                 dead letters and their bytes, two u64
//!  replayed 0 sink 0 stream 0            letters that left as delivered, u64: the saved books do not know of them
//!  copy 0 cluster 0 · key of a letter    nothing; the letter is still to be copied to this Kafka cluster
//!  note 0 key 0                          parts of the value
//! ```
//! A value longer than a part is split; the part number (u16) ends the key.
//!
//! Each value has a frame around it (`frame.rs`), in which it stands behind a head ([`Part`]): the version, by which parts
//! of two values of one key are told apart and the newer of two is known; up to which version all is on stable storage; the
//! length of the whole. So letters are found in the bytes of the file when sled cannot open it (`salvage.rs`). The owner of
//! the frames is drawn when the database is made.

use std::collections::BTreeMap;

use super::frame::{self, Frame, Owner};
use crate::domain::{DeadLetter, DeadLetterKey, Sequence, SinkName, StreamName};

pub(super) const META: &[u8] = b"meta\0format";
pub(super) const START: &[u8] = b"meta\0start";
pub(super) const BOOKS: &[u8] = b"books\0";
pub(super) const LETTER: &[u8] = b"letter\0";
pub(super) const COUNT: &[u8] = b"count\0";
pub(super) const REPLAYED: &[u8] = b"replayed\0";
pub(super) const COPY: &[u8] = b"copy\0";
pub(super) const NOTE: &[u8] = b"note\0";

/// Version u64, synced u64, length u32.
const PART_HEAD_BYTES: usize = 8 + 8 + 4;
/// Less than in a generation (`block.rs`): where values are removed, sled joins pages, and one may have 20 values or some more
/// before it is divided. A page of 25 still stays below the size of a blob.
pub(super) const PART_MAX: usize = 5_000 - PART_HEAD_BYTES;

/// What stands in a frame: a value, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// Of all that one call changed.
    pub version: u64,
    /// What has this version or a lower one was on stable storage when this was written.
    pub synced: u64,
    /// Of the whole value.
    pub length: u32,
    pub bytes: Vec<u8>,
}

impl Part {
    pub(super) fn of(frame: &Frame<'_>) -> Option<Self> {
        let value = frame.value();
        let (version, rest) = value.split_first_chunk::<8>()?;
        let (synced, rest) = rest.split_first_chunk::<8>()?;
        let (length, bytes) = rest.split_first_chunk::<4>()?;
        Some(Part {
            version: u64::from_be_bytes(*version),
            synced: u64::from_be_bytes(*synced),
            length: u32::from_be_bytes(*length),
            bytes: bytes.to_vec(),
        })
    }

    /// As it stands in the database.
    pub(super) fn read(key: &[u8], framed: &[u8]) -> Option<Self> {
        let whole = Frame::read(framed);
        let whole = whole.filter(|frame| frame.bytes() == framed.len() && frame.key() == key)?;
        Self::of(&whole)
    }
}

/// A value, or a part of one, as it goes into the database. `versions`: its own, and what is on stable storage. `length`:
/// of the whole value.
pub(super) fn framed(
    owner: Owner,
    key: &[u8],
    versions: [u64; 2],
    length: usize,
    bytes: &[u8],
) -> Vec<u8> {
    let mut value = Vec::with_capacity(PART_HEAD_BYTES + bytes.len());
    value.extend(versions.into_iter().flat_map(u64::to_be_bytes));
    value.extend_from_slice(&(length as u32).to_be_bytes());
    value.extend_from_slice(bytes);
    frame::encode(owner, key, &value)
}

/// What a key of the database stands for, as far as it is looked for in the raw file.
pub(super) enum Kind {
    Letter(DeadLetterKey, u16),
    Count(SinkName, StreamName),
    /// Of a letter still to be copied to this cluster.
    Copy(String),
    Other,
}

impl Kind {
    pub(super) fn of(key: &[u8]) -> Self {
        if let Some((key, part)) = split_letter_key(key) {
            return Kind::Letter(key, part);
        }
        if let Some((sink, stream)) = key.strip_prefix(COUNT).and_then(split_names) {
            return Kind::Count(sink, stream);
        }
        let cluster = key.strip_prefix(COPY).and_then(|rest| rest.split(|byte| *byte == 0).next());
        let cluster = cluster.and_then(|name| std::str::from_utf8(name).ok());
        cluster.map_or(Kind::Other, |name| Kind::Copy(name.to_owned()))
    }
}

/// Whose letters.
pub(super) type Names = (SinkName, StreamName);

/// By sink: the version in which the number of letters changed last, and that number.
pub(super) type Counts = BTreeMap<Names, (u64, u64)>;

/// Dead letters of one sink of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub letters: u64,
    pub bytes: u64,
}

impl Count {
    pub(super) fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.letters.to_be_bytes());
        bytes[8..].copy_from_slice(&self.bytes.to_be_bytes());
        bytes
    }
}

pub(super) fn join(kind: &[u8], names: &[&str]) -> Vec<u8> {
    let mut key = kind.to_vec();
    for name in names {
        key.extend_from_slice(name.as_bytes());
        key.push(0);
    }
    key
}

pub(super) fn letter_key(key: &DeadLetterKey) -> Vec<u8> {
    let mut bytes = join(LETTER, &[key.sink.as_str(), key.stream.as_str()]);
    bytes.extend_from_slice(&key.sequence.0.to_be_bytes());
    bytes
}

pub(super) fn copy_key(cluster: &str, letter_key: &[u8]) -> Vec<u8> {
    [join(COPY, &[cluster]).as_slice(), letter_key].concat()
}

/// What a letter's key says, with the part number behind it.
pub(super) fn split_letter_key(key: &[u8]) -> Option<(DeadLetterKey, u16)> {
    let (rest, part) = key.strip_prefix(LETTER)?.split_last_chunk::<2>()?;
    let (names, sequence) = rest.split_last_chunk::<8>()?;
    let (sink, stream) = split_names(names)?;
    let key = DeadLetterKey { sink, stream, sequence: Sequence(u64::from_be_bytes(*sequence)) };
    Some((key, u16::from_be_bytes(*part)))
}

pub(super) fn split_names(names: &[u8]) -> Option<(SinkName, StreamName)> {
    let (sink, stream) = std::str::from_utf8(names.strip_suffix(&[0])?).ok()?.split_once('\0')?;
    Some((SinkName::parse(sink).ok()?, StreamName::parse(stream).ok()?))
}

pub(super) fn encode_letter(letter: &DeadLetter) -> Result<Vec<u8>, serde_json::Error> {
    let head = serde_json::to_vec(&DeadLetter { payload: Vec::new(), ..letter.clone() })?;
    let mut value = Vec::with_capacity(4 + head.len() + letter.payload.len());
    value.extend_from_slice(&(head.len() as u32).to_be_bytes());
    value.extend_from_slice(&head);
    value.extend_from_slice(&letter.payload);
    Ok(value)
}

pub(super) fn decode_letter(value: &[u8]) -> Option<DeadLetter> {
    let (length, rest) = value.split_first_chunk::<4>()?;
    let (head, payload) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    let mut letter: DeadLetter = serde_json::from_slice(head).ok()?;
    letter.payload = payload.to_vec();
    Some(letter)
}

pub(super) fn decode_count(value: &[u8]) -> Option<Count> {
    let (letters, rest) = value.split_first_chunk::<8>()?;
    let bytes = rest.try_into().ok()?;
    Some(Count { letters: u64::from_be_bytes(*letters), bytes: u64::from_be_bytes(bytes) })
}
