//! Reading topics on and on, through any number of restarts of the broker.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::{Offset, TopicPartitionList};

use super::config;
use super::reader::Record;
use crate::wait::until;

const ASK_WITHIN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
/// Without a single record for this long the reading has failed.
const QUIET_MAX: Duration = Duration::from_secs(20);

/// A consumer of its own that remembers how far it has come.
pub struct Follower {
    consumer: BaseConsumer,
    /// By topic and partition: the offset of the next record.
    next: HashMap<(String, i32), i64>,
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Follower {
    pub(super) fn new(bootstrap: &str, topics: &[&str]) -> Result<Self> {
        let consumer: BaseConsumer = config(bootstrap)
            .set("group.id", "rig")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            .set("fetch.wait.max.ms", "20")
            // The broker may be away for a while: then it is to be found again quickly.
            .set("reconnect.backoff.max.ms", "200")
            .create()
            .context("make a consumer")?;
        let mut assignment = TopicPartitionList::new();
        let mut next = HashMap::new();
        for topic in topics {
            for partition in partitions(&consumer, topic)? {
                assignment.add_partition_offset(topic, partition, Offset::Offset(0))?;
                next.insert(((*topic).to_owned(), partition), 0);
            }
        }
        consumer.assign(&assignment)?;
        Ok(Self { consumer, next })
    }

    /// What has come since the last call, with its topic, in the order of each partition.
    ///
    /// # Errors
    /// When the broker does not answer in time.
    pub fn read(&mut self) -> Result<Vec<(String, Record)>> {
        let mut open = HashMap::new();
        for ((topic, partition), next) in &self.next {
            let (_, end) = self
                .consumer
                .fetch_watermarks(topic, *partition, ASK_WITHIN)
                .with_context(|| format!("ask for the end of {topic}"))?;
            if *next < end {
                open.insert((topic.clone(), *partition), end);
            }
        }
        let mut records = Vec::new();
        let mut last = Instant::now();
        while !open.is_empty() {
            match self.consumer.poll(POLL) {
                Some(Ok(message)) => {
                    last = Instant::now();
                    let place = (message.topic().to_owned(), message.partition());
                    let next = message.offset() + 1;
                    records.push((place.0.clone(), Record::from(&message)));
                    if open.get(&place).is_some_and(|end| next >= *end) {
                        open.remove(&place);
                    }
                    self.next.insert(place, next);
                }
                // A broker that was away: the library connects again by itself.
                Some(Err(_)) | None if last.elapsed() < QUIET_MAX => {}
                Some(Err(error)) => return Err(error).context("read records"),
                None => bail!("no record for {QUIET_MAX:?}; open: {open:?}"),
            }
        }
        Ok(records)
    }
}

/// The broker asked may be one of several to which a new topic is not known yet.
fn partitions(consumer: &BaseConsumer, topic: &str) -> Result<Vec<i32>> {
    until(ASK_WITHIN, format!("there is a topic {topic}"), || {
        let metadata = consumer.fetch_metadata(Some(topic), ASK_WITHIN)?;
        let about = metadata.topics().first().map(|about| about.partitions()).unwrap_or_default();
        Ok((!about.is_empty()).then(|| about.iter().map(|one| one.id()).collect()))
    })
}
