//! A copy of each dead letter, of whatever stream and sink, in a topic of its own. The letters wait in the state store,
//! so that no sink waits for a copy and no restart forgets one; a letter whose copy was confirmed right before a crash
//! is copied again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use rdkafka::message::{Header, OwnedHeaders};
use tokio::sync::watch;
use tokio::time::timeout;

use super::error::KafkaError;
use super::outbox::{RECORD_OVERHEAD_BYTES, TELEMETRY_ID_HEADER};
use super::reports::opaque;
use super::session::{Cluster, Outgoing, Session};
use super::topics;
use crate::buffer::{BufferError, State};
use crate::config::{DeadLetterTopic, KafkaSinkSettings};
use crate::crash::part_point;
use crate::domain::{
    DeadLetter, DeadLetterKey, ErrorClass, LogIdentity, Runbook, Sequence, SinkName, TelemetryId,
};
use crate::part::{Control, Phase};
use crate::retry::Backoff;

/// Copies on their way at a time.
const BATCH_LETTERS: usize = 100;
const BATCH_BYTES: usize = 1 << 20;
/// Without a new letter for so long the connection is given up.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Room for the headers of a copy whose payload has to be cut.
const HEADERS_BYTES: usize = 4 << 10;

/// What the copier of one cluster is made from.
pub(super) struct CopierParts {
    /// The number under which reports of its producer come.
    pub lane: usize,
    pub cluster: Arc<Cluster>,
    pub topic: DeadLetterTopic,
    pub state: State,
    pub log: LogIdentity,
    pub control: Control,
}

/// Copies what waits, over a producer of its own, so that trouble with a copy disturbs no stream.
pub(super) struct Copier {
    parts: CopierParts,
    sink: KafkaSinkSettings,
    backoff: Backoff,
    session: Option<Arc<Session>>,
    /// Largest record the topic takes; `None` until the topic was found.
    record_bytes_max: Option<usize>,
    /// A letter of the last batch was refused for its own sake: one at a time shows which.
    single: bool,
    /// Told in the log already.
    trouble: Option<String>,
}

impl Copier {
    pub fn new(parts: CopierParts) -> Self {
        let sink = sink_settings(&parts.cluster.name, &parts.topic);
        Copier {
            sink,
            backoff: Backoff::new(parts.cluster.settings.retry),
            session: None,
            record_bytes_max: None,
            single: false,
            trouble: None,
            parts,
        }
    }

    /// Until the sinks are told to drain: what is not copied then is copied after the next start. An error means the buffer has failed.
    pub async fn run(mut self) -> Result<(), KafkaError> {
        let mut control = self.parts.control.clone();
        tokio::select! {
            result = self.work() => result,
            () = ended(&mut control) => Ok(()),
        }
    }

    async fn work(&mut self) -> Result<(), KafkaError> {
        let mut kept = self.parts.state.dead_letters_kept();
        loop {
            if self.parts.control.paused() {
                self.parts.control.changed().await;
                continue;
            }
            if let Some(rest) = self.parts.cluster.health.breaker().rest() {
                self.parts.control.sleep(rest).await;
                continue;
            }
            kept.borrow_and_update();
            let limit = if self.single { 1 } else { BATCH_LETTERS };
            let name = &self.parts.cluster.name;
            let letters = self.parts.state.dead_letters_to_copy(name, limit, BATCH_BYTES).await?;
            match letters.is_empty() {
                true => self.idle(&mut kept).await,
                false => self.attempt(&letters).await?,
            }
        }
    }

    async fn idle(&mut self, kept: &mut watch::Receiver<()>) {
        self.single = false;
        let changed = tokio::select! {
            changed = timeout(IDLE_LIMIT, kept.changed()) => changed.is_ok(),
            () = self.parts.control.changed() => true,
        };
        if !changed {
            self.session = None;
        }
    }

    async fn attempt(&mut self, letters: &[DeadLetter]) -> Result<(), BufferError> {
        let copied = self.copy(letters).await;
        // What follows is a wait of our own choice.
        self.parts.control.progress.set_work_waiting(false);
        match copied {
            Ok(()) => {
                self.settled(letters).await?;
                self.recovered();
            }
            Err(error) if error.class() == ErrorClass::Data => {
                self.session = None;
                if letters.len() == 1 {
                    let letter = &letters[0].key;
                    tracing::warn!(event = "dead_letter_not_copied", cluster = %self.parts.cluster.name,
                        %letter, %error, "this letter is not copied; the letter itself stays");
                    self.settled(letters).await?;
                }
                self.single = letters.len() > 1;
            }
            Err(error) => {
                self.session = None;
                self.record_bytes_max = None;
                self.tell(&error);
                let pause = self.backoff.next_pause();
                self.parts.control.sleep(pause).await;
            }
        }
        Ok(())
    }

    async fn settled(&self, letters: &[DeadLetter]) -> Result<(), BufferError> {
        let keys: Vec<DeadLetterKey> = letters.iter().map(|letter| letter.key.clone()).collect();
        self.parts.state.dead_letters_copied(&self.parts.cluster.name, keys).await
    }

    /// An outage is told by the cluster's own line; what a person has to mend is told here, once.
    fn tell(&mut self, error: &KafkaError) {
        let text = error.to_string();
        if self.trouble.as_ref() == Some(&text) {
            return;
        }
        let (cluster, topic) = (&self.parts.cluster.name, &self.sink.topic);
        if error.class() == ErrorClass::Standing {
            tracing::error!(event = "dead_letter_copies_held", runbook = Runbook::DeadLettersGrowing.page(),
                %cluster, topic, error = text, "dead letters are kept and wait to be copied");
        } else {
            tracing::debug!(event = "dead_letter_copies_wait", %cluster, topic, error = text);
        }
        self.trouble = Some(text);
    }

