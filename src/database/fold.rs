//! The rule of a latest-state table, applied in memory to the rows as they are, message by message:
//!
//! 1. only values that are present take part; null never erases;
//! 2. a row changes only when a value becomes different, and then `updated_at` is the arrival of that message;
//! 3. a message older than the newest one *seen* for its key changes nothing. A message that changes nothing still
//!    moves "newest seen", so `updated_at` cannot stand in for it. In one log the sequence says which is older: a wall
//!    clock that is set back must not hold a row for as long as it was ahead. Between two logs only the arrival can.
//!
//! The result is what one transaction per message would have left behind, at the price of one write per row.

use std::collections::BTreeMap;

use super::encode::Cell;
use crate::domain::{Arrival, Sequence};

/// One message for a latest-state table.
#[derive(Debug, Clone)]
pub struct Message {
    pub key: String,
    pub sequence: Sequence,
    pub arrival: Arrival,
    /// One per mapped column, the key among them.
    pub cells: Vec<Cell<'static>>,
}

/// The newest message of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub arrival: Arrival,
    /// `None` in another log.
    pub sequence: Option<Sequence>,
}

impl Seen {
    fn is_newer_than(&self, message: &Message) -> bool {
        match self.sequence {
            Some(sequence) => message.sequence < sequence,
            None => message.arrival < self.arrival,
        }
    }
}

/// A row and what is known of its key.
#[derive(Debug, Clone, Default)]
pub struct Row {
    /// Values of the mapped columns; `None` when the table has no such row.
    pub cells: Option<Vec<Cell<'static>>>,
    pub seen: Option<Seen>,
    /// Set by the fold: arrival of the last message that changed something.
    pub updated_at: Option<Arrival>,
    /// Set by the fold: a message moved `seen`.
    pub seen_moved: bool,
    /// Added to by the fold.
    pub folded: Folded,
}

/// Rows by key; ordered, so that two writers lock in the same order.
pub type Rows = BTreeMap<String, Row>;

/// Messages that left a row as it was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Folded {
    pub unchanged: u64,
    pub stale: u64,
}

impl std::ops::AddAssign for Folded {
    fn add_assign(&mut self, more: Folded) {
        self.unchanged += more.unchanged;
        self.stale += more.stale;
    }
}

/// Of all rows.
pub fn folded(rows: &Rows) -> Folded {
    let mut all = Folded::default();
    rows.values().for_each(|row| all += row.folded);
    all
}

/// Applies the messages in order. `fixed` says which cells are set when a row is made and never again.
pub fn fold<'m>(rows: &mut Rows, fixed: &[bool], messages: impl IntoIterator<Item = &'m Message>) {
    fail::fail_point!("fold");
    for message in messages {
        fail::fail_point!(&format!("fold_{}", message.key));
        let row = rows.entry(message.key.clone()).or_default();
        if row.seen.is_some_and(|seen| seen.is_newer_than(message)) {
            row.folded.stale += 1;
            continue;
        }
        let seen = Seen { arrival: message.arrival, sequence: Some(message.sequence) };
        row.seen_moved |= row.seen != Some(seen);
        row.seen = Some(seen);
        if apply(row, fixed, message) {
            row.updated_at = Some(message.arrival);
        } else {
            row.folded.unchanged += 1;
        }
    }
}

