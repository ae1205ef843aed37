//! What of a batch is still to be written, in order.

use std::collections::VecDeque;
use std::ops::Range;

use super::batch::{Batch, Segment};
use super::blame::Blame;

/// A batch of up to so many rows is begun in two segments, so that a refused row that is named costs the others little more
/// than the time of half of them. Only a backlog makes longer ones; there rows are late anyway, and a second COPY, which
/// costs the server as much as some six hundred rows, would take more from the speed than it gives.
const HALVED_ROWS_MAX: usize = 5_000;
/// One of fewer rows goes whole: it takes no longer than half of the longest that is halved.
const HALVED_ROWS_MIN: usize = 2_500;

/// Segments that were not yet taken by the server.
#[derive(Debug)]
pub struct Waiting {
    segments: VecDeque<Segment>,
    blame: Blame,
    one_by_one: bool,
}

impl Waiting {
    /// All of a batch.
    pub fn of(batch: &Batch) -> Waiting {
        let rows = batch.rows.len();
        let halved = (HALVED_ROWS_MIN..=HALVED_ROWS_MAX).contains(&rows);
        let whole = batch.whole();
        let segments = if halved { batch.parts(&whole, None) } else { None };
        let segments = segments.unwrap_or_else(|| vec![whole]).into();
        Waiting { segments, blame: Blame::default(), one_by_one: false }
    }

    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The only one.
    pub fn only(&self) -> Option<&Segment> {
        self.segments.front().filter(|_| self.segments.len() == 1)
    }

    pub fn take_first(&mut self) -> Option<Segment> {
        self.segments.pop_front()
    }

    /// Puts a segment before the others.
    pub fn put_first(&mut self, segment: Segment) {
        self.segments.push_front(segment);
    }

    /// These rows went in.
    pub fn taken(&mut self, rows: &Range<usize>) {
        self.blame.taken(rows);
    }

    /// The segment was refused, at its row `line`, counted from 1, where the server says so: its parts are tried next. Gives
    /// it back when there is no more than one row left to blame.
    pub fn split(
        &mut self,
        batch: &Batch,
        segment: Segment,
        line: Option<usize>,
    ) -> Result<(), Segment> {
        let suspect = self.blame.refused(&segment.rows, line);
        let parts = batch.parts(&segment, suspect).ok_or(segment)?;
        self.put_back(parts);
        Ok(())
    }

    /// As [`Waiting::split`]; a single row stays where it is.
    pub fn split_first(&mut self, batch: &Batch, line: Option<usize>) {
        let Some(first) = self.take_first() else { return };
        if let Err(row) = self.split(batch, first, line) {
            self.put_first(row);
        }
    }

    /// All of these went in, and then their transaction was refused: by the cursor, or by a constraint that waits for the
    /// commit. From here on each segment has one of its own.
    pub fn refused_together(&mut self, segments: Vec<Segment>) {
        self.one_by_one = true;
        self.put_back(segments);
    }

    fn put_back(&mut self, segments: Vec<Segment>) {
        for segment in segments.into_iter().rev() {
            self.segments.push_front(segment);
        }
    }