    fn recovered(&mut self) {
        self.backoff.reset();
        self.parts.cluster.health.reached();
        if self.trouble.take().is_some() {
            let cluster = &self.parts.cluster.name;
            tracing::info!(event = "dead_letters_copied", %cluster, topic = self.sink.topic, "copying again");
        }
    }

    /// Every one of them is confirmed, or it is an error.
    async fn copy(&mut self, letters: &[DeadLetter]) -> Result<(), KafkaError> {
        const DOING: &str = "copy dead letters";
        let cluster = &self.parts.cluster;
        let session = match self.session.take().filter(|session| !session.is_fatal()) {
            Some(session) => session,
            None => cluster.single()?,
        };
        let record_bytes_max = match self.record_bytes_max {
            Some(known) => known,
            None => {
                let facts = tokio::select! {
                    facts = topics::prepare(cluster, &session, &self.sink) => facts?,
                    refusal = cluster.health.refused() => return Err(refusal),
                };
                let configured = cluster.settings.message_bytes_max;
                facts.message_bytes_max.map_or(configured, |limit| limit.min(configured))
            }
        };
        self.record_bytes_max = Some(record_bytes_max);
        self.parts.control.progress.set_work_waiting(true);
        part_point(|| format!("part_copies_{}", cluster.name)).await;
        let reports = session.reports(self.parts.lane);
        reports.window().begin(Sequence::ZERO);
        for letter in letters {
            let place = reports.window().push(letter.arrival);
            let copy = catch_unwind(AssertUnwindSafe(|| {
                CopyText::of(letter, self.parts.log, record_bytes_max)
            }));
            let copy = copy.map_err(|_| KafkaError::Panicked { doing: DOING })?;
            let record = copy.record(&self.sink.topic, opaque(self.parts.lane, place));
            session.producer().send(record).map_err(|(error, _)| {
                session.explain(KafkaError::of(DOING, &self.sink.topic, &error))
            })?;
        }
        let limit = cluster.settings.message_timeout;
        let progress = &self.parts.control.progress;
        progress
            .waiting(timeout(limit, reports.all_reported()))
            .await
            .map_err(|_| KafkaError::TimedOut { doing: DOING, limit })?;
        if let Some(failure) = reports.window().failure() {
            let (topic, code) = (self.sink.topic.clone(), failure.code);
            return Err(session.explain(KafkaError::Refused { doing: DOING, topic, code }));
        }
        self.session = Some(session);
        Ok(())
    }
}

async fn ended(control: &mut Control) {
    while control.phase() == Phase::Running {
        control.changed().await;
    }
}

/// The topic as [`topics::prepare`] wants it.
pub(super) fn sink_settings(cluster: &str, topic: &DeadLetterTopic) -> KafkaSinkSettings {
    KafkaSinkSettings {
        sink: SinkName::parse("dead_letters").expect("a fixed name"),
        cluster: cluster.to_owned(),
        topic: topic.topic.clone(),
        raw_root: false,
        ensure: topic.ensure.clone(),
    }
}

/// One copy: the payload as value, everything else as text.
struct CopyText<'a> {
    letter: &'a DeadLetter,
    key: String,
    headers: Vec<(&'static str, String)>,
    payload: &'a [u8],
}

impl<'a> CopyText<'a> {
    fn of(letter: &'a DeadLetter, log: LogIdentity, record_bytes_max: usize) -> Self {
        fail::fail_point!(&format!("map_copy_{}", letter.topic));
        let DeadLetterKey { sink, stream, sequence } = &letter.key;
        let id = TelemetryId { log, stream, sequence: *sequence };
        let time = |micros| jiff::Timestamp::from_microsecond(micros).map(|at| format!("{at:.6}"));
        let mut headers = vec![
            (TELEMETRY_ID_HEADER, id.to_string()),
            ("telemetry-stream", stream.to_string()),
            ("telemetry-sink", sink.to_string()),
            ("telemetry-sequence", sequence.to_string()),
            ("telemetry-reason", letter.reason.code().to_owned()),
            ("telemetry-stage", letter.stage.code().to_owned()),
            ("telemetry-arrival", time(letter.arrival.as_micros()).unwrap_or_default()),
            ("telemetry-topic", letter.topic.clone()),
            ("telemetry-detail", letter.detail.clone()),
        ];
        headers.extend(letter.sqlstate.clone().map(|code| ("telemetry-sqlstate", code)));
        headers.extend(letter.column.clone().map(|column| ("telemetry-column", column)));
        let key = letter.key.to_string();
        let overhead = RECORD_OVERHEAD_BYTES + HEADERS_BYTES + key.len() + letter.topic.len();
        let room = record_bytes_max.saturating_sub(overhead);
        let payload = &letter.payload[..letter.payload.len().min(room)];
        if payload.len() < letter.payload.len() {
            headers.push(("telemetry-payload-bytes", letter.payload.len().to_string()));
        }
        CopyText { letter, key, headers, payload }
    }

    fn record<'r>(&'r self, topic: &'r str, opaque: usize) -> Outgoing<'r> {
        let headers = OwnedHeaders::new_with_capacity(self.headers.len());
        let headers = self.headers.iter().fold(headers, |headers, (key, value)| {
            headers.insert(Header { key, value: Some(value.as_bytes()) })
        });
        // The topic's retention counts from when the letter was set aside.
        Outgoing::with_opaque_to(topic, opaque)
            .key(self.key.as_bytes())
            .payload(self.payload)
            .timestamp(self.letter.dead_at.as_micros().div_euclid(1000))
            .headers(headers)
    }
}
