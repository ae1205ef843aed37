//! The books of one sink of one stream: received = delivered + pending + dead-lettered + filtered, at any moment.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::Sequence;

/// Saved together with the cursor, in one step (one row in PostgreSQL, one value in the state store), so a crash can
/// not make them disagree. All counts are records since `base`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Books {
    /// The cursor: every record up to here is in one of the counts below.
    pub cursor: Sequence,
    /// Where this sink began (the record before its first): a sink added later does not owe what was dropped before.
    pub base: Sequence,
    /// Taken by the sink; for a latest-state table `unchanged` and `stale` are parts of this.
    pub delivered: u64,
    /// Excluded by the filter.
    pub filtered: u64,
    /// Without a required field: in the books a kind of filtered, counted apart.
    pub incomplete: u64,
    pub dead_lettered: u64,
    /// Lost by the disk (a quarantined generation): reported, never silent.
    pub lost: u64,
    /// Of `delivered`: the latest-state row already said so.
    pub unchanged: u64,
    /// Of `delivered`: older than what the latest-state row has seen.
    pub stale: u64,
}

impl Books {
    /// A sink that begins behind `base`.
    pub fn starting_at(base: Sequence) -> Self {
        Books { cursor: base, base, ..Books::default() }
    }

    /// As many of the dead letters are delivered after all.
    pub fn with_replayed(self, replayed: u64) -> Self {
        let replayed = replayed.min(self.dead_lettered);
        Books {
            delivered: self.delivered + replayed,
            dead_lettered: self.dead_lettered - replayed,
            ..self
        }
    }

    /// The later of two states of the same books. Only its writer moves the cursor; between two of its moves only replays
    /// change anything, and each takes one from the dead letters.
    pub fn or_later(self, other: Option<Books>) -> Books {
        let place = |books: &Books| (books.cursor, Reverse(books.dead_lettered));
        other.filter(|other| place(other) > place(&self)).unwrap_or(self)
    }

    /// 0 when the books balance: records passed by the cursor minus records accounted for.
    pub fn difference(&self) -> i64 {
        let passed = self.cursor.since(self.base);
        let accounted =
            self.delivered + self.filtered + self.incomplete + self.dead_lettered + self.lost;
        (i128::from(passed) - i128::from(accounted)) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_states_of_the_same_books_the_later_one_stands_whichever_comes_last() {
        let batch =
            Books { cursor: Sequence(9), delivered: 6, dead_lettered: 3, ..Books::default() };
        let replayed = batch.with_replayed(1);
        let next = Books { cursor: Sequence(10), delivered: 7, ..batch };
        for (earlier, later) in [(batch, replayed), (replayed, next), (batch, next)] {
            assert_eq!(earlier.or_later(Some(later)), later);
            assert_eq!(later.or_later(Some(earlier)), later);
        }
        assert_eq!(batch.or_later(None), batch);
    }
}
