//! Topics: made when asked for, compared with what was asked for, never changed.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::FromClientConfig as _;
use rdkafka::error::RDKafkaErrorCode as Code;
use rdkafka::producer::Producer as _;
use tokio::runtime::Handle;

use super::client_config::admin_config;
use super::error::{CREATE_TOPIC, KafkaError, is_missing_topic};
use super::session::{Cluster, Session};
use crate::config::{KafkaSinkSettings, TopicSettings};

/// A topic as the cluster has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TopicFacts {
    pub partitions: usize,
    /// Of the partition that has the fewest.
    pub replicas: usize,
    /// `max.message.bytes`; none when this user may not read the topic's settings.
    pub message_bytes_max: Option<usize>,
    pub retention: Option<Retention>,
    /// `min.insync.replicas`.
    pub insync_replicas_min: Option<usize>,
}

/// `retention.ms`; negative means for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Retention(pub i64);

/// Makes the topic when it is missing and `ensure` says so. Blocking calls run elsewhere.
pub(super) async fn prepare(
    cluster: &Arc<Cluster>,
    session: &Arc<Session>,
    sink: &KafkaSinkSettings,
) -> Result<TopicFacts, KafkaError> {
    let timeout = cluster.settings.operation_timeout;
    let (asked, session, sink) = (cluster.clone(), session.clone(), sink.clone());
    let runtime = Handle::current();
    // Look, make, look again, read settings: four calls with a limit each.
    cluster
        .blocking("look up the topic", timeout * 5, move || {
            let cluster = asked;
            let found = match (look_up(&session, &sink.topic, timeout), &sink.ensure) {
                (Err(KafkaError::TopicMissing { .. }), Some(wanted)) => {
                    create(&cluster, &runtime, &sink.topic, wanted)?;
                    None
                }
                (found, _) => Some(found?),
            };
            let mut facts = match found {
                Some(facts) => facts,
                None => wait_until_made(&session, &sink.topic, timeout)?,
            };
            cluster.health.reached();
            read_settings(&cluster, &runtime, &sink.topic, &mut facts);
            Ok(facts)
        })
        .await
}

fn look_up(session: &Session, topic: &str, timeout: Duration) -> Result<TopicFacts, KafkaError> {
    const DOING: &str = "look up the topic";
    let metadata = session
        .producer()
        .client()
        .fetch_metadata(Some(topic), timeout)
        .map_err(|error| KafkaError::of(DOING, topic, &error))?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let error = found.and_then(|found| found.error()).map(Code::from);
    match (found, error) {
        (_, Some(code)) if is_missing_topic(code) => {
            Err(KafkaError::TopicMissing { topic: topic.to_owned() })
        }
        (_, Some(code)) => Err(KafkaError::Refused { doing: DOING, topic: topic.to_owned(), code }),
        (Some(found), None) if !found.partitions().is_empty() => {
            let partitions = found.partitions();
            let replicas = partitions.iter().map(|partition| partition.replicas().len()).min();
            let replicas = replicas.unwrap_or_default();
            Ok(TopicFacts { partitions: partitions.len(), replicas, ..TopicFacts::default() })
        }
        _ => Err(KafkaError::TopicMissing { topic: topic.to_owned() }),
    }
}

/// A topic just made is not known to every broker at once.
fn wait_until_made(
    session: &Session,
    topic: &str,
    timeout: Duration,
) -> Result<TopicFacts, KafkaError> {
    const PAUSE: Duration = Duration::from_millis(100);
    let deadline = std::time::Instant::now() + timeout;
    loop {
        match look_up(session, topic, timeout) {
            Err(KafkaError::TopicMissing { .. }) if std::time::Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            found => return found,
        }
    }
}

/// A client of its own.
pub(super) fn admin(cluster: &Cluster) -> Result<AdminClient<DefaultClientContext>, KafkaError> {
    AdminClient::from_config(&admin_config(&cluster.settings)).map_err(|error| {
        KafkaError::Settings { cluster: cluster.name.clone(), problem: error.to_string() }
    })
}

fn options(timeout: Duration) -> AdminOptions {
    AdminOptions::new().request_timeout(Some(timeout)).operation_timeout(Some(timeout))
}

fn create(
    cluster: &Cluster,
    runtime: &Handle,
    topic: &str,
    wanted: &TopicSettings,
) -> Result<(), KafkaError> {
    let retention = wanted.retention.as_millis().to_string();
    let new = NewTopic::new(topic, wanted.partitions, TopicReplication::Fixed(wanted.replication))
        .set("retention.ms", &retention);
    let admin = admin(cluster)?;
    let asked = admin.create_topics([&new], &options(cluster.settings.operation_timeout));
    let answers =
        runtime.block_on(asked).map_err(|error| KafkaError::of(CREATE_TOPIC, topic, &error))?;
    for answer in answers {
        match answer {
            Ok(_) => tracing::info!(event = "kafka_topic_created", cluster = %cluster.name, topic),
            Err((_, Code::TopicAlreadyExists)) => {}
            Err((_, code)) => {
                return Err(KafkaError::Refused {
                    doing: CREATE_TOPIC,
                    topic: topic.to_owned(),
                    code,
                });
            }
        }
    }
    Ok(())
}

/// Only to know more: without the right to read them the defaults of the configuration hold.
fn read_settings(cluster: &Cluster, runtime: &Handle, topic: &str, facts: &mut TopicFacts) {
    let Ok(admin) = admin(cluster) else { return };
    let resource = ResourceSpecifier::Topic(topic);
    let asked = admin.describe_configs([&resource], &options(cluster.settings.operation_timeout));
    let Ok(answers) = runtime.block_on(asked) else { return };
    for resource in answers.into_iter().flatten() {
        let value = |name: &str| resource.get(name).and_then(|entry| entry.value.as_deref());
        facts.message_bytes_max = value("max.message.bytes").and_then(|text| text.parse().ok());
        facts.insync_replicas_min = value("min.insync.replicas").and_then(|text| text.parse().ok());
        facts.retention = value("retention.ms").and_then(|text| text.parse().ok()).map(Retention);
    }
}

/// What differs between the topic and what `ensure` asks for, for people; none when nothing does.
pub(super) fn drift(facts: &TopicFacts, wanted: &TopicSettings) -> Option<String> {
    let mut differences = Vec::new();
    if facts.partitions != wanted.partitions.max(0) as usize {
        differences
            .push(format!("{} partitions instead of {}", facts.partitions, wanted.partitions));
    }
    let wanted_ms = i64::try_from(wanted.retention.as_millis()).unwrap_or(i64::MAX);
    if let Some(Retention(found_ms)) = facts.retention
        && found_ms != wanted_ms
    {
        differences.push(format!("retention.ms {found_ms} instead of {wanted_ms}"));
    }
    (!differences.is_empty()).then(|| differences.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_names_what_differs_and_is_silent_when_nothing_does() {
        let wanted = TopicSettings {
            partitions: 3,
            replication: 1,
            retention: Duration::from_secs(7 * 86_400),
        };
        let mut facts = TopicFacts {
            partitions: 3,
            replicas: 1,
            message_bytes_max: None,
            retention: Some(Retention(604_800_000)),
            insync_replicas_min: None,
        };
        assert_eq!(drift(&facts, &wanted), None);
        facts.retention = None;
        assert_eq!(drift(&facts, &wanted), None, "unknown is no drift");
        facts.partitions = 1;
        facts.retention = Some(Retention(86_400_000));
        let text = drift(&facts, &wanted).unwrap();
        assert_eq!(text, "1 partitions instead of 3, retention.ms 86400000 instead of 604800000");
    }
}
