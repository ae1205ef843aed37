//! What can go wrong at a Kafka cluster, and what it means for the records waiting there.

use std::time::Duration;

use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode as Code};

use crate::buffer::BufferError;
use crate::domain::ErrorClass;

/// An error of the producer, of its topics or of a replay. Its text tells the operator what to do; it never holds a
/// secret.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    #[error("cluster {cluster:?}: librdkafka refuses the settings: {problem}")]
    Settings { cluster: String, problem: String },
    #[error("{doing}: librdkafka refuses topic {topic:?}: {problem}")]
    Unaskable { doing: &'static str, topic: String, problem: String },
    #[error("{doing}: {}{}", describe(*code), remedy(doing, *code, topic))]
    Refused { doing: &'static str, topic: String, code: Code },
    #[error(
        "topic {topic:?} does not exist: create it, or add an `ensure` table to the stream's kafka settings so that the node does"
    )]
    TopicMissing { topic: String },
    #[error("cluster {cluster:?} and this node cannot connect: {why}; {}", access.remedy(cluster))]
    TurnedAway { cluster: String, access: Access, why: String },
    #[error("{doing}: no confirmation within {} s", limit.as_secs_f32())]
    TimedOut { doing: &'static str, limit: Duration },
    #[error(
        "the record of {bytes} bytes is larger than the {limit} bytes the brokers take: raise max.message.bytes of the topic and `message_bytes_max`"
    )]
    TooLarge { bytes: usize, limit: usize },
    #[error("stream {stream:?} is not routed to this cluster, or its producer is not running")]
    NotServed { stream: String },
    #[error(
        "stream {stream:?} entered no replay into its books within {} s: it is paused or cannot deliver; let it go on, then replay the rest",
        limit.as_secs_f32()
    )]
    BooksFull { stream: String, limit: Duration },
    #[error("the mapping of stream {stream:?} does not compile: {problem}")]
    Mapping { stream: String, problem: String },
    #[error("{doing}: this program panicked, which is a mistake in it")]
    Panicked { doing: &'static str },
    #[error(transparent)]
    Buffer(#[from] BufferError),
}

/// What is being done when `ensure` has a topic made; it takes a right of its own.
pub(super) const CREATE_TOPIC: &str = "create the topic";

/// What keeps the node from a cluster that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Login,
    Tls,
}

impl Access {
    /// From an error event of librdkafka. A broker that wants a client certificate says so only after the handshake,
    /// and the library calls it a lost connection.
    pub(super) fn of(code: Code, reason: &str) -> Option<Self> {
        match code {
            // The library calls it that too when the connection broke, or no answer came, before anybody judged anything.
            Code::Authentication if reason.contains("mechanism handshake failed: Local:") => None,
            Code::SSL if reason.contains("SSL transport error: ") => None,
            Code::Authentication | Code::SaslAuthenticationFailed => Some(Access::Login),
            Code::SSL => Some(Access::Tls),
            _ if reason.contains("SSL alert number") => Some(Access::Tls),
            _ => None,
        }
    }

    /// Settings are read at the start and at a reload, the files they name whenever the cluster turns the node away.
    fn remedy(self, cluster: &str) -> String {
        match self {
            Access::Login => format!(
                "check `username`, the password and `mechanism` in [clusters.{cluster}.sasl]; a corrected password file is read again by itself, anything else needs `telemetry reload`"
            ),
            Access::Tls => format!(
                "check `ca_file`, `certificate_file` and `key_file` in [clusters.{cluster}.tls] and the names in the brokers' certificates; corrected files are read again by themselves, anything else needs `telemetry reload`"
            ),
        }
    }
}

impl KafkaError {
    pub fn class(&self) -> ErrorClass {
        match self {
            KafkaError::Refused { code, .. } => class_of(*code),
            KafkaError::TimedOut { .. }
            | KafkaError::NotServed { .. }
            | KafkaError::BooksFull { .. } => ErrorClass::Transient,
            KafkaError::TooLarge { .. } | KafkaError::Panicked { .. } => ErrorClass::Data,
            KafkaError::Settings { .. }
            | KafkaError::Unaskable { .. }
            | KafkaError::TopicMissing { .. }
            | KafkaError::TurnedAway { .. }
            | KafkaError::Mapping { .. } => ErrorClass::Standing,
            KafkaError::Buffer(error) => error.class(),
        }
    }

    /// Nobody answered: the cluster is away, not only a topic in trouble.
    pub(super) fn is_unreachable(&self) -> bool {
        match self {
            KafkaError::TimedOut { .. } => true,
            // Only the brokers that make topics were asked.
            KafkaError::Refused { doing, .. } if *doing == CREATE_TOPIC => false,
            KafkaError::Refused { code, .. } => matches!(
                code,
                Code::BrokerTransportFailure
                    | Code::AllBrokersDown
                    | Code::Resolve
                    | Code::OperationTimedOut
                    | Code::Authentication
                    | Code::SSL
            ),
            _ => false,
        }
    }

