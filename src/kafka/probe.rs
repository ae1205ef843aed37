//! A look at a cluster: does it let the node in, are the topics there, do records fit.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::error::RDKafkaErrorCode as Code;

use super::copies;
use super::error::KafkaError;
use super::health::ClusterHealth;
use super::session::{Cluster, Session};
use super::topics::{self, TopicFacts};
use crate::config::{ClusterSettings, KafkaSinkSettings, StreamSettings};
use crate::domain::{Finding, Findings};

/// The library asks for a producer's identity half a second after its last try.
const IDENTITY_WAIT: Duration = Duration::from_millis(1_500);
const IDENTITY_LOOK: Duration = Duration::from_millis(50);

/// What one cluster says to the topics of these streams. Makes nothing; each question has the cluster's own limit.
pub async fn probe(
    name: &str,
    settings: &ClusterSettings,
    streams: &[&StreamSettings],
) -> Vec<Finding> {
    let mut findings = Findings::about(format!("kafka:{name}"));
    let health = Arc::new(ClusterHealth::detached(name));
    let cluster = Arc::new(Cluster::new(name.to_owned(), settings.clone(), health));
    match cluster.shared() {
        Ok(session) => look(&cluster, &session, streams, &mut findings).await,
        Err(error) => findings.failed("settings", &error),
    }
    findings.done()
}

async fn look(
    cluster: &Arc<Cluster>,
    session: &Arc<Session>,
    streams: &[&StreamSettings],
    findings: &mut Findings,
) {
    let (mut reached, mut asked_for) = (false, None);
    let copies = cluster.settings.dead_letters.as_ref();
    let copies = copies.map(|topic| copies::sink_settings(&cluster.name, topic));
    let routed = streams.iter().filter_map(|stream| stream.kafka.clone());
    for sink in routed.chain(copies) {
        let sink = &sink;
        let asked = KafkaSinkSettings { ensure: None, ..sink.clone() };
        let found = topics::prepare(cluster, session, &asked).await;
        let missing = matches!(found, Err(KafkaError::TopicMissing { .. }));
        if !reached && (found.is_ok() || missing) {
            reached = true;
            let protocol = topics_way(&cluster.settings);
            findings.ok("reachable", format!("the cluster lets the node in, {protocol}"));
        }
        asked_for.get_or_insert_with(|| sink.topic.clone());
        match found {
            Ok(facts) => topic(&cluster.settings, sink, &facts, findings),
            Err(_) if missing && sink.ensure.is_some() => {
                findings.ok("topic", format!("{}: not there, the node makes it", sink.topic));
            }
            Err(error) if missing => findings.failed("topic", &error),
            Err(error) => {
                // Why the brokers turn the node away says more than that nobody answered.
                let error = cluster.health.refusal().unwrap_or(error);
                match cluster.health.question().filter(|_| error.is_unreachable()) {
                    Some(question) => findings.fail("reachable", error.to_string(), &question),
                    None => findings.failed("reachable", &error),
                }
                // The other topics would wait as long for the same answer.
                return;
            }
        }
    }
    let Some(topic) = asked_for else { return };
    if let Some(code) = refused_identity(session).await {
        findings.failed("write", &KafkaError::Refused { doing: "open a producer", topic, code });
    }
}

/// What the brokers refuse the producer its identity for: a right to look at a topic is none to write to it. The library
/// asks by itself once a broker answers, and of being granted it tells nobody: silence is taken for that.
async fn refused_identity(session: &Session) -> Option<Code> {
    let refused = async {
        loop {
            if let Some(code) = session.standing_end() {
                return code;
            }
            tokio::time::sleep(IDENTITY_LOOK).await;
        }
    };
    tokio::time::timeout(IDENTITY_WAIT, refused).await.ok()
}

fn topics_way(settings: &ClusterSettings) -> &'static str {
    match (settings.tls.is_some(), settings.sasl.is_some()) {
        (true, true) => "over TLS, with a login",
        (true, false) => "over TLS",
        (false, true) => "with a login, in clear text",
        (false, false) => "in clear text",
    }
}

fn topic(
    settings: &ClusterSettings,
    sink: &KafkaSinkSettings,
    facts: &TopicFacts,
    findings: &mut Findings,
) {
    let name = &sink.topic;
    match sink.ensure.as_ref().and_then(|wanted| topics::drift(facts, wanted)) {
        None => findings.ok("topic", format!("{name}: {} partitions", facts.partitions)),
        Some(drift) => {
            let remedy = "change the topic or what `ensure` asks for; the node changes no topic";
            findings.warn("topic", format!("{name}: {drift}"), remedy);
        }
    }
    acknowledgement(name, facts, findings);
    match facts.message_bytes_max {
        Some(topic) if topic < settings.message_bytes_max => findings.warn(
            "message size",
            format!("{name}: {topic} bytes, the node sends up to {}", settings.message_bytes_max),
            "raise max.message.bytes of the topic, or lower message_bytes_max: larger records become dead letters",
        ),
        Some(topic) => findings.ok("message size", format!("{name}: {topic} bytes")),
        None => {}
    }
}

/// The node asks for the answer of all replicas that are in step; how many that are at least is the topic's setting.
fn acknowledgement(name: &str, facts: &TopicFacts, findings: &mut Findings) {
    let (replicas, insync) = (facts.replicas, facts.insync_replicas_min);
    let shown = insync.map_or("unknown".to_owned(), |count| count.to_string());
    let figure = format!("{name}: all; {replicas} replicas, min.insync.replicas {shown}");
    match insync {
        Some(insync) if replicas > 1 && insync < 2 => {
            let remedy = "set min.insync.replicas of the topic to 2: one broker alone may answer for all, and be lost";
            findings.warn("acks", figure, remedy);
        }
        Some(insync) if insync > replicas => {
            let remedy = "lower min.insync.replicas of the topic, or give it more replicas: it takes no record";
            findings.fail("acks", figure, remedy);
        }
        _ => findings.ok("acks", figure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Verdict;

    #[test]
    fn replicas_that_need_not_answer_are_doubtful_and_too_few_of_them_take_nothing() {
        for (replicas, insync_replicas_min, wanted) in [
            (1, Some(1), Verdict::Ok),
            (3, None, Verdict::Ok),
            (3, Some(2), Verdict::Ok),
            (3, Some(1), Verdict::Warn),
            (1, Some(2), Verdict::Fail),
        ] {
            let facts = TopicFacts { replicas, insync_replicas_min, ..TopicFacts::default() };
            let mut findings = Findings::about("kafka:main");
            acknowledgement("t", &facts, &mut findings);
            let found = findings.done().remove(0);
            assert_eq!(found.verdict, wanted, "{}", found.figure);
        }
    }
}
