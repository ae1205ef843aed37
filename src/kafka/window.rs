//! What is on its way to the brokers, and how far the cursor may go.
//!
//! Reports come in any order: partitions answer on their own. The cursor moves only over the prefix without a hole,
//! so that a crash repeats records and never skips one.

use std::collections::VecDeque;

use rdkafka::error::RDKafkaErrorCode;

use super::error::class_of;
use crate::domain::{Arrival, Books, ErrorClass, Sequence};

/// What became of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Delivered,
    Filtered,
    Incomplete,
    /// Stored as a dead letter, durably.
    DeadLettered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Pending,
    Settled(Fate),
    Failed,
}

/// A record's slot: its state, and when the message arrived.
#[derive(Debug, Clone, Copy)]
struct Entry {
    slot: Slot,
    arrival: Arrival,
}

/// The first failure by sequence, and how far failures for the record's own sake reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failure {
    pub sequence: Sequence,
    pub code: RDKafkaErrorCode,
    /// The last record that failed as [`ErrorClass::Data`]: one of the batch up to here is to blame.
    pub data_until: Option<Sequence>,
}

/// What the cursor passed since the last call of [`Window::settle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Passed {
    pub records: u64,
    pub delivered: u64,
    pub filtered: u64,
    pub incomplete: u64,
    pub dead_lettered: u64,
    /// Arrivals of the first and the last record delivered.
    pub delivered_arrivals: Option<(Arrival, Arrival)>,
}

impl Passed {
    /// Moves the cursor of `books` and counts.
    pub fn enter(&self, books: &mut Books) {
        books.cursor = Sequence(books.cursor.0 + self.records);
        books.delivered += self.delivered;
        books.filtered += self.filtered;
        books.incomplete += self.incomplete;
        books.dead_lettered += self.dead_lettered;
    }

    fn count(&mut self, fate: Fate, arrival: Arrival) {
        self.records += 1;
        match fate {
            Fate::Filtered => self.filtered += 1,
            Fate::Incomplete => self.incomplete += 1,
            Fate::DeadLettered => self.dead_lettered += 1,
            Fate::Delivered => {
                self.delivered += 1;
                let first = self.delivered_arrivals.map_or(arrival, |(first, _)| first);
                self.delivered_arrivals = Some((first, arrival));
            }
        }
    }
}

/// The records behind the cursor that were taken up, in order of their sequence.
#[derive(Debug, Default)]
pub(super) struct Window {
    cursor: Sequence,
    entries: VecDeque<Entry>,
    pending: usize,
    failure: Option<Failure>,
}

impl Window {
    /// Forgets everything and begins behind `cursor`.
    pub fn begin(&mut self, cursor: Sequence) {
        self.entries.clear();
        self.cursor = cursor;
        self.pending = 0;
        self.failure = None;
    }

    /// Takes up the next record; its number is returned so that the caller can see it is the one it means.
    pub fn push(&mut self, arrival: Arrival) -> Sequence {
        self.entries.push_back(Entry { slot: Slot::Pending, arrival });
        self.pending += 1;
        self.last()
    }

    /// Gives back every record after `sequence`: they were taken up and never sent.
    pub fn give_back_after(&mut self, sequence: Sequence) {
        let keep = sequence.since(self.cursor) as usize;
        while self.entries.len() > keep {
            if self.entries.pop_back().is_some_and(|entry| entry.slot == Slot::Pending) {
                self.pending -= 1;
            }
        }
    }

    /// The record's fate is known. A second word on the same record changes nothing.
    pub fn settled(&mut self, sequence: Sequence, fate: Fate) {
        self.resolve(sequence, Slot::Settled(fate));
    }

    /// The record was not delivered, or nobody can tell.
    pub fn failed(&mut self, sequence: Sequence, code: RDKafkaErrorCode) {
        if !self.resolve(sequence, Slot::Failed) {
            return;
        }
        let data = (class_of(code) == ErrorClass::Data).then_some(sequence);
        let failure = self.failure.get_or_insert(Failure { sequence, code, data_until: None });
        if sequence < failure.sequence {
            (failure.sequence, failure.code) = (sequence, code);
        }
        failure.data_until = failure.data_until.max(data);
    }

    /// Nothing will be heard of the record in this life; the cursor stops in front of it.
    pub fn forget(&mut self, sequence: Sequence) {
        self.resolve(sequence, Slot::Failed);
    }

    fn resolve(&mut self, sequence: Sequence, slot: Slot) -> bool {
        let Some(index) = sequence.since(self.cursor).checked_sub(1) else { return false };
        let Some(entry) = self.entries.get_mut(index as usize) else { return false };
        if entry.slot != Slot::Pending {
            return false;
        }
        entry.slot = slot;
        self.pending -= 1;
        true
    }

