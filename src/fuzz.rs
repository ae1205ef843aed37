//! What the fuzz targets call, and the test that runs their seeds. Each takes any bytes at all; what must not be is a
//! panic. Nothing of it is in a released binary.

use std::cell::RefCell;
use std::path::Path;
use std::sync::LazyLock;

use crate::config::{self, Report, StreamSettings, Warnings};
use crate::domain::{Arrival, DeliveryFlags, Record, Sequence};
use crate::mapping::{self, Outcome, RecordMapper, RowMapper};

pub use crate::buffer::fuzz_block as block;

static STREAMS: LazyLock<Vec<StreamSettings>> = LazyLock::new(|| {
    let file = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/mapping.toml"));
    let loaded = config::load(file, &|_| None).unwrap_or_else(|report| panic!("{report}"));
    loaded.settings.streams.into_values().collect()
});

/// Both uses of one stream; they keep memory from message to message, as in the node.
struct Mappers {
    record: RecordMapper,
    rows: Vec<RowMapper>,
}

impl Mappers {
    fn of(stream: &StreamSettings) -> Self {
        let row = |table| RowMapper::compile(stream, table).expect("it was checked");
        Mappers {
            record: RecordMapper::compile(stream).expect("it was checked"),
            rows: stream.tables.values().map(row).collect(),
        }
    }
}

thread_local! {
    static MAPPERS: RefCell<Vec<Mappers>> = RefCell::new(STREAMS.iter().map(Mappers::of).collect());
}

/// The first line is the topic, the rest the payload. A record that is made is JSON with a key, explaining comes to the
/// same verdict, and what a mapper saw before changes nothing.
pub fn mapping(bytes: &[u8]) {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let Ok(topic) = std::str::from_utf8(&bytes[..end]) else { return };
    let record = Record {
        sequence: Sequence(1),
        arrival: Arrival(1_773_472_865_412_908),
        topic,
        payload: bytes.get(end + 1..).unwrap_or_default(),
        flags: DeliveryFlags { qos: 1, ..DeliveryFlags::default() },
        packet_id: 1,
    };
    MAPPERS.with_borrow_mut(|all| {
        for (stream, mappers) in STREAMS.iter().zip(all) {
            let first = verdicts(mappers, &record);
            assert_eq!(first, verdicts(mappers, &record), "a repeat of the same message");
            let explained = mapping::explain(stream, &record).expect("it was checked");
            let explained: Vec<_> = explained.uses.iter().map(|found| found.verdict).collect();
            assert_eq!(explained, first.iter().map(|(verdict, _)| *verdict).collect::<Vec<_>>());
        }
    });
}

/// What each use makes of the record: the verdict and the values as text.
fn verdicts(mappers: &mut Mappers, record: &Record<'_>) -> Vec<(&'static str, String)> {
    let (mut json, mut key) = (Vec::new(), Vec::new());
    let mut found = vec![verdict(mappers.record.map(record, &mut json, &mut key))];
    if found[0].0 == "mapped" {
        serde_json::from_slice::<serde::de::IgnoredAny>(&json).expect("a record is JSON");
        assert!(!key.is_empty(), "a record has a key");
        found[0].1 = String::from_utf8(json).expect("JSON is UTF-8");
    }
    found.extend(mappers.rows.iter_mut().map(|mapper| verdict(mapper.map(record))));
    found
}

fn verdict<T: std::fmt::Debug>(outcome: Outcome<T>) -> (&'static str, String) {
    match outcome {
        Outcome::Mapped(values) => ("mapped", format!("{values:?}")),
        Outcome::Filtered => ("filtered", String::new()),
        Outcome::Incomplete => ("incomplete", String::new()),
        Outcome::Dead(fault) => ("dead", format!("{fault:?}")),
    }
}

/// A configuration that passes compiles, one that does not has a report, and both can be shown.
pub fn configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match config::parse(text, &|_| None) {
        Err(report) => shown(&report),
        Ok(loaded) => {
            let _ = Warnings(&loaded.warnings).to_string();
            loaded.effective.iter().for_each(|line| drop(line.to_string()));
            for stream in loaded.settings.streams.values() {
                let _ = RecordMapper::compile(stream);
                stream.tables.values().for_each(|table| drop(RowMapper::compile(stream, table)));
            }
        }
    }
}

fn shown(report: &Report) {
    let text = report.to_string();
    assert!(!report.problems.is_empty(), "refused without a reason: {text}");
    serde_json::to_string(report).expect("a report is JSON");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs every file of these folders through a target, and beginnings of it.
    fn run(target: fn(&[u8]), folders: &[&str]) {
        let mut files = 0;
        for folder in folders {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    continue;
                }
                let bytes = std::fs::read(&path).unwrap();
                files += 1;
                for part in 1..=8 {
                    target(&bytes[..bytes.len() * part / 8]);
                }
            }
        }
        assert!(files > 0, "no seeds in {folders:?}");
    }

    #[test]
    fn seeds_of_the_mapping_end_in_a_verdict() {
        run(mapping, &["fuzz/seeds/mapping"]);
    }

    #[test]
    fn seeds_of_the_block_decoder_end_in_a_verdict() {
        run(block, &["fuzz/seeds/block"]);
    }

    #[test]
    fn seeds_of_the_configuration_end_in_a_verdict() {
        run(configuration, &["fuzz/seeds/configuration", "tests/check", "examples/homelab"]);
    }
}
