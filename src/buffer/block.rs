//! The unit of the log: up to 16 records of one stream, encoded once by the writer, checked once when read back.
//!
//! ```text
//!  version u8 · crc32 u32 (of all that follows) · length u32 (of the whole block) · first sequence u64 · count u16
//!  then per record: arrival i64 (µs) · flags u8 · packet id u16
//!                   · topic length u16, topic   (0xffff: same topic as the record before)
//!                   · payload length u32, payload
//! ```
//! All numbers are big-endian. The sequence of a record is the block's first plus its place.

use std::str;

use bytes::Bytes;

use super::Incoming;
use crate::domain::{Arrival, DeliveryFlags, Record, Sequence, SequenceRange};

/// A sled leaf holds 16 keys of whatever size, so 16 records per key keep its tree small.
pub(super) const BLOCK_RECORDS_MAX: usize = 16;

/// Values of at most this size keep 17 of them in one sled page, below the size at which sled would write the page to
/// a blob file, which it never syncs. A longer block is split over keys.
pub(super) const PART_BYTES_MAX: usize = 7_300;

const VERSION: u8 = 1;
const CRC_AT: usize = 1;
const LENGTH_AT: usize = 5;
const FIRST_AT: usize = 9;
const COUNT_AT: usize = 17;
const HEADER_BYTES: usize = 19;
const RECORD_HEADER_BYTES: usize = 8 + 1 + 2 + 2 + 4;
const SAME_TOPIC: u16 = u16::MAX;

const FLAG_QOS: u8 = 0b0000_0011;
const FLAG_RETAIN: u8 = 0b0000_0100;
const FLAG_DUP: u8 = 0b0000_1000;
const FLAG_TRUNCATED: u8 = 0b0001_0000;

/// Why bytes are no block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BlockError {
    #[error("shorter than a block's header")]
    Short,
    #[error("block version {0} is not known to this program")]
    Version(u8),
    #[error("the block's length does not match")]
    Length,
    #[error("the block's check sum does not match")]
    Checksum,
    #[error("the block's records do not fit its length")]
    Structure,
}

/// Up to some 16 records, or one large one, as they stand in the log: encoded once by the writer, checked once by CRC
/// when read back, shared by every sink. Cloning copies a pointer.
#[derive(Debug, Clone)]
pub struct Block {
    bytes: Bytes,
    range: SequenceRange,
}

impl Block {
    /// Takes encoded bytes; whatever they are, they are a whole block afterwards or refused.
    pub(super) fn decode(bytes: Bytes) -> Result<Block, BlockError> {
        if bytes.len() < HEADER_BYTES {
            return Err(BlockError::Short);
        }
        if bytes[0] != VERSION {
            return Err(BlockError::Version(bytes[0]));
        }
        if declared_length(&bytes) != Some(bytes.len()) {
            return Err(BlockError::Length);
        }
        if crc32fast::hash(&bytes[LENGTH_AT..]).to_be_bytes() != bytes[CRC_AT..LENGTH_AT] {
            return Err(BlockError::Checksum);
        }
        let (first, count) = first_and_count(&bytes);
        let last = first.checked_add(count.wrapping_sub(1)).ok_or(BlockError::Structure)?;
        if count == 0 || first == 0 {
            return Err(BlockError::Structure);
        }
        let range = SequenceRange { first: Sequence(first), last: Sequence(last) };
        let block = Block { bytes, range };
        let mut records = block.cursor();
        let whole = records.by_ref().count() as u64 == count && records.rest.is_empty();
        if whole { Ok(block) } else { Err(BlockError::Structure) }
    }

    pub fn range(&self) -> SequenceRange {
        self.range
    }

    /// Encoded size.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn encoded(&self) -> &[u8] {
        &self.bytes
    }

    /// The records of the block; those up to and including `after` are left out.
    pub fn records_after(&self, after: Sequence) -> impl Iterator<Item = Record<'_>> {
        self.cursor().skip_while(move |record| record.sequence <= after)
    }

    fn cursor(&self) -> Cursor<'_> {
        Cursor {
            rest: &self.bytes[HEADER_BYTES..],
            next: self.range.first,
            last: self.range.last,
            topic: None,
        }
    }
}

/// What the header in the first part says of the whole block's length; `None` when there is no header.
pub(super) fn declared_length(first_part: &[u8]) -> Option<usize> {
    let field = first_part.get(LENGTH_AT..FIRST_AT)?;
    Some(u32::from_be_bytes(field.try_into().ok()?) as usize)
}