    /// Moves the cursor over the settled prefix and says what it passed.
    pub fn settle(&mut self) -> Passed {
        let mut passed = Passed::default();
        while let Some(Entry { slot: Slot::Settled(fate), arrival }) = self.entries.front().copied()
        {
            passed.count(fate, arrival);
            self.entries.pop_front();
        }
        self.cursor = Sequence(self.cursor.0 + passed.records);
        passed
    }

    /// Records taken up that the cursor has not passed.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Records not reported yet.
    pub fn pending(&self) -> usize {
        self.pending
    }

    pub fn failure(&self) -> Option<Failure> {
        self.failure
    }

    /// The last record taken up.
    pub fn last(&self) -> Sequence {
        Sequence(self.cursor.0 + self.entries.len() as u64)
    }

    /// Arrival of the record right behind the cursor, where it was taken up.
    pub fn oldest_arrival(&self) -> Option<Arrival> {
        self.entries.front().map(|entry| entry.arrival)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn window(records: u64) -> Window {
        let mut window = Window::default();
        window.begin(Sequence(10));
        for n in 0..records {
            assert_eq!(window.push(Arrival(n as i64)), Sequence(11 + n));
        }
        window
    }

    #[test]
    fn the_cursor_stops_in_front_of_the_first_record_without_a_report() {
        let mut window = window(4);
        window.settled(Sequence(12), Fate::Delivered);
        assert_eq!(window.settle(), Passed::default());
        window.settled(Sequence(11), Fate::Filtered);
        let passed = window.settle();
        assert_eq!((passed.records, passed.delivered, passed.filtered), (2, 1, 1));
        assert_eq!(passed.delivered_arrivals, Some((Arrival(1), Arrival(1))));
        assert_eq!(window.pending(), 2);
        assert_eq!(window.oldest_arrival(), Some(Arrival(2)));
    }

    #[test]
    fn a_report_of_an_earlier_life_or_a_second_one_changes_nothing() {
        let mut window = window(2);
        window.settled(Sequence(11), Fate::Delivered);
        window.failed(Sequence(11), RDKafkaErrorCode::PurgeQueue);
        window.settled(Sequence(3), Fate::Delivered);
        window.settled(Sequence(99), Fate::Delivered);
        assert_eq!(window.failure(), None);
        assert_eq!(window.pending(), 1);
    }

    #[test]
    fn the_failure_is_the_first_by_sequence_and_knows_how_far_bad_data_reaches() {
        let mut window = window(5);
        window.failed(Sequence(14), RDKafkaErrorCode::PurgeQueue);
        window.failed(Sequence(13), RDKafkaErrorCode::MessageSizeTooLarge);
        window.failed(Sequence(12), RDKafkaErrorCode::MessageSizeTooLarge);
        let failure = window.failure().unwrap();
        assert_eq!(failure.sequence, Sequence(12));
        assert_eq!(failure.code, RDKafkaErrorCode::MessageSizeTooLarge);
        assert_eq!(failure.data_until, Some(Sequence(13)));
    }

    #[test]
    fn what_was_taken_up_and_not_sent_is_given_back() {
        let mut window = window(5);
        window.give_back_after(Sequence(13));
        assert_eq!((window.last(), window.pending()), (Sequence(13), 3));
        assert_eq!(window.push(Arrival(0)), Sequence(14));
    }

    proptest! {
        #[test]
        fn any_order_of_reports_gives_the_contiguous_prefix_and_balanced_books(
            order in Just((0..60u64).collect::<Vec<_>>()).prop_shuffle(),
            fails in proptest::collection::vec(proptest::bool::weighted(0.1), 60),
            settle_every in 1..20usize,
        ) {
            let mut window = window(60);
            let mut books = Books::starting_at(Sequence(10));
            let mut reported = [false; 60];
            for (step, n) in order.iter().enumerate() {
                let sequence = Sequence(11 + n);
                if fails[*n as usize] {
                    window.failed(sequence, RDKafkaErrorCode::MessageTimedOut);
                } else {
                    window.settled(sequence, Fate::Delivered);
                    reported[*n as usize] = true;
                }
                if step % settle_every == 0 {
                    window.settle().enter(&mut books);
                    let prefix = reported.iter().take_while(|done| **done).count() as u64;
                    prop_assert_eq!(books.cursor, Sequence(10 + prefix));
                }
            }
            window.settle().enter(&mut books);
            let first_failure = fails.iter().position(|failed| *failed);
            let expected = first_failure.map_or(70, |n| 10 + n as u64);
            prop_assert_eq!(books.cursor, Sequence(expected));
            prop_assert_eq!(books.difference(), 0);
            prop_assert_eq!(window.pending(), 0);
            let rewind = window.failure().map(|failure| failure.sequence);
            prop_assert_eq!(rewind, first_failure.map(|n| Sequence(11 + n as u64)));
        }
    }
}
