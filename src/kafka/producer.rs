//! The supervised part: one per cluster, a lane per stream.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

use super::copies::{Copier, CopierParts};
use super::error::KafkaError;
use super::health::ClusterHealth;
use super::lane::{Lane, LaneParts};
use super::ledger::{CORRECTIONS_MAX, LedgerParts, Replayed};
use super::replay::{KafkaReplayer, ReplayTarget};
use super::reports::LANES_MAX;
use super::session::Cluster;
use crate::buffer::Buffer;
use crate::config::{ClusterSettings, KafkaSinkSettings, StreamSettings};
use crate::observe::{Board, Edge};
use crate::part::{Control, Part, PartResult, Phase};
use crate::retry::Backoff;

/// What a producer is made from.
pub struct KafkaParts {
    /// Key in the configuration's `clusters`.
    pub cluster: String,
    pub settings: ClusterSettings,
    /// The streams routed to the cluster; others are left out.
    pub streams: Vec<StreamSettings>,
    pub buffer: Buffer,
    pub board: Arc<Board>,
}

/// Delivers every stream routed to one cluster, and the copies of dead letters it is to have.
pub struct KafkaProducer {
    cluster: Arc<Cluster>,
    routes: Vec<(StreamSettings, KafkaSinkSettings)>,
    replayed: Vec<mpsc::Receiver<Replayed>>,
    replayer: KafkaReplayer,
    buffer: Buffer,
    board: Arc<Board>,
}

impl KafkaProducer {
    /// Connects to nothing yet.
    pub fn new(parts: KafkaParts) -> Self {
        let KafkaParts { cluster, settings, streams, buffer, board } = parts;
        let routes: Vec<_> = streams
            .into_iter()
            .filter_map(|stream| {
                let sink = stream.kafka.clone().filter(|sink| sink.cluster == cluster)?;
                Some((stream, sink))
            })
            .take(LANES_MAX - 1)
            .collect();
        let health = Arc::new(ClusterHealth::new(&cluster, &board));
        // One more for the copies.
        let lanes = routes.len() + 1;
        let cluster = Arc::new(Cluster::new(cluster, settings, lanes, health));
        let mut targets = Vec::new();
        let mut replayed = Vec::new();
        for (lane, (stream, sink)) in routes.iter().enumerate() {
            let (sender, receiver) = mpsc::channel(CORRECTIONS_MAX);
            replayed.push(receiver);
            let view = board.sink(&stream.name, &sink.sink);
            targets.push(ReplayTarget {
                lane,
                stream: stream.clone(),
                topic: sink.topic.clone(),
                view,
                books: sender,
            });
        }
        let replayer = KafkaReplayer::new(cluster.clone(), &buffer, targets);
        KafkaProducer { cluster, routes, replayed, replayer, buffer, board }
    }

    /// Delivers single dead letters while the producer runs.
    pub fn replayer(&self) -> KafkaReplayer {
        self.replayer.clone()
    }
}

impl Part for KafkaProducer {
    async fn run(self, control: Control) -> PartResult {
        let KafkaProducer { cluster, routes, replayed, replayer: _, buffer, board } = self;
        let copies = cluster.settings.dead_letters.clone();
        let topic = routes.first().map(|(_, sink)| sink.topic.clone());
        let topic = topic.or_else(|| copies.as_ref().map(|copies| copies.topic.clone()));
        let copier = copies.map(|topic| {
            Copier::new(CopierParts {
                lane: routes.len(),
                cluster: cluster.clone(),
                topic,
                state: buffer.state(),
                log: buffer.identity(),
                control: control.clone(),
            })
        });
        let mut lanes = FuturesUnordered::new();
        for (index, ((stream, sink), replayed)) in routes.into_iter().zip(replayed).enumerate() {
            let ledger = LedgerParts {
                stream: stream.name.clone(),
                sink: sink.sink.clone(),
                buffer: buffer.clone(),
                view: board.sink(&stream.name, &sink.sink),
                stream_view: board.stream(&stream.name),
                replayed,
            };
            let cluster = cluster.clone();
            let bound = cluster.settings.in_flight_max;
            let in_flight = board.sink_edge(Edge::InFlight, &stream.name, &sink.sink, bound);
            // Of its own: a lane that hangs is noticed although the others beat.
            let mut control = control.clone();
            control.progress = control.progress.child();
            let parts = LaneParts { index, cluster, stream, sink, ledger, in_flight, control };
            lanes.push(async move { Lane::open(parts).await?.run().await });
        }
        let streams = async {
            while let Some(ended) = lanes.next().await {
                ended?;
            }
            Ok::<_, KafkaError>(())
        };
        let copying = async {
            match copier {
                Some(copier) => copier.run().await,
                None => Ok(()),
            }
        };
        let work = async { tokio::try_join!(streams, copying).map(drop) };
        tokio::select! {
            done = work => done?,
            () = watch_health(&cluster, topic, control.clone()) => {}
        }
        Ok(())
    }
}

/// While the cluster is away and no stream has anything to send, somebody must notice that it is back.
async fn watch_health(cluster: &Arc<Cluster>, topic: Option<String>, mut control: Control) {
    let Some(topic) = topic else {
        // No stream: nothing to do until the phase says so.
        while control.phase() == Phase::Running {
            control.changed().await;
        }
        return;
    };
    let mut backoff = Backoff::new(cluster.settings.retry);
    loop {
        cluster.health.maybe_lost().await;
        let breaker = cluster.health.breaker();
        let pause = backoff.next_pause();
        tokio::time::sleep(breaker.rest().unwrap_or(pause)).await;
        let Ok(permit) = breaker.pass() else { continue };
        match cluster.probe(topic.clone()).await {
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