/// True when a value became different.
fn apply(row: &mut Row, fixed: &[bool], message: &Message) -> bool {
    let Some(cells) = &mut row.cells else {
        row.cells = Some(message.cells.clone());
        return true;
    };
    let mut changed = false;
    for ((cell, new), fixed) in cells.iter_mut().zip(&message.cells).zip(fixed) {
        if !fixed && !new.is_null() && cell != new {
            cell.clone_from(new);
            changed = true;
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FREE: [bool; 3] = [false; 3];

    fn message(key: &str, sequence: u64, values: &[Option<i64>]) -> Message {
        let cells = values.iter().map(|value| value.map_or(Cell::Null, Cell::Int8)).collect();
        let arrival = arrival_of(sequence);
        Message { key: key.to_owned(), sequence: Sequence(sequence), arrival, cells }
    }

    /// The clock is set back again and again.
    fn arrival_of(sequence: u64) -> Arrival {
        Arrival(1000 - sequence as i64)
    }

    fn values(row: &Row) -> Vec<Option<i64>> {
        let value = |cell: &Cell<'_>| match cell {
            Cell::Int8(value) => Some(*value),
            _ => None,
        };
        row.cells.iter().flatten().map(value).collect()
    }

    #[test]
    fn a_partial_message_leaves_the_other_columns_as_they_are() {
        let mut rows = Rows::new();
        let messages = [message("a", 1, &[Some(1), Some(2)]), message("a", 2, &[None, Some(3)])];
        fold(&mut rows, &FREE, &messages);
        assert_eq!(folded(&rows), Folded::default());
        assert_eq!(values(&rows["a"]), [Some(1), Some(3)]);
        assert_eq!(rows["a"].updated_at, Some(arrival_of(2)));
    }

    #[test]
    fn an_equal_message_changes_nothing_and_still_counts_as_seen() {
        let mut rows = Rows::new();
        let messages = [
            message("a", 1, &[Some(1)]),
            message("a", 9, &[Some(1)]),
            message("a", 5, &[Some(2)]),
            message("a", 9, &[Some(3)]),
        ];
        fold(&mut rows, &FREE, &messages);
        assert_eq!(folded(&rows), Folded { unchanged: 1, stale: 1 });
        assert_eq!(values(&rows["a"]), [Some(3)]);
        assert_eq!(rows["a"].seen.unwrap().sequence, Some(Sequence(9)));
    }

    #[test]
    fn of_another_log_only_the_arrival_says_what_is_older() {
        let mut rows = Rows::new();
        let seen = Some(Seen { arrival: arrival_of(5), sequence: None });
        rows.insert("a".to_owned(), Row { seen, ..Row::default() });
        let older = message("a", 6, &[Some(1)]);
        fold(&mut rows, &FREE, [&older]);
        assert_eq!(folded(&rows), Folded { unchanged: 0, stale: 1 });
        let messages = [message("a", 4, &[Some(2)]), message("a", 6, &[Some(3)])];
        fold(&mut rows, &FREE, &messages);
        assert_eq!(folded(&rows), Folded { unchanged: 0, stale: 1 });
        assert_eq!(values(&rows["a"]), [Some(3)], "it is this log's now");
    }

    #[test]
    fn a_fixed_cell_keeps_what_the_row_was_made_with() {
        let mut rows = Rows::new();
        let messages = [message("a", 1, &[Some(1), Some(5)]), message("a", 2, &[Some(2), Some(6)])];
        fold(&mut rows, &[false, true], &messages);
        assert_eq!(values(&rows["a"]), [Some(2), Some(5)]);
    }

    /// What one transaction per message would do, written down as plainly as the rule.
    #[derive(Default, Clone)]
    struct Naive {
        rows: BTreeMap<String, (Vec<Option<i64>>, Arrival)>,
        seen: BTreeMap<String, u64>,
        folded: Folded,
    }

    impl Naive {
        fn take(&mut self, key: &str, sequence: u64, values: &[Option<i64>]) {
            if self.seen.get(key).is_some_and(|seen| sequence < *seen) {
                self.folded.stale += 1;
                return;
            }
            self.seen.insert(key.to_owned(), sequence);
            let arrival = arrival_of(sequence);
            let Some((row, updated_at)) = self.rows.get_mut(key) else {
                self.rows.insert(key.to_owned(), (values.to_vec(), arrival));
                return;
            };
            let merged: Vec<_> =
                values.iter().zip(row.iter()).map(|(new, old)| new.or(*old)).collect();
            if merged == *row {
                self.folded.unchanged += 1;
            } else {
                *row = merged;
                *updated_at = arrival;
            }
        }
    }

    proptest! {
        #[test]
        fn a_folded_batch_leaves_what_single_messages_would(
            messages in prop::collection::vec(
                ("[abc]", 0u64..20, prop::array::uniform3(prop::option::of(0i64..3))), 0..60),
            cut in 0usize..60,
        ) {
            let mut naive = Naive::default();
            let mut rows = Rows::new();
            let mut updated: BTreeMap<String, Arrival> = BTreeMap::new();
            let cut = cut.min(messages.len());
            for batch in [&messages[..cut], &messages[cut..]] {
                let batch: Vec<_> =
                    batch.iter().map(|(key, at, values)| message(key, *at, values)).collect();
                fold(&mut rows, &FREE, &batch);
                // As the table would hand the rows to the next batch.
                for (key, row) in &mut rows {
                    if let Some(at) = row.updated_at.take() {
                        updated.insert(key.clone(), at);
                    }
                }
            }
            for (key, at, values) in &messages {
                naive.take(key, *at, values);
            }
            prop_assert_eq!(folded(&rows), naive.folded);
            for (key, (expected, updated_at)) in &naive.rows {
                prop_assert_eq!(&values(&rows[key]), expected);
                prop_assert_eq!(updated[key], *updated_at);
                let seen = rows[key].seen.and_then(|seen| seen.sequence).map(|sequence| sequence.0);
                prop_assert_eq!(seen, naive.seen.get(key).copied());
            }
        }
    }
}
