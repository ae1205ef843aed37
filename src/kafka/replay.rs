//! Dead letters of this sink, delivered one at a time through the current mapping.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::error::KafkaError;
use super::ledger::Replayed;
use super::outbox::Outbox;
use super::reports::opaque;
use super::session::{Cluster, Session};
use crate::buffer::{Buffer, State};
use crate::config::StreamSettings;
use crate::domain::{DeadLetter, LogIdentity, Sequence, StreamName};
use crate::mapping::{Fault, Outcome};
use crate::observe::SinkView;

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
}

/// Where a stream's letters go.
pub(super) struct ReplayTarget {
    pub lane: usize,
    pub stream: StreamSettings,
    pub topic: String,
    pub view: Arc<SinkView>,
    pub books: mpsc::Sender<Replayed>,
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
    pub(super) fn new(cluster: Arc<Cluster>, buffer: &Buffer) -> Self {
        let (log, state) = (buffer.identity(), buffer.state());
        let (targets, session) = (StdMutex::default(), Mutex::default());
        KafkaReplayer { inner: Arc::new(Inner { cluster, log, state, targets, session }) }
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
        let target = inner.targets().get(stream).cloned();
        let Some(target) = target.filter(|target| !target.books.is_closed()) else {
            return Err(KafkaError::NotServed { stream: stream.to_string() });
        };
        // The place in the books is taken first: after the confirmation nothing may fail.
        let place = target.books.reserve().await;
        let place = place.map_err(|_| KafkaError::NotServed { stream: stream.to_string() })?;
        let mut outbox = Outbox::new(target.stream.clone(), target.topic.clone(), inner.log)?;
        match outbox.map(&letter.record())? {
            Outcome::Mapped(()) => {}
            Outcome::Filtered => return Ok(ReplayOutcome::Filtered),
            Outcome::Incomplete => return Ok(ReplayOutcome::Incomplete),
            Outcome::Dead(fault) => return Ok(ReplayOutcome::Dead(fault)),
        }
        inner.deliver(&target, &mut outbox, letter).await?;
        if inner.state.remove_replayed(&letter.key).await? {
            place.send(Replayed);
            target.view.meters.replayed_messages.inc();
        }
        Ok(ReplayOutcome::Delivered)
    }
}

impl Inner {
    fn targets(&self) -> MutexGuard<'_, HashMap<StreamName, Arc<ReplayTarget>>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn deliver(
        &self,
        target: &ReplayTarget,
        outbox: &mut Outbox,
        letter: &DeadLetter,
    ) -> Result<(), KafkaError> {
        const DOING: &str = "replay";
        let mut slot = self.session.lock().await;
        let session = match slot.take().filter(|session| !session.context().is_fatal()) {
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
            .map_err(|(error, _)| KafkaError::of(DOING, &target.topic, &error))?;
        let limit = self.cluster.settings.message_timeout;
        // A session whose report stays out is not used again: its late report would be taken for another's.
        timeout(limit, reports.all_reported())
            .await
            .map_err(|_| KafkaError::TimedOut { doing: DOING, limit })?;
        let failure = reports.window().failure();
        *slot = Some(session);
        match failure {
            None => Ok(()),
            Some(failure) => Err(KafkaError::Refused {
                doing: DOING,
                topic: target.topic.clone(),
                code: failure.code,
            }),
        }
    }
}
