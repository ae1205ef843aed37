//! Dead letters of this sink, delivered one at a time through the current mapping.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use rdkafka::error::RDKafkaErrorCode as Code;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::error::KafkaError;
use super::health::ClusterHealth;
use super::ledger::Replayed;
use super::outbox::Outbox;
use super::reports::opaque;
use super::session::{Cluster, Session};
use crate::buffer::State;
use crate::config::{ClusterSettings, StreamSettings};
use crate::domain::{DeadLetter, LogIdentity, Sequence, StreamName};
use crate::mapping::{Fault, Outcome};
use crate::observe::{Board, SinkView};

/// What became of a replayed dead letter.
#[derive(Debug, Clone, PartialEq)]
pub enum ReplayOutcome {
    /// Confirmed by the brokers; the letter is gone and the books count it as delivered.
    Delivered,
    /// The current mapping leaves it out.
    Filtered,
    /// The current mapping finds it incomplete.
    Incomplete,
    /// Still not deliverable, for this reason.
    Dead(Fault),
    /// The sink has not yet passed this record: its lane will settle it.
    NotPassed,
}

/// Where a stream's letters go.
pub(super) struct ReplayTarget {
    pub lane: usize,
    pub stream: StreamSettings,
    pub topic: String,
    pub view: Arc<SinkView>,
    /// The lane that has the books open; without one the state database alone is told, where the next lane finds it.
    pub books: Option<mpsc::Sender<Replayed>>,
}

/// What a replayer is made from where no producer runs.
pub struct ReplayerParts<'a> {
    /// Key in the configuration's `clusters`.
    pub cluster: &'a str,
    pub settings: ClusterSettings,
    /// Those routed to it.
    pub streams: Vec<StreamSettings>,
    pub state: State,
    pub log: LogIdentity,
    pub board: &'a Board,
}

/// A handle to replay dead letters of one cluster's streams: one at a time, over a producer of its own, so that a
/// letter the brokers refuse disturbs no stream. Of no use once its [`super::KafkaProducer`] has ended.
#[derive(Clone)]
pub struct KafkaReplayer {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Arc<Cluster>,
    log: LogIdentity,
    state: State,
    /// Of each stream the lane that serves it now, or did last.
    targets: StdMutex<HashMap<StreamName, Arc<ReplayTarget>>>,
    session: Mutex<Option<Arc<Session>>>,
}

impl KafkaReplayer {
    pub(super) fn new(cluster: Arc<Cluster>, log: LogIdentity, state: State) -> Self {
        let (targets, session) = (StdMutex::default(), Mutex::default());
        KafkaReplayer { inner: Arc::new(Inner { cluster, log, state, targets, session }) }
    }

    /// Of a stopped node: nobody else has the books of its sinks open. Connects to nothing yet.
    pub fn alone(parts: ReplayerParts<'_>) -> Self {
        let ReplayerParts { cluster, settings, streams, state, log, board } = parts;
        let health = Arc::new(ClusterHealth::new(cluster, board));
        let replayer =
            Self::new(Arc::new(Cluster::new(cluster.to_owned(), settings, health)), log, state);
        for (lane, stream) in streams.into_iter().enumerate() {
            let Some(sink) = &stream.kafka else { continue };
            let view = board.sink(&stream.name, &sink.sink);
            let topic = sink.topic.clone();
            replayer.serve(ReplayTarget { lane, stream, topic, view, books: None });
        }
        replayer
    }

    /// From now on the letters of its stream go there.
    pub(super) fn serve(&self, target: ReplayTarget) {
        self.inner.targets().insert(target.stream.name.clone(), Arc::new(target));
    }

