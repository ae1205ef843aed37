//! What of a batch is still to be written, in order.

use std::ops::Range;

use super::blame::Blame;
use super::halves::Halves;

/// A time series' batch of up to so many rows is begun in two parts, so that a refused row that is named costs the others
/// little more than the time of half of them. Only a backlog makes longer ones; there rows are late anyway, and a second
/// COPY, which costs the server as much as some six hundred rows, would take more from the speed than it gives.
const HALVED_ROWS_MAX: usize = 5_000;
/// One of fewer rows goes whole: it takes no longer than half of the longest that is halved.
const HALVED_ROWS_MIN: usize = 2_500;

/// Rows that were not yet taken by the server.
#[derive(Debug)]
pub struct Waiting {
    parts: Halves,
    blame: Blame,
    one_by_one: bool,
}

impl Waiting {
    /// All rows of a batch; one without any still moves the cursor.
    pub fn whole(rows: usize) -> Waiting {
        let parts = Halves::of(std::iter::once(0..rows));
        Waiting { parts, blame: Blame::default(), one_by_one: false }
    }

    /// All rows of a batch of a time series.
    pub fn of_time_series(rows: usize) -> Waiting {
        let mut waiting = Waiting::whole(rows);
        if (HALVED_ROWS_MIN..=HALVED_ROWS_MAX).contains(&rows) {
            waiting.parts = Halves::of([0..rows / 2, rows / 2..rows]);
        }
        waiting
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// What is left, when it is to be tried as one.
    pub fn only(&self) -> Option<Range<usize>> {
        self.parts.only()
    }

    /// What to try.
    pub fn next(&mut self) -> Option<Range<usize>> {
        self.parts.next()
    }

    /// The next rows went in.
    pub fn taken(&mut self) {
        if let Some(rows) = self.next() {
            self.blame.taken(&rows);
            self.parts.taken();
        }
    }

    /// The next rows were refused, at the row `line` of them, counted from 1, where the server says so: their parts are tried
    /// instead. False when it is no more than one row, which stays.
    pub fn refused(&mut self, line: Option<usize>) -> bool {
        let Some(rows) = self.next() else { return false };
        let Some(row) = self.blame.refused(&rows, line) else { return self.parts.split() };
        self.parts.split_around(row);
        true
    }

    /// The next row is a dead letter, and its transaction moves the cursor past it.
    pub fn passed(&mut self) {
        self.parts.passed();
    }

    /// The next row is a dead letter: of it the cursor's move alone is left.
    pub fn leave_cursor(&mut self) {
        if let Some(Range { end, .. }) = self.next() {
            self.parts.passed();
            self.parts.put_back(std::iter::once(end..end));
        }
    }

    /// All of these went in, and then their transaction was refused: by the cursor, or by a constraint that waits for the
    /// commit. From here on each has one of its own.
    pub fn refused_together(&mut self, parts: impl DoubleEndedIterator<Item = Range<usize>>) {
        self.one_by_one = true;
        self.parts.put_back(parts);
    }

    /// Each part has a transaction of its own.
    pub fn is_one_by_one(&self) -> bool {
        self.one_by_one
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::database::blame::NAMES_MAX;

    const ROWS: usize = 5_000;

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
        let (mut seen, mut next) = (Taken::default(), 0);
        let mut waiting = Waiting::of_time_series(ROWS);
        while let Some(rows) = waiting.next() {
            seen.tries += 1;
            seen.sent += rows.len();
            let Some(&row) = bad.iter().find(|&row| rows.contains(row)) else {
                waiting.taken();
                assert_eq!(rows.start, next, "in order");
                next = rows.end;
                continue;
            };
            if !waiting.refused(line(&rows, row)) {
                assert_eq!(rows, row..row + 1);
                seen.alone.push(row);
                next = rows.end;
                waiting.passed();
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
                assert!(seen.tries <= 26 * bad.len(), "{seen:?}");
            }
        }
    }

    #[test]
    fn after_a_refusal_of_all_they_come_again_in_order_and_one_by_one() {
        let mut waiting = Waiting::of_time_series(ROWS);
        let all = |waiting: &mut Waiting| -> Vec<Range<usize>> {
            let taken = |waiting: &mut Waiting| waiting.next().inspect(|_| waiting.taken());
            std::iter::from_fn(|| taken(waiting)).collect()
        };
        let parts = all(&mut waiting);
        waiting.refused_together(parts.iter().cloned());
        assert!(waiting.is_one_by_one());
        assert_eq!(all(&mut waiting), parts);
    }

    #[test]
    fn a_long_batch_is_one_segment_and_a_short_one_too() {
        for rows in [0, 1, HALVED_ROWS_MIN - 1, HALVED_ROWS_MAX + 1] {
            assert_eq!(Waiting::of_time_series(rows).only(), Some(0..rows));
        }
        for rows in [HALVED_ROWS_MIN, HALVED_ROWS_MAX] {
            assert_eq!(Waiting::of_time_series(rows).only(), None);
        }
    }

    #[test]
    fn behind_a_row_set_aside_the_cursor_alone_is_left() {
        let mut waiting = Waiting::whole(2);
        assert!(waiting.refused(None));
        assert!(!waiting.refused(None));
        waiting.leave_cursor();
        assert_eq!(waiting.next(), Some(1..1));
        waiting.taken();
        assert_eq!(waiting.next(), Some(1..2));
    }
}
