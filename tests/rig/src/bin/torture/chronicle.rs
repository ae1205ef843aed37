//! What came to Kafka, from the first round on: a consumer that drops repeats by their header, as the guarantee says.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use anyhow::{Context, Result, bail};
use rig::{Follower, Record};

use crate::collect::Reading;
use crate::traffic::{STREAMS, Stream};

/// A record that came for the first time.
pub struct Fresh {
    pub stream: &'static str,
    pub reading: Reading,
    /// The whole of it.
    pub text: String,
}

/// Everything read so far.
#[derive(Default)]
pub struct Chronicle {
    /// By topic, the stream whose it is.
    streams: HashMap<String, &'static Stream>,
    /// By `telemetry-id`: the content.
    contents: HashMap<String, u64>,
    /// By stream and key: the sequence of the newest record, and what it said.
    newest: HashMap<(&'static str, String), (u64, Reading)>,
    /// Of the running round: each record once.
    pub fresh: Vec<Fresh>,
    pub reordered: Vec<String>,
    pub changed: Vec<String>,
    /// Records that came again under the same `telemetry-id`.
    pub repeated: u64,
}

impl Chronicle {
    /// The topics of the streams, in their order.
    pub fn new(topics: &[&str]) -> Self {
        let names = topics.iter().map(|topic| (*topic).to_owned());
        Self { streams: names.zip(&STREAMS).collect(), ..Self::default() }
    }

    /// Forgets what only the last round's judgement needed.
    pub fn begin_round(&mut self) {
        self.fresh.clear();
        self.reordered.clear();
        self.changed.clear();
        self.repeated = 0;
    }

    /// # Errors
    /// When Kafka does not answer, or a record is none of the node's.
    pub fn read_on(&mut self, follower: &mut Follower) -> Result<()> {
        for (topic, record) in follower.read()? {
            self.enter(&topic, &record).with_context(|| {
                let value = String::from_utf8_lossy(&record.value);
                format!("a record of {topic}, offset {}: {value}", record.offset)
            })?;
        }
        Ok(())
    }

    fn enter(&mut self, topic: &str, record: &Record) -> Result<()> {
        let stream = *self.streams.get(topic).context("a topic nobody reads")?;
        let id = record.header("telemetry-id").context("it has no telemetry-id")?;
        let mut hasher = DefaultHasher::new();
        (&record.key, &record.value, record.timestamp).hash(&mut hasher);
        let content = hasher.finish();
        if let Some(before) = self.contents.insert(id.to_owned(), content) {
            self.repeated += 1;
            if before != content {
                self.changed.push(format!("{id} came again with another content"));
            }
            return Ok(());
        }
        let sequence = id.rsplit('/').next().and_then(|number| number.parse().ok());
        let sequence: u64 = sequence.context("its telemetry-id ends with no sequence")?;
        let key = record.key.clone().context("it has no key")?;
        let key = String::from_utf8(key).context("its key is no text")?;
        let reading = reading(stream, record)?;
        if reading.device != key {
            bail!("its key is {key}, its device {}", reading.device);
        }
        let entry = (sequence, reading.clone());
        if let Some((before, _)) = self.newest.insert((stream.name, key), entry)
            && before >= sequence
        {
            self.reordered.push(format!("{id} came after sequence {before} of the same device"));
        }
        let text = String::from_utf8(record.value.clone()).context("it is no text")?;
        self.fresh.push(Fresh { stream: stream.name, reading, text });
        Ok(())
    }

    /// By device, what its newest record said.
    pub fn newest(&self, stream: &'static str) -> impl Iterator<Item = &Reading> {
        self.newest.iter().filter(move |((of, _), _)| *of == stream).map(|(_, (_, last))| last)
    }
}

fn reading(stream: &Stream, record: &Record) -> Result<Reading> {
    let json = record.json()?;
    let at = |place: usize| json.pointer(stream.record[place]);
    let device = at(0).and_then(|value| value.as_str()).context("no device")?;
    let number = at(1).and_then(|value| value.as_f64()).context("no number")?;
    let value = at(2).and_then(|value| value.as_f64());
    Ok(Reading {
        device: device.to_owned(),
        number: number as u64,
        value: value.map(|value| value as u32),
        time: json["ts"].as_str().context("no ts")?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the plug p1, as the node would write it under this sequence.
    fn record(sequence: u64, value: u32) -> Record {
        let json = serde_json::json!({
            "ts": "2026-03-14T07:21:05Z",
            "tags": {"plug_id": "p1"},
            "fields": {"uptime_seconds": sequence, "wifi_rssi": value},
        });
        Record {
            key: Some(b"p1".to_vec()),
            value: json.to_string().into_bytes(),
            headers: vec![("telemetry-id".to_owned(), id(sequence).into_bytes())],
            timestamp: Some(1),
            partition: 0,
            offset: 0,
        }
    }

    fn id(sequence: u64) -> String {
        format!("homelab-1/plug/{sequence}")
    }

    fn chronicle(records: &[Record]) -> Chronicle {
        let mut chronicle = Chronicle::new(&["energy", "indoor", "heatpump", "plugs"]);
        for record in records {
            chronicle.enter("plugs", record).unwrap();
        }
        chronicle
    }

    #[test]
    fn records_in_order_are_each_fresh_and_the_last_is_the_newest() {
        let chronicle = chronicle(&[record(1, 7), record(2, 8)]);
        assert_eq!(chronicle.fresh.len(), 2);
        assert_eq!(chronicle.newest("plug").map(|last| last.number).collect::<Vec<_>>(), [2]);
        assert!(chronicle.reordered.is_empty() && chronicle.changed.is_empty());
        assert_eq!(chronicle.repeated, 0);
    }

    #[test]
    fn a_record_that_comes_after_a_later_one_of_its_device_is_reordered() {
        let chronicle = chronicle(&[record(2, 8), record(1, 7)]);
        let told = format!("{} came after sequence 2 of the same device", id(1));
        assert_eq!(chronicle.reordered, [told]);
    }

    #[test]
    fn a_repeat_is_no_new_record_and_must_say_the_same() {
        let again = chronicle(&[record(1, 7), record(2, 8), record(1, 7)]);
        assert_eq!((again.fresh.len(), again.repeated), (2, 1));
        assert!(again.changed.is_empty() && again.reordered.is_empty());
        let other = chronicle(&[record(1, 7), record(1, 8)]);
        assert_eq!(other.changed, [format!("{} came again with another content", id(1))]);
        let mut later = record(1, 7);
        later.timestamp = Some(2);
        assert_eq!(chronicle(&[record(1, 7), later]).changed.len(), 1);
    }

    #[test]
    fn a_record_that_is_none_of_the_nodes_is_an_error() {
        let mut chronicle = chronicle(&[]);
        let without_id = Record { headers: Vec::new(), ..record(1, 7) };
        let of_another = Record { key: Some(b"p2".to_vec()), ..record(1, 7) };
        assert!(chronicle.enter("plugs", &without_id).is_err());
        assert!(chronicle.enter("plugs", &of_another).is_err());
        assert!(chronicle.enter("elsewhere", &record(1, 7)).is_err());
    }
}
