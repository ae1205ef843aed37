//! The checked configuration: what cannot be wrong any more. Every other folder is built from these types and never
//! sees the file. Defaults, units and consequences stand in `docs/configuration.md`, made from the raw form.

use std::path::{Path, PathBuf};
use std::time::Duration;

use indexmap::IndexMap;

use super::password::Password;
use crate::domain::{NodeName, Presented, SinkName, StreamName};

/// Everything `telemetry run` needs.
#[derive(Debug, Clone)]
pub struct Settings {
    pub node: NodeSettings,
    pub buffer: BufferSettings,
    pub http: HttpSettings,
    pub log: LogSettings,
    pub supervision: SupervisionSettings,
    pub brokers: IndexMap<String, BrokerSettings>,
    pub clusters: IndexMap<String, ClusterSettings>,
    pub databases: IndexMap<String, DatabaseSettings>,
    pub streams: IndexMap<StreamName, StreamSettings>,
}

impl Settings {
    /// The clusters that get a copy of each dead letter.
    pub fn dead_letter_clusters(&self) -> Vec<String> {
        let wanting = self.clusters.iter().filter(|(_, cluster)| cluster.dead_letters.is_some());
        wanting.map(|(name, _)| name.clone()).collect()
    }

    /// Whom the node connects to over TLS, as the board calls them.
    fn tls_peers(&self) -> impl Iterator<Item = (String, &TlsSettings)> {
        let brokers = self.brokers.iter().map(|(name, of)| (format!("mqtt:{name}"), &of.tls));
        let clusters = self.clusters.iter().map(|(name, of)| (format!("kafka:{name}"), &of.tls));
        let databases =
            self.databases.iter().map(|(name, of)| (format!("postgresql:{name}"), &of.tls));
        let all = brokers.chain(clusters).chain(databases);
        all.filter_map(|(peer, tls)| Some((peer, tls.as_ref()?)))
    }

    /// What these presented when the node connected. Kafka's library does not tell.
    pub fn presented_certificates(&self) -> Vec<(String, Vec<u8>)> {
        self.tls_peers().filter_map(|(peer, tls)| Some((peer, tls.presented.der()?))).collect()
    }

    /// What was presented under `before` is known under these too: whatever a reload leaves alone does not connect anew.
    pub fn share_presented(&mut self, before: &Settings) {
        let share = |new: Option<&mut TlsSettings>, old: Option<&TlsSettings>| {
            if let (Some(new), Some(old)) = (new, old) {
                new.presented = old.presented.clone();
            }
        };
        for (name, broker) in &mut self.brokers {
            let old = before.brokers.get(name);
            share(broker.tls.as_mut(), old.and_then(|old| old.tls.as_ref()));
        }
        for (name, database) in &mut self.databases {
            let old = before.databases.get(name);
            share(database.tls.as_mut(), old.and_then(|old| old.tls.as_ref()));
        }
    }

    /// Every certificate the configuration names, by who is on the other side.
    pub fn certificate_files(&self) -> Vec<NamedCertificate> {
        let mut found = Vec::new();
        for (peer, tls) in self.tls_peers() {
            let named = |path: &PathBuf, authority| NamedCertificate {
                peer: peer.clone(),
                path: path.clone(),
                authority,
            };
            found.extend(tls.ca_file.iter().map(|path| named(path, true)));
            found.extend(tls.client_certificate.iter().map(|(path, _)| named(path, false)));
        }
        found.extend(self.http.certificate.iter().map(|files| NamedCertificate {
            peer: "http".to_owned(),
            path: files.certificate.clone(),
            authority: false,
        }));
        found
    }
}

/// A certificate in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedCertificate {
    /// As the board calls the dependency, or `http` for the node's own listener.
    pub peer: String,
    pub path: PathBuf,
    /// Any one of the file's certificates is enough.
    pub authority: bool,
}

