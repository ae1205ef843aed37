//! Which dead letters stand in the state database whole, whatever it says of itself.

use std::collections::BTreeMap;

use super::fates::push;
use super::state_value::{Count, Names, Part, split_letter_key};
use crate::domain::{DeadLetterKey, SequenceRange};

/// Letters that are there.
#[derive(Default)]
pub(super) struct Held {
    pub counts: BTreeMap<Names, Count>,
    sequences: BTreeMap<Names, Vec<SequenceRange>>,
    /// Some of them are not found now, and will be.
    pub hidden: bool,
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

    /// Letters that are not found now, and will be.
    pub(super) fn add_hidden(&mut self, letters: Vec<DeadLetterKey>) {
        for DeadLetterKey { sink, stream, sequence } in letters {
            let names = (sink, stream);
            self.hidden = true;
            self.counts.entry(names.clone()).or_default().letters += 1;
            let range = SequenceRange { first: sequence, last: sequence };
            self.sequences.entry(names).or_default().push(range);
        }
        for ranges in self.sequences.values_mut() {
            ranges.sort_unstable_by_key(|range| range.first);
        }
    }

    /// In order.
    pub(super) fn sequences(&self, names: &Names) -> &[SequenceRange] {
        self.sequences.get(names).map_or(&[], Vec::as_slice)
    }

    pub(super) fn letters(&self) -> impl Iterator<Item = (&Names, SequenceRange)> {
        let sinks = self.sequences.iter();
        sinks.flat_map(|(names, ranges)| ranges.iter().map(move |range| (names, *range)))
    }
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