    /// Names what was being done and the topic; without a code nobody but the library has seen it.
    pub(super) fn of(doing: &'static str, topic: &str, error: &ClientError) -> Self {
        let topic = topic.to_owned();
        // The library's own answer leaves out those of administration.
        let code = match error {
            ClientError::AdminOp(code) => Some(*code),
            error => error.rdkafka_error_code(),
        };
        match code {
            Some(code) => KafkaError::Refused { doing, topic, code },
            None => KafkaError::Unaskable { doing, topic, problem: error.to_string() },
        }
    }
}

/// The class of a librdkafka or broker error code. What is not known to pass by itself waits for a person.
pub(super) fn class_of(code: Code) -> ErrorClass {
    if is_data(code) {
        ErrorClass::Data
    } else if is_local_transient(code) || is_broker_transient(code) {
        ErrorClass::Transient
    } else {
        ErrorClass::Standing
    }
}

fn is_data(code: Code) -> bool {
    matches!(
        code,
        Code::MessageSizeTooLarge
            | Code::MessageBatchTooLarge
            | Code::InvalidMessageSize
            | Code::InvalidTimestamp
            | Code::InvalidRecord
    )
}

/// Raised by the client library itself.
fn is_local_transient(code: Code) -> bool {
    matches!(
        code,
        Code::BadMessage
            | Code::BrokerDestroy
            | Code::DestroyBroker
            | Code::BrokerTransportFailure
            | Code::Resolve
            | Code::MessageTimedOut
            | Code::AllBrokersDown
            | Code::OperationTimedOut
            | Code::TimedOutQueue
            | Code::QueueFull
            | Code::ISRInsufficient
            | Code::NodeUpdate
            | Code::WaitingForCoordinator
            | Code::InProgress
            | Code::PreviousInProgress
            | Code::Outdated
            | Code::WaitCache
            | Code::Retry
            | Code::PurgeQueue
            | Code::PurgeInflight
            | Code::Fatal
            | Code::Fenced
            | Code::GaplessGuarantee
            | Code::Inconsistent
            | Code::UnknownBroker
    )
}

/// Answered by a broker. Sequence and epoch errors end the producer, not the record: a fresh producer mends them.
fn is_broker_transient(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidMessage
            | Code::LeaderNotAvailable
            | Code::NotLeaderForPartition
            | Code::RequestTimedOut
            | Code::BrokerNotAvailable
            | Code::ReplicaNotAvailable
            | Code::StaleControllerEpoch
            | Code::NetworkException
            | Code::CoordinatorLoadInProgress
            | Code::CoordinatorNotAvailable
            | Code::NotCoordinator
            | Code::NotEnoughReplicas
            | Code::NotEnoughReplicasAfterAppend
            | Code::NotController
            | Code::OutOfOrderSequenceNumber
            | Code::DuplicateSequenceNumber
            | Code::InvalidProducerEpoch
            | Code::ProducerFenced
            | Code::UnknownProducerId
            | Code::InvalidProducerIdMapping
            | Code::ConcurrentTransactions
            | Code::KafkaStorageError
            | Code::ReassignmentInProgress
            | Code::FencedLeaderEpoch
            | Code::UnknownLeaderEpoch
            | Code::StaleBrokerEpoch
            | Code::PreferredLeaderNotAvailable
            | Code::EligibleLeadersNotAvailable
            | Code::ThrottlingQuotaExceeded
            | Code::UnknownTopicId
            | Code::RebootstrapRequired
    )
}

/// The topic is not there, as the client or a broker says it.
pub(super) fn is_missing_topic(code: Code) -> bool {
    matches!(code, Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition)
}

/// The library's own words, without the name of its enum.
fn describe(code: Code) -> String {
    let text = code.to_string();
    let words = text.split_once(" (").and_then(|(_, words)| words.strip_suffix(')'));
    words.unwrap_or(&text).to_owned()
}

