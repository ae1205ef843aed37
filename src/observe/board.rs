//! The board: one view per stream, per sink and per dependency. A part holds its view and writes to it; nobody else
//! does. Counters count from process start; books and positions are gauges copied from durable state.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use indexmap::IndexMap;

use super::dependency::{DependencyStatus, DependencyView};
use super::edges::{Edge, EdgeMeter};
use super::expiry::CertificateStatus;
use super::http_meters::HttpMeters;
use super::metrics::{BufferMeters, Exposition, SinkMeters, StreamMeters};
use super::seldom::Seldom;
use super::status::{
    BufferStatus, NodeStatus, PartStatus, Silence, SinkKind, SinkState, SinkStatus, StreamStatus,
};
use crate::certificates::CertificateFacts;
use crate::config::{BreakerSettings, Settings, StreamSettings};
use crate::domain::{Arrival, DeadLetter, DeadLetterKey, Incident, Runbook, SinkName, StreamName};

/// Everything the node knows of itself at this moment.
#[derive(Debug)]
pub struct Board {
    views: RwLock<Views>,
    parts: Mutex<BTreeMap<String, PartStatus>>,
    buffer: Mutex<BufferStatus>,
    node: Mutex<NodeStatus>,
    certificates: Mutex<BTreeMap<String, CertificateStatus>>,
    presented: Mutex<BTreeMap<String, CertificateFacts>>,
    pub buffer_meters: BufferMeters,
    pub http_meters: HttpMeters,
    exposition: Exposition,
}

/// Of everything that is configured, in the order of the configuration.
#[derive(Debug, Default)]
struct Views {
    streams: IndexMap<StreamName, Arc<StreamView>>,
    sinks: IndexMap<(StreamName, SinkName), Arc<SinkView>>,
    dependencies: IndexMap<String, Arc<DependencyView>>,
}