#[derive(Debug, Clone)]
pub struct NodeSettings {
    pub name: NodeName,
    /// Buffer, state, control socket.
    pub state_dir: PathBuf,
    /// From SIGTERM until whatever is still pending stays in the buffer.
    pub drain_timeout: Duration,
    /// Threads (arbiters) the stream actors are spread over.
    pub stream_threads: usize,
}

#[derive(Debug, Clone)]
pub struct BufferSettings {
    /// All generations together; above it the node stops acknowledging.
    pub quota_bytes: u64,
    /// One generation (a sled database) is closed above this size.
    pub generation_bytes: u64,
    /// How long the oldest waiting message waits for company before a sync; zero = lowest latency.
    pub sync_linger: Duration,
    /// A group this large is synced without waiting any longer.
    pub group_messages_max: usize,
    /// Durable blocks held in memory for caught-up sinks, all streams together.
    pub tail_bytes_max: usize,
    /// Dead letters; when full a sink holds rather than drops.
    pub dead_letter_quota_bytes: u64,
    /// A file of this size is given up to be able to reopen on a full disk.
    pub ballast_bytes: u64,
    /// Free space of the file system below which the node stops acknowledging.
    pub free_bytes_min: u64,
}

#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// `host:port`; loopback by default. Port 0 picks a free one.
    pub listen: std::net::SocketAddr,
    /// HTTPS with this certificate; none = plain HTTP.
    pub certificate: Option<CertificateFiles>,
    /// Everything but the probes needs a token: always, unless it listens on loopback.
    pub guarded: bool,
    /// Of one token and address.
    pub requests_per_minute_max: u32,
    pub connections_per_peer_max: usize,
}

/// PEM files of a certificate (with its chain) and its private key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Journal when started by systemd, text on a terminal, JSON otherwise.
    Auto,
    Text,
    Json,
    Journald,
}

#[derive(Debug, Clone)]
pub struct LogSettings {
    pub format: LogFormat,
    /// `tracing` filter directives, e.g. `info` or `info,telemetry::stream=debug`.
    pub filter: String,
}

#[derive(Debug, Clone)]
pub struct SupervisionSettings {
    /// Restarts allowed within `restart_window` before a part is parked.
    pub restarts_max: u32,
    pub restart_window: Duration,
    /// Pause before a restart: grows from the first to the second, with jitter.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// A parked part is tried again this often.
    pub parked_retry: Duration,
    /// No progress with work waiting for this long = stalled.
    pub stall_timeout: Duration,
}

/// Pauses between attempts: exponential from `min` to `max`, with jitter, without end.
#[derive(Debug, Clone, Copy)]
pub struct BackoffSettings {
    pub min: Duration,
    pub max: Duration,
}

