//! A node's Kafka side on a stage: a real buffer in a folder of its own, librdkafka's mock cluster, one producer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use indexmap::IndexMap;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::{Offset, TopicPartitionList};
use telemetry::buffer::{Buffer, Incoming};
use telemetry::config::*;
use telemetry::domain::{
    Arrival, DeliveryFlags, NodeName, Sequence, SinkName, StreamName, TelemetryId,
};
use telemetry::kafka::{KafkaParts, KafkaProducer, KafkaReplayer, TELEMETRY_ID_HEADER};
use telemetry::observe::{Board, SinkStatus};
use telemetry::part::{Control, Part as _, Phase, Progress};
use tokio::sync::watch;

pub const CLUSTER: &str = "main";
/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);
const KEYS: u64 = 7;

pub struct Stage {
    pub mock: MockCluster<'static, DefaultProducerContext>,
    pub buffer: Buffer,
    pub board: Arc<Board>,
    pub settings: Settings,
    _folder: tempfile::TempDir,
}

/// A record as a consumer sees it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub sequence: u64,
    pub key: String,
    pub value: serde_json::Value,
    pub timestamp_ms: i64,
}

pub fn stream_name(name: &str) -> StreamName {
    StreamName::parse(name).unwrap()
}

pub fn sink_name() -> SinkName {
    SinkName::parse("kafka").unwrap()
}

fn field(source: FieldSource, field_type: FieldType) -> FieldSettings {
    FieldSettings {
        source,
        field_type,
        tag: false,
        required: false,
        rounding: Rounding::Reject,
        record_type: None,
        min: None,
        max: None,
        out_of_range: OutOfRange::DeadLetter,
        default: None,
        scale: 1.0,
        offset: 0.0,
        bit: None,
        values: None,
        boolean_as_number: false,
        text_as_number: false,
        timestamp: TimestampSettings {
            format: TimestampFormat::Auto,
            max_age: Duration::from_secs(86_400),
            max_skew: Duration::from_secs(60),
        },
    }
}

fn stream(name: &str) -> StreamSettings {
    let path = |name: &str| FieldSource::Paths(vec![name.to_owned()]);
    let fields = [
        ("id", field(path("id"), FieldType::Text)),
        ("n", field(path("n"), FieldType::Int8)),
        ("text", field(path("text"), FieldType::Text)),
    ];
    StreamSettings {
        name: stream_name(name),
        broker: "main".to_owned(),
        topic_filter: format!("{name}/#"),
        qos: 1,
        client_id: name.to_owned(),
        mapping: MappingSettings {
            payload_bytes_max: 1 << 20,
            filter: Some(FilterSettings {
                source: path("skip"),
                test: FilterTest::NoneOf(vec![serde_json::Value::Bool(true)]),
            }),
            require_any: Vec::new(),
            fields: fields.into_iter().map(|(name, field)| (name.to_owned(), field)).collect(),
            device_id: "id".to_owned(),
        },
        silent_after: (None, None),
        dedupe: None,
        kafka: Some(KafkaSinkSettings {
            sink: sink_name(),
            cluster: CLUSTER.to_owned(),
            topic: name.to_owned(),
            raw_root: false,
            ensure: None,
        }),
        tables: IndexMap::new(),
    }
}

fn cluster(bootstrap: String) -> ClusterSettings {
    ClusterSettings {
        bootstrap_servers: vec![bootstrap],
        tls: None,
        sasl: None,
        compression: "none".to_owned(),
        linger: Duration::from_millis(5),
        batch_bytes: 1_000_000,
        message_timeout: Duration::from_secs(5),
        operation_timeout: Duration::from_millis(500),
        in_flight_max: 1_000,
        message_bytes_max: 500_000,
        cursor_save_interval: Duration::from_millis(50),
        retry: BackoffSettings { min: Duration::from_millis(20), max: Duration::from_millis(200) },
        breaker: Default::default(),
        dead_letters: None,
        // Several batches per stream, so that one can fail among others.
        properties: IndexMap::from([("batch.num.messages".to_owned(), "100".to_owned())]),
    }
}