fn first_and_count(bytes: &[u8]) -> (u64, u64) {
    let fold = |range: std::ops::Range<usize>| {
        bytes[range].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    (fold(FIRST_AT..COUNT_AT), fold(COUNT_AT..HEADER_BYTES))
}

/// Walks the records; ends early, never panics, on bytes that do not fit.
struct Cursor<'a> {
    rest: &'a [u8],
    next: Sequence,
    last: Sequence,
    topic: Option<&'a str>,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }
}

impl<'a> Iterator for Cursor<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        if self.next > self.last {
            return None;
        }
        let sequence = self.next;
        let arrival = Arrival(i64::from_be_bytes(self.array()?));
        let [flags] = self.array()?;
        let packet_id = u16::from_be_bytes(self.array()?);
        let topic = match u16::from_be_bytes(self.array()?) {
            SAME_TOPIC => self.topic?,
            bytes => str::from_utf8(self.take(usize::from(bytes))?).ok()?,
        };
        let payload_bytes = u32::from_be_bytes(self.array()?);
        let payload = self.take(payload_bytes as usize)?;
        self.topic = Some(topic);
        self.next = sequence.next();
        Some(Record { sequence, arrival, topic, payload, flags: unpack(flags), packet_id })
    }
}

fn pack(flags: DeliveryFlags) -> u8 {
    let bit = |set: bool, bit: u8| if set { bit } else { 0 };
    flags.qos & FLAG_QOS
        | bit(flags.retain, FLAG_RETAIN)
        | bit(flags.dup, FLAG_DUP)
        | bit(flags.truncated, FLAG_TRUNCATED)
}

fn unpack(flags: u8) -> DeliveryFlags {
    DeliveryFlags {
        qos: flags & FLAG_QOS,
        retain: flags & FLAG_RETAIN != 0,
        dup: flags & FLAG_DUP != 0,
        truncated: flags & FLAG_TRUNCATED != 0,
    }
}

/// Cuts a stream's messages into blocks, numbering them.
#[derive(Debug)]
pub(super) struct BlockBuilder {
    next: Sequence,
    buffer: Vec<u8>,
    count: usize,
    /// Where in `buffer` the topic of the last record stands.
    topic: std::ops::Range<usize>,
    done: Vec<Block>,
}

impl BlockBuilder {
    /// The first message pushed gets the number `next`.
    pub(super) fn new(next: Sequence) -> Self {
        BlockBuilder { next, buffer: Vec::new(), count: 0, topic: 0..0, done: Vec::new() }
    }

    pub(super) fn push(&mut self, message: &Incoming) {
        // A topic is UTF-8 by the protocol; replacing what is not keeps the rest of the block readable.
        let topic = String::from_utf8_lossy(&message.topic);
        let topic = &topic[..topic.floor_char_boundary(usize::from(SAME_TOPIC - 1))];
        let bytes = RECORD_HEADER_BYTES + topic.len() + message.payload.len();
        let full = self.count == BLOCK_RECORDS_MAX || self.buffer.len() + bytes > PART_BYTES_MAX;
        if self.count > 0 && full {
            self.cut();
        }
        if self.count == 0 {
            let typical = (HEADER_BYTES + bytes * BLOCK_RECORDS_MAX).min(PART_BYTES_MAX);
            self.buffer = Vec::with_capacity(typical.max(HEADER_BYTES + bytes));
            self.buffer.resize(HEADER_BYTES, 0);
            self.topic = 0..0;
        }
        self.write(message, topic);
        self.count += 1;
        self.next = self.next.next();
    }

    fn write(&mut self, message: &Incoming, topic: &str) {
        let buffer = &mut self.buffer;
        buffer.extend_from_slice(&message.arrival.as_micros().to_be_bytes());
        buffer.push(pack(message.flags));
        buffer.extend_from_slice(&message.packet_id.to_be_bytes());
        if self.count > 0 && &buffer[self.topic.clone()] == topic.as_bytes() {
            buffer.extend_from_slice(&SAME_TOPIC.to_be_bytes());
        } else {
            buffer.extend_from_slice(&(topic.len() as u16).to_be_bytes());
            let begin = buffer.len();
            buffer.extend_from_slice(topic.as_bytes());
            self.topic = begin..buffer.len();
        }
        buffer.extend_from_slice(&(message.payload.len() as u32).to_be_bytes());
        buffer.extend_from_slice(&message.payload);
    }

