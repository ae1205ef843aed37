//! The unit of the log: up to 64 records of one stream, encoded once by the writer, checked once when read back.
//!
//! ```text
//!  version u8 · crc32 u32 (of all that follows) · length u32 (of the whole block) · first sequence u64 · count u16
//!  · records length u32, records as one LZ4 block (as they are where that is no shorter)
//!  each record: arrival i64 (µs) · flags u8 · packet id u16
//!               · topic length u16, topic   (0xffff: same topic as the record before)
//!               · payload length u32, payload
//! ```
//! All numbers are big-endian. The sequence of a record is the block's first plus its place. Messages of one stream are
//! much alike: compressed, an hour of them takes a fifth of the disk, and sled, which writes everything several times,
//! a fifth of the work.

use std::str;

use bytes::Bytes;

use super::Incoming;
use crate::domain::{Arrival, DeliveryFlags, Record, Sequence, SequenceRange};

/// A sled leaf holds 16 keys of whatever size, so many records per key keep its tree small.
pub(super) const BLOCK_RECORDS_MAX: usize = 64;

/// Records of one block before compression, unless it is a single one: compressed, most blocks fit one part.
pub(super) const BLOCK_BYTES_MAX: usize = 32 << 10;

/// Values of at most this size, with a frame (`frame.rs`) around each, keep 17 of them in one sled page, below the size at
/// which sled would write the page to a blob file, which it never syncs. A longer block is split over keys.
pub(super) const PART_BYTES_MAX: usize = 7_200;

const VERSION: u8 = 2;
const CRC_AT: usize = 1;
const LENGTH_AT: usize = 5;
const FIRST_AT: usize = 9;
const COUNT_AT: usize = 17;
const RECORDS_LENGTH_AT: usize = 19;
const HEADER_BYTES: usize = 23;
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

/// Up to 64 records, or one large one, as they are in memory: encoded once by the writer, checked once by CRC when read
/// back, shared by every sink. Cloning copies a pointer.
#[derive(Debug, Clone)]
pub struct Block {
    records: Bytes,
    range: SequenceRange,
}

impl Block {
    /// Takes stored bytes; whatever they are, they are a whole block afterwards or refused.
    pub(super) fn decode(stored: &[u8]) -> Result<Block, BlockError> {
        if stored.len() < HEADER_BYTES {
            return Err(BlockError::Short);
        }
        if stored[0] != VERSION {
            return Err(BlockError::Version(stored[0]));
        }
        if declared_length(stored) != Some(stored.len()) {
            return Err(BlockError::Length);
        }
        if crc32fast::hash(&stored[LENGTH_AT..]).to_be_bytes() != stored[CRC_AT..LENGTH_AT] {
            return Err(BlockError::Checksum);
        }
        let (first, count) =
            (number(stored, FIRST_AT..COUNT_AT), number(stored, COUNT_AT..RECORDS_LENGTH_AT));
        // A number follows the last one, too.
        let next = first.checked_add(count).ok_or(BlockError::Structure)?;
        if count == 0 || first == 0 {
            return Err(BlockError::Structure);
        }
        let last = next - 1;
        let length = number(stored, RECORDS_LENGTH_AT..HEADER_BYTES) as usize;
        let records = unpack_records(&stored[HEADER_BYTES..], length)?;
        let range = SequenceRange { first: Sequence(first), last: Sequence(last) };
        let block = Block { records: records.into(), range };
        let mut records = block.cursor();
        let whole = records.by_ref().count() as u64 == count && records.rest.is_empty();
        if whole { Ok(block) } else { Err(BlockError::Structure) }
    }

    /// As it goes to the disk.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut stored =
            vec![0; HEADER_BYTES + lz4_flex::block::get_maximum_output_size(self.records.len())];
        let packed = lz4_flex::block::compress_into(&self.records, &mut stored[HEADER_BYTES..])
            .ok()
            .filter(|packed| *packed < self.records.len());
        match packed {
            Some(packed) => stored.truncate(HEADER_BYTES + packed),
            None => {
                stored.truncate(HEADER_BYTES);
                stored.extend_from_slice(&self.records);
            }
        }
        let SequenceRange { first, .. } = self.range;
        let length = stored.len() as u32;
        stored[0] = VERSION;
        stored[LENGTH_AT..FIRST_AT].copy_from_slice(&length.to_be_bytes());
        stored[FIRST_AT..COUNT_AT].copy_from_slice(&first.0.to_be_bytes());
        stored[COUNT_AT..RECORDS_LENGTH_AT]
            .copy_from_slice(&(self.range.count() as u16).to_be_bytes());
        stored[RECORDS_LENGTH_AT..HEADER_BYTES]
            .copy_from_slice(&(self.records.len() as u32).to_be_bytes());
        let crc = crc32fast::hash(&stored[LENGTH_AT..]);
        stored[CRC_AT..LENGTH_AT].copy_from_slice(&crc.to_be_bytes());
        stored
    }

    pub fn range(&self) -> SequenceRange {
        self.range
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.records.len()
    }

    /// The records of the block; those up to and including `after` are left out.
    pub fn records_after(&self, after: Sequence) -> impl Iterator<Item = Record<'_>> {
        self.cursor().skip_while(move |record| record.sequence <= after)
    }

    fn cursor(&self) -> Cursor<'_> {
        Cursor { rest: &self.records, next: self.range.first, last: self.range.last, topic: None }
    }
}