fn settings(folder: &std::path::Path, streams: &[&str], bootstrap: String) -> Settings {
    Settings {
        node: NodeSettings {
            name: NodeName::parse("node").unwrap(),
            state_dir: folder.to_owned(),
            drain_timeout: Duration::from_secs(5),
            stream_threads: 1,
        },
        buffer: BufferSettings {
            quota_bytes: 1 << 30,
            generation_bytes: 64 << 20,
            sync_linger: Duration::ZERO,
            group_messages_max: 10_000,
            tail_bytes_max: 16 << 20,
            dead_letter_quota_bytes: 16 << 20,
            ballast_bytes: 0,
            free_bytes_min: 0,
        },
        http: HttpSettings {
            listen: ([127, 0, 0, 1], 0).into(),
            certificate: None,
            guarded: false,
            requests_per_minute_max: 600,
            connections_per_peer_max: 64,
        },
        log: LogSettings { format: LogFormat::Text, filter: "info".to_owned() },
        supervision: SupervisionSettings {
            restarts_max: 3,
            restart_window: Duration::from_secs(60),
            backoff_min: Duration::from_millis(10),
            backoff_max: Duration::from_millis(100),
            parked_retry: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(60),
        },
        brokers: IndexMap::new(),
        clusters: IndexMap::from([(CLUSTER.to_owned(), cluster(bootstrap))]),
        databases: IndexMap::new(),
        streams: streams.iter().map(|name| (stream_name(name), stream(name))).collect(),
    }
}

