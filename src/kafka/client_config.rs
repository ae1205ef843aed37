//! From checked settings to librdkafka properties.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::producer::BaseProducer;

use crate::config::{ClusterSettings, SaslMechanism, TlsSettings};

/// Room in librdkafka's queue beyond what the streams may have in flight, so that their own bounds hold first.
const QUEUE_SPARE_MESSAGES: usize = 1_000;
/// librdkafka's own limits of `message.max.bytes`.
const MESSAGE_BYTES_LEGAL: std::ops::RangeInclusive<usize> = 1_000..=1_000_000_000;
/// Memory one producer's queue may take: beyond it `send` answers "queue full" and the streams wait.
const QUEUE_KBYTES_MAX: usize = 256 * 1024;

/// A connection that is refused costs nothing, and what waits is to go out soon after the brokers are back.
const RECONNECT_MAX: Duration = Duration::from_secs(5);

/// What a producer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Carries every stream. A record that fails for good must stop what is queued behind it, or later records of
    /// its key would pass it.
    Shared,
    /// Carries one record at a time: there is nothing that could pass.
    Single,
}

/// The properties of a producer for `streams` streams. `properties` of the file come last and win.
pub(super) fn producer_config(
    settings: &ClusterSettings,
    streams: usize,
    purpose: Purpose,
) -> ClientConfig {
    let mut config = client_config(settings);
    // A record that travels alone waits for no company.
    let linger = if purpose == Purpose::Single { Duration::ZERO } else { settings.linger };
    let queue = settings.in_flight_max * streams.max(1) + QUEUE_SPARE_MESSAGES;
    // How early a connection was closed says what its listener may want, and is told on this level only.
    config.set_log_level(RDKafkaLogLevel::Info).set("log.connection.close", "true");
    config
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("enable.gapless.guarantee", (purpose == Purpose::Shared).to_string())
        // An expired record would leave a hole that later ones pass through. The node watches the age itself and
        // sends everything again, in order.
        .set("message.timeout.ms", "0")
        .set("compression.type", &settings.compression)
        .set("linger.ms", (linger.as_secs_f64() * 1e3).to_string())
        .set("batch.size", settings.batch_bytes.to_string())
        .set("queue.buffering.max.messages", queue.to_string())
        .set("queue.buffering.max.kbytes", QUEUE_KBYTES_MAX.to_string())
        // The same key lands in the same partition whichever client writes it.
        .set("partitioner", "murmur2_random");
    for (name, value) in &settings.properties {
        config.set(name, value);
    }
    config
}

/// What the client library refuses of a cluster's settings. It is told of no broker, so it connects to none; and of no
/// file, for a certificate that is renewed amiss is the cluster's trouble and none of the whole node.
pub fn refused_settings(settings: &ClusterSettings) -> Vec<String> {
    let alone = |(name, value): (&String, &String)| {
        ClientConfig::new().set(name, value).create_native_config().err().map(words)
    };
    let refused: Vec<_> = settings.properties.iter().filter_map(alone).collect();
    if !refused.is_empty() {
        return refused;
    }
    let mut config = producer_config(settings, 1, Purpose::Shared);
    for name in
        ["bootstrap.servers", "ssl.ca.location", "ssl.certificate.location", "ssl.key.location"]
    {
        config.remove(name);
    }
    let together = config.create::<BaseProducer>().err();
    together.map(words).into_iter().collect()
}

fn words(error: KafkaError) -> String {
    match error {
        KafkaError::ClientConfig(_, description, ..) => description,
        KafkaError::ClientCreation(description) => description,
        other => other.to_string(),
    }
}

/// For topics and their settings.
pub(super) fn admin_config(settings: &ClusterSettings) -> ClientConfig {
    let mut config = client_config(settings);
    for (name, value) in &settings.properties {
        config.set(name, value);
    }
    config
}

fn client_config(settings: &ClusterSettings) -> ClientConfig {
    let mut config = ClientConfig::new();
    let message_bytes =
        settings.message_bytes_max.clamp(*MESSAGE_BYTES_LEGAL.start(), *MESSAGE_BYTES_LEGAL.end());
    config
        .set("bootstrap.servers", settings.bootstrap_servers.join(","))
        .set("client.id", "telemetry")
        .set("message.max.bytes", message_bytes.to_string())
        .set("socket.timeout.ms", settings.operation_timeout.as_millis().max(10).to_string())
        .set(
            "socket.connection.setup.timeout.ms",
            settings.operation_timeout.as_millis().clamp(1000, 60_000).to_string(),
        )
        .set("socket.keepalive.enable", "true")
        .set("socket.nagle.disable", "true")
        .set("reconnect.backoff.ms", reconnect(settings.retry.min).to_string())
        .set("reconnect.backoff.max.ms", reconnect(settings.retry.max).to_string())
        .set("allow.auto.create.topics", "false")
        .set("statistics.interval.ms", "0")
        .set("log.connection.close", "false")
        .set("security.protocol", security_protocol(settings));
    config.set_log_level(RDKafkaLogLevel::Warning);
    if let Some(tls) = &settings.tls {
        set_tls(&mut config, tls);
    }
    if let Some(sasl) = &settings.sasl {
        config
            .set("sasl.mechanism", mechanism(sasl.mechanism))
            .set("sasl.username", &sasl.username)
            .set("sasl.password", sasl.password.current().expose());
    }
    config
}

