//! Which dead letters stand in the state database whole, whatever it says of itself.

use std::collections::BTreeMap;

use super::fates::{Ranges, Word, push, ranges, without};
use super::state_value::{Count, Names, Part, split_letter_key};
use crate::domain::{DeadLetterKey, SequenceRange};

/// Letters that are there.
#[derive(Default)]
pub(super) struct Held {
    pub counts: BTreeMap<Names, Count>,
    pub sequences: Ranges,
    /// Those among them that sled does not find.
    pub hidden: Ranges,
    /// Keys of parts that make no letter.
    pub torn: Vec<Vec<u8>>,
}

impl Held {
    fn add(&mut self, letter: DeadLetterKey, found: Whole) {
        if !found.is_whole() {
            return self.torn.extend(found.keys);
        }
        let names = (letter.sink, letter.stream);
        let range = SequenceRange { first: letter.sequence, last: letter.sequence };
        push(self.sequences.entry(names.clone()).or_default(), range);
        let count = self.counts.entry(names).or_default();
        count.letters += 1;
        count.bytes += found.bytes;
    }

    pub(super) fn count(&self, names: &Names) -> Count {
        self.counts.get(names).copied().unwrap_or_default()
    }

    /// Letters that sled does not find, and a start with more room does.
    pub(super) fn hide(&mut self, letters: Ranges) {
        self.hidden = letters;
        for (names, hidden) in &self.hidden {
            self.counts.entry(names.clone()).or_default().letters += total(hidden);
            let sequences = self.sequences.entry(names.clone()).or_default();
            sequences.extend(hidden);
            sequences.sort_unstable_by_key(|range| range.first);
        }
    }

    /// These are about to be removed. In the order of their keys.
    pub(super) fn leave_out(&mut self, letters: &[DeadLetterKey]) {
        for (names, leaving) in ranges(letters) {
            self.counts.entry(names.clone()).or_default().letters -= total(&leaving);
            let sequences = self.sequences.entry(names).or_default();
            *sequences = sequences.iter().flat_map(|range| without(*range, &leaving)).collect();
        }
    }

    /// In order.
    pub(super) fn sequences(&self, names: &Names) -> &[SequenceRange] {
        self.sequences.get(names).map_or(&[], Vec::as_slice)
    }

    pub(super) fn letters(&self) -> impl Iterator<Item = (&Names, SequenceRange)> {
        flat(&self.sequences)
    }

    /// What is to be said of each; the last word counts.
    pub(super) fn words(&self) -> impl Iterator<Item = (Word, &Names, SequenceRange)> {
        let kept = self.letters().map(|(names, range)| (Word::Kept, names, range));
        kept.chain(flat(&self.hidden).map(|(names, range)| (Word::Hidden, names, range)))
    }
}

fn flat(ranges: &Ranges) -> impl Iterator<Item = (&Names, SequenceRange)> {
    ranges.iter().flat_map(|(names, ranges)| ranges.iter().map(move |range| (names, *range)))
}

fn total(ranges: &[SequenceRange]) -> u64 {
    ranges.iter().map(|range| range.count()).sum()
}

/// Parts of letters, in the order of their keys, become letters.
#[derive(Default)]
pub(super) struct Search {
    held: Held,
    open: Option<(DeadLetterKey, Whole)>,
}

impl Search {
    pub(super) fn add(&mut self, key: &[u8], part: &Part) {
        let Some((letter, _)) = split_letter_key(key) else { return };
        if let Some((name, whole)) = self.open.take_if(|(name, _)| *name != letter) {
            self.held.add(name, whole);
        }
        self.open.get_or_insert_with(|| (letter, Whole::default())).1.add(key, part);
    }

    pub(super) fn done(mut self) -> Held {
        if let Some((name, whole)) = self.open {
            self.held.add(name, whole);
        }
        self.held
    }
}

/// Parts found below the key of a letter.
#[derive(Default)]
pub(super) struct Whole {
    pub version: Option<u64>,
    length: u64,
    bytes: u64,
    mixed: bool,
    keys: Vec<Vec<u8>>,
}

impl Whole {
    pub(super) fn add(&mut self, key: &[u8], part: &Part) {
        self.mixed |= *self.version.get_or_insert(part.version) != part.version;
        self.length = u64::from(part.length);
        self.bytes += part.bytes.len() as u64;
        self.keys.push(key.to_vec());
    }

    pub(super) fn is_whole(&self) -> bool {
        !self.mixed && self.bytes == self.length
    }
}