impl Stage {
    /// Topics have one partition.
    pub fn new(streams: &[&str], change: impl FnOnce(&mut Settings)) -> Self {
        let mock = MockCluster::new(1).unwrap();
        for name in streams {
            mock.create_topic(name, 1, 1).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings(folder.path(), streams, mock.bootstrap_servers());
        change(&mut settings);
        let names: Vec<_> =
            settings.streams.values().map(|s| (s.name.clone(), s.sinks())).collect();
        let board = Board::new(&settings);
        let buffer = Buffer::open(folder.path(), &settings.buffer, &names, board.clone()).unwrap();
        Stage { mock, buffer, board, settings, _folder: folder }
    }

    fn producer(&self) -> KafkaProducer {
        let routes: Vec<_> = self.settings.streams.values().cloned().collect();
        KafkaProducer::new(KafkaParts {
            cluster: CLUSTER.to_owned(),
            settings: self.settings.clusters[CLUSTER].clone(),
            routes: tokio::sync::watch::Sender::new(Arc::new(routes)).subscribe(),
            buffer: self.buffer.clone(),
            board: self.board.clone(),
        })
    }

    /// Keeps payloads, durably.
    pub async fn keep(&self, stream: &str, payloads: impl IntoIterator<Item = String>) {
        let appender = self.buffer.appender(&stream_name(stream));
        let batch: Vec<_> = payloads
            .into_iter()
            .map(|payload| Incoming {
                topic: Bytes::from(format!("{stream}/x")),
                payload: Bytes::from(payload),
                arrival: Arrival::now(),
                flags: DeliveryFlags { qos: 1, ..DeliveryFlags::default() },
                packet_id: 1,
            })
            .collect();
        appender.try_append(batch).unwrap().await.unwrap();
    }

    /// Keeps `count` good messages of several devices.
    pub async fn keep_good(&self, stream: &str, count: u64) {
        self.keep(stream, (0..count).map(good)).await;
    }

    pub fn status(&self, stream: &str) -> SinkStatus {
        self.board.sink(&stream_name(stream), &sink_name()).status()
    }

    pub fn cursor(&self, stream: &str) -> u64 {
        self.status(stream).books.map_or(0, |books| books.cursor.0)
    }

    /// Runs the producer while `play` lasts, then drains and stops it.
    pub async fn run(&self, play: impl AsyncFnOnce(&KafkaReplayer)) {
        self.run_and_drain(async |replayer, _| play(replayer).await, PATIENCE).await;
    }

    pub async fn run_with_pause(
        &self,
        play: impl AsyncFnOnce(&KafkaReplayer, &watch::Sender<bool>),
    ) {
        self.run_and_drain(play, PATIENCE).await;
    }

    /// Starts a producer that has to end after `drain`.
    pub async fn run_until_deadline(&self, drain: Duration) {
        self.run_and_drain(async |_, _| {}, drain).await;
    }

    async fn run_and_drain(
        &self,
        play: impl AsyncFnOnce(&KafkaReplayer, &watch::Sender<bool>),
        drain: Duration,
    ) {
        let (phase, phase_watch) = watch::channel(Phase::Running);
        let (paused, paused_watch) = watch::channel(false);
        let progress = Arc::new(Progress::default());
        let producer = self.producer();
        let replayer = producer.replayer();
        let running = producer.run(Control::new(phase_watch, paused_watch, progress));
        let playing = async {
            tokio::time::timeout(PATIENCE, play(&replayer, &paused))
                .await
                .expect("the play ends in time");
            phase.send_replace(Phase::Draining { deadline: Instant::now() + drain });
        };
        let (ended, ()) =
            tokio::time::timeout(PATIENCE * 2, async { tokio::join!(running, playing) })
                .await
                .expect("the producer ends in time");
        ended.unwrap();
    }

    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !condition(self) {
            assert!(begun.elapsed() < PATIENCE, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn until_cursor(&self, stream: &str, cursor: u64) {
        self.until("the cursor arrives", |stage| stage.cursor(stream) >= cursor).await;
    }

    /// The whole topic, oldest first, read until `records` distinct ones were seen and then to its end.
    pub fn read(&self, topic: &str, records: usize) -> Vec<Seen> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.mock.bootstrap_servers())
            .set("group.id", "reader")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .create()
            .unwrap();
        let mut whole = TopicPartitionList::new();
        whole.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
        consumer.assign(&whole).unwrap();
        let (mut seen, mut distinct) = (Vec::new(), BTreeSet::new());
        let begun = Instant::now();
        let prefix = self.prefix(topic);
        while begun.elapsed() < PATIENCE {
            match consumer.poll(Duration::from_millis(200)) {
                Some(Ok(message)) => {
                    let record = seen_of(&message, &prefix);
                    distinct.insert(record.sequence);
                    seen.push(record);
                }
                Some(Err(rdkafka::error::KafkaError::PartitionEOF(_)))
                    if distinct.len() >= records =>
                {
                    break;
                }
                _ => {}
            }
        }
        seen
    }

    fn prefix(&self, stream: &str) -> String {
        let stream = stream_name(stream);
        let log = self.buffer.identity();
        let id = TelemetryId { log, stream: &stream, sequence: Sequence::ZERO }.to_string();
        id.strip_suffix('0').unwrap().to_owned()
    }
}

/// A message of one of [`KEYS`] devices.
pub fn good(n: u64) -> String {
    format!(r#"{{"id": "device-{}", "n": {n}}}"#, n % KEYS)
}

fn seen_of(message: &rdkafka::message::BorrowedMessage<'_>, prefix: &str) -> Seen {
    let headers = message.headers().expect("every record is signed");
    let id = headers.get(0);
    assert_eq!(id.key, TELEMETRY_ID_HEADER);
    let id = std::str::from_utf8(id.value.unwrap()).unwrap();
    Seen {
        sequence: id.strip_prefix(prefix).expect("log and stream").parse().unwrap(),
        key: String::from_utf8(message.key().unwrap().to_vec()).unwrap(),
        value: serde_json::from_slice(message.payload().unwrap()).unwrap(),
        timestamp_ms: message.timestamp().to_millis().unwrap(),
    }
}

/// What a consumer has that drops repeats by their header: every expected record once, per key in order.
pub fn assert_whole_and_in_order(seen: &[Seen], expected: impl IntoIterator<Item = u64>) {
    let mut last = BTreeMap::new();
    let mut distinct = BTreeSet::new();
    for record in seen {
        if !distinct.insert(record.sequence) {
            continue;
        }
        let before = last.insert(record.key.clone(), record.sequence);
        assert!(
            before.is_none_or(|before| before < record.sequence),
            "{} after {before:?} of {}",
            record.sequence,
            record.key
        );
    }
    let expected: BTreeSet<_> = expected.into_iter().collect();
    assert_eq!(distinct, expected, "no hole, nothing foreign");
}
