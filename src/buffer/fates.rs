//! What became of the dead letters of one sink, as far as it is known: of each sequence the newest word.

use std::collections::BTreeMap;

use super::state_value::Names;
use crate::domain::{DeadLetterKey, Sequence, SequenceRange};

/// What is said of a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Kept,
    /// Kept; it stands in the bytes of the database, where sled does not find it.
    Hidden,
    Removed,
}

/// What became of a letter last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fate {
    /// In which this happened.
    pub version: u64,
    pub word: Word,
}

/// Letters by sink, in order.
pub(super) type Ranges = BTreeMap<Names, Vec<SequenceRange>>;

/// Of letters in the order of their keys.
pub(super) fn ranges<'l>(letters: impl IntoIterator<Item = &'l DeadLetterKey>) -> Ranges {
    let mut all = Ranges::new();
    for DeadLetterKey { sink, stream, sequence } in letters {
        let range = SequenceRange { first: *sequence, last: *sequence };
        push(all.entry((sink.clone(), stream.clone())).or_default(), range);
    }
    all
}

/// By the first sequence of each range: its last one, and what became of all of them.
#[derive(Debug, Default)]
pub(super) struct Fates(BTreeMap<u64, (u64, Fate)>);

impl Fates {
    /// Replaces what was known of these.
    pub(super) fn set(&mut self, range: SequenceRange, fate: Fate) {
        let (first, last) = (range.first.0, range.last.0);
        self.split(first);
        if let Some(next) = last.checked_add(1) {
            self.split(next);
        }
        let known: Vec<u64> = self.0.range(first..=last).map(|(first, _)| *first).collect();
        for first in known {
            self.0.remove(&first);
        }
        self.0.insert(first, (last, fate));
    }

    /// No range goes on across the place before `at`.
    fn split(&mut self, at: u64) {
        let before = self.0.range(..at).next_back();
        if let Some((first, (last, fate))) = before.map(|(first, end)| (*first, *end))
            && last >= at
        {
            self.0.insert(first, (at - 1, fate));
            self.0.insert(at, (last, fate));
        }
    }

    pub(super) fn of(&self, sequence: Sequence) -> Option<Fate> {
        let (_, (last, fate)) = self.0.range(..=sequence.0).next_back()?;
        (*last >= sequence.0).then_some(*fate)
    }

    /// In order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SequenceRange, Fate)> {
        self.0.iter().map(|(first, (last, fate))| {
            (SequenceRange { first: Sequence(*first), last: Sequence(*last) }, *fate)
        })
    }
}

/// Puts a range behind the others, all of which are lower.
pub(super) fn push(ranges: &mut Vec<SequenceRange>, next: SequenceRange) {
    match ranges.last_mut() {
        Some(range) if range.last.next() == next.first => range.last = next.last,
        _ => ranges.push(next),
    }
}

/// The parts of a range that none of the others, which are in order, holds.
pub(super) fn without(range: SequenceRange, others: &[SequenceRange]) -> Vec<SequenceRange> {
    let begin = others.partition_point(|other| other.last < range.first);
    let mut left = Vec::new();
    let mut next = range.first;
    for other in others[begin..].iter().take_while(|other| other.first <= range.last) {
        if next < other.first {
            left.push(SequenceRange { first: next, last: Sequence(other.first.0 - 1) });
        }
        next = other.last.next();
    }
    if next <= range.last {
        left.push(SequenceRange { first: next, last: range.last });
    }
    left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, last: u64) -> SequenceRange {
        SequenceRange { first: Sequence(first), last: Sequence(last) }
    }

    proptest! {
        #[test]
        fn the_last_word_counts(words in prop::collection::vec((0..30_u64, 0..8_u64, any::<bool>()), 0..40)) {
            let mut fates = Fates::default();
            let mut known = BTreeMap::new();
            for (version, (first, length, kept)) in words.into_iter().enumerate() {
                let word = if kept { Word::Kept } else { Word::Removed };
                let fate = Fate { version: version as u64, word };
                fates.set(range(first, first + length), fate);
                known.extend((first..=first + length).map(|at| (at, fate)));
            }
            for at in 0..40 {
                prop_assert_eq!(fates.of(Sequence(at)), known.get(&at).copied());
            }
            let all = fates.iter().flat_map(|(range, fate)| {
                (range.first.0..=range.last.0).map(move |at| (at, fate))
            });
            prop_assert!(all.eq(known));
        }

        #[test]
        fn what_is_left_of_a_range(
            first in 0..30_u64,
            length in 0..20_u64,
            held in prop::collection::btree_set(0..50_u64, 0..30),
        ) {
            let mut others = Vec::new();
            held.iter().for_each(|at| push(&mut others, range(*at, *at)));
            let left = without(range(first, first + length), &others);
            let left: Vec<u64> = left.iter().flat_map(|range| range.first.0..=range.last.0).collect();
            let expected: Vec<u64> = (first..=first + length).filter(|at| !held.contains(at)).collect();
            prop_assert_eq!(left, expected);
        }
    }

    #[test]
    fn the_highest_sequence_is_one_as_any_other() {
        let mut fates = Fates::default();
        fates.set(range(1, u64::MAX), Fate { version: 1, word: Word::Kept });
        fates.set(range(u64::MAX, u64::MAX), Fate { version: 2, word: Word::Removed });
        assert_eq!(fates.iter().count(), 2);
    }
}
