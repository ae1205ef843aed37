//! What was published, and what of it the broker acknowledged: the truth everything else is compared with.

use std::collections::HashMap;

/// One publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Counts publications of one publisher, from 0.
    pub id: u64,
    pub stream: String,
    pub topic: String,
    pub payload: Vec<u8>,
    /// The broker took it over: a PUBACK without an error.
    pub acked: bool,
    /// The broker's reason when it refused.
    pub refused: Option<String>,
    /// Sent more than once, because a connection was lost in between: the broker may hold it twice.
    pub resent: bool,
}

/// All publications in the order they were given.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    entries: Vec<Entry>,
}

impl Ledger {
    pub(crate) fn add(&mut self, stream: &str, topic: &str, payload: &[u8]) -> u64 {
        let id = self.entries.len() as u64;
        self.entries.push(Entry {
            id,
            stream: stream.to_owned(),
            topic: topic.to_owned(),
            payload: payload.to_vec(),
            acked: false,
            refused: None,
            resent: false,
        });
        id
    }

    pub(crate) fn entry_mut(&mut self, id: u64) -> &mut Entry {
        &mut self.entries[id as usize]
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn stream(&self, stream: &str) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.stream == stream)
    }

    pub fn acked(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.acked)
    }

    pub fn acked_count(&self) -> usize {
        self.acked().count()
    }

    /// Compares with what arrived, each publication known by a text of its own (`identify`). An acknowledged one must
    /// be there; one that was sent but never acknowledged may be; one that was sent twice may be there twice.
    pub fn compare<'a>(
        &self,
        identify: impl Fn(&Entry) -> String,
        arrived: impl IntoIterator<Item = &'a str>,
    ) -> Comparison {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for id in arrived {
            *counts.entry(id).or_default() += 1;
        }
        let mut comparison = Comparison::default();
        for entry in &self.entries {
            let id = identify(entry);
            match counts.remove(id.as_str()) {
                None if entry.acked => comparison.lost.push(id),
                Some(copies) if copies > 1 + usize::from(entry.resent) => {
                    comparison.doubled.push(id)
                }
                _ => {}
            }
        }
        comparison.unknown = counts.into_keys().map(str::to_owned).collect();
        comparison
    }
}

/// What is wrong; all empty = nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    pub lost: Vec<String>,
    pub doubled: Vec<String>,
    /// Arrived, but never published.
    pub unknown: Vec<String>,
}

impl Comparison {
    pub fn is_exact(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        for payload in ["a", "b", "c"] {
            ledger.add("s", "t", payload.as_bytes());
        }
        ledger.entry_mut(0).acked = true;
        ledger.entry_mut(1).acked = true;
        ledger
    }

    fn payload(entry: &Entry) -> String {
        String::from_utf8(entry.payload.clone()).unwrap()
    }

    #[test]
    fn only_what_was_acknowledged_must_arrive() {
        assert!(ledger().compare(payload, ["a", "b"]).is_exact());
        assert!(ledger().compare(payload, ["a", "b", "c"]).is_exact());
        assert_eq!(ledger().compare(payload, ["a", "c"]).lost, ["b"]);
    }

    #[test]
    fn a_second_copy_is_an_error_unless_it_was_sent_twice() {
        let mut ledger = ledger();
        assert_eq!(ledger.compare(payload, ["a", "a", "b"]).doubled, ["a"]);
        ledger.entry_mut(0).resent = true;
        assert!(ledger.compare(payload, ["a", "a", "b"]).is_exact());
    }

    #[test]
    fn what_nobody_published_is_told() {
        assert_eq!(ledger().compare(payload, ["a", "b", "x"]).unknown, ["x"]);
    }
}