/// `length`: of the records. They may be millions in a header made up by chance, so nothing is set aside before LZ4, which
/// never yields more than 255 bytes for one, could have made that many.
fn unpack_records(packed: &[u8], length: usize) -> Result<Vec<u8>, BlockError> {
    if packed.len() == length {
        return Ok(packed.to_vec());
    }
    if packed.len().saturating_mul(255) < length {
        return Err(BlockError::Structure);
    }
    lz4_flex::block::decompress(packed, length)
        .ok()
        .filter(|records| records.len() == length)
        .ok_or(BlockError::Structure)
}

/// What the header in the first part says of the whole block's length; `None` when there is no header.
pub(super) fn declared_length(first_part: &[u8]) -> Option<usize> {
    let field = first_part.get(LENGTH_AT..FIRST_AT)?;
    Some(u32::from_be_bytes(field.try_into().ok()?) as usize)
}

fn number(bytes: &[u8], at: std::ops::Range<usize>) -> u64 {
    bytes[at].iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
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
        let full = self.count == BLOCK_RECORDS_MAX || self.buffer.len() + bytes > BLOCK_BYTES_MAX;
        if self.count > 0 && full {
            self.cut();
        }
        if self.count == 0 {
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
        let records = Bytes::copy_from_slice(&self.buffer);
        self.buffer.clear();
        let count = std::mem::take(&mut self.count);
        let first = Sequence(self.next.0 - count as u64);
        let range = SequenceRange { first, last: Sequence(self.next.0 - 1) };
        self.done.push(Block { records, range });
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

/// Any bytes as a block: as they are, and with a header that fits, so that the records are looked at. What is taken for a
/// block has as many records as it says and comes out of another encoding as it went in.
#[cfg(any(test, fuzzing))]
pub fn fuzz(bytes: &[u8]) {
    let mut stored = bytes.to_vec();
    let _ = Block::decode(&stored);
    if stored.len() < HEADER_BYTES {
        return;
    }
    let length = (stored.len() as u32).to_be_bytes();
    stored[0] = VERSION;
    stored[LENGTH_AT..FIRST_AT].copy_from_slice(&length);
    let crc = crc32fast::hash(&stored[LENGTH_AT..]).to_be_bytes();
    stored[CRC_AT..LENGTH_AT].copy_from_slice(&crc);
    let Ok(block) = Block::decode(&stored) else { return };
    let records: Vec<_> = block.records_after(Sequence::ZERO).collect();
    assert_eq!(records.len() as u64, block.range().count());
    let again = Block::decode(&block.encode()).expect("what was a block is one again");
    assert_eq!(again.range(), block.range());
    assert!(again.records_after(Sequence::ZERO).eq(records), "other records");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn incoming() -> impl Strategy<Value = Incoming> {
        // Lengths decide where blocks are cut; a random byte each would cost seconds.
        let length = prop_oneof![4 => 0..700_usize, 1 => 7_000..20_000_usize];
        // A step of one compresses to nothing, the multiplier of a random generator not at all.
        let step = prop_oneof![Just(1_u32), Just(1_664_525)];
        let payload = (length, any::<u32>(), step).prop_map(|(length, start, step)| {
            let next = |value: &u32| Some(value.wrapping_mul(step).wrapping_add(1));
            let values = std::iter::successors(Some(start), next).take(length);
            values.map(|value| (value >> 24) as u8).collect::<Vec<u8>>()
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
                let read = Block::decode(&block.encode()).unwrap();
                prop_assert_eq!(read.range(), block.range());
                let records: Vec<_> = read.records_after(Sequence::ZERO).collect();
                prop_assert!(records.len() <= BLOCK_RECORDS_MAX);
                prop_assert!(records.len() == 1 || read.bytes() <= BLOCK_BYTES_MAX);
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
            if let Ok(block) = Block::decode(&bytes) {
                prop_assert_eq!(
                    block.records_after(Sequence::ZERO).count() as u64,
                    block.range().count()
                );
            }
        }
    }

    /// Found by the fuzzer: the number behind the last record did not exist.
    #[test]
    fn a_block_that_would_use_the_last_number_there_is_is_refused() {
        let last = |last: u64| {
            let mut block = BlockBuilder::new(Sequence(1));
            block.push(&Incoming {
                topic: Bytes::from_static(b"t"),
                payload: Bytes::new(),
                arrival: Arrival(1),
                flags: DeliveryFlags::default(),
                packet_id: 1,
            });
            let mut block = block.finish().remove(0);
            block.range = SequenceRange { first: Sequence(last), last: Sequence(last) };
            Block::decode(&block.encode()).map(|block| block.range())
        };
        assert_eq!(last(u64::MAX).unwrap_err(), BlockError::Structure);
        assert_eq!(last(u64::MAX - 1).unwrap().count(), 1);
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
        let stored = whole.encode();
        for bit in 0..stored.len() * 8 {
            let mut bytes = stored.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Block::decode(&bytes).is_err(), "bit {bit}");
        }
    }
}
