//! One batch on its way: rows as the table takes them, and what became of every other record in between.
//!
//! A batch is delivered in segments: what the server takes or refuses as one.

use std::ops::Range;
use std::time::Instant;

use bytes::BytesMut;

use super::cursor::Tally;
use super::fold::Message;
use crate::buffer::Block;
use crate::domain::{Arrival, DeadLetter, Record, Sequence};
use crate::mapping::Observed;

/// Records between two cursor positions.
#[derive(Debug, Default)]
pub struct Batch {
    /// Everything up to here is in this batch or was before it.
    pub last: Sequence,
    pub rows: Vec<RowMark>,
    /// Encoded rows, for a time series.
    pub encoded: BytesMut,
    /// Messages, for latest state; one per row mark.
    pub messages: Vec<Message>,
    /// Records that became no row, in order.
    specials: Vec<Special>,
    pub letters: Vec<DeadLetter>,
    /// So many of the letters are kept on disk.
    pub letters_kept: usize,
    /// The records' own bytes, for the one the server refuses.
    pub blocks: Vec<Block>,
    pub records: usize,
    pub payload_bytes: usize,
    /// When the first record came in: the age that ends the wait for company.
    pub opened: Option<Instant>,
    pub oldest: Option<Arrival>,
    pub observed: Observed,
}

/// A row of the batch.
#[derive(Debug, Clone, Copy)]
pub struct RowMark {
    pub sequence: Sequence,
    pub arrival: Arrival,
    /// Where its bytes end in `encoded`.
    pub end: usize,
}

/// What became of a record that is no row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    Filtered(Sequence),
    Incomplete(Sequence),
    Dead(Sequence),
    /// The log lost this many, the last of which is named.
    Lost(Sequence, u64),
}

impl Special {
    fn sequence(self) -> Sequence {
        match self {
            Special::Filtered(at)
            | Special::Incomplete(at)
            | Special::Dead(at)
            | Special::Lost(at, _) => at,
        }
    }
}

/// Rows that follow each other, and how far the cursor moves with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub rows: Range<usize>,
    pub to: Sequence,
}

impl Batch {
    /// An empty batch behind `last`.
    pub fn behind(last: Sequence) -> Batch {
        Batch { last, ..Batch::default() }
    }

    /// Nothing to move the cursor for.
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Counts a record in, whatever becomes of it.
    pub fn take(&mut self, record: &Record<'_>) {
        self.last = record.sequence;
        self.records += 1;
        self.payload_bytes += record.payload.len();
        self.opened.get_or_insert_with(Instant::now);
        self.oldest.get_or_insert(record.arrival);
    }

    pub fn mark_row(&mut self, record: &Record<'_>) {
        let end = self.encoded.len();
        self.rows.push(RowMark { sequence: record.sequence, arrival: record.arrival, end });
    }

    pub fn mark(&mut self, special: Special) {
        self.specials.push(special);
    }

    pub fn take_lost(&mut self, last: Sequence, count: u64) {
        self.last = last;
        self.records += 1;
        self.opened.get_or_insert_with(Instant::now);
        self.specials.push(Special::Lost(last, count));
    }

    /// These rows, and the records that became none up to the next row.
    pub fn segment(&self, rows: Range<usize>) -> Segment {
        let next = self.rows.get(rows.end);
        let to = next.map_or(self.last, |next| next.sequence.previous());
        Segment { rows, to }
    }

    /// Takes a row out as a dead letter; its segment is to be cut there.
    pub fn set_aside(&mut self, letter: DeadLetter) {
        let sequence = letter.key.sequence;
        let at = self.specials.partition_point(|s| s.sequence() < sequence);
        self.specials.insert(at, Special::Dead(sequence));
        self.letters.push(letter);
    }

    /// The encoded bytes of a segment's rows.
    pub fn encoded_range(&self, rows: &Range<usize>) -> Range<usize> {
        let end_of = |row: usize| row.checked_sub(1).map_or(0, |before| self.rows[before].end);
        end_of(rows.start)..end_of(rows.end)
    }