/// What an operator does about it; empty where waiting is all there is to do.
fn remedy(doing: &str, code: Code, topic: &str) -> String {
    match code {
        Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed
            if doing == CREATE_TOPIC =>
        {
            format!(
                "; allow this user to Create, Write and Describe topic {topic:?}, or create it yourself"
            )
        }
        Code::TopicAuthorizationFailed => {
            format!("; allow this user to Write and Describe topic {topic:?}")
        }
        Code::ClusterAuthorizationFailed => format!(
            "; allow this user to Write topic {topic:?} (brokers before 2.8: IdempotentWrite on the cluster)"
        ),
        Code::UnsupportedFeature => {
            "; the brokers know no idempotent producer: upgrade them to 0.11 or later".to_owned()
        }
        Code::Authentication | Code::SaslAuthenticationFailed => {
            "; check the user name, the password and the SASL mechanism".to_owned()
        }
        Code::UnsupportedSASLMechanism | Code::IllegalSASLState => {
            "; set the SASL mechanism the brokers offer".to_owned()
        }
        Code::SSL => {
            "; check the authority file, the client certificate and the brokers' names".to_owned()
        }
        Code::InvalidTopic => format!("; {topic:?} is no legal topic name: change it"),
        Code::InvalidReplicationFactor => {
            "; lower `replication`: the cluster has fewer brokers".to_owned()
        }
        Code::MessageSizeTooLarge | Code::MessageBatchTooLarge => {
            format!("; raise max.message.bytes of topic {topic:?} or lower `message_bytes_max`")
        }
        Code::BrokerTransportFailure
        | Code::AllBrokersDown
        | Code::Resolve
        | Code::OperationTimedOut => {
            "; no broker of `bootstrap_servers` answers as it should, records wait in the buffer"
                .to_owned()
        }
        code if is_missing_topic(code) => {
            format!("; create topic {topic:?} or let the node `ensure` it")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_that_matters_has_the_class_its_handling_needs() {
        use ErrorClass::{Data, Standing, Transient};
        let table = [
            (Code::BrokerTransportFailure, Transient),
            (Code::AllBrokersDown, Transient),
            (Code::Resolve, Transient),
            (Code::MessageTimedOut, Transient),
            (Code::PurgeQueue, Transient),
            (Code::PurgeInflight, Transient),
            (Code::Fatal, Transient),
            (Code::Fenced, Transient),
            (Code::ProducerFenced, Transient),
            (Code::InvalidProducerEpoch, Transient),
            (Code::GaplessGuarantee, Transient),
            (Code::NotLeaderForPartition, Transient),
            (Code::NotEnoughReplicas, Transient),
            (Code::OutOfOrderSequenceNumber, Transient),
            (Code::KafkaStorageError, Transient),
            (Code::MessageSizeTooLarge, Data),
            (Code::MessageBatchTooLarge, Data),
            (Code::InvalidRecord, Data),
            (Code::TopicAuthorizationFailed, Standing),
            (Code::ClusterAuthorizationFailed, Standing),
            (Code::Authentication, Standing),
            (Code::SaslAuthenticationFailed, Standing),
            (Code::SSL, Standing),
            (Code::UnknownTopic, Standing),
            (Code::UnknownTopicOrPartition, Standing),
            (Code::InvalidTopic, Standing),
            (Code::PolicyViolation, Standing),
            (Code::UnsupportedCompressionType, Standing),
            (Code::Unknown, Standing),
        ];
        for (code, class) in table {
            assert_eq!(class_of(code), class, "{code:?}");
        }
    }

    #[test]
    fn an_administrators_question_without_an_answer_is_asked_again() {
        let error = ClientError::AdminOp(Code::OperationTimedOut);
        let error = KafkaError::of(CREATE_TOPIC, "energy", &error);
        assert_eq!(error.class(), ErrorClass::Transient, "{error}");
        assert!(!error.is_unreachable(), "the other streams' brokers answer");
        let error = ClientError::AdminOpCreation("no such name".to_owned());
        let error = KafkaError::of(CREATE_TOPIC, "energy", &error);
        assert_eq!(error.class(), ErrorClass::Standing, "{error}");
        assert!(error.to_string().contains("topic \"energy\": "), "{error}");
    }

    #[test]
    fn a_topic_the_user_may_not_make_asks_for_the_right_to_create() {
        for code in [Code::TopicAuthorizationFailed, Code::ClusterAuthorizationFailed] {
            let error = |doing| KafkaError::Refused { doing, topic: "energy".to_owned(), code };
            assert!(error(CREATE_TOPIC).to_string().contains("allow this user to Create"));
            assert!(!error("deliver").to_string().contains("Create"));
        }
    }

    #[test]
    fn a_connection_that_breaks_during_a_handshake_is_no_refusal() {
        let handshake = |words: &str| {
            let reason = format!(
                "sasl_ssl://kafka.test:9094/bootstrap: SASL PLAIN mechanism handshake failed: {words}: broker's supported mechanisms: (n/a)"
            );
            Access::of(Code::Authentication, &reason)
        };
        assert_eq!(handshake("Local: Broker transport failure"), None);
        assert_eq!(handshake("Local: Timed out"), None);
        assert_eq!(handshake("Broker: Unsupported SASL mechanism"), Some(Access::Login));
        let refused =
            "SASL authentication error: Authentication failed: Invalid username or password";
        assert_eq!(Access::of(Code::Authentication, refused), Some(Access::Login));
        let tls = |words: &str| {
            let reason = format!(
                "ssl://kafka.test:9094/bootstrap: SSL handshake failed: {words} (after 9ms)"
            );
            Access::of(Code::SSL, &reason)
        };
        assert_eq!(tls("SSL transport error: Connection timed out"), None);
        assert_eq!(
            tls("error:0A000086:SSL routines::certificate verify failed"),
            Some(Access::Tls)
        );
    }

    #[test]
    fn a_standing_error_says_what_to_do() {
        for code in [
            Code::TopicAuthorizationFailed,
            Code::ClusterAuthorizationFailed,
            Code::UnsupportedFeature,
            Code::SaslAuthenticationFailed,
            Code::SSL,
            Code::UnknownTopicOrPartition,
            Code::InvalidReplicationFactor,
            Code::BrokerTransportFailure,
        ] {
            let error = KafkaError::Refused { doing: "send", topic: "energy".to_owned(), code };
            assert!(error.to_string().contains("; "), "{error}");
            assert!(!error.to_string().contains(&format!("{code:?} (")), "{error}");
        }
    }
}
