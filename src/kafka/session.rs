//! One librdkafka producer and what belongs to it. It is replaced as a whole: a producer in its fatal state delivers
//! nothing any more, and what it still held is sent again from the cursors.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::client::{Client, ClientContext};
use rdkafka::config::FromClientConfigAndContext as _;
use rdkafka::error::RDKafkaErrorCode as Code;
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use tokio::sync::Semaphore;

use super::client_config::{Purpose, producer_config};
use super::error::{KafkaError, class_of};
use super::health::{ClusterHealth, Lacks};
use super::reports::{Context, Reports};
use super::topics;
use crate::config::{ClusterSettings, TlsSettings};
use crate::domain::{ErrorClass, Secret};
use crate::private_file::Stamp;

/// A record ready for librdkafka, which copies it.
pub(super) type Outgoing<'a> = BaseRecord<'a, [u8], [u8], usize>;

/// What a session shows the brokers, as its files had it when it was opened.
#[derive(PartialEq, Eq)]
struct Presented {
    password: Option<Secret>,
    files: Vec<Option<Stamp>>,
}

impl Presented {
    fn now(settings: &ClusterSettings) -> Self {
        let files = settings.tls.iter().flat_map(TlsSettings::files);
        Presented {
            password: settings.sasl.as_ref().map(|sasl| sasl.password.current()),
            files: files.map(|file| Stamp::of(file).unwrap_or(None)).collect(),
        }
    }
}

/// A running producer.
pub(super) struct Session {
    presented: Presented,
    producer: Option<ThreadedProducer<Context>>,
}

impl Session {
    fn open(
        settings: &ClusterSettings,
        lanes: usize,
        purpose: Purpose,
        health: Arc<ClusterHealth>,
    ) -> Result<Self, rdkafka::error::KafkaError> {
        // Before the library reads them: what changes in between is seen as a change.
        let presented = Presented::now(settings);
        let lacks = Lacks { tls: settings.tls.is_none(), sasl: settings.sasl.is_none() };
        let context = Context::new(health, lacks);
        let config = producer_config(settings, lanes, purpose);
        let producer = ThreadedProducer::from_config_and_context(&config, context)?;
        Ok(Session { presented, producer: Some(producer) })
    }

    pub fn producer(&self) -> &ThreadedProducer<Context> {
        self.producer.as_ref().expect("the producer leaves with the session")
    }

    pub fn context(&self) -> &Context {
        self.producer().context()
    }

    pub fn reports(&self, lane: usize) -> Arc<Reports> {
        self.context().reports(lane)
    }

    /// The producer will deliver nothing any more. The library tells its callback only what happened, not that this is the
    /// end.
    pub fn is_fatal(&self) -> bool {
        self.context().is_fatal() || self.producer().client().fatal_error().is_some()
    }

    /// What ended the producer and would end a fresh one too, until a person mends it. What it held comes back as purged,
    /// and what it is given is refused as fatal: neither names the cause.
    pub fn standing_end(&self) -> Option<Code> {
        let (code, reason) = self.producer().client().fatal_error()?;
        tracing::debug!(target: "librdkafka", %code, reason, "the producer has ended");
        (class_of(code) == ErrorClass::Standing).then_some(code)
    }

    /// The error with what ended the producer in place of what followed from it.
    pub fn explain(&self, error: KafkaError) -> KafkaError {
        match (self.standing_end(), error) {
            (Some(code), KafkaError::Refused { doing, topic, .. }) => {
                KafkaError::Refused { doing, topic, code }
            }
            (_, error) => error,
        }
    }
}

impl Drop for Session {
    /// Ending a producer waits for its threads, half a second and more: never on the thread of a part.
    fn drop(&mut self) {
        let producer = self.producer.take();
        let closing = std::thread::Builder::new().name("kafka-close".to_owned());
        if closing.spawn(move || drop(producer)).is_err() {
            tracing::debug!("no thread to end a Kafka producer on; it ended here");
        }
    }
}

/// One cluster: its settings, its health, and the producer its streams share at the moment.
pub(super) struct Cluster {
    pub name: String,
    pub settings: ClusterSettings,
    pub health: Arc<ClusterHealth>,
    /// A new producer has room for so many streams.
    lanes: AtomicUsize,
    shared: Mutex<Option<Arc<Session>>>,
    /// One per blocking call that may be under way.
    calls: Arc<Semaphore>,
}

const ASK: &str = "ask the cluster";
/// Blocking calls of one cluster at a time: each takes a thread here, and an admin client some more.
const CALLS_MAX: usize = 4;

