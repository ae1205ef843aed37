//! What stands around every value of a generation and of the state database, so that it is found in the raw bytes of
//! sled's file without sled.
//!
//! ```text
//!  magic, 4 bytes · crc32 u32 (of all that follows) · mask u32 · log u32 · generation u32
//!  · key length u16 · value length u16 · key, value (each 4 bytes of both exclusive-or the mask)
//! ```
//! All numbers are big-endian. sled 0.34 writes a value in one piece, as a fragment of its page and again whenever it
//! writes the whole page; unless the page is too large for its log, which [`PART_BYTES_MAX`] rules out. So as long as one
//! of these copies is whole, so is the value, whatever else of the file is harmed.
//!
//! Log and generation tell whose it is: a file system that hands out blocks of another file, or a person who exchanges
//! files, makes no record of another generation one of this. The mask is drawn anew for each frame, and such that the magic
//! does not occur behind it: a payload that looks like a frame, by chance or by intent, is none on the disk.

use std::ops::Range;

use super::block::PART_BYTES_MAX;
use crate::domain::LogIdentity;

/// No text, and nothing sled writes by itself.
pub(super) const MAGIC: [u8; 4] = [0xf5, b't', 0xfa, 0x02];
const CRC: Range<usize> = 4..8;
const MASK: Range<usize> = 8..12;
const LOG: Range<usize> = 12..16;
const GENERATION: Range<usize> = 16..20;
const KEY_LENGTH: Range<usize> = 20..22;
const VALUE_LENGTH: Range<usize> = 22..24;
pub(super) const HEAD_BYTES: usize = 24;

/// The longest frame there can be.
pub(super) const BYTES_MAX: usize = HEAD_BYTES + 2 * u16::MAX as usize;

/// Whose a frame is: a log, by the first bytes of its identity, and one of its generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Owner {
    log: u32,
    pub generation: u32,
}

impl Owner {
    /// A state database, by a number of its own. No generation has the number 0.
    pub(super) fn of_state(number: u32) -> Self {
        Owner { log: number, generation: 0 }
    }

    pub(super) fn is_state(&self) -> bool {
        self.generation == 0
    }

    pub(super) fn new(log: LogIdentity, generation: u64) -> Self {
        Owner { log: log.0.as_fields().0, generation: generation as u32 }
    }
}

/// A whole frame in front of some bytes.
pub(super) struct Frame<'a> {
    pub owner: Owner,
    /// Tells contents apart.
    pub crc: u32,
    mask: [u8; 4],
    key: &'a [u8],
    value: &'a [u8],
    /// Where the value begins in what is masked.
    shift: usize,
}

impl<'a> Frame<'a> {
    /// `None`: what `bytes` begin with is no whole frame.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let (key_length, value_length) = lengths(bytes)?;
        let frame = bytes.get(..HEAD_BYTES + key_length + value_length)?;
        let crc = number(&frame[CRC]);
        if frame[..CRC.start] != MAGIC || crc32fast::hash(&frame[CRC.end..]) != crc {
            return None;
        }
        let owner = Owner { log: number(&frame[LOG]), generation: number(&frame[GENERATION]) };
        let (key, value) = frame[HEAD_BYTES..].split_at(key_length);
        let mask = number(&frame[MASK]).to_be_bytes();
        Some(Frame { owner, crc, mask, key, value, shift: key_length })
    }

    pub(super) fn bytes(&self) -> usize {
        HEAD_BYTES + self.key.len() + self.value.len()
    }

    pub(super) fn key(&self) -> Vec<u8> {
        unmasked(self.key, self.mask, 0)
    }

    pub(super) fn value(&self) -> Vec<u8> {
        unmasked(self.value, self.mask, self.shift)
    }
}

/// What a frame, if it is one, says of the whole one's length; `None` where its head does not fit.
pub(super) fn declared_bytes(bytes: &[u8]) -> Option<usize> {
    lengths(bytes).map(|(key, value)| HEAD_BYTES + key + value)
}

fn lengths(bytes: &[u8]) -> Option<(usize, usize)> {
    let head = bytes.get(..HEAD_BYTES)?;
    Some((number(&head[KEY_LENGTH]) as usize, number(&head[VALUE_LENGTH]) as usize))
}

fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// `shift`: how many masked bytes stand before.
fn unmasked(bytes: &[u8], mut mask: [u8; 4], shift: usize) -> Vec<u8> {
    let turn = shift % mask.len();
    mask.rotate_left(turn);
    let mut bytes = bytes.to_vec();
    apply(mask, &mut bytes);
    bytes
}

fn apply(mask: [u8; 4], bytes: &mut [u8]) {
    for four in bytes.chunks_mut(mask.len()) {
        four.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
    }
}

/// A value with its frame. `key` has at most some hundred bytes.
pub(super) fn encode(owner: Owner, key: &[u8], value: &[u8]) -> Vec<u8> {
    debug_assert!(value.len() <= PART_BYTES_MAX, "a value that sled would put into a blob");
    loop {
        let mask: u32 = rand::random();
        let frame = encode_masked(owner, mask.to_be_bytes(), key, value);
        if memchr::memmem::find(&frame[1..], &MAGIC).is_none() {
            return frame;
        }
    }
}

fn encode_masked(owner: Owner, mask: [u8; 4], key: &[u8], value: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD_BYTES + key.len() + value.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&mask);
    frame.extend_from_slice(&owner.log.to_be_bytes());
    frame.extend_from_slice(&owner.generation.to_be_bytes());
    frame.extend_from_slice(&(key.len() as u16).to_be_bytes());
    frame.extend_from_slice(&(value.len() as u16).to_be_bytes());
    frame.extend_from_slice(key);
    frame.extend_from_slice(value);
    apply(mask, &mut frame[HEAD_BYTES..]);
    let crc = crc32fast::hash(&frame[CRC.end..]);
    frame[CRC].copy_from_slice(&crc.to_be_bytes());
    frame
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWNER: Owner = Owner { log: 0x0102_0304, generation: 7 };

    proptest! {
        #[test]
        fn what_is_framed_reads_back_and_a_flipped_bit_is_noticed(
            key in prop::collection::vec(any::<u8>(), 0..80),
            value in prop::collection::vec(any::<u8>(), 0..300),
            behind in prop::collection::vec(any::<u8>(), 0..20),
            bit in any::<prop::sample::Index>(),
        ) {
            let mut bytes = encode(OWNER, &key, &value);
            let whole = bytes.len();
            bytes.extend_from_slice(&behind);
            let frame = Frame::read(&bytes).unwrap();
            prop_assert_eq!(frame.owner, OWNER);
            prop_assert_eq!(frame.bytes(), whole);
            prop_assert_eq!(declared_bytes(&bytes), Some(whole));
            prop_assert_eq!(frame.key(), key);
            prop_assert_eq!(frame.value(), value);
            prop_assert!(Frame::read(&bytes[..whole - 1]).is_none());
            let bit = bit.index(whole * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Frame::read(&bytes).is_none());
        }
    }

    #[test]
    fn a_frame_within_a_value_is_none_on_the_disk() {
        let forged = encode(OWNER, b"key", b"value");
        let all: Vec<u8> = (0..=255).flat_map(|mask| MAGIC.map(|byte| byte ^ mask)).collect();
        let bytes = encode(OWNER, b"other", &[forged.as_slice(), &all].concat());
        assert!((1..bytes.len()).all(|at| Frame::read(&bytes[at..]).is_none()));
        assert!((1..bytes.len()).all(|at| !bytes[at..].starts_with(&MAGIC)));
    }
}