    /// Each segment has a transaction of its own.
    pub fn is_one_by_one(&self) -> bool {
        self.one_by_one
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::database::batch::tests::record;
    use crate::database::blame::NAMES_MAX;
    use crate::domain::Sequence;

    const ROWS: usize = 5_000;

    fn batch(rows: usize) -> Batch {
        let mut batch = Batch::behind(Sequence::ZERO);
        for sequence in 1..=rows as u64 {
            let record = record(sequence);
            batch.take(&record);
            batch.mark_row(&record);
        }
        batch
    }

    /// The row of these that a server names, the bad one being this.
    type Naming = fn(&Range<usize>, usize) -> Option<usize>;

    /// What it took to deliver a batch.
    #[derive(Debug, Default)]
    struct Taken {
        /// Rows that ended alone.
        alone: Vec<usize>,
        tries: usize,
        /// Rows sent.
        sent: usize,
    }

    /// Delivers to a server that refuses the rows `bad` and names what `line` makes of the first of them.
    fn deliver(bad: &[usize], line: Naming) -> Taken {
        let (batch, mut seen, mut next) = (batch(ROWS), Taken::default(), 0);
        let mut waiting = Waiting::of(&batch);
        while let Some(segment) = waiting.take_first() {
            seen.tries += 1;
            seen.sent += segment.rows.len();
            let Some(&row) = bad.iter().find(|&row| segment.rows.contains(row)) else {
                waiting.taken(&segment.rows);
                assert_eq!(segment.rows.start, next, "in order");
                next = segment.rows.end;
                continue;
            };
            let line = line(&segment.rows, row);
            if let Err(segment) = waiting.split(&batch, segment, line) {
                assert_eq!(segment.rows, row..row + 1);
                seen.alone.push(row);
                next = segment.rows.end;
            }
        }
        assert_eq!(next, ROWS);
        seen
    }

    fn truly(rows: &Range<usize>, bad: usize) -> Option<usize> {
        Some(bad - rows.start + 1)
    }

    #[test]
    fn of_a_named_row_the_others_of_its_segment_are_sent_once_more() {
        for row in [0, 1, 1_249, 2_499, 2_500, ROWS - 2, ROWS - 1] {
            let seen = deliver(&[row], truly);
            assert_eq!(seen.alone, [row]);
            assert!(seen.tries <= 5, "{seen:?}");
            assert_eq!(seen.sent, ROWS + ROWS / 2);
        }
        let seen = deliver(&[7, 8, 4_000], truly);
        assert_eq!((seen.alone, seen.tries), (vec![7, 8, 4_000], 10));
    }

    #[test]
    fn where_most_rows_are_refused_names_cost_no_more_than_halves() {
        let bad: Vec<usize> = (0..ROWS).collect();
        let halved = deliver(&bad, |_, _| None);
        assert_eq!(halved.alone, bad);
        let named = deliver(&bad, truly);
        assert_eq!(named.alone, bad);
        let (named, halved) = (named.sent, halved.sent);
        assert!(named <= halved + (NAMES_MAX + 1) * ROWS, "{named} rows sent, {halved} by halves");
    }

    #[test]
    fn without_a_name_or_with_wrong_ones_halves_find_it() {
        let wrong: [Naming; 4] =
            [|rows, _| Some(rows.len()), |_, _| Some(1), |_, _| None, |_, _| Some(usize::MAX)];
        for line in wrong {
            for bad in [vec![2_500], vec![1], vec![3, 4_711]] {
                let seen = deliver(&bad, line);
                assert_eq!(seen.alone, bad);
                assert!(seen.tries <= 30 * bad.len(), "{seen:?}");
            }
        }
    }

    #[test]
    fn after_a_refusal_of_all_they_come_again_in_order_and_one_by_one() {
        let batch = batch(ROWS);
        let mut waiting = Waiting::of(&batch);
        let all: Vec<Segment> = std::iter::from_fn(|| waiting.take_first()).collect();
        waiting.refused_together(all.clone());
        assert!(waiting.is_one_by_one());
        assert_eq!(std::iter::from_fn(|| waiting.take_first()).collect::<Vec<_>>(), all);
    }

    #[test]
    fn a_long_batch_is_one_segment_and_a_short_one_too() {
        for rows in [1, HALVED_ROWS_MIN - 1, HALVED_ROWS_MAX + 1] {
            let batch = batch(rows);
            assert_eq!(Waiting::of(&batch).only(), Some(&batch.whole()));
        }
        for rows in [HALVED_ROWS_MIN, HALVED_ROWS_MAX] {
            assert_eq!(Waiting::of(&batch(rows)).segments.len(), 2);
        }
        let mut none = Batch::behind(Sequence::ZERO);
        none.take(&record(1));
        assert_eq!(Waiting::of(&none).only(), Some(&none.whole()));
    }
}