impl Cluster {
    pub fn new(name: String, settings: ClusterSettings, health: Arc<ClusterHealth>) -> Self {
        let (lanes, calls) = (AtomicUsize::new(1), Arc::new(Semaphore::new(CALLS_MAX)));
        Cluster { name, settings, health, lanes, shared: Mutex::new(None), calls }
    }

    /// How many streams there are now. A producer that is there keeps its room: a full one makes its streams wait.
    pub fn set_lanes(&self, lanes: usize) {
        self.lanes.store(lanes, Ordering::Relaxed);
    }

    /// The producer all streams share, made anew when the last one was retired. Making one starts threads and reads
    /// certificate files, some milliseconds, once.
    pub fn shared(&self) -> Result<Arc<Session>, KafkaError> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        // The other lanes see it end and come for the next.
        if let Some(outdated) = shared.take_if(|session| self.is_outdated(session)) {
            outdated.context().give_up();
        }
        if let Some(session) = shared.as_ref().filter(|session| !session.is_fatal()) {
            return Ok(session.clone());
        }
        let session = Arc::new(self.open(Purpose::Shared)?);
        *shared = Some(session.clone());
        Ok(session)
    }

    /// The brokers turn it away, and what it showed them has been replaced since. One that is let in is left alone.
    fn is_outdated(&self, session: &Session) -> bool {
        self.health.refusal().is_some() && session.presented != Presented::now(&self.settings)
    }

    /// A producer of one lane's own, to try records one by one without drawing the others in.
    pub fn single(&self) -> Result<Arc<Session>, KafkaError> {
        self.open(Purpose::Single).map(Arc::new)
    }

    fn open(&self, purpose: Purpose) -> Result<Session, KafkaError> {
        let lanes = self.lanes.load(Ordering::Relaxed);
        Session::open(&self.settings, lanes, purpose, self.health.clone()).map_err(|error| {
            KafkaError::Settings { cluster: self.name.clone(), problem: error.to_string() }
        })
    }

    /// No one gets `session` any more; the other lanes see it end and come for the next.
    pub fn retire(&self, session: &Arc<Session>) {
        session.context().give_up();
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.take_if(|current| Arc::ptr_eq(current, session));
    }

    /// Asks the cluster for a topic; for whoever waits for it to come back.
    ///
    /// librdkafka (2.12) takes a last broker that stops in order at its word: it says that there are no brokers, and whoever
    /// asked just then may be left with nobody to connect to, for good. So a producer that is still deaf when a client of
    /// this moment is answered is replaced.
    pub async fn probe(self: &Arc<Self>, topic: String) -> Result<(), KafkaError> {
        let cluster = self.clone();
        self.blocking(ASK, self.settings.operation_timeout * 4, move || {
            let session = cluster.shared()?;
            match cluster.ask_through(&session, &topic) {
                Err(error) if error.is_unreachable() => {
                    cluster.ask(topics::admin(&cluster)?.inner(), &topic).map_err(|_| error)?;
                }
                answer => return answer,
            }
            if cluster.ask_through(&session, &topic).is_err() {
                tracing::warn!(event = "kafka_producer_deaf", cluster = %cluster.name,
                    "the brokers answer, but not this producer: another takes its place");
                cluster.retire(&session);
            }
            Ok(())
        })
        .await
    }

    fn ask_through(&self, session: &Session, topic: &str) -> Result<(), KafkaError> {
        let limit = self.settings.operation_timeout;
        let _ = limit;
        fail::fail_point!("kafka_deaf", |_| Err(KafkaError::TimedOut { doing: ASK, limit }));
        self.ask(session.producer().client(), topic)
    }

    fn ask(&self, client: &Client<impl ClientContext>, topic: &str) -> Result<(), KafkaError> {
        let answer = client.fetch_metadata(Some(topic), self.settings.operation_timeout);
        answer.map(drop).map_err(|error| KafkaError::of(ASK, topic, &error))
    }

    /// Runs a blocking call of librdkafka away from the part's thread, once it is its turn. The call has its own time
    /// limit; `limit` is for one that ignores it.
    pub async fn blocking<T: Send + 'static>(
        &self,
        doing: &'static str,
        limit: Duration,
        call: impl FnOnce() -> Result<T, KafkaError> + Send + 'static,
    ) -> Result<T, KafkaError> {
        // Nobody closes it; without a permit the call would only be one more.
        let turn = self.calls.clone().acquire_owned().await;
        let call = move || {
            let _turn = turn;
            call()
        };
        match tokio::time::timeout(limit, tokio::task::spawn_blocking(call)).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(KafkaError::TimedOut { doing, limit }),
        }
    }
}
