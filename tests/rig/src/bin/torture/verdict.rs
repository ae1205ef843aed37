//! What a round is found guilty of.

use std::fmt;

const SHOWN: usize = 5;

/// What is wrong, by how; all empty = nothing.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    pub lost: Vec<String>,
    pub doubled: Vec<String>,
    pub reordered: Vec<String>,
    /// Other content than was published.
    pub changed: Vec<String>,
    /// Dead though good, or there though it should not be.
    pub misjudged: Vec<String>,
    /// Nobody published it.
    pub foreign: Vec<String>,
    /// The node's own books say something else than what is there.
    pub books: Vec<String>,
    pub stuck: Vec<String>,
    /// The node says that the disk lost something. No fault harms what a file holds on stable storage.
    pub alarms: Vec<String>,
    /// Acknowledged messages that are at every place where their kind belongs.
    pub delivered: u64,
    pub dead: u64,
    pub repeated: u64,
    /// Handed to the node twice by a broker that had been cut off, in the stream that declares no message id.
    pub made_twice: u64,
}

impl Verdict {
    fn kinds(&self) -> [(&'static str, &Vec<String>); 9] {
        [
            ("lost", &self.lost),
            ("doubled", &self.doubled),
            ("reordered", &self.reordered),
            ("changed", &self.changed),
            ("misjudged", &self.misjudged),
            ("foreign", &self.foreign),
            ("books", &self.books),
            ("stuck", &self.stuck),
            ("alarms", &self.alarms),
        ]
    }

    pub fn holds(&self) -> bool {
        self.kinds().iter().all(|(_, found)| found.is_empty())
    }

    /// What is missing may still be on its way; everything else stays as it is.
    pub fn may_mend(&self) -> bool {
        self.kinds()[1..7].iter().all(|(_, found)| found.is_empty())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, found) in self.kinds().iter().filter(|(_, found)| !found.is_empty()) {
            writeln!(f, "{kind} ({}):", found.len())?;
            for what in found.iter().take(SHOWN) {
                writeln!(f, "  {what}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_still_be_on_its_way_is_waited_for() {
        let mut verdict = Verdict::default();
        assert!(verdict.holds() && verdict.may_mend());
        verdict.lost.push("one".to_owned());
        verdict.stuck.push("energy".to_owned());
        assert!(!verdict.holds() && verdict.may_mend());
        assert_eq!(verdict.to_string(), "lost (1):\n  one\nstuck (1):\n  energy\n");
        let one = || vec!["one".to_owned()];
        for verdict in [
            Verdict { doubled: one(), ..Verdict::default() },
            Verdict { reordered: one(), ..Verdict::default() },
            Verdict { changed: one(), ..Verdict::default() },
            Verdict { misjudged: one(), ..Verdict::default() },
            Verdict { foreign: one(), ..Verdict::default() },
            Verdict { books: one(), ..Verdict::default() },
        ] {
            assert!(!verdict.holds() && !verdict.may_mend(), "{verdict}");
        }
    }
}
