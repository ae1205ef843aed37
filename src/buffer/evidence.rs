//! Which dead letters a state database should have, from two witnesses beside sled: the bytes of its file (`raw_state.rs`)
//! and the file `letters` (`letter_journal.rs`). What one of them lost the other tells; both agree with a database that is
//! whole.

use std::collections::BTreeMap;
use std::path::Path;

use super::BufferError;
use super::fates::{Ranges, Word, push, without};
use super::held::Held;
use super::letter_journal::{self, LetterRecord};
use super::lost_letters::LostLetters;
use super::raw_state::{RawLetter, RawState};
use super::recovery::patiently;
use super::state_store::StateStore;
use super::state_value::{Counts, Names};
use crate::domain::{DeadLetter, DeadLetterKey, Sequence};

/// Letters put back with one batch.
const BATCH_LETTERS: usize = 256;
const BATCH_BYTES: usize = 4 << 20;

/// What both witnesses tell.
pub(super) struct Evidence {
    pub raw: RawState,
    record: LetterRecord,
}

/// How a database differs from what it should have.
#[derive(Default)]
pub(super) struct Gaps {
    /// Sinks whose letters are as many as their count says, and none of them returned: the version of the count.
    agreed: BTreeMap<Names, u64>,
    /// A count of a higher version is newer than all that `letters` says.
    recorded: u64,
    /// Letters that were removed and are there again.
    pub returned: Vec<DeadLetterKey>,
    /// Some of it was on stable storage.
    pub harmed: bool,
}

/// What was put back.
pub(super) struct Filled {
    pub letters: u64,
    pub lost: Vec<LostLetters>,
    pub held: Held,
    /// All of it has this one or a lower one.
    pub version: u64,
}

impl Evidence {
    /// `folder`: of the database.
    pub(super) fn gather(folder: &Path, buffer: &Path) -> Result<Self, BufferError> {
        let record = letter_journal::read(buffer)?;
        Ok(Evidence { raw: patiently(|| RawState::search(folder))?, record })
    }

    /// The newest version of which there is a trace.
    pub(super) fn newest(&self) -> u64 {
        self.raw.newest().max(self.record.newest())
    }

    /// All up to this version was on stable storage.
    fn synced(&self) -> u64 {
        self.raw.synced().max(self.record.synced)
    }

    /// There are letters, or should be; or books.
    pub(super) fn has_letters_or_books(&self) -> bool {
        let found = self.raw.has_letters() || self.raw.books().next().is_some();
        found || self.record.kept().next().is_some()
    }

    /// `None`: there is every letter that should be there, and no other.
    pub(super) fn gaps(
        &self,
        state: &StateStore,
        held: &Held,
    ) -> Result<Option<Gaps>, BufferError> {
        let returned = self.returned(state, held)?;
        let mut gaps = Gaps { recorded: self.record.knows_all_to(), ..Gaps::default() };
        let counts = state.versioned_counts()?;
        gaps.harmed |= held.counts.keys().any(|names| !counts.contains_key(names));
        for (names, (version, letters)) in counts {
            let fresh = |key: &DeadLetterKey| key.sink != names.0 || key.stream != names.1;
            if letters == held.count(&names).letters && returned.iter().all(fresh) {
                gaps.agreed.insert(names, version);
            } else {
                gaps.harmed = true;
            }
        }
        let behind =
            |names: &Names, version| gaps.agreed.get(names).is_none_or(|agreed| *agreed < version);
        gaps.harmed |= self.counts().any(|(names, version, _)| behind(names, version));
        gaps.harmed |= !self.missing(held, &gaps).is_empty();
        // A part that came back alone would be shown as a letter cut short.
        gaps.harmed |= !returned.is_empty() || !held.torn.is_empty();
        gaps.returned = returned;
        let synced = self.synced();
        let mut lacking = false;
        for letter in self.raw.letters() {
            if self.lacks(&gaps, state, &letter)? {
                lacking = true;
                gaps.harmed |= letter.version <= synced;
            }
        }
        Ok((lacking || gaps.harmed).then_some(gaps))
    }

    /// Letters that were kept and are not there.
    fn missing(&self, held: &Held, gaps: &Gaps) -> Ranges {
        let mut all = Ranges::new();
        for (names, range, fate) in self.record.kept() {
            let missing = without(range, held.sequences(names));
            let excused = fate.word != Word::Hidden && gaps.knows(names, fate.version);
            if !missing.is_empty() && !excused {
                let ranges = all.entry(names.clone()).or_default();
                missing.into_iter().for_each(|range| push(ranges, range));
            }
        }
        all
    }

    /// One that was removed and kept again since is not among them, though an older one be there.
    fn returned(&self, state: &StateStore, held: &Held) -> Result<Vec<DeadLetterKey>, BufferError> {
        let mut returned = Vec::new();
        for ((sink, stream), range) in held.letters() {
            for sequence in (range.first.0..=range.last.0).map(Sequence) {
                let (sink, stream) = (sink.clone(), stream.clone());
                let key = DeadLetterKey { sink, stream, sequence };
                // What is named as kept needs no look at the database.
                if self.record.gone(&key, 0)
                    && let newest = state.letter_version(&key)?.max(self.raw.letter_version(&key))
                    && newest.is_some_and(|version| self.record.gone(&key, version))
                {
                    returned.push(key);
                }
            }
        }
        Ok(returned)
    }

