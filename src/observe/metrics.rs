//! The metrics of `docs/metrics.md`. Names stay; labels come from the configuration or a fixed list, never from a
//! message. Counters are added to once per batch; gauges are copied from the [`Board`] at each scrape.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use super::board::Board;
use super::edges::{Edge, EdgeMeter};
use super::http_meters::{HttpMeters, HttpRefusal};
use super::status::{DisconnectReason, PartState, Redelivery, SinkKind, SinkState};
use crate::breaker::BreakerState;
use crate::domain::{Arrival, ErrorClass, Reason, SinkName, StreamName};

type Labels = Vec<(&'static str, String)>;
type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge>;
type FloatGauge = Gauge<f64, AtomicU64>;
type FloatGauges = Family<Labels, FloatGauge>;
type Histograms = Family<Labels, Histogram, Buckets>;
type Buckets = fn() -> Histogram;

fn accept_seconds() -> Histogram {
    Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5])
}

fn end_to_end_seconds() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0, 3600.0,
    ])
}

fn batch_seconds() -> Histogram {
    Histogram::new([0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0])
}

fn sync_seconds() -> Histogram {
    Histogram::new([
        0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
    ])
}

fn messages() -> Histogram {
    Histogram::new([1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0])
}

/// What a stream's reader counts.
#[derive(Debug, Clone)]
pub struct StreamMeters {
    pub connects: Counter,
    pub received_messages: Counter,
    pub received_bytes: Counter,
    /// Durable and acknowledged.
    pub accepted_messages: Counter,
    pub rejected_messages: Counter,
    /// Receipt until PUBACK.
    pub accept_duration: Histogram,
    redelivered: [Counter; Redelivery::ALL.len()],
    disconnects: [Counter; DisconnectReason::ALL.len()],
}

impl StreamMeters {
    pub fn redelivered(&self, kind: Redelivery) -> &Counter {
        &self.redelivered[kind as usize]
    }

    pub fn disconnected(&self, reason: DisconnectReason) -> &Counter {
        &self.disconnects[reason as usize]
    }
}

/// What a sink counts of one stream.
#[derive(Debug, Clone)]
pub struct SinkMeters {
    pub delivered_messages: Counter,
    pub filtered_messages: Counter,
    pub incomplete_messages: Counter,
    pub unchanged_messages: Counter,
    pub stale_messages: Counter,
    pub dead_lettered_messages: Counter,
    pub replayed_messages: Counter,
    pub retries: Counter,
    /// Arrival until committed.
    pub end_to_end_duration: Histogram,
    pub batch_duration: Histogram,
    pub batch_messages: Histogram,
    pub flagged_device_time_invalid: Counter,
    pub flagged_out_of_range: Counter,
    errors: [Counter; 3],
    reasons: [Counter; Reason::ALL.len()],
}

impl SinkMeters {
    pub fn error(&self, class: ErrorClass) -> &Counter {
        &self.errors[class as usize]
    }

    pub fn dead_letter_reason(&self, reason: Reason) -> &Counter {
        &self.reasons[reason as usize]
    }
}

/// What the buffer's writer counts.
#[derive(Debug, Clone)]
pub struct BufferMeters {
    pub sync_duration: Histogram,
    pub group_messages: Histogram,
}

