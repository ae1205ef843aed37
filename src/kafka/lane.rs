//! One stream on its way to its topic: what it does when all is well is in [`super::delivery`]; here is what it does
//! before, between and after.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::error::RDKafkaErrorCode as Code;

use super::delivery::{Delivery, Stop};
use super::error::{KafkaError, class_of};
use super::health::ClusterHealth;
use super::ledger::{Ledger, LedgerParts};
use super::outbox::{Outbox, too_large};
use super::session::{Cluster, Session};
use super::topics::{self, TopicFacts};
use super::window::Failure;
use crate::buffer::{BufferError, Reader};
use crate::config::{KafkaSinkSettings, StreamSettings};
use crate::domain::{ErrorClass, Reason, Sequence, Stage};
use crate::mapping::Fault;
use crate::observe::{EdgeMeter, SinkState};
use crate::part::{Control, Phase};
use crate::retry::Backoff;

/// A lane that waits for room in the store of dead letters looks this often.
const FULL_RETRY: Duration = Duration::from_secs(5);

const DELIVER: &str = "deliver";
/// How soon a sink that waits for its topic says what became known of the cluster.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// What a lane is made from.
pub(super) struct LaneParts {
    pub index: usize,
    pub cluster: Arc<Cluster>,
    pub stream: StreamSettings,
    pub sink: KafkaSinkSettings,
    pub ledger: LedgerParts,
    pub in_flight: EdgeMeter,
    pub control: Control,
}

/// One stream's work at one cluster.
pub(super) struct Lane {
    index: usize,
    cluster: Arc<Cluster>,
    sink: KafkaSinkSettings,
    reader: Reader,
    outbox: Outbox,
    ledger: Ledger,
    backoff: Backoff,
    in_flight: EdgeMeter,
    control: Control,
    /// The topic was found since the last standing failure.
    prepared: bool,
    drift_told: bool,
    /// Largest record sent.
    record_bytes_max: usize,
    /// One record at a time until the cursor is here.
    single_until: Option<Sequence>,
    own_session: Option<Arc<Session>>,
}

impl Lane {
    pub async fn open(parts: LaneParts) -> Result<Self, KafkaError> {
        let LaneParts { index, cluster, stream, sink, ledger, in_flight, control } = parts;
        let buffer = ledger.buffer.clone();
        let reader = buffer.reader(&stream.name);
        let outbox = Outbox::new(stream, sink.topic.clone(), buffer.identity())?;
        Ok(Lane {
            index,
            reader,
            outbox,
            ledger: Ledger::open(ledger).await?,
            backoff: Backoff::new(cluster.settings.retry),
            in_flight,
            control,
            prepared: false,
            drift_told: false,
            record_bytes_max: cluster.settings.message_bytes_max,
            single_until: None,
            own_session: None,
            cluster,
            sink,
        })
    }

    /// Until the phase ends it. An error means the buffer has failed, or the mapping.
    pub async fn run(mut self) -> Result<(), KafkaError> {
        let saving = self.ledger.keep_saving(self.cluster.settings.cursor_save_interval);
        tokio::select! {
            error = saving => return Err(error.into()),
            ended = self.work() => ended?,
        }
        self.ledger.save().await?;
        self.control.progress.set_work_waiting(false);
        Ok(())
    }

    async fn work(&mut self) -> Result<(), KafkaError> {
        while !self.is_over() {
            if self.control.paused() {
                self.ledger.show(SinkState::Paused, None);
                self.control.progress.set_work_waiting(false);
                self.control.changed().await;
                continue;
            }
            if let Some(rest) = self.cluster.health.breaker().rest() {
                self.rest(rest).await;
                continue;
            }
            match self.attempt().await {
                Ok(()) => {}
                Err(KafkaError::Buffer(error)) => self.buffer_trouble(error).await?,
                Err(error @ KafkaError::Mapping { .. }) => return Err(error),
                Err(error) => {
                    // Nobody answers: it may be known why.
                    let refusal = self.cluster.health.refusal().filter(|_| error.is_unreachable());
                    self.refused(&refusal.unwrap_or(error)).await;
                }
            }
        }
        Ok(())
    }

    /// The breaker is open and the cluster's probe makes the trials.
    async fn rest(&mut self, rest: Duration) {
        let refusal = self.cluster.health.refusal();
        let state = if refusal.is_some() { SinkState::Held } else { SinkState::Waiting };
        // What it is held for is more than that nobody answers.
        if self.ledger.view().status().state != SinkState::Held {
            self.ledger.show(state, Some(self.cluster.health.trouble()));
        }
        self.wait(rest).await;
    }

    /// The phase ends this lane now, whatever waits.
    fn is_over(&self) -> bool {
        match self.control.phase() {
            Phase::Running => false,
            Phase::Stopping => true,
            Phase::Draining { deadline } => {
                let caught_up = self.ledger.cursor() >= self.reader.durable().borrow().0;
                caught_up || self.control.paused() || Instant::now() >= deadline
            }
        }
    }