fn reconnect(pause: Duration) -> u128 {
    pause.min(RECONNECT_MAX).as_millis()
}

fn security_protocol(settings: &ClusterSettings) -> &'static str {
    match (settings.tls.is_some(), settings.sasl.is_some()) {
        (false, false) => "plaintext",
        (true, false) => "ssl",
        (false, true) => "sasl_plaintext",
        (true, true) => "sasl_ssl",
    }
}

fn mechanism(mechanism: SaslMechanism) -> &'static str {
    match mechanism {
        SaslMechanism::Plain => "PLAIN",
        SaslMechanism::ScramSha256 => "SCRAM-SHA-256",
        SaslMechanism::ScramSha512 => "SCRAM-SHA-512",
    }
}

fn set_tls(config: &mut ClientConfig, tls: &TlsSettings) {
    config.set("ssl.endpoint.identification.algorithm", "https");
    if let Some(file) = &tls.ca_file {
        config.set("ssl.ca.location", file.to_string_lossy());
    }
    if let Some((certificate, key)) = &tls.client_certificate {
        config
            .set("ssl.certificate.location", certificate.to_string_lossy())
            .set("ssl.key.location", key.to_string_lossy());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BackoffSettings, SaslSettings};
    use crate::domain::Secret;

    fn settings() -> ClusterSettings {
        ClusterSettings {
            bootstrap_servers: vec!["a:9092".to_owned(), "b:9092".to_owned()],
            tls: None,
            sasl: None,
            compression: "snappy".to_owned(),
            linger: Duration::from_micros(2500),
            batch_bytes: 500_000,
            message_timeout: Duration::from_secs(30),
            operation_timeout: Duration::from_secs(10),
            in_flight_max: 10_000,
            message_bytes_max: 1_000_000,
            cursor_save_interval: Duration::from_secs(1),
            retry: BackoffSettings {
                min: Duration::from_millis(100),
                max: Duration::from_secs(30),
            },
            breaker: Default::default(),
            dead_letters: None,
            properties: indexmap::IndexMap::new(),
        }
    }

    #[test]
    fn the_producer_is_idempotent_keeps_order_and_its_queue_holds_every_stream() {
        let config = producer_config(&settings(), 4, Purpose::Shared);
        for (name, value) in [
            ("bootstrap.servers", "a:9092,b:9092"),
            ("enable.idempotence", "true"),
            ("enable.gapless.guarantee", "true"),
            ("acks", "all"),
            ("linger.ms", "2.5"),
            ("queue.buffering.max.messages", "41000"),
            ("allow.auto.create.topics", "false"),
            ("security.protocol", "plaintext"),
        ] {
            assert_eq!(config.get(name), Some(value), "{name}");
        }
        let made: Result<rdkafka::producer::BaseProducer, _> = config.create();
        assert!(made.is_ok(), "librdkafka takes every property");
    }

    #[test]
    fn properties_of_the_file_come_last() {
        let mut settings = settings();
        settings.properties.insert("socket.keepalive.enable".to_owned(), "false".to_owned());
        let config = producer_config(&settings, 1, Purpose::Single);
        assert_eq!(config.get("socket.keepalive.enable"), Some("false"));
        assert_eq!(config.get("enable.gapless.guarantee"), Some("false"));
    }

    #[test]
    fn a_password_reaches_librdkafka_and_no_log() {
        let mut settings = settings();
        settings.tls = Some(TlsSettings::default());
        settings.sasl = Some(SaslSettings {
            mechanism: SaslMechanism::ScramSha512,
            username: "node".to_owned(),
            password: Secret::new("hidden-word".to_owned()).into(),
        });
        let config = producer_config(&settings, 1, Purpose::Shared);
        assert_eq!(config.get("security.protocol"), Some("sasl_ssl"));
        assert_eq!(config.get("sasl.mechanism"), Some("SCRAM-SHA-512"));
        assert_eq!(config.get("sasl.password"), Some("hidden-word"));
        assert!(!format!("{config:?}{settings:?}").contains("hidden-word"));
    }
}
