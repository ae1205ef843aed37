//! `[clusters.<name>]`.

use super::Context;
use super::access::{
    self, PASSWORD_CREDENTIAL, PASSWORD_ENV, PASSWORD_FILE, PASSWORD_REFUSED, TLS,
};
use super::node::{BREAKER_COOL_DOWN, BREAKER_FAILURES, backoff, breaker};
use super::report::Problems;
use super::schema::*;
use super::section::Section;
use super::settings::*;
use super::sink::{ENSURE, dead_letter_topic};
use crate::domain::Secret;

/// librdkafka's own limits, of `linger.ms`, `socket.timeout.ms` and `message.max.bytes`: it refuses more.
const LINGER_MS_MAX: i64 = 900_000;
const SOCKET_TIMEOUT_SECONDS_MAX: i64 = 300;
const MESSAGE_BYTES_MAX: i64 = 1_000_000_000;

pub static CLUSTER: Group = Group {
    doc: "A Kafka cluster, or Redpanda. Producers are idempotent and wait for all replicas.",
    settings: &[
        required("bootstrap_servers", Kind::Texts, "`host:port` of some of its brokers."),
        optional_section("tls", &TLS, "no TLS"),
        optional_section("sasl", &SASL, "no authentication"),
        text(
            "compression",
            Kind::Choice(&["none", "gzip", "snappy", "lz4", "zstd"]),
            "snappy",
            "Of the batches. `zstd` is smaller and costs more CPU.",
        ),
        integer(
            "linger_ms",
            (0, LINGER_MS_MAX),
            5,
            "A record waits this long for company. 0 = lowest latency, smaller batches.",
        ),
        integer(
            "batch_bytes",
            (KIB, 100 * MIB),
            128 * KIB,
            "A batch this large is sent at once. None becomes larger than `message_bytes_max`.",
        ),
        integer(
            "message_timeout_seconds",
            (1, 3600),
            30,
            "Nothing confirmed for this long although the cluster answers: the producer is renewed \
             and what is unconfirmed sent again. While the cluster is away, records wait without \
             a limit.",
        ),
        integer(
            "operation_timeout_seconds",
            (1, SOCKET_TIMEOUT_SECONDS_MAX),
            30,
            "For each request, records included, and for setting up a connection (1 to 60 s there).",
        ),
        integer(
            "in_flight_max",
            (1, 1_000_000),
            10_000,
            "Records handed over and not yet confirmed, per stream: memory, and what a \
             crash may repeat.",
        ),
        integer(
            "message_bytes_max",
            (KIB, MESSAGE_BYTES_MAX),
            1_000_000,
            "Largest record the brokers take (`message.max.bytes`). A larger one becomes a \
             dead letter.",
        ),
        integer(
            "cursor_save_ms",
            (10, HOUR_MS),
            200,
            "Between two durable saves of the cursor: what a crash may repeat.",
        ),
        integer("retry_min_ms", (10, HOUR_MS), 500, "First pause before trying again; it doubles."),
        integer(
            "retry_max_ms",
            (10, HOUR_MS),
            30_000,
            "Longest pause before a sink tries again, and up to 30 % more. Connections that broke are \
             made anew by the library itself, at the latest after 5 s, whatever this and the breaker say.",
        ),
        BREAKER_FAILURES,
        BREAKER_COOL_DOWN,
        optional_section("dead_letters", &DEAD_LETTERS, "no copies"),
        optional(
            "properties",
            Kind::TextMap,
            "none",
            "Further librdkafka properties, as they are, e.g. `\"socket.keepalive.enable\" \
             = \"true\"`.",
        ),
    ],
    refused: &[("brokers", "called `bootstrap_servers` here")],
};