    /// From the cursor on, until something ends it that is dealt with before it returns.
    async fn attempt(&mut self) -> Result<(), KafkaError> {
        let session = match self.single_until {
            None => self.cluster.shared()?,
            Some(_) => match &self.own_session {
                Some(session) => session.clone(),
                None => self.own_session.insert(self.cluster.single()?).clone(),
            },
        };
        if !self.prepared && !self.prepare(&session).await? {
            return Ok(());
        }
        let mut delivery = Delivery {
            session: &session,
            reports: session.reports(self.index),
            lane: self.index,
            cluster: &self.cluster,
            outbox: &mut self.outbox,
            ledger: &mut self.ledger,
            backoff: &mut self.backoff,
            in_flight: &self.in_flight,
            control: &mut self.control,
            record_bytes_max: self.record_bytes_max,
            single_until: self.single_until,
            last_moved: Instant::now(),
            room_left: 0,
            timed: None,
            waiting_told: false,
        };
        let stop = delivery.run(&mut self.reader).await;
        let unreported = delivery.settle_down(matches!(stop, Ok(Stop::Stuck))).await;
        let failure = delivery.reports.window().failure();
        self.in_flight.set(0);
        self.after(stop?, failure, unreported, &session).await
    }

    /// False when the phase ended it.
    async fn prepare(&mut self, session: &Arc<Session>) -> Result<bool, KafkaError> {
        let preparing = topics::prepare(&self.cluster, session, &self.sink);
        let facts = tokio::select! {
            facts = preparing => facts?,
            // The library would try until its time is over.
            refusal = self.cluster.health.refused() => return Err(refusal),
            () = interrupted(&mut self.control) => return Ok(false),
            never = keep_telling(&self.ledger, &self.cluster.health) => match never {},
        };
        self.prepared = true;
        let configured = self.cluster.settings.message_bytes_max;
        self.record_bytes_max = facts.message_bytes_max.unwrap_or(configured).min(configured);
        self.tell_drift(&facts);
        Ok(true)
    }

    /// What of the topic does not fit the settings; once.
    fn tell_drift(&mut self, facts: &TopicFacts) {
        if std::mem::replace(&mut self.drift_told, true) {
            return;
        }
        let (stream, topic) = (self.ledger.stream(), &self.sink.topic);
        let wanted = self.sink.ensure.as_ref();
        if let Some(difference) = wanted.and_then(|wanted| topics::drift(facts, wanted)) {
            tracing::warn!(
                event = "kafka_topic_drift", %stream, topic, difference,
                "the topic is not as `ensure` asks for; the node changes no existing topic"
            );
        }
        let batch_bytes = self.cluster.settings.batch_bytes;
        if let Some(limit) = facts.message_bytes_max.filter(|limit| *limit < batch_bytes) {
            tracing::warn!(
                event = "kafka_batches_too_large", %stream, topic, limit, batch_bytes,
                "the topic takes no batch of `batch_bytes`: each refused one is sent again record by record; \
                 lower `batch_bytes` or raise the topic's max.message.bytes"
            );
        }
    }

    /// Judges how a delivery ended. `unreported` records are left with a producer nobody listens to any more.
    async fn after(
        &mut self,
        stop: Stop,
        failure: Option<Failure>,
        unreported: usize,
        session: &Arc<Session>,
    ) -> Result<(), KafkaError> {
        let silent = unreported > 0 && stop != Stop::Ended;
        if silent || session.is_fatal() {
            self.cluster.retire(session);
            self.own_session = None;
        }
        if let Some(code) = session.standing_end().filter(|_| stop != Stop::Ended) {
            // The next producer that all share is the trial for all of them: one of each lane's own would be hundreds.
            let topic = self.sink.topic.clone();
            return Err(KafkaError::Refused { doing: DELIVER, topic, code });
        }
        if let Stop::Refused(sequence, code) = stop {
            return self.failed(Failure { sequence, code, data_until: None }).await;
        }
        match (failure, stop) {
            (Some(failure), _) => self.failed(failure).await,
            (None, Stop::Lost(range)) => {
                self.ledger.lost(range);
                Ok(())
            }
            (None, Stop::Single) => {
                self.single_until = None;
                self.own_session = None;
                // The shared producer may still remember the topic as refused or missing.
                self.prepared = false;
                Ok(())
            }
            (None, Stop::Stuck) => {
                // The topic may have gone, about which the library keeps silent.
                self.prepared = false;
                self.failed_transiently("no delivery was confirmed in time").await
            }
            (None, Stop::Failed) => self.failed_transiently("the producer was renewed").await,
            (None, Stop::Ended | Stop::Refused(..)) => Ok(()),
        }
    }

