//! The supervised part: one per cluster, a lane per stream.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};

use super::copies::{Copier, CopierParts};
use super::error::KafkaError;
use super::health::ClusterHealth;
use super::lane::{Lane, LaneParts};
use super::ledger::{CORRECTIONS_MAX, LedgerParts};
use super::replay::{KafkaReplayer, ReplayTarget};
use super::reports::LANES_MAX;
use super::session::Cluster;
use crate::buffer::Buffer;
use crate::config::{ClusterSettings, KafkaSinkSettings, StreamSettings};
use crate::domain::StreamName;
use crate::observe::{Board, Edge};
use crate::part::{Control, Part, PartResult, Phase};
use crate::retry::Backoff;

/// The streams routed to one cluster.
pub type Routes = Arc<Vec<StreamSettings>>;

/// What a stream's lane is made from, for comparing.
pub fn lane_basis(stream: &StreamSettings) -> String {
    format!("{:?} {:?}", stream.mapping, stream.kafka)
}

/// What a producer is made from.
pub struct KafkaParts {
    /// Key in the configuration's `clusters`.
    pub cluster: String,
    pub settings: ClusterSettings,
    /// They may change while it runs: lanes come and go, the others are not touched.
    pub routes: watch::Receiver<Routes>,
    pub buffer: Buffer,
    pub board: Arc<Board>,
}

/// Delivers every stream routed to one cluster, and the copies of dead letters it is to have.
pub struct KafkaProducer {
    cluster: Arc<Cluster>,
    routes: watch::Receiver<Routes>,
    replayer: KafkaReplayer,
    buffer: Buffer,
    board: Arc<Board>,
}

impl KafkaProducer {
    /// Connects to nothing yet.
    pub fn new(parts: KafkaParts) -> Self {
        let KafkaParts { cluster, settings, routes, buffer, board } = parts;
        let health = Arc::new(ClusterHealth::new(&cluster, &board));
        let cluster = Arc::new(Cluster::new(cluster, settings, health));
        let replayer = KafkaReplayer::new(cluster.clone(), buffer.identity(), buffer.state());
        KafkaProducer { cluster, routes, replayer, buffer, board }
    }

    /// Delivers single dead letters while the producer runs.
    pub fn replayer(&self) -> KafkaReplayer {
        self.replayer.clone()
    }
}

impl Part for KafkaProducer {
    async fn run(self, mut control: Control) -> PartResult {
        let health = watch_health(self.cluster.clone(), self.routes.clone());
        tokio::pin!(health);
        let copying = copy_letters(&self, control.beside());
        tokio::pin!(copying);
        let mut routes = self.routes.clone();
        let mut lanes = Lanes::default();
        let mut changing = true;
        loop {
            let phase = control.phase();
            if phase == Phase::Running {
                let routes = routes.borrow_and_update().clone();
                lanes.follow(&routes, &self, &control)?;
            } else {
                lanes.tell(phase);
                if lanes.running.is_empty() {
                    return Ok(());
                }
            }
            tokio::select! {
                Some((stream, ended)) = lanes.work.next() => {
                    ended?;
                    lanes.running.remove(&stream);
                }
                changed = routes.changed(), if changing => changing = changed.is_ok(),
                failed = &mut copying => return Err(failed.into()),
                () = control.changed() => {}
                () = &mut health => {}
            }
        }
    }
}

/// Ends with a failure only: what is not copied when the part ends is copied after the next start.
async fn copy_letters(producer: &KafkaProducer, control: Control) -> KafkaError {
    let cluster = &producer.cluster;
    if let Some(topic) = cluster.settings.dead_letters.clone() {
        let (state, log) = (producer.buffer.state(), producer.buffer.identity());
        let (lane, cluster) = (COPIER_LANE, cluster.clone());
        let parts = CopierParts { lane, cluster, topic, state, log, control };
        if let Err(error) = Copier::new(parts).run().await {
            return error;
        }
    }
    std::future::pending().await
}

/// The number of the copies' lane; the streams' come after it.
const COPIER_LANE: usize = 0;

/// The lanes that run, each with its own phase.
#[derive(Default)]
struct Lanes {
    running: HashMap<StreamName, RunningLane>,
    work: FuturesUnordered<LocalBoxFuture<'static, (StreamName, Result<(), KafkaError>)>>,
    /// Numbers are not used twice: a late report of a lane that ended must reach no other.
    opened: usize,
}

