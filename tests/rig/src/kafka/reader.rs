//! Reading topics back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::{Offset, TopicPartitionList};

use super::config;

const ASK_WITHIN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(200);
/// Without a single record for this long the reading has failed.
const QUIET_MAX: Duration = Duration::from_secs(20);

/// A record as a consumer sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub key: Option<Vec<u8>>,
    pub value: Vec<u8>,
    pub headers: Vec<(String, Vec<u8>)>,
    /// Milliseconds since 1970.
    pub timestamp: Option<i64>,
    pub partition: i32,
    pub offset: i64,
}

impl Record {
    /// A header's value as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(key, _)| key == name)?;
        std::str::from_utf8(value).ok()
    }

    /// The value as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.value).context("read the record's JSON")
    }
}

impl From<&BorrowedMessage<'_>> for Record {
    fn from(message: &BorrowedMessage<'_>) -> Self {
        let headers = message.headers().into_iter().flat_map(|headers| {
            headers
                .iter()
                .map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec()))
        });
        Self {
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().unwrap_or_default().to_vec(),
            headers: headers.collect(),
            timestamp: message.timestamp().to_millis(),
            partition: message.partition(),
            offset: message.offset(),
        }
    }
}

/// A partition's first offset and the one after its last.
struct Span {
    partition: i32,
    first: i64,
    end: i64,
}

fn consumer(bootstrap: &str) -> Result<BaseConsumer> {
    config(bootstrap)
        .set("group.id", "rig")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "false")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", "20")
        .create()
        .context("make a consumer")
}

fn spans(consumer: &BaseConsumer, topic: &str) -> Result<Vec<Span>> {
    let metadata = consumer.fetch_metadata(Some(topic), ASK_WITHIN)?;
    let about = metadata.topics().first().context("no answer about the topic")?;
    about
        .partitions()
        .iter()
        .map(|partition| {
            let id = partition.id();
            let (first, end) = consumer.fetch_watermarks(topic, id, ASK_WITHIN)?;
            Ok(Span { partition: id, first, end })
        })
        .collect()
}

pub(super) fn count(bootstrap: &str, topic: &str) -> Result<u64> {
    let spans = spans(&consumer(bootstrap)?, topic)?;
    Ok(spans.iter().map(|span| (span.end - span.first).unsigned_abs()).sum())
}

pub(super) fn read(bootstrap: &str, topic: &str, limit: usize) -> Result<Vec<Record>> {
    let consumer = consumer(bootstrap)?;
    let spans = spans(&consumer, topic)?;
    if spans.is_empty() {
        bail!("there is no topic {topic}");
    }
    let mut open: Vec<Span> = spans.into_iter().filter(|span| span.first < span.end).collect();
    let mut assignment = TopicPartitionList::new();
    for span in &open {
        assignment.add_partition_offset(topic, span.partition, Offset::Offset(span.first))?;
    }
    consumer.assign(&assignment)?;

    let mut records = Vec::new();
    let mut last = Instant::now();
    while !open.is_empty() && records.len() < limit {
        match consumer.poll(POLL) {
            Some(message) => {
                let record = Record::from(&message?);
                last = Instant::now();
                open.retain(|span| {
                    span.partition != record.partition || record.offset + 1 < span.end
                });
                records.push(record);
            }
            None if last.elapsed() > QUIET_MAX => {
                bail!("no record of {topic} for {QUIET_MAX:?}, {} read", records.len())
            }
            // The end of a partition may be a transaction's marker, which is never handed out.
            None => {
                let position = consumer.position()?;
                open.retain(|span| {
                    let place = position.find_partition(topic, span.partition);
                    !matches!(place.map(|place| place.offset()), Some(Offset::Offset(at)) if at >= span.end)
                });
            }
        }
    }
    records.sort_by_key(|record| (record.partition, record.offset));
    Ok(records)
}