/// When the parts that use one dependency stop asking it all at once, and how often one of them tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerSettings {
    /// So many failures in a row open it.
    pub failures: u32,
    /// Between two trials.
    pub cool_down: Duration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        BreakerSettings { failures: 5, cool_down: Duration::from_secs(3) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MqttVersion {
    V5,
    V311,
}

/// An MQTT broker.
#[derive(Debug, Clone)]
pub struct BrokerSettings {
    pub host: String,
    pub port: u16,
    pub version: MqttVersion,
    pub tls: Option<TlsSettings>,
    pub username: Option<String>,
    pub password: Option<Password>,
    pub keepalive: Duration,
    /// How long the broker keeps the session of an absent node (MQTT 5; 3.1.1 leaves it to the broker).
    pub session_expiry: Duration,
    pub connect_timeout: Duration,
    /// For the broker's answer to SUBSCRIBE and for one write.
    pub operation_timeout: Duration,
    pub reconnect: BackoffSettings,
    pub breaker: BreakerSettings,
    /// Announced to the broker (MQTT 5): how many messages it may have unacknowledged.
    pub receive_maximum: u16,
    /// Our own bound on what is received and not yet acknowledged: above it the socket is not read.
    pub unacknowledged_messages_max: usize,
    pub unacknowledged_bytes_max: usize,
    /// Announced (MQTT 5). A larger packet is kept cut off and becomes a dead letter.
    pub packet_bytes_max: usize,
}

#[derive(Debug, Clone, Default)]
pub struct TlsSettings {
    /// PEM file of the authority; none = the public web authorities.
    pub ca_file: Option<PathBuf>,
    /// PEM files of the client's certificate and key.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// The name the server's certificate must carry; none = the host connected to.
    pub server_name: Option<String>,
    /// Not from the file: what was met under these settings.
    pub presented: Presented,
}

impl TlsSettings {
    /// Every file it names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let own = self.client_certificate.iter().flat_map(|(certificate, key)| [certificate, key]);
        self.ca_file.iter().chain(own).map(PathBuf::as_path)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaslMechanism {
    Plain,
    ScramSha256,
    ScramSha512,
}

#[derive(Debug, Clone)]
pub struct SaslSettings {
    pub mechanism: SaslMechanism,
    pub username: String,
    pub password: Password,
}

/// A Kafka cluster (or Redpanda).
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    pub bootstrap_servers: Vec<String>,
    pub tls: Option<TlsSettings>,
    pub sasl: Option<SaslSettings>,
    /// none, gzip, snappy, lz4, zstd
    pub compression: String,
    pub linger: Duration,
    pub batch_bytes: usize,
    /// Nothing confirmed for this long although the cluster answers: the producer is renewed, and what is unconfirmed
    /// is sent again from the buffer, in order.
    pub message_timeout: Duration,
    pub operation_timeout: Duration,
    /// Records handed to librdkafka and not yet confirmed, per stream.
    pub in_flight_max: usize,
    /// Largest record the brokers take.
    pub message_bytes_max: usize,
    /// Between two durable saves of the cursor: what a crash may repeat.
    pub cursor_save_interval: Duration,
    pub retry: BackoffSettings,
    pub breaker: BreakerSettings,
    /// Where a copy of each dead letter of the node goes.
    pub dead_letters: Option<DeadLetterTopic>,
    /// Any further librdkafka property, as it is.
    pub properties: IndexMap<String, String>,
}

/// A topic for copies of dead letters, of every stream and sink.
#[derive(Debug, Clone)]
pub struct DeadLetterTopic {
    pub topic: String,
    /// Make the topic when it is missing.
    pub ensure: Option<TopicSettings>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatabaseTls {
    Off,
    VerifyFull,
}

/// A PostgreSQL database.
#[derive(Debug, Clone)]
pub struct DatabaseSettings {
    pub host: String,
    pub port: u16,
    pub dbname: String,
    pub user: String,
    pub password: Option<Password>,
    /// Who makes tables and partitions and runs the jobs; none = `user` does that too.
    pub migrator: Option<LoginSettings>,
    pub tls_mode: DatabaseTls,
    pub tls: Option<TlsSettings>,
    /// Where the tables and the node's own bookkeeping live.
    pub schema: String,
    /// All connections of this node to this database, over all writers.
    pub connections_max: u32,
    pub connect_timeout: Duration,
    /// Waiting for a free connection of the pool.
    pub pool_timeout: Duration,
    /// One statement of a writer.
    pub statement_timeout: Duration,
    /// Migrations, roll-ups.
    pub query_timeout: Duration,
    pub retry: BackoffSettings,
    pub breaker: BreakerSettings,
    /// Folder with this database's SQL files; none = the node creates nothing but its own bookkeeping.
    pub migrations_dir: Option<PathBuf>,
    /// How long the migrator waits quietly for the database before it says so (and goes on waiting).
    pub migration_wait: Duration,
    /// SQL functions the node calls on a schedule, e.g. roll-ups.
    pub jobs: IndexMap<String, JobSettings>,
}

impl DatabaseSettings {
    /// The same database as the role that may make tables and partitions.
    pub fn as_migrator(&self) -> DatabaseSettings {
        let mut settings = self.clone();
        if let Some(login) = settings.migrator.take() {
            settings.user = login.user;
            settings.password = login.password;
        }
        settings
    }
}

/// A role and its password.
#[derive(Debug, Clone)]
pub struct LoginSettings {
    pub user: String,
    pub password: Option<Password>,
}

/// `SELECT <function>($1, $2)` with a time range of the last `lookback`, every `interval`.
#[derive(Debug, Clone)]
pub struct JobSettings {
    /// A function `(from timestamptz, to timestamptz)`, without parentheses.
    pub function: String,
    pub interval: Duration,
    pub lookback: Duration,
}

/// One MQTT subscription, its mapping and its sinks.
#[derive(Debug, Clone)]
pub struct StreamSettings {
    pub name: StreamName,
    /// Key in `Settings::brokers`.
    pub broker: String,
    pub topic_filter: String,
    pub qos: u8,
    pub client_id: String,
    pub mapping: MappingSettings,
    /// Said to be silent after this long without a message; (warning, critical).
    pub silent_after: (Option<Duration>, Option<Duration>),
    pub dedupe: Option<DedupeSettings>,
    pub kafka: Option<KafkaSinkSettings>,
    pub tables: IndexMap<SinkName, TableSettings>,
}

impl StreamSettings {
    /// Every sink of the stream: `kafka` first, then the tables in the order of the file.
    pub fn sinks(&self) -> Vec<SinkName> {
        let kafka = self.kafka.as_ref().map(|k| k.sink.clone());
        kafka.into_iter().chain(self.tables.keys().cloned()).collect()
    }
}

/// Repeats that do not carry DUP: dropped (and counted) within a window of the last messages.
#[derive(Debug, Clone)]
pub struct DedupeSettings {
    pub key: DedupeKey,
    pub window: Duration,
    pub window_messages: usize,
}

#[derive(Debug, Clone)]
pub enum DedupeKey {
    /// These members (paths) name the message.
    MessageId(Vec<String>),
    /// Topic and payload, byte for byte.
    Payload,
}

/// How a message becomes a Kafka record and rows.
#[derive(Debug, Clone)]
pub struct MappingSettings {
    pub payload_bytes_max: usize,
    pub filter: Option<FilterSettings>,
    /// At least one of these fields must be present, else the message is incomplete.
    pub require_any: Vec<String>,
    /// In the order of the file; the key is the name in the record and, by default, the column.
    pub fields: IndexMap<String, FieldSettings>,
    /// The field (a key of `fields`) whose value is the device id.
    pub device_id: String,
}

#[derive(Debug, Clone)]
pub struct FilterSettings {
    pub source: FieldSource,
    pub test: FilterTest,
}

#[derive(Debug, Clone)]
pub enum FilterTest {
    /// Passes when equal to one of these (JSON scalars).
    OneOf(Vec<serde_json::Value>),
    NoneOf(Vec<serde_json::Value>),
    Exists,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum FieldSource {
    /// RFC 9535 singular path without the leading `$.`, then its aliases, in order; the first that is present counts.
    Paths(Vec<String>),
    /// 1 = the first level of the topic.
    TopicLevel(usize),
    Constant(serde_json::Value),
    Arrival,
    /// The quality flags of this message, joined by commas; null when there are none.
    Flags,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldType {
    Int2,
    Int4,
    Int8,
    Float8,
    Boolean,
    Text,
    /// A device's own time, see `TimestampSettings`.
    Timestamp,
}

impl FieldType {
    /// As PostgreSQL calls it in a table's definition.
    pub fn sql_type(self) -> &'static str {
        match self {
            FieldType::Int2 => "smallint",
            FieldType::Int4 => "integer",
            FieldType::Int8 => "bigint",
            FieldType::Float8 => "double precision",
            FieldType::Boolean => "boolean",
            FieldType::Text => "text",
            FieldType::Timestamp => "timestamptz",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    Floor,
    /// Half away from zero.
    Nearest,
    /// A fraction is a dead letter.
    Reject,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutOfRange {
    DeadLetter,
    Null,
    Clamp,
    /// Kept, and the flag `out_of_range` is set.
    Flag,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestampFormat {
    /// Text: RFC 3339 or ISO without zone (UTC). Number: seconds, milliseconds or microseconds, whichever falls inside
    /// the sanity window.
    Auto,
    Rfc3339,
    EpochSeconds,
    EpochMillis,
    EpochMicros,
}

#[derive(Debug, Clone, Copy)]
pub struct TimestampSettings {
    pub format: TimestampFormat,
    /// Outside `[arrival - max_age, arrival + max_skew]` the arrival time is used and `device_time_invalid` flagged.
    pub max_age: Duration,
    pub max_skew: Duration,
}

#[derive(Debug, Clone)]
pub struct FieldSettings {
    pub source: FieldSource,
    pub field_type: FieldType,
    /// Shown under `tags` of the record instead of `fields`.
    pub tag: bool,
    /// Missing or null makes the message incomplete for each table that has this column (never for the record).
    pub required: bool,
    pub rounding: Rounding,
    /// The record's own type where it differs from the column's (as sent, unrounded, for `Float8`).
    pub record_type: Option<FieldType>,
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub out_of_range: OutOfRange,
    /// Used when missing or null.
    pub default: Option<serde_json::Value>,
    /// value = raw × scale + offset, before rounding.
    pub scale: f64,
    pub offset: f64,
    /// This bit of the integer, as a boolean.
    pub bit: Option<u8>,
    /// Text (or number, by its JSON form) → value; anything else is a dead letter.
    pub values: Option<IndexMap<String, serde_json::Value>>,
    /// true = 1, false = 0 in a numeric field.
    pub boolean_as_number: bool,
    /// "237" counts as 237.
    pub text_as_number: bool,
    pub timestamp: TimestampSettings,
}

#[derive(Debug, Clone)]
pub struct KafkaSinkSettings {
    /// Always `kafka`.
    pub sink: SinkName,
    /// Key in `Settings::clusters`.
    pub cluster: String,
    pub topic: String,
    /// Merge the source document into the top level of the record; `ts`, `tags`, `fields` win a clash.
    pub raw_root: bool,
    /// Make the topic when it is missing.
    pub ensure: Option<TopicSettings>,
}

#[derive(Debug, Clone)]
pub struct TopicSettings {
    pub partitions: i32,
    pub replication: i32,
    pub retention: Duration,
}

#[derive(Debug, Clone)]
pub struct TableSettings {
    pub sink: SinkName,
    /// Key in `Settings::databases`.
    pub database: String,
    pub table: String,
    pub kind: TableKind,
    /// Field → column, for every column the node writes from the mapping, in order.
    pub columns: IndexMap<String, String>,
    /// Rows of one transaction at most, when lagging.
    pub batch_rows_max: usize,
    pub batch_bytes_max: usize,
    /// A caught-up writer waits at most this long for company.
    pub batch_linger: Duration,
}

#[derive(Debug, Clone)]
pub enum TableKind {
    /// Time series by COPY.
    Append {
        /// Column that takes the arrival time.
        time_column: String,
        /// Column that takes the node's name, if the table has one.
        node_column: Option<String>,
        /// Rows older than this are dropped with their partition; none = for ever.
        retention: Option<Duration>,
        /// Width of a partition (chunk).
        partition: Duration,
    },
    /// One row per key, changed only when a value changes.
    Latest {
        /// The field (of the mapping) that is the key.
        key: String,
        updated_at_column: String,
        /// Columns set at the first insert only, from a field: column → field.
        insert_only: IndexMap<String, String>,
    },
}