    /// Delivers the letter with its original arrival time and `telemetry-id`. It leaves the store and enters the books in
    /// one step behind the confirmation: a crash before repeats the record under the same `telemetry-id`, and neither
    /// a crash nor a second replay counts it twice.
    pub async fn replay(&self, letter: &DeadLetter) -> Result<ReplayOutcome, KafkaError> {
        let inner = &self.inner;
        let stream = &letter.key.stream;
        let not_served = || KafkaError::NotServed { stream: stream.to_string() };
        let target = inner.targets().get(stream).cloned().ok_or_else(not_served)?;
        // The place in the books is taken first: after the confirmation nothing may fail.
        let place = match &target.books {
            Some(books) => Some(inner.place(stream, books).await?),
            None if inner.is_passed(letter).await? => None,
            None => return Ok(ReplayOutcome::NotPassed),
        };
        let mut outbox = Outbox::new(target.stream.clone(), target.topic.clone(), inner.log)?;
        match outbox.map(&letter.record())? {
            Outcome::Mapped(()) => {}
            Outcome::Filtered => return Ok(ReplayOutcome::Filtered),
            Outcome::Incomplete => return Ok(ReplayOutcome::Incomplete),
            Outcome::Dead(fault) => return Ok(ReplayOutcome::Dead(fault)),
        }
        inner.deliver(&target, &mut outbox, letter).await?;
        if inner.state.remove_replayed(&letter.key).await? {
            if let Some(place) = place {
                place.send(Replayed);
            }
            target.view.meters.replayed_messages.inc();
        }
        Ok(ReplayOutcome::Delivered)
    }
}

impl Inner {
    fn targets(&self) -> MutexGuard<'_, HashMap<StreamName, Arc<ReplayTarget>>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The saved cursor is behind the record: no lane will judge it again, and count it a second time.
    async fn is_passed(&self, letter: &DeadLetter) -> Result<bool, KafkaError> {
        let books = self.state.books(&letter.key.stream, &letter.key.sink).await?;
        Ok(books.is_some_and(|books| books.cursor >= letter.key.sequence))
    }

    /// A lane that is paused or waits for its topic enters nothing, and takes only so much.
    async fn place<'b>(
        &self,
        stream: &StreamName,
        books: &'b mpsc::Sender<Replayed>,
    ) -> Result<mpsc::Permit<'b, Replayed>, KafkaError> {
        let limit = self.cluster.settings.operation_timeout;
        let stream = || stream.to_string();
        match timeout(limit, books.reserve()).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) => Err(KafkaError::NotServed { stream: stream() }),
            Err(_) => Err(KafkaError::BooksFull { stream: stream(), limit }),
        }
    }

    async fn deliver(
        &self,
        target: &ReplayTarget,
        outbox: &mut Outbox,
        letter: &DeadLetter,
    ) -> Result<(), KafkaError> {
        const DOING: &str = "replay";
        let mut slot = self.session.lock().await;
        let session = match slot.take().filter(|session| !session.is_fatal()) {
            Some(session) => session,
            None => self.cluster.single()?,
        };
        let sequence = letter.key.sequence;
        let reports = session.reports(target.lane);
        reports.window().begin(Sequence(sequence.0.saturating_sub(1)));
        reports.window().push(letter.arrival);
        let outgoing = outbox.outgoing(sequence, letter.arrival, opaque(target.lane, sequence));
        session
            .producer()
            .send(outgoing)
            .map_err(|(error, _)| session.explain(KafkaError::of(DOING, &target.topic, &error)))?;
        let limit = self.cluster.settings.message_timeout;
        // A session whose report stays out is not used again: its late report would be taken for another's.
        let reported = tokio::select! {
            reported = timeout(limit, reports.all_reported()) => reported,
            // The library would try until its time is over.
            refusal = self.cluster.health.refused() => return Err(refusal),
        };
        reported.map_err(|_| match self.cluster.health.is_down() {
            true => KafkaError::Refused {
                doing: DOING,
                topic: target.topic.clone(),
                code: Code::AllBrokersDown,
            },
            false => KafkaError::TimedOut { doing: DOING, limit },
        })?;
        let failure = reports.window().failure();
        let outcome = failure.map_or(Ok(()), |failure| {
            let (topic, code) = (target.topic.clone(), failure.code);
            Err(session.explain(KafkaError::Refused { doing: DOING, topic, code }))
        });
        *slot = Some(session);
        outcome
    }
}