pub(super) fn lock<T>(cell: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while holding one of these locks leaves a value that is still whole: each is replaced field by field.
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    /// A view for everything that is configured; each series exists from the start.
    pub fn new(settings: &Settings) -> Arc<Self> {
        let exposition = Exposition::new();
        let buffer =
            BufferStatus { quota_bytes: settings.buffer.quota_bytes, ..Default::default() };
        let board = Board {
            views: RwLock::default(),
            parts: Mutex::default(),
            certificates: Mutex::default(),
            presented: Mutex::default(),
            buffer: Mutex::new(buffer),
            node: Mutex::new(NodeStatus {
                name: settings.node.name.to_string(),
                ..Default::default()
            }),
            buffer_meters: exposition.buffer_meters(),
            http_meters: exposition.http_meters(),
            exposition,
        };
        board.configure(settings);
        Arc::new(board)
    }

    /// Views for what is configured now: what was there before keeps its own, what is gone loses its series too.
    pub fn configure(&self, settings: &Settings) {
        let mut views = self.views.write().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *views);
        for (name, stream) in &settings.streams {
            let view = before.streams.swap_remove(name);
            let view = view.unwrap_or_else(|| self.new_stream_view(name));
            view.configure(stream);
            views.streams.insert(name.clone(), view);
            for sink in stream.sinks() {
                let kind = SinkKind::of(stream, &sink);
                let key = (name.clone(), sink);
                let view = before.sinks.swap_remove(&key).filter(|view| view.kind == kind);
                let view = view.unwrap_or_else(|| {
                    let meters = self.exposition.sink_meters(&key.0, &key.1, kind);
                    Arc::new(SinkView::new(key.clone(), kind, meters))
                });
                views.sinks.insert(key, view);
            }
        }
        for (name, breaker) in dependencies(settings) {
            let view = before.dependencies.swap_remove(&name);
            let view = view.filter(|view| view.breaker().settings() == breaker);
            let view = view.unwrap_or_else(|| Arc::new(DependencyView::new(&name, breaker)));
            views.dependencies.insert(name, view);
        }
        before.streams.keys().for_each(|stream| self.exposition.forget_stream(stream));
        for (stream, sink) in before.sinks.keys() {
            if !views.sinks.contains_key(&(stream.clone(), sink.clone())) {
                self.exposition.forget_sink(stream, sink);
            }
        }
    }

    fn new_stream_view(&self, name: &StreamName) -> Arc<StreamView> {
        let view = StreamView::new(self.exposition.stream_meters(name));
        view.update(|status| {
            status.heard = Some(Instant::now());
            status.since = Some(Arrival::now());
        });
        Arc::new(view)
    }

    fn views(&self) -> RwLockReadGuard<'_, Views> {
        self.views.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The view of a configured stream. Asking for any other is a mistake in our own wiring.
    pub fn stream(&self, name: &StreamName) -> Arc<StreamView> {
        self.views().streams.get(name).cloned().expect("every configured stream has a view")
    }

    /// The view of a configured sink.
    pub fn sink(&self, stream: &StreamName, sink: &SinkName) -> Arc<SinkView> {
        let key = (stream.clone(), sink.clone());
        self.views().sinks.get(&key).cloned().expect("every configured sink has a view")
    }

    /// How many dead letters wait, as the state database has it. Their sink may not be configured any more.
    pub fn show_dead_letters(&self, stream: &StreamName, sink: &SinkName, letters: u64) {
        if let Some(view) = self.views().sinks.get(&(stream.clone(), sink.clone())) {
            view.update(|status| status.dead_letters = letters);
        }
    }

    /// `mqtt:<broker>`, `kafka:<cluster>` or `postgresql:<database>`.
    pub fn dependency(&self, name: &str) -> Arc<DependencyView> {
        self.views()
            .dependencies
            .get(name)
            .cloned()
            .expect("every configured dependency has a view")
    }

    pub fn streams(&self) -> Vec<(StreamName, Arc<StreamView>)> {
        let line = |(name, view): (&StreamName, &Arc<StreamView>)| (name.clone(), view.clone());
        self.views().streams.iter().map(line).collect()
    }

    pub fn sinks(&self) -> Vec<(StreamName, SinkName, Arc<SinkView>)> {
        let line = |((stream, sink), view): (&(StreamName, SinkName), &Arc<SinkView>)| {
            (stream.clone(), sink.clone(), view.clone())
        };
        self.views().sinks.iter().map(line).collect()
    }

    /// The sinks of one stream.
    pub fn sinks_of(&self, name: &StreamName) -> Vec<(SinkName, Arc<SinkView>)> {
        let views = self.views();
        let own = views.sinks.iter().filter(|((stream, _), _)| stream == name);
        own.map(|((_, sink), view)| (sink.clone(), view.clone())).collect()
    }

    pub fn dependencies(&self) -> Vec<(String, DependencyStatus)> {
        self.views().dependencies.iter().map(|(name, view)| (name.clone(), view.status())).collect()
    }

    pub fn buffer(&self) -> BufferStatus {
        lock(&self.buffer).clone()
    }

    pub fn update_buffer(&self, change: impl FnOnce(&mut BufferStatus)) {
        change(&mut lock(&self.buffer));
    }

    pub fn node(&self) -> NodeStatus {
        lock(&self.node).clone()
    }

    pub fn update_node(&self, change: impl FnOnce(&mut NodeStatus)) {
        change(&mut lock(&self.node));
    }

    /// By peer; empty before they were read for the first time.
    pub fn certificates(&self) -> BTreeMap<String, CertificateStatus> {
        lock(&self.certificates).clone()
    }

    /// What brokers and databases presented, by peer.
    pub fn presented_certificates(&self) -> BTreeMap<String, CertificateFacts> {
        lock(&self.presented).clone()
    }

    pub fn set_certificates(
        &self,
        found: BTreeMap<String, CertificateStatus>,
        presented: BTreeMap<String, CertificateFacts>,
    ) {
        *lock(&self.certificates) = found;
        *lock(&self.presented) = presented;
    }

    pub fn parts(&self) -> BTreeMap<String, PartStatus> {
        lock(&self.parts).clone()
    }

    pub fn update_part(&self, name: &str, change: impl FnOnce(&mut PartStatus)) {
        change(lock(&self.parts).entry(name.to_owned()).or_default());
    }

    pub fn forget_part(&self, name: &str) {
        lock(&self.parts).remove(name);
        self.exposition.forget_part(name);
    }

    /// The meter of an edge of the whole node.
    pub fn edge(&self, edge: Edge, capacity: usize) -> EdgeMeter {
        self.exposition.edge(edge, &[], capacity as u64)
    }

    /// The meter of a stream's edge.
    pub fn stream_edge(&self, edge: Edge, stream: &StreamName, capacity: usize) -> EdgeMeter {
        self.exposition.edge(edge, &[("stream", stream.as_str())], capacity as u64)
    }

    /// The meter of the edge in front of one sink of a stream.
    pub fn sink_edge(
        &self,
        edge: Edge,
        stream: &StreamName,
        sink: &SinkName,
        capacity: usize,
    ) -> EdgeMeter {
        let owner = [("stream", stream.as_str()), ("sink", sink.as_str())];
        self.exposition.edge(edge, &owner, capacity as u64)
    }

    /// `/metrics`, in the Prometheus text format.
    pub fn render_metrics(&self) -> String {
        self.exposition.render(self)
    }
}

/// By the names the board calls them, each with its breaker's settings.
fn dependencies(settings: &Settings) -> Vec<(String, BreakerSettings)> {
    let brokers = settings.brokers.iter().map(|(name, of)| (format!("mqtt:{name}"), of.breaker));
    let clusters = settings.clusters.iter().map(|(name, of)| (format!("kafka:{name}"), of.breaker));
    let databases =
        settings.databases.iter().map(|(name, of)| (format!("postgresql:{name}"), of.breaker));
    brokers.chain(clusters).chain(databases).collect()
}

