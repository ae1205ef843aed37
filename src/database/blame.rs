//! Which rows of a refused segment are tried apart. Halves find a refused row in log2 steps and send the good ones three times;
//! mostly a server names the row at which it stopped, and then they are sent twice.

use std::ops::Range;

/// So many names of one batch are followed: behind each one all of the rest is sent, and where most rows are refused halves
/// send fewer.
const NAMES_MAX: usize = 8;

/// What is believed of the server while one batch is delivered. It may collect rows and name the last one it has read: after
/// one wrong word nothing that it names counts.
#[derive(Debug, Default)]
pub struct Blame {
    named: Option<usize>,
    names: usize,
    misled: bool,
}

impl Blame {
    /// These rows went in.
    pub fn taken(&mut self, rows: &Range<usize>) {
        if self.named.take_if(|row| rows.contains(row)).is_some() {
            self.misled = true;
        }
    }

    /// These rows were refused, at the row `line` of them, counted from 1, where the server says so: the one to be tried
    /// alone. All before it must go in then.
    pub fn refused(&mut self, rows: &Range<usize>, line: Option<usize>) -> Option<usize> {
        if self.named.take().is_some_and(|row| *rows != (row..row + 1)) {
            self.misled = true;
        }
        let row = rows.start.saturating_add(line?.checked_sub(1)?);
        let followed = !self.misled && self.names < NAMES_MAX;
        self.named = Some(row).filter(|row| followed && rows.len() > 1 && rows.contains(row));
        self.names += usize::from(self.named.is_some());
        self.named
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::batch::Batch;
    use crate::database::batch::tests::record;
    use crate::domain::Sequence;

    const ROWS: usize = 5_000;

    fn batch() -> Batch {
        let mut batch = Batch::behind(Sequence::ZERO);
        for sequence in 1..=ROWS as u64 {
            let record = record(sequence);
            batch.take(&record);
            batch.mark_row(&record);
        }
        batch
    }

    /// The row of these that a server names, the bad one being this.
    type Naming = fn(&Range<usize>, usize) -> Option<usize>;

    /// Delivers to a server that refuses the rows `bad` and names what `line` makes of the first of them: the rows that end
    /// alone, the writes, and the rows sent.
    fn deliver(bad: &[usize], line: Naming) -> (Vec<usize>, usize, usize) {
        let (batch, mut blame) = (batch(), Blame::default());
        let (mut alone, mut writes, mut sent, mut next) = (Vec::new(), 0, 0, 0);
        let mut waiting = vec![batch.whole()];
        while let Some(segment) = waiting.pop() {
            writes += 1;
            sent += segment.rows.len();
            let Some(first) = bad.iter().find(|&row| segment.rows.contains(row)) else {
                blame.taken(&segment.rows);
                assert_eq!(segment.rows.start, next, "in order");
                next = segment.rows.end;
                continue;
            };
            let suspect = blame.refused(&segment.rows, line(&segment.rows, *first));
            match batch.parts(&segment, suspect) {
                Some(parts) => waiting.extend(parts.into_iter().rev()),
                None => {
                    alone.push(*first);
                    next = segment.rows.end;
                }
            }
        }
        assert_eq!(next, ROWS);
        (alone, writes, sent)
    }

    fn truly(rows: &Range<usize>, bad: usize) -> Option<usize> {
        Some(bad - rows.start + 1)
    }

    #[test]
    fn a_row_that_is_named_costs_the_others_one_more_time() {
        assert_eq!(deliver(&[2_500], truly), (vec![2_500], 4, 2 * ROWS));
        assert_eq!(deliver(&[0], truly), (vec![0], 3, 2 * ROWS));
        assert_eq!(deliver(&[ROWS - 1], truly), (vec![ROWS - 1], 3, 2 * ROWS));
        let (alone, writes, _) = deliver(&[7, 8, 4_000], truly);
        assert_eq!((alone, writes), (vec![7, 8, 4_000], 9));
    }

    #[test]
    fn where_most_rows_are_refused_names_cost_no_more_than_halves() {
        let bad: Vec<usize> = (0..ROWS).collect();
        let (alone, _, halved) = deliver(&bad, |_, _| None);
        assert_eq!(alone, bad);
        let (alone, _, named) = deliver(&bad, truly);
        assert_eq!(alone, bad);
        assert!(named <= halved + (NAMES_MAX + 1) * ROWS, "{named} rows sent, {halved} by halves");
    }

    #[test]
    fn without_a_name_or_with_wrong_ones_halves_find_it() {
        let wrong: [Naming; 4] =
            [|rows, _| Some(rows.len()), |_, _| Some(1), |_, _| None, |_, _| Some(usize::MAX)];
        for line in wrong {
            for bad in [vec![2_500], vec![1], vec![3, 4_711]] {
                let (alone, writes, _) = deliver(&bad, line);
                assert_eq!(alone, bad);
                assert!(writes <= 30 * bad.len(), "{writes} writes for {bad:?}");
            }
        }
    }
}