    /// The letter is to be put back.
    fn lacks(
        &self,
        gaps: &Gaps,
        state: &StateStore,
        letter: &RawLetter<'_>,
    ) -> Result<bool, BufferError> {
        let names = (letter.key.sink.clone(), letter.key.stream.clone());
        Ok(match state.letter_version(&letter.key)? {
            Some(held) => held < letter.version,
            None if self.record.hides(&letter.key) => true,
            None => {
                !gaps.knows(&names, letter.version)
                    && !self.record.removed(&letter.key, letter.version)
            }
        })
    }

    /// Letters that stand in the file where sled does not find them. The records of those that were never answered for are
    /// in the log.
    pub(super) fn hidden(
        &self,
        state: &StateStore,
        gaps: &Gaps,
    ) -> Result<Vec<DeadLetterKey>, BufferError> {
        let mut hidden = Vec::new();
        for letter in self.raw.letters() {
            let answered = letter.version <= self.synced() || self.record.keeps(&letter.key);
            if answered
                && self.lacks(gaps, state, &letter)?
                && state.letter_version(&letter.key)?.is_none()
                && self.raw.read(&letter)?.is_some()
            {
                hidden.push(letter.key);
            }
        }
        Ok(hidden)
    }

    /// Puts back what is missing, books too, and removes what has come back.
    pub(super) fn fill(&self, draft: &mut StateStore, gaps: &Gaps) -> Result<Filled, BufferError> {
        let expected = self.expected(draft)?;
        draft.go_on_after(self.newest());
        draft.count_start()?;
        self.put_books(draft)?;
        draft.copy_letters_to(&self.raw.clusters())?;
        let letters = self.put_back(draft, gaps)?;
        draft.remove_letters(&gaps.returned)?;
        let held = draft.recount()?;
        draft.flush()?;
        let lost = self.lost(&held, gaps, expected);
        Ok(Filled { letters, lost, held, version: draft.newest() })
    }

    /// Where the bytes have newer ones. Of those that may not have been on stable storage only where there are no others: a
    /// replay is counted in the step in which the letter leaves.
    fn put_books(&self, draft: &StateStore) -> Result<(), BufferError> {
        for (key, books) in self.raw.books() {
            let held = draft.version_of(key)?;
            let believed = if held.is_some() { self.synced() } else { u64::MAX };
            if let Some((version, book)) = books.range(..=believed).next_back()
                && held.is_none_or(|held| *version > held)
            {
                draft.insert(key, &book.bytes)?;
            }
        }
        Ok(())
    }

    /// How many letters each sink should have: the newest word of anybody.
    pub(super) fn expected(&self, state: &StateStore) -> Result<Counts, BufferError> {
        // What `letters` knows and does not name was removed.
        let known = self.record.knows_all_to();
        let mut expected = state.versioned_counts()?;
        expected.retain(|_, (version, _)| *version > known);
        let raw = self.counts();
        let raw = raw.map(|(names, version, letters)| (names.clone(), (version, letters)));
        for (names, count) in raw {
            let newest = expected.entry(names).or_default();
            *newest = (*newest).max(count);
        }
        // Where a line is missing the others may count too many.
        for (names, count) in self.record.counts() {
            let newest = expected.entry(names).or_default();
            if count.0 > newest.0 {
                *newest = count;
            }
        }
        Ok(expected)
    }

    /// Of the counts in the bytes those that are newer than what `letters` says: an older one may be of a batch that sled
    /// rightly took for torn.
    fn counts(&self) -> impl Iterator<Item = (&Names, u64, u64)> {
        let known = self.record.knows_all_to();
        self.raw.counts().filter(move |(_, version, _)| *version > known)
    }

    /// What should be there, and neither the database nor its bytes have it.
    pub(super) fn lost(&self, held: &Held, gaps: &Gaps, expected: Counts) -> Vec<LostLetters> {
        let mut missing = self.missing(held, gaps);
        let lost = expected.into_iter().map(|(names, (_, letters))| {
            let sequences = missing.remove(&names).unwrap_or_default();
            let named: u64 = sequences.iter().map(|range| range.count()).sum();
            let there = held.count(&names).letters;
            let unnamed = letters.saturating_sub(there + named);
            LostLetters::new(names, sequences, unnamed, self.newest())
        });
        lost.filter(|lost| lost.letters() > 0).collect()
    }

    fn put_back(&self, draft: &mut StateStore, gaps: &Gaps) -> Result<u64, BufferError> {
        let (mut letters, mut bytes) = (Vec::<DeadLetter>::new(), 0);
        let mut saved = 0;
        for found in self.raw.letters() {
            if !self.lacks(gaps, draft, &found)? {
                continue;
            }
            let Some(letter) = self.raw.read(&found)? else { continue };
            bytes += letter.payload.len();
            letters.push(letter);
            saved += 1;
            if letters.len() == BATCH_LETTERS || bytes > BATCH_BYTES {
                draft.put_letters(&std::mem::take(&mut letters))?;
                bytes = 0;
            }
        }
        draft.put_letters(&letters)?;
        Ok(saved)
    }
}

impl Gaps {
    /// Where a letter of this version is not there, it was removed.
    fn knows(&self, names: &Names, version: u64) -> bool {
        let agreed = self.agreed.get(names).filter(|agreed| **agreed > self.recorded);
        agreed.is_some_and(|agreed| version <= *agreed)
    }
}