/// Every family of the exposition, and the registry that prints them.
#[derive(Debug)]
pub struct Exposition {
    registry: Registry,
    counters: BTreeMap<&'static str, Counters>,
    histograms: BTreeMap<&'static str, Histograms>,
    gauges: BTreeMap<&'static str, Gauges>,
    float_gauges: BTreeMap<&'static str, FloatGauges>,
    process: Registry,
    process_gauges: BTreeMap<&'static str, FloatGauge>,
    buffer: BufferMeters,
    /// Of counters, histograms and held gauges: families do not tell what they hold.
    series: Mutex<BTreeSet<(&'static str, Labels)>>,
    /// One scrape at a time: gauges are set, then printed.
    scrape: Mutex<()>,
}

/// (name without prefix and `_total`, help)
const COUNTERS: &[(&str, &str)] = &[
    ("received_messages", "Messages received from the broker, repeats included"),
    ("received_bytes", "Payload bytes received from the broker"),
    ("accepted_messages", "Messages durable in the buffer and acknowledged"),
    ("rejected_messages", "Packets that were no message of a subscription"),
    ("redelivered_messages", "Repeats acknowledged and not kept again, by kind"),
    ("mqtt_connects", "Connections that were granted their subscription"),
    ("mqtt_disconnects", "Connections that ended, by reason"),
    ("delivered_messages", "Messages the sink has taken for good"),
    ("filtered_messages", "Messages the filter excluded"),
    ("incomplete_messages", "Messages without a required field"),
    ("unchanged_messages", "Messages that changed nothing in a latest-state table"),
    ("stale_messages", "Messages older than what the latest-state row has seen"),
    ("dead_lettered_messages", "Messages set aside as dead letters"),
    ("dead_letter_reasons", "Dead letters by reason"),
    ("replayed_messages", "Dead letters delivered by a replay"),
    ("flagged_messages", "Messages kept with a quality flag"),
    ("sink_errors", "Failures at the sink, by class"),
    ("sink_retries", "Attempts after a failure"),
    ("breaker_trips", "Times the breaker of a dependency opened"),
    ("clock_jumps", "Times the wall clock was set, by direction"),
    ("part_restarts", "Fresh starts of a part after a failure"),
    ("part_stalls", "Times a part had work and made no progress, or its thread stood still"),
    ("http_refused_requests", "Requests refused before they were looked at, by reason"),
    ("http_refused_connections", "Connections closed at once because their peer had too many"),
];

const HISTOGRAMS: &[(&str, &str, Buckets)] = &[
    ("accept_duration_seconds", "Receipt of a message until its PUBACK", accept_seconds),
    ("end_to_end_duration_seconds", "Arrival of a message until committed", end_to_end_seconds),
    ("sink_batch_duration_seconds", "One batch at a sink", batch_seconds),
    ("sink_batch_messages", "Messages of one batch at a sink", messages),
];

const GAUGES: &[(&str, &str)] = &[
    ("build_info", "Always 1; the version is in the label"),
    ("ready", "1 when /health/ready answers 200"),
    ("health_state", "1 for the state the node is in"),
    ("stream_input_active", "1 when subscribed and receiving may happen"),
    ("stream_output_active", "1 when every sink of the stream is delivering"),
    ("mqtt_connected", "1 when connected to the broker"),
    ("mqtt_subscribed", "1 when the subscription is granted"),
    ("mqtt_granted_qos", "Granted quality of service; -1 without a subscription"),
    ("mqtt_unacknowledged_messages", "Received and not yet acknowledged"),
    ("stream_sequence", "Sequence of the last durable record"),
    ("stream_unmapped_fields", "Names of payload members no mapping uses"),
    ("buffer_accepting", "1 while the buffer takes messages"),
    ("buffer_bytes", "Bytes the generations occupy"),
    ("buffer_quota_bytes", "Above this the node stops acknowledging"),
    ("buffer_generations", "Generations on disk"),
    ("buffer_generations_quarantined", "Generations set aside because they could not be read"),
    ("buffer_lost_messages", "Records the disk lost"),
    ("filesystem_size_bytes", "Size of the buffer's file system"),
    ("filesystem_free_bytes", "Free space of the buffer's file system"),
    ("sink_info", "Always 1; the kind is in the label"),
    ("sink_state", "1 for the state the sink is in"),
    ("sink_pending_messages", "Durable records behind the sink's cursor"),
    ("dead_letters", "Dead letters waiting for a person"),
    ("dead_letters_lost", "Dead letters the disk lost"),
    ("dead_letter_store_bytes", "Bytes of stored dead letters"),
    ("dead_letter_store_quota_bytes", "Above this a sink holds rather than drops"),
    ("dead_letter_copies_waiting", "Dead letters not yet copied to this Kafka cluster"),
    (
        "ledger_difference_messages",
        "Records passed minus records accounted for: 0 when the books balance",
    ),
    ("dependency_up", "1 when the last attempt to reach it worked"),
    ("breaker_state", "1 for the state the breaker is in"),
    ("migrations_pending", "Migrations not yet applied"),
    ("migration_failed", "1 when migrations were refused or failed"),
    ("part_parked", "1 when the part failed too often and waits"),
    ("edge_depth", "What waits on an edge between two parts"),
    ("edge_capacity", "The bound of that edge, in the same unit"),
];

/// Set by whoever fills and empties an edge, not copied at a scrape.
const HELD_GAUGES: [&str; 2] = ["edge_depth", "edge_capacity"];

const FLOAT_GAUGES: &[(&str, &str)] = &[
    (
        "stream_last_message_timestamp_seconds",
        "Arrival of the last message, also of an earlier life; start of the node while there is none",
    ),
    (
        "stream_silence_limit_seconds",
        "Silence after which the stream counts as silent, by severity",
    ),
    (
        "breaker_next_trial_timestamp_seconds",
        "When an open breaker lets the next trial through; 0 = not open",
    ),
    ("sink_oldest_pending_timestamp_seconds", "Arrival of the first pending record; 0 = none"),
    ("sink_newest_delivered_timestamp_seconds", "Arrival of the newest delivered record; 0 = none"),
    ("sink_last_success_timestamp_seconds", "Last time the sink took a batch; 0 = never"),
    (
        "certificate_expiry_timestamp_seconds",
        "When the first certificate of this connection expires, ours or the one it presents; 0 = it cannot be read",
    ),
];

/// The names every exporter uses, so without our prefix.
const PROCESS_GAUGES: &[(&str, &str)] = &[
    ("process_start_time_seconds", "Start of the process"),
    ("process_resident_memory_bytes", "Resident memory"),
    ("process_cpu_seconds", "CPU time used"),
    ("process_open_fds", "Open file descriptors"),
];

impl Exposition {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("telemetry");
        let counters = COUNTERS
            .iter()
            .map(|(name, help)| (*name, register(&mut registry, name, help, Counters::default())))
            .collect();
        let histograms = HISTOGRAMS
            .iter()
            .map(|(name, help, make)| {
                let family = Histograms::new_with_constructor(*make);
                (*name, register(&mut registry, name, help, family))
            })
            .collect();
        let gauges = GAUGES
            .iter()
            .map(|(name, help)| (*name, register(&mut registry, name, help, Gauges::default())))
            .collect();
        let float_gauges = FLOAT_GAUGES
            .iter()
            .map(|(name, help)| {
                (*name, register(&mut registry, name, help, FloatGauges::default()))
            })
            .collect();
        let mut process = Registry::default();
        let process_gauges = PROCESS_GAUGES
            .iter()
            .map(|(name, help)| (*name, register(&mut process, name, help, FloatGauge::default())))
            .collect();
        let buffer = BufferMeters { sync_duration: sync_seconds(), group_messages: messages() };
        registry.register(
            "buffer_sync_duration_seconds",
            "One sync of the buffer to stable storage",
            buffer.sync_duration.clone(),
        );
        registry.register(
            "buffer_group_messages",
            "Messages made durable by one sync",
            buffer.group_messages.clone(),
        );
        let (series, scrape) = (Mutex::default(), Mutex::default());
        Exposition {
            registry,
            counters,
            histograms,
            gauges,
            float_gauges,
            process,
            process_gauges,
            buffer,
            series,
            scrape,
        }
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        let labels = owned(labels);
        let counter = self.counters[name].get_or_create(&labels).clone();
        self.series().insert((name, labels));
        counter
    }

    fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        let labels = owned(labels);
        let histogram = self.histograms[name].get_or_create(&labels).clone();
        self.series().insert((name, labels));
        histogram
    }

    fn series(&self) -> MutexGuard<'_, BTreeSet<(&'static str, Labels)>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its sinks' series too.
    pub fn forget_stream(&self, stream: &StreamName) {
        self.forget(&[("stream", stream.as_str())]);
    }

    pub fn forget_sink(&self, stream: &StreamName, sink: &SinkName) {
        self.forget(&[("stream", stream.as_str()), ("sink", sink.as_str())]);
    }

    pub fn forget_part(&self, part: &str) {
        self.forget(&[("part", part)]);
    }

    /// What is held with these labels, whatever others it has. Other gauges are set anew at each scrape.
    fn forget(&self, of: &[(&'static str, &str)]) {
        let meant = |(_, labels): &(&'static str, Labels)| {
            of.iter().all(|(name, value)| labels.iter().any(|(n, v)| n == name && v == value))
        };
        for (name, labels) in self.series().extract_if(.., meant) {
            if let Some(family) = self.counters.get(name) {
                family.remove(&labels);
            }
            if let Some(family) = self.histograms.get(name) {
                family.remove(&labels);
            }
            if let Some(family) = self.gauges.get(name) {
                family.remove(&labels);
            }
        }
    }

    pub fn buffer_meters(&self) -> BufferMeters {
        self.buffer.clone()
    }

    pub fn http_meters(&self) -> HttpMeters {
        let refused = |because: HttpRefusal| {
            self.counter("http_refused_requests", &[("reason", because.code())])
        };
        HttpMeters {
            refused: HttpRefusal::ALL.map(refused),
            refused_connections: self.counter("http_refused_connections", &[]),
        }
    }

    pub fn stream_meters(&self, stream: &StreamName) -> StreamMeters {
        let of = [("stream", stream.as_str())];
        let redelivered = Redelivery::ALL
            .map(|kind| self.counter("redelivered_messages", &[of[0], ("kind", kind.code())]));
        let disconnects = DisconnectReason::ALL
            .map(|reason| self.counter("mqtt_disconnects", &[("reason", reason.code())]));
        StreamMeters {
            connects: self.counter("mqtt_connects", &of),
            received_messages: self.counter("received_messages", &of),
            received_bytes: self.counter("received_bytes", &of),
            accepted_messages: self.counter("accepted_messages", &of),
            rejected_messages: self.counter("rejected_messages", &of),
            accept_duration: self.histogram("accept_duration_seconds", &of),
            redelivered,
            disconnects,
        }
    }

    pub fn sink_meters(&self, stream: &StreamName, sink: &SinkName, kind: SinkKind) -> SinkMeters {
        let of = [("stream", stream.as_str()), ("sink", sink.as_str())];
        let by_kind = [("kind", kind.code())];
        let flagged = |flag| self.counter("flagged_messages", &[of[0], of[1], ("flag", flag)]);
        let errors = [ErrorClass::Transient, ErrorClass::Data, ErrorClass::Standing]
            .map(|class| self.counter("sink_errors", &[of[0], of[1], ("class", class.code())]));
        let reasons = Reason::ALL
            .map(|reason| self.counter("dead_letter_reasons", &[("reason", reason.code())]));
        SinkMeters {
            delivered_messages: self.counter("delivered_messages", &of),
            filtered_messages: self.counter("filtered_messages", &of),
            incomplete_messages: self.counter("incomplete_messages", &of),
            unchanged_messages: self.counter("unchanged_messages", &of),
            stale_messages: self.counter("stale_messages", &of),
            dead_lettered_messages: self.counter("dead_lettered_messages", &of),
            replayed_messages: self.counter("replayed_messages", &of),
            retries: self.counter("sink_retries", &of),
            end_to_end_duration: self.histogram("end_to_end_duration_seconds", &of),
            batch_duration: self.histogram("sink_batch_duration_seconds", &by_kind),
            batch_messages: self.histogram("sink_batch_messages", &by_kind),
            flagged_device_time_invalid: flagged("device_time_invalid"),
            flagged_out_of_range: flagged("out_of_range"),
            errors,
            reasons,
        }
    }

    /// The meter of one edge; its bound is shown from now on.
    pub fn edge(&self, edge: Edge, owner: &[(&'static str, &str)], capacity: u64) -> EdgeMeter {
        let labels = [&[("edge", edge.code())], owner].concat();
        self.set("edge_capacity", &labels, to_i64(capacity));
        let labels = owned(&labels);
        let depth = self.gauges["edge_depth"].get_or_create(&labels).clone();
        self.series().extend(HELD_GAUGES.map(|name| (name, labels.clone())));
        EdgeMeter(depth)
    }

    fn set(&self, name: &str, labels: &[(&'static str, &str)], value: i64) {
        self.gauges[name].get_or_create(&owned(labels)).set(value);
    }

    fn set_float(&self, name: &str, labels: &[(&'static str, &str)], value: f64) {
        self.float_gauges[name].get_or_create(&owned(labels)).set(value);
    }

    pub fn render(&self, board: &Board) -> String {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let copied = |(name, _): &(&&str, &Gauges)| !HELD_GAUGES.contains(*name);
        self.gauges.iter().filter(copied).for_each(|(_, family)| family.clear());
        self.float_gauges.values().for_each(Family::clear);
        self.copy_node(board);
        self.copy_streams(board);
        self.copy_buffer(board);
        self.copy_sinks(board);
        self.copy_outside(board);
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode_registry(&mut text, &self.registry);
        let _ = encode_registry(&mut text, &self.process);
        let _ = encode_eof(&mut text);
        text
    }

    fn copy_node(&self, board: &Board) {
        self.set("build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        let health = crate::observe::health::judge(board);
        self.set("ready", &[], i64::from(health.ready));
        for state in crate::observe::health::HealthState::ALL {
            self.set("health_state", &[("state", state.code())], i64::from(health.state == state));
        }
        let node = board.node();
        for (direction, jumps) in
            [("forward", node.clock_jumps_forward), ("backward", node.clock_jumps_backward)]
        {
            advance(&self.counter("clock_jumps", &[("direction", direction)]), jumps);
        }
        for (part, status) in board.parts() {
            let of = [("part", part.as_str())];
            self.set("part_parked", &of, i64::from(status.state == PartState::Parked));
            advance(&self.counter("part_restarts", &of), status.restarts);
            advance(&self.counter("part_stalls", &of), status.stalls);
        }
        let process = super::process::Process::now();
        for (name, value) in [
            ("process_start_time_seconds", process.start_time_seconds),
            ("process_resident_memory_bytes", process.resident_bytes),
            ("process_cpu_seconds", process.cpu_seconds),
            ("process_open_fds", process.open_fds),
        ] {
            self.process_gauges[name].set(value);
        }
    }

    fn copy_streams(&self, board: &Board) {
        for (name, view) in board.streams() {
            let of = [("stream", name.as_str())];
            let status = view.status();
            self.set("mqtt_connected", &of, i64::from(status.connected));
            self.set("mqtt_subscribed", &of, i64::from(status.subscribed));
            self.set("mqtt_granted_qos", &of, status.granted_qos.map_or(-1, i64::from));
            self.set("mqtt_unacknowledged_messages", &of, to_i64(status.unacknowledged as u64));
            let bound = status.unacknowledged_max as u64;
            self.edge(Edge::Unacknowledged, &of, bound).set(status.unacknowledged);
            self.set("stream_input_active", &of, i64::from(status.subscribed));
            let sinks = board.sinks_of(&name);
            let delivering =
                sinks.iter().all(|(_, sink)| sink.status().state == SinkState::Delivering);
            self.set("stream_output_active", &of, i64::from(delivering));
            self.set("stream_sequence", &of, to_i64(status.sequence.0));
            self.set("stream_unmapped_fields", &of, to_i64(status.unmapped.len() as u64));
            let last = seconds(status.last_message.or(status.since));
            self.set_float("stream_last_message_timestamp_seconds", &of, last);
            for (severity, limit) in &status.silence_limits_seconds {
                let labels = [of[0], ("severity", *severity)];
                self.set_float("stream_silence_limit_seconds", &labels, *limit);
            }
        }
    }

    fn copy_buffer(&self, board: &Board) {
        let buffer = board.buffer();
        self.set("buffer_accepting", &[], i64::from(buffer.accepting));
        self.set("buffer_bytes", &[], to_i64(buffer.bytes));
        self.set("buffer_quota_bytes", &[], to_i64(buffer.quota_bytes));
        self.set("buffer_generations", &[], to_i64(buffer.generations));
        self.set("buffer_generations_quarantined", &[], to_i64(buffer.quarantined));
        self.set("filesystem_size_bytes", &[], to_i64(buffer.filesystem_bytes));
        self.set("filesystem_free_bytes", &[], to_i64(buffer.free_bytes));
        self.set("dead_letter_store_bytes", &[], to_i64(buffer.dead_letter_bytes));
        self.set("dead_letter_store_quota_bytes", &[], to_i64(buffer.dead_letter_quota_bytes));
        let bytes = usize::try_from(buffer.bytes).unwrap_or(usize::MAX);
        self.edge(Edge::Log, &[], buffer.quota_bytes).set(bytes);
        for (cluster, waiting) in &buffer.dead_letter_copies_waiting {
            let dependency = format!("kafka:{cluster}");
            let of = [("dependency", dependency.as_str())];
            self.set("dead_letter_copies_waiting", &of, to_i64(*waiting));
        }
        for (name, _) in board.streams() {
            let lost = buffer.lost.get(name.as_str()).copied().unwrap_or(0);
            self.set("buffer_lost_messages", &[("stream", name.as_str())], to_i64(lost));
        }
    }

    fn copy_sinks(&self, board: &Board) {
        let lost_letters = board.buffer().dead_letters_lost;
        for (stream, sink, view) in board.sinks() {
            let of = [("stream", stream.as_str()), ("sink", sink.as_str())];
            let status = view.status();
            self.set("sink_info", &[of[0], of[1], ("kind", status.kind.code())], 1);
            for state in SinkState::ALL {
                let labels = [of[0], of[1], ("state", state.code())];
                self.set("sink_state", &labels, i64::from(status.state == state));
            }
            let last = board.stream(&stream).status().sequence;
            let pending = status.books.map_or(0, |books| last.since(books.cursor));
            self.set("sink_pending_messages", &of, to_i64(pending));
            self.set("dead_letters", &of, to_i64(status.dead_letters));
            let lost = lost_letters.get(stream.as_str()).and_then(|sinks| sinks.get(sink.as_str()));
            self.set("dead_letters_lost", &of, to_i64(lost.copied().unwrap_or(0)));
            let difference = status.books.map_or(0, |books| books.difference());
            self.set("ledger_difference_messages", &of, difference);
            for (name, at) in [
                ("sink_oldest_pending_timestamp_seconds", status.oldest_pending),
                ("sink_newest_delivered_timestamp_seconds", status.newest_delivered),
                ("sink_last_success_timestamp_seconds", status.last_success),
            ] {
                self.set_float(name, &of, seconds(at));
            }
        }
    }

    fn copy_outside(&self, board: &Board) {
        for (peer, status) in board.certificates() {
            let expires = status.expires.map_or(0.0, |at| at.as_second() as f64);
            let of = [("peer", peer.as_str())];
            self.set_float("certificate_expiry_timestamp_seconds", &of, expires);
        }
        for (name, status) in board.dependencies() {
            let of = [("dependency", name.as_str())];
            self.set("dependency_up", &of, i64::from(status.up == Some(true)));
            for state in BreakerState::ALL {
                let labels = [of[0], ("state", state.code())];
                self.set("breaker_state", &labels, i64::from(status.breaker.state == state));
            }
            let next = seconds(status.breaker.next_trial);
            self.set_float("breaker_next_trial_timestamp_seconds", &of, next);
            advance(&self.counter("breaker_trips", &of), status.breaker.trips);
            if let Some(migration) = status.migration {
                let failed = migration == super::MigrationState::Failed;
                self.set("migration_failed", &of, i64::from(failed));
                self.set("migrations_pending", &of, to_i64(status.migrations_pending));
            }
        }
    }
}

fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn owned(labels: &[(&'static str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}

/// Brings a counter up to a total that is kept elsewhere.
fn advance(counter: &Counter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn seconds(at: Option<Arrival>) -> f64 {
    at.map_or(0.0, |at| at.as_micros() as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_documented_with_its_help() {
        let page = include_str!("../../docs/metrics.md");
        let names = COUNTERS
            .iter()
            .map(|(name, help)| (format!("telemetry_{name}_total"), *help))
            .chain(HISTOGRAMS.iter().map(|(name, help, _)| (format!("telemetry_{name}"), *help)))
            .chain(
                [GAUGES, FLOAT_GAUGES]
                    .concat()
                    .into_iter()
                    .map(|(name, help)| (format!("telemetry_{name}"), help)),
            )
            .chain(PROCESS_GAUGES.iter().map(|(name, help)| ((*name).to_owned(), *help)));
        for (name, help) in names {
            let line = page.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
            assert!(line.is_some_and(|line| line.contains(help)), "{name}: {help}");
        }
    }
}
