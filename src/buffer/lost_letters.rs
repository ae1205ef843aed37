//! The dead letters that the disk lost: told once, and kept in `letter_losses`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::fates::without;
use super::log::set_aside;
use super::state_value::Names;
use super::{BufferError, disk};
use crate::domain::{Arrival, Runbook, SequenceRange, SinkName, StreamName};

pub(super) const NAME: &str = "letter_losses";

/// Ranges that are named of one loss; the letters of any others are counted.
const RANGES_MAX: usize = 10_000;
/// Ranges in one line of the log.
const RANGES_IN_A_LINE_MAX: usize = 50;

/// Dead letters of one sink that the disk lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LostLetters {
    pub stream: StreamName,
    pub sink: SinkName,
    /// Which ones.
    pub sequences: Vec<SequenceRange>,
    /// As many more, of which nothing tells which.
    pub unnamed: u64,
    /// The newest version of which there was a trace: a start that ends half-way, and is made again, finds the same loss.
    #[serde(default)]
    pub as_of_version: u64,
    pub noticed: Arrival,
}

impl LostLetters {
    pub(super) fn new(
        (sink, stream): Names,
        mut sequences: Vec<SequenceRange>,
        unnamed: u64,
        as_of_version: u64,
    ) -> Self {
        let rest = sequences.split_off(sequences.len().min(RANGES_MAX));
        let unnamed = unnamed + count(&rest);
        LostLetters { stream, sink, sequences, unnamed, as_of_version, noticed: Arrival::now() }
    }

    pub fn letters(&self) -> u64 {
        count(&self.sequences) + self.unnamed
    }

    /// What was told already: nothing was kept between that and this.
    fn leave_out(&mut self, told: &Self) {
        let same = (&self.stream, &self.sink) == (&told.stream, &told.sink);
        if same && told.as_of_version >= self.as_of_version {
            let left = self.sequences.iter().flat_map(|range| without(*range, &told.sequences));
            self.sequences = left.collect();
            self.unnamed = self.unnamed.saturating_sub(told.unnamed);
        }
    }

    fn tell(&self) {
        let named = self.sequences.iter().take(RANGES_IN_A_LINE_MAX);
        let mut sequences: Vec<_> = named.map(SequenceRange::to_string).collect();
        if sequences.len() < self.sequences.len() {
            sequences.push(format!("… ({NAME} has all)"));
        }
        tracing::error!(
            event = "dead_letters_lost",
            runbook = Runbook::DataLost.page(),
            stream = %self.stream,
            sink = %self.sink,
            letters = self.letters(),
            sequences = sequences.join(", "),
            unnamed = self.unnamed,
            "the disk lost dead letters"
        );
    }
}

/// The list so far; a damaged one is set aside: what it told was in the journal too.
pub(super) fn read(buffer: &Path, quarantine: &Path) -> Result<Vec<LostLetters>, BufferError> {
    let path = buffer.join(NAME);
    match disk::read_json(&path) {
        Err(error) if error.is_damage() => {
            set_aside(&path, quarantine, &error)?;
            Ok(Vec::new())
        }
        read => Ok(read?.unwrap_or_default()),
    }
}

/// Tells of what is not in the list, and adds it.
pub(super) fn add(
    buffer: &Path,
    quarantine: &Path,
    mut lost: Vec<LostLetters>,
) -> Result<(), BufferError> {
    let mut list = read(buffer, quarantine)?;
    lost.iter_mut().for_each(|lost| list.iter().for_each(|told| lost.leave_out(told)));
    lost.retain(|lost| lost.letters() > 0);
    if lost.is_empty() {
        return Ok(());
    }
    lost.iter().for_each(LostLetters::tell);
    list.extend(lost);
    disk::write_json(&buffer.join(NAME), &list)
}

/// By stream and sink.
pub(super) fn counts(list: &[LostLetters]) -> BTreeMap<String, BTreeMap<String, u64>> {
    let mut counts: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
    for lost in list {
        let of_stream = counts.entry(lost.stream.to_string()).or_default();
        *of_stream.entry(lost.sink.to_string()).or_default() += lost.letters();
    }
    counts
}

fn count(ranges: &[SequenceRange]) -> u64 {
    ranges.iter().map(|range| range.count()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Sequence;

    fn lost(ranges: &[(u64, u64)], unnamed: u64, as_of_version: u64) -> LostLetters {
        lost_of("one", ranges, unnamed, as_of_version)
    }

    fn lost_of(sink: &str, ranges: &[(u64, u64)], unnamed: u64, as_of_version: u64) -> LostLetters {
        let names = (SinkName::parse(sink).unwrap(), StreamName::parse("a").unwrap());
        let range = |&(first, last)| SequenceRange { first: Sequence(first), last: Sequence(last) };
        LostLetters::new(names, ranges.iter().map(range).collect(), unnamed, as_of_version)
    }

    #[test]
    fn the_list_grows_and_is_counted_by_sink() {
        let folder = tempfile::tempdir().unwrap();
        let quarantine = folder.path().join("quarantine");
        let add = |lost| add(folder.path(), &quarantine, vec![lost]).unwrap();
        add(lost(&[(3, 5), (9, 9)], 2, 6));
        add(lost(&[(4, 4)], 0, 8));
        // The start that found it ended before it had mended anything.
        add(lost(&[(4, 4)], 0, 8));
        // The newest trace was cut off meanwhile, and one more letter.
        add(lost(&[(4, 4), (7, 7)], 0, 7));
        // Kept again since, and lost again.
        add(lost(&[(4, 4)], 0, 9));
        let list = read(folder.path(), &quarantine).unwrap();
        assert_eq!(list.iter().map(LostLetters::letters).collect::<Vec<_>>(), [6, 1, 1, 1]);
        add(lost_of("two", &[(4, 4)], 2, 8));
        let list = read(folder.path(), &quarantine).unwrap();
        assert_eq!(counts(&list)["a"]["two"], 3);
        assert_eq!(counts(&list)["a"]["one"], 9);
    }

    #[test]
    fn of_very_many_ranges_some_are_counted_only() {
        let ranges: Vec<_> = (0..RANGES_MAX as u64 + 7).map(|at| (at * 2, at * 2)).collect();
        let lost = lost(&ranges, 1, 7);
        assert_eq!((lost.sequences.len(), lost.unnamed), (RANGES_MAX, 8));
    }
}
