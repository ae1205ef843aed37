//! What came to Kafka, from the first round on: a consumer that drops repeats by their header, as the guarantee says.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use anyhow::{Context, Result, bail};
use rig::{Follower, KafkaCluster, Record};

use crate::collect::Reading;
use crate::traffic::{STREAMS, Stream};

/// Everything read so far.
pub struct Chronicle {
    follower: Follower,
    /// By topic, the stream whose it is.
    streams: HashMap<String, &'static Stream>,
    /// By `telemetry-id`: the content.
    contents: HashMap<String, u64>,
    /// By stream and key: the sequence of the newest record, and what it said.
    newest: HashMap<(&'static str, String), (u64, Reading)>,
    /// Of the running round, by stream: each record once.
    pub fresh: Vec<(&'static str, Reading)>,
    pub reordered: Vec<String>,
    pub changed: Vec<String>,
    /// Records that came again under the same `telemetry-id`.
    pub repeated: u64,
}

impl Chronicle {
    /// # Errors
    /// When a topic does not exist.
    pub fn new(kafka: &KafkaCluster, topics: &[String]) -> Result<Self> {
        let names: Vec<&str> = topics.iter().map(String::as_str).collect();
        Ok(Self {
            follower: kafka.follow(&names)?,
            streams: topics.iter().cloned().zip(&STREAMS).collect(),
            contents: HashMap::new(),
            newest: HashMap::new(),
            fresh: Vec::new(),
            reordered: Vec::new(),
            changed: Vec::new(),
            repeated: 0,
        })
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
    pub fn read_on(&mut self) -> Result<()> {
        for (topic, record) in self.follower.read()? {
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
        self.fresh.push((stream.name, reading));
        Ok(())
    }

    /// Distinct records of a stream so far.
    pub fn count(&self, stream: &str) -> u64 {
        let of_stream = |id: &&String| id.split('/').nth(1) == Some(stream);
        self.contents.keys().filter(of_stream).count() as u64
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
    })
}