pub static SASL: Group = Group {
    doc: "User and password at a Kafka cluster.",
    settings: &[
        required(
            "mechanism",
            Kind::Choice(&["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]),
            "PLAIN sends the password readable: without TLS to another machine it is warned of.",
        ),
        required("username", Kind::Text, "User."),
        PASSWORD_FILE,
        PASSWORD_CREDENTIAL,
        PASSWORD_ENV,
    ],
    refused: &[PASSWORD_REFUSED],
};

pub static DEAD_LETTERS: Group = Group {
    doc: "A topic that gets a copy of each dead letter, of whatever stream and sink, from the moment \
          this is set: the payload as it came, the reason in headers. At least once; what waits for \
          the cluster is copied when it is back. A letter that is replayed or purged before is not \
          copied.",
    settings: &[
        required("topic", Kind::Text, "Topic; no stream writes to it."),
        optional_section("ensure", &ENSURE, "a missing topic: the copies wait"),
    ],
    refused: &[],
};

/// librdkafka properties that the node sets itself, by their beginning: order, durability, delivery reports and
/// secrets depend on them.
const OWN_PROPERTIES: &[(&str, &str)] = &[
    ("bootstrap.servers", "use bootstrap_servers"),
    ("metadata.broker.list", "use bootstrap_servers"),
    ("compression.type", "use compression"),
    ("compression.codec", "use compression"),
    ("linger.ms", "use linger_ms"),
    ("queue.buffering.max", "use linger_ms and in_flight_max"),
    ("batch.size", "use batch_bytes"),
    ("message.timeout.ms", "a record never expires"),
    ("delivery.timeout.ms", "a record never expires"),
    ("message.max.bytes", "use message_bytes_max"),
    ("message.send.max.retries", "a record is sent until it is confirmed"),
    ("retries", "a record is sent until it is confirmed"),
    ("enable.idempotence", "always on"),
    ("enable.gapless.guarantee", "always on"),
    ("max.in.flight", "the most that keeps the order"),
    ("queuing.strategy", "always in order"),
    ("acks", "always all"),
    ("request.required.acks", "always all"),
    ("delivery.report", "every record is reported"),
    ("partitioner", "always murmur2_random, so that a key stays in its partition"),
    ("allow.auto.create.topics", "use `ensure` of the stream's kafka settings"),
    ("transaction", "not used"),
    ("sasl.", "use [clusters.<name>.sasl]"),
    ("enable.sasl", "use [clusters.<name>.sasl]"),
    ("ssl.ca", "use [clusters.<name>.tls]"),
    ("ssl.certificate", "use [clusters.<name>.tls]"),
    ("ssl.key", "use [clusters.<name>.tls]"),
    ("ssl.endpoint", "the host name is always checked"),
    ("enable.ssl", "certificates are always checked"),
    ("security.protocol", "follows from tls and sasl"),
];

pub fn cluster(section: &Section, context: &mut Context<'_>) -> ClusterSettings {
    let tls = section.section("tls").map(|tls| access::tls(tls, context));
    if let Some(tls) = section.section("tls").filter(|tls| tls.has("server_name")) {
        let rule = "a Kafka broker's certificate must carry the host it advertises; remove this";
        context.problems.error(tls.at("server_name"), rule);
    }
    let sasl = section.section("sasl").map(|sasl| sasl_settings(sasl, context));
    let bootstrap_servers = section.texts("bootstrap_servers");
    for server in &bootstrap_servers {
        if !is_host_and_port(server) {
            let rule = format!("{server:?} is not host:port");
            context.problems.error(section.at("bootstrap_servers"), rule);
        }
    }
    let local = bootstrap_servers
        .iter()
        .filter_map(|server| server.rsplit_once(':'))
        .all(|(host, _)| access::is_local(host));
    let plain = sasl.as_ref().is_some_and(|sasl| sasl.mechanism == SaslMechanism::Plain);
    if plain && tls.is_none() && !local {
        let rule = "the password travels in clear text; add TLS";
        context.problems.warn(section.at("sasl"), rule);
    }
    batches_fit(section, &mut context.problems);
    ClusterSettings {
        bootstrap_servers,
        tls,
        sasl,
        compression: section.text("compression"),
        linger: section.duration("linger_ms"),
        batch_bytes: section.integer("batch_bytes"),
        message_timeout: section.duration("message_timeout_seconds"),
        operation_timeout: section.duration("operation_timeout_seconds"),
        in_flight_max: section.integer("in_flight_max"),
        message_bytes_max: section.integer("message_bytes_max"),
        cursor_save_interval: section.duration("cursor_save_ms"),
        retry: backoff(section, "retry_min_ms", "retry_max_ms", &mut context.problems),
        breaker: breaker(section),
        dead_letters: section
            .section("dead_letters")
            .map(|copies| dead_letter_topic(copies, &mut context.problems)),
        properties: properties(section, context),
    }
}

fn batches_fit(section: &Section, problems: &mut Problems) {
    let (batch, largest) =
        (section.integer::<u64>("batch_bytes"), section.integer::<u64>("message_bytes_max"));
    if section.has("batch_bytes") && batch > largest {
        let rule =
            format!("above message_bytes_max = {largest}: no batch becomes larger than that");
        problems.warn(section.at("batch_bytes"), rule);
    }
}

fn properties(section: &Section, context: &mut Context<'_>) -> indexmap::IndexMap<String, String> {
    let properties = section.text_map("properties");
    for name in properties.keys() {
        let own = OWN_PROPERTIES.iter().find(|(beginning, _)| name.starts_with(beginning));
        if let Some((_, instead)) = own {
            let rule = format!("{name} is set by the node: {instead}");
            context.problems.error(section.at("properties"), rule);
        }
    }
    properties
}

fn sasl_settings(section: &Section, context: &mut Context<'_>) -> SaslSettings {
    let mechanisms = [
        ("PLAIN", SaslMechanism::Plain),
        ("SCRAM-SHA-256", SaslMechanism::ScramSha256),
        ("SCRAM-SHA-512", SaslMechanism::ScramSha512),
    ];
    let places = ["password_file", "password_credential", "password_env"];
    if !places.into_iter().any(|name| section.has(name)) {
        let rule = "a password is required: password_file, password_credential or password_env";
        context.problems.error(section.itself(), rule);
    }
    SaslSettings {
        mechanism: section.pick("mechanism", &mechanisms),
        username: section.text("username"),
        // Without one there is a problem, and the settings are not used.
        password: access::password(section, context)
            .unwrap_or_else(|| Secret::new(String::new()).into()),
    }
}

fn is_host_and_port(server: &str) -> bool {
    server.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}