    /// What segments that follow each other add to the books when the cursor comes from `from`.
    pub fn tally(&self, segments: &[Segment], from: Sequence) -> Tally {
        let rows: usize = segments.iter().map(|segment| segment.rows.len()).sum();
        let to = segments.last().map_or(from, |segment| segment.to);
        let mut tally = Tally { delivered: rows as i64, ..Tally::default() };
        let first = self.specials.partition_point(|s| s.sequence() <= from);
        for special in self.specials[first..].iter().take_while(|s| s.sequence() <= to) {
            match special {
                Special::Filtered(_) => tally.filtered += 1,
                Special::Incomplete(_) => tally.incomplete += 1,
                Special::Dead(_) => tally.dead_lettered += 1,
                Special::Lost(_, count) => tally.lost += *count as i64,
            }
        }
        tally
    }

    /// Finds a record of the batch again and does something with it.
    pub fn with_record<T>(
        &self,
        sequence: Sequence,
        then: impl FnOnce(&Record<'_>) -> T,
    ) -> Option<T> {
        let block = self.blocks.iter().find(|block| {
            let range = block.range();
            range.first <= sequence && sequence <= range.last
        })?;
        let before = Sequence(sequence.0.saturating_sub(1));
        let record = block.records_after(before).next()?;
        (record.sequence == sequence).then(|| then(&record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(sequence: u64) -> Record<'static> {
        Record {
            sequence: Sequence(sequence),
            arrival: Arrival(0),
            topic: "t",
            payload: b"{}",
            flags: Default::default(),
            packet_id: 0,
        }
    }

    /// Rows at 1, 2, 4, 6, 7; 3 filtered, 5 incomplete, 8 to 9 lost.
    fn batch() -> Batch {
        let mut batch = Batch::behind(Sequence::ZERO);
        for sequence in 1..=7 {
            batch.take(&record(sequence));
            match sequence {
                3 => batch.mark(Special::Filtered(Sequence(3))),
                5 => batch.mark(Special::Incomplete(Sequence(5))),
                _ => {
                    batch.encoded.extend_from_slice(&[sequence as u8; 3]);
                    batch.mark_row(&record(sequence));
                }
            }
        }
        batch.take_lost(Sequence(9), 2);
        batch
    }

    fn accounted(tally: Tally) -> i64 {
        tally.delivered + tally.filtered + tally.incomplete + tally.dead_lettered + tally.lost
    }

    #[test]
    fn a_segment_reaches_to_the_row_behind_it() {
        let batch = batch();
        let to = |rows| batch.segment(rows).to.0;
        assert_eq!([to(0..1), to(0..2), to(1..3), to(3..5)], [1, 3, 5, 9]);
        assert_eq!([to(1..1), to(5..5)], [1, 9], "the cursor alone");
        assert_eq!(batch.encoded_range(&(2..5)), 6..15);
    }

    #[test]
    fn however_a_batch_is_cut_its_tallies_add_up_to_the_records_passed() {
        let batch = batch();
        for cuts in [vec![0, 5], vec![0, 2, 5], vec![0, 0, 1, 4, 4, 5], vec![0, 1, 2, 3, 4, 5]] {
            let rows = cuts.windows(2).map(|ends| ends[0]..ends[1]);
            let segments: Vec<Segment> = rows.map(|rows| batch.segment(rows)).collect();
            let mut from = Sequence::ZERO;
            for segment in &segments {
                let tally = batch.tally(std::slice::from_ref(segment), from);
                assert_eq!(accounted(tally), segment.to.since(from) as i64, "{segment:?}");
                from = segment.to;
            }
            assert_eq!(from, Sequence(9));
            assert_eq!(accounted(batch.tally(&segments, Sequence::ZERO)), 9, "{cuts:?}");
        }
    }
}