    async fn failed(&mut self, failure: Failure) -> Result<(), KafkaError> {
        let class = match failure.data_until {
            Some(_) => ErrorClass::Data,
            None => class_of(failure.code),
        };
        let (topic, code) = (self.sink.topic.clone(), failure.code);
        let error = KafkaError::Refused { doing: DELIVER, topic, code };
        tracing::debug!(stream = %self.ledger.stream(), sequence = failure.sequence.0, %error);
        match class {
            ErrorClass::Data if self.single_until.is_some() => {
                self.ledger.view().meters.error(class).inc();
                self.set_next_aside(failure.code).await
            }
            ErrorClass::Data => {
                self.ledger.view().meters.error(class).inc();
                self.single_until = failure.data_until;
                Ok(())
            }
            ErrorClass::Transient => self.failed_transiently(&error.to_string()).await,
            ErrorClass::Standing => {
                // The next try is one record of its own producer's: it draws nobody in.
                self.single_until = Some(self.ledger.cursor().next());
                Err(error)
            }
        }
    }

    async fn failed_transiently(&mut self, why: &str) -> Result<(), KafkaError> {
        let meters = &self.ledger.view().meters;
        meters.error(ErrorClass::Transient).inc();
        meters.retries.inc();
        let why = if self.cluster.health.is_down() {
            self.cluster.health.trouble()
        } else {
            why.to_owned()
        };
        self.ledger.show(SinkState::Waiting, Some(why));
        let pause = self.backoff.next_pause();
        self.wait(pause).await;
        Ok(())
    }

    /// The first record behind the cursor, sent alone, was refused for its own sake.
    async fn set_next_aside(&mut self, code: Code) -> Result<(), KafkaError> {
        let cursor = self.ledger.cursor();
        let chunk = self.reader.read(cursor, 1).await?;
        let record = chunk.blocks.iter().flat_map(|block| block.records_after(cursor)).next();
        let Some(record) = record else { return Ok(()) };
        let fault = match code {
            Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidMessageSize => {
                let bytes = match self.outbox.map(&record)? {
                    crate::mapping::Outcome::Mapped(()) => self.outbox.wire_bytes(),
                    _ => record.payload.len(),
                };
                too_large(bytes, self.record_bytes_max)
            }
            code => Fault {
                stage: Stage::Deliver,
                reason: Reason::KafkaRefused,
                field: None,
                detail: code.to_string(),
            },
        };
        let letter = fault.into_letter(self.ledger.stream(), self.ledger.sink(), &record, None);
        self.ledger.set_aside(vec![letter]).await?;
        let passed = super::window::Passed { records: 1, dead_lettered: 1, ..Default::default() };
        self.ledger.enter(passed, None);
        self.control.progress.beat();
        Ok(())
    }

    /// Holds for what a person must mend, waits for the rest.
    async fn refused(&mut self, error: &KafkaError) {
        let class = error.class();
        self.ledger.view().meters.error(class).inc();
        self.ledger.view().meters.retries.inc();
        self.control.progress.beat();
        self.prepared = false;
        self.own_session = None;
        let mut trouble = error.to_string();
        if error.is_unreachable() {
            self.cluster.health.lost(&trouble);
            trouble = self.cluster.health.trouble();
        }
        let pause = match class {
            ErrorClass::Standing => {
                self.ledger.show(SinkState::Held, Some(trouble));
                self.cluster.settings.retry.max
            }
            ErrorClass::Transient | ErrorClass::Data => {
                self.ledger.show(SinkState::Waiting, Some(trouble));
                self.backoff.next_pause()
            }
        };
        self.wait(pause).await;
    }

    /// A full store of dead letters holds this sink; a buffer that has stopped ends it.
    async fn buffer_trouble(&mut self, error: BufferError) -> Result<(), KafkaError> {
        if matches!(error, BufferError::Stopped { .. }) {
            return Err(error.into());
        }
        self.ledger.show(SinkState::Held, Some(error.to_string()));
        self.control.progress.beat();
        self.wait(FULL_RETRY).await;
        Ok(())
    }

    /// Waits, but never beyond the deadline of a drain, and not at all once the phase changes. A wait of our own
    /// choice is no stall, however long the settings make it.
    async fn wait(&mut self, pause: Duration) {
        let pause = match self.control.phase() {
            Phase::Draining { deadline } => {
                pause.min(deadline.saturating_duration_since(Instant::now()))
            }
            _ => pause,
        };
        self.control.progress.set_work_waiting(false);
        tokio::select! {
            _ = self.control.sleep(pause) => {}
            // The cluster answers somebody: no reason to sleep on.
            () = self.cluster.health.breaker().recovered() => {}
        }
    }
}

/// While the cluster is asked for a topic, which may take long when nobody answers: what is waited for, as far as known.
async fn keep_telling(ledger: &Ledger, health: &ClusterHealth) -> Infallible {
    loop {
        if ledger.view().status().state == SinkState::Waiting {
            ledger.show(SinkState::Waiting, Some(health.trouble()));
        }
        tokio::time::sleep(TELL_INTERVAL).await;
    }
}

/// Returns when the phase or a pause changes, or a drain reaches its deadline.
async fn interrupted(control: &mut Control) {
    match control.phase() {
        Phase::Draining { deadline } => {
            control.sleep(deadline.saturating_duration_since(Instant::now())).await;
        }
        Phase::Running | Phase::Stopping => control.changed().await,
    }
}