fn silence_limits(stream: &StreamSettings) -> Vec<(&'static str, f64)> {
    let (warning, critical) = stream.silent_after;
    [("warning", warning), (Silence::CRITICAL, critical)]
        .into_iter()
        .filter_map(|(severity, limit)| Some((severity, limit?.as_secs_f64())))
        .collect()
}

/// Names of unmapped members remembered per stream: devices may invent new ones without end.
const UNMAPPED_NAMES_MAX: usize = 100;

/// A stream's line on the board.
#[derive(Debug)]
pub struct StreamView {
    pub meters: StreamMeters,
    /// Every sink maps every message; only this one counts what no mapping uses.
    witness: Mutex<Option<SinkName>>,
    status: Mutex<StreamStatus>,
}

impl StreamView {
    fn new(meters: StreamMeters) -> Self {
        StreamView { meters, witness: Mutex::default(), status: Mutex::default() }
    }

    fn configure(&self, stream: &StreamSettings) {
        *lock(&self.witness) = stream.sinks().into_iter().next();
        self.update(|status| status.silence_limits_seconds = silence_limits(stream));
    }

    /// Members of payloads that no mapping uses, as `sink` saw them.
    pub fn unmapped_seen(&self, sink: &SinkName, members: &[(String, u64)]) {
        if members.is_empty() || lock(&self.witness).as_ref() != Some(sink) {
            return;
        }
        let known = &mut lock(&self.status).unmapped;
        for (name, count) in members {
            if let Some(total) = known.get_mut(name) {
                *total += count;
            } else if known.len() < UNMAPPED_NAMES_MAX {
                known.insert(name.clone(), *count);
            }
        }
    }

    pub fn status(&self) -> StreamStatus {
        lock(&self.status).clone()
    }

    pub fn update(&self, change: impl FnOnce(&mut StreamStatus)) {
        change(&mut lock(&self.status));
    }
}

/// A sink's line on the board.
#[derive(Debug)]
pub struct SinkView {
    key: (StreamName, SinkName),
    pub meters: SinkMeters,
    kind: SinkKind,
    /// While a person is waited for.
    pub hold: Incident,
    /// While its books do not balance.
    imbalance: Incident,
    status: Mutex<SinkStatus>,
    letters_told: Seldom,
}

impl SinkView {
    fn new(key: (StreamName, SinkName), kind: SinkKind, meters: SinkMeters) -> Self {
        let status = SinkStatus {
            kind,
            state: SinkState::default(),
            trouble: Some("it has not begun yet".to_owned()),
            books: None,
            oldest_pending: None,
            newest_delivered: None,
            last_success: None,
            dead_letters: 0,
        };
        SinkView {
            key,
            meters,
            kind,
            hold: Incident::default(),
            imbalance: Incident::default(),
            status: Mutex::new(status),
            letters_told: Seldom::default(),
        }
    }

    /// The cursor has passed a dead letter: counted by reason, and told at most once a minute.
    pub fn set_aside(&self, letter: &DeadLetter) {
        self.meters.dead_letter_reason(letter.reason).inc();
        let Some(letters) = self.letters_told.due() else { return };
        let DeadLetterKey { sink, stream, sequence } = &letter.key;
        tracing::warn!(
                   event = "dead_lettered",
        runbook = Runbook::DeadLettersGrowing.page(), %stream, %sink, %sequence, letters,
                   reason = letter.reason.code(), column = letter.column, detail = letter.detail,
                   "messages were set aside: see `telemetry dlq list`; this line comes at most once a minute"
               );
    }

    pub fn status(&self) -> SinkStatus {
        lock(&self.status).clone()
    }

    pub fn update(&self, change: impl FnOnce(&mut SinkStatus)) {
        let mut status = lock(&self.status);
        change(&mut status);
        let difference = status.books.map_or(0, |books| books.difference());
        drop(status);
        self.tell_balance(difference);
    }

    /// Says once that the books do not balance, and once that they do again.
    fn tell_balance(&self, difference: i64) {
        let (stream, sink) = &self.key;
        if difference == 0 {
            if let Some(correlation_id) = self.imbalance.end() {
                tracing::info!(event = "books_balance", %correlation_id, %stream, %sink, "they balance again");
            }
        } else if self.imbalance.current().is_none() {
            tracing::error!(
                event = "books_do_not_balance",
                runbook = Runbook::BooksDoNotBalance.page(),
                correlation_id = %self.imbalance.id(),
                %stream,
                %sink,
                difference,
                "received is not the sum of what became of it: see `telemetry ledger`"
            );
        }
    }
}