struct RunningLane {
    basis: String,
    phase: watch::Sender<Phase>,
}

impl Lanes {
    /// Ends the lanes whose stream has changed or gone, and opens one for each stream that has none; a changed stream's
    /// comes when the old one has ended.
    fn follow(
        &mut self,
        routes: &Routes,
        producer: &KafkaProducer,
        control: &Control,
    ) -> PartResult {
        for (name, lane) in &self.running {
            let wanted = routes.iter().find(|stream| stream.name == *name);
            if wanted.is_none_or(|stream| lane_basis(stream) != lane.basis) {
                lane.phase.send_replace(Phase::Stopping);
            }
        }
        producer.cluster.set_lanes(routes.len() + 1);
        for stream in routes.iter() {
            let sink = stream.kafka.clone().filter(|sink| sink.cluster == producer.cluster.name);
            let Some(sink) = sink.filter(|_| !self.running.contains_key(&stream.name)) else {
                continue;
            };
            if self.opened + 1 == LANES_MAX {
                anyhow::bail!("{LANES_MAX} lanes were opened: a fresh producer counts anew");
            }
            self.open(stream.clone(), sink, producer, control);
        }
        Ok(())
    }

    fn open(
        &mut self,
        stream: StreamSettings,
        sink: KafkaSinkSettings,
        producer: &KafkaProducer,
        control: &Control,
    ) {
        self.opened += 1;
        let (index, name) = (COPIER_LANE + self.opened, stream.name.clone());
        let (books, replayed) = mpsc::channel(CORRECTIONS_MAX);
        let view = producer.board.sink(&name, &sink.sink);
        producer.replayer.serve(ReplayTarget {
            lane: index,
            stream: stream.clone(),
            topic: sink.topic.clone(),
            view: view.clone(),
            books: Some(books),
        });
        let ledger = LedgerParts {
            stream: name.clone(),
            sink: sink.sink.clone(),
            buffer: producer.buffer.clone(),
            view,
            stream_view: producer.board.stream(&name),
            replayed,
        };
        let phase = watch::Sender::new(control.phase());
        // Its progress is of its own: a lane that hangs is noticed although the others beat.
        let control = control.child(phase.subscribe());
        self.running.insert(name.clone(), RunningLane { basis: lane_basis(&stream), phase });
        let cluster = producer.cluster.clone();
        let bound = cluster.settings.in_flight_max;
        let in_flight = producer.board.sink_edge(Edge::InFlight, &name, &sink.sink, bound);
        let parts = LaneParts { index, cluster, stream, sink, ledger, in_flight, control };
        self.work.push(Box::pin(async move {
            let ended = async { Lane::open(parts).await?.run().await };
            (name, ended.await)
        }));
    }

    /// The part's own phase is everybody's.
    fn tell(&self, phase: Phase) {
        for lane in self.running.values() {
            lane.phase.send_if_modified(|current| {
                let news = *current != phase && *current != Phase::Stopping;
                if news {
                    *current = phase;
                }
                news
            });
        }
    }
}

/// While the cluster is away and no stream has anything to send, somebody must notice that it is back.
async fn watch_health(cluster: Arc<Cluster>, routes: watch::Receiver<Routes>) {
    let mut backoff = Backoff::new(cluster.settings.retry);
    loop {
        cluster.health.maybe_lost().await;
        let breaker = cluster.health.breaker();
        let pause = backoff.next_pause();
        tokio::time::sleep(breaker.rest().unwrap_or(pause)).await;
        let topics = routes.borrow().clone();
        let routed = topics.iter().filter_map(|stream| Some(&stream.kafka.as_ref()?.topic));
        let copies = cluster.settings.dead_letters.iter().map(|copies| &copies.topic);
        let Some(topic) = routed.chain(copies).next().cloned() else { continue };
        let Ok(permit) = breaker.pass() else { continue };
        match cluster.probe(topic).await {
            Ok(()) => {
                permit.succeeded();
                cluster.health.reached();
                backoff.reset();
            }
            Err(error) => {
                permit.failed();
                tracing::debug!(cluster = %cluster.name, %error);
            }
        }
    }
}
