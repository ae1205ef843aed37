//! The ledger: one line of JSON per message the broker acknowledged, the truth a test compares everything else with.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::SimulateError;

/// One acknowledged publication.
#[derive(Debug, Clone, Serialize)]
struct Line<'a> {
    stream: &'a str,
    topic: &'a str,
    /// Counts the publications of the stream in this run, from 1.
    id: u64,
    sha256: &'a str,
    /// When the PUBACK came.
    acknowledged: Timestamp,
}

/// The hash of a payload as the ledger writes it.
pub(super) fn payload_hash(payload: &[u8]) -> String {
    hex::encode(Sha256::digest(payload))
}

#[derive(Debug)]
pub(super) struct Ledger {
    file: File,
    path: String,
}

impl Ledger {
    /// Begins a new ledger in place of an old one.
    pub(super) fn create(path: &Path) -> Result<Self, SimulateError> {
        let shown = path.display().to_string();
        match File::create(path) {
            Ok(file) => Ok(Ledger { file, path: shown }),
            Err(source) => Err(SimulateError::Ledger { path: shown, source }),
        }
    }

    /// Each line is one write to the kernel: a killed simulator leaves no half-known message behind.
    pub(super) fn write(
        &mut self,
        stream: &str,
        topic: &str,
        id: u64,
        sha256: &str,
    ) -> Result<(), SimulateError> {
        let line = Line { stream, topic, id, sha256, acknowledged: Timestamp::now() };
        let failed = |source| SimulateError::Ledger { path: self.path.clone(), source };
        let mut text = serde_json::to_vec(&line).map_err(|error| failed(error.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_in_the_file_as_soon_as_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let mut ledger = Ledger::create(&path).unwrap();
        ledger.write("energy", "a/b", 1, &payload_hash(b"x")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let line: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(line["stream"], "energy");
        assert_eq!(line["id"], 1);
        assert_eq!(
            line["sha256"],
            "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
        );
        assert!(Ledger::create(&folder.path().join("no/such")).is_err());
    }
}