    fn cut(&mut self) {
        let mut bytes = std::mem::take(&mut self.buffer);
        let count = std::mem::take(&mut self.count);
        let first = Sequence(self.next.0 - count as u64);
        let length = bytes.len() as u32;
        bytes[0] = VERSION;
        bytes[LENGTH_AT..FIRST_AT].copy_from_slice(&length.to_be_bytes());
        bytes[FIRST_AT..COUNT_AT].copy_from_slice(&first.0.to_be_bytes());
        bytes[COUNT_AT..HEADER_BYTES].copy_from_slice(&(count as u16).to_be_bytes());
        let crc = crc32fast::hash(&bytes[LENGTH_AT..]);
        bytes[CRC_AT..LENGTH_AT].copy_from_slice(&crc.to_be_bytes());
        let range = SequenceRange { first, last: Sequence(self.next.0 - 1) };
        self.done.push(Block { bytes: bytes.into(), range });
    }

    /// The number of the message pushed last.
    pub(super) fn last(&self) -> Sequence {
        Sequence(self.next.0 - 1)
    }

    /// All blocks, in order.
    pub(super) fn finish(mut self) -> Vec<Block> {
        if self.count > 0 {
            self.cut();
        }
        self.done
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn incoming() -> impl Strategy<Value = Incoming> {
        // Lengths decide where blocks are cut; a random byte each would cost seconds.
        let length = prop_oneof![4 => 0..700_usize, 1 => 7_000..20_000_usize];
        let payload = (length, any::<u8>()).prop_map(|(length, start)| {
            (0..length).map(|at| start.wrapping_add(at as u8)).collect::<Vec<u8>>()
        });
        let topic = prop_oneof![Just("same/topic".to_owned()), "[a-zäé/]{0,40}"];
        let flags = (0u8..4, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(qos, retain, dup, truncated)| DeliveryFlags { qos, retain, dup, truncated },
        );
        (topic, payload, any::<i64>(), flags, any::<u16>()).prop_map(
            |(topic, payload, arrival, flags, packet_id)| Incoming {
                topic: topic.into(),
                payload: payload.into(),
                arrival: Arrival(arrival),
                flags,
                packet_id,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_built_reads_back(
            messages in prop::collection::vec(incoming(), 1..60),
            first in 1..u64::MAX / 2,
        ) {
            let mut builder = BlockBuilder::new(Sequence(first));
            messages.iter().for_each(|message| builder.push(message));
            prop_assert_eq!(builder.last(), Sequence(first + messages.len() as u64 - 1));
            let blocks = builder.finish();
            let mut expected = messages.iter().zip(first..);
            for block in &blocks {
                let read = Block::decode(Bytes::copy_from_slice(block.encoded())).unwrap();
                prop_assert_eq!(read.range(), block.range());
                let records: Vec<_> = read.records_after(Sequence::ZERO).collect();
                prop_assert!(records.len() <= BLOCK_RECORDS_MAX);
                prop_assert!(records.len() == 1 || read.bytes() <= PART_BYTES_MAX);
                for record in records {
                    let (message, sequence) = expected.next().unwrap();
                    prop_assert_eq!(record.sequence, Sequence(sequence));
                    prop_assert_eq!(record.topic.as_bytes(), &message.topic[..]);
                    prop_assert_eq!(record.payload, &message.payload[..]);
                    prop_assert_eq!(record.arrival, message.arrival);
                    prop_assert_eq!(record.flags, message.flags);
                    prop_assert_eq!(record.packet_id, message.packet_id);
                }
            }
            prop_assert!(expected.next().is_none());
        }

        #[test]
        fn arbitrary_bytes_are_refused_without_a_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            whole in any::<bool>(),
        ) {
            // With a header that fits, so that the records are looked at.
            if whole && bytes.len() >= HEADER_BYTES {
                let length = (bytes.len() as u32).to_be_bytes();
                bytes[0] = VERSION;
                bytes[LENGTH_AT..FIRST_AT].copy_from_slice(&length);
                let crc = crc32fast::hash(&bytes[LENGTH_AT..]).to_be_bytes();
                bytes[CRC_AT..LENGTH_AT].copy_from_slice(&crc);
            }
            if let Ok(block) = Block::decode(bytes.into()) {
                prop_assert_eq!(
                    block.records_after(Sequence::ZERO).count() as u64,
                    block.range().count()
                );
            }
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let mut builder = BlockBuilder::new(Sequence(5));
        for n in 0..3u8 {
            builder.push(&Incoming {
                topic: Bytes::from_static(b"t"),
                payload: vec![n; 20].into(),
                arrival: Arrival(1),
                flags: DeliveryFlags::default(),
                packet_id: 1,
            });
        }
        let whole = builder.finish().remove(0);
        let after: Vec<_> = whole.records_after(Sequence(6)).map(|r| r.sequence.0).collect();
        assert_eq!(after, [7]);
        for bit in 0..whole.bytes() * 8 {
            let mut bytes = whole.encoded().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Block::decode(bytes.into()).is_err(), "bit {bit}");
        }
    }
}
