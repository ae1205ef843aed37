//! One stretch of delivering over one producer: read, map, send, follow the reports, until something ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode as Code};
use tokio::sync::watch;

use super::error::KafkaError;
use super::ledger::Ledger;
use super::outbox::{Outbox, too_large};
use super::reports::{Reports, opaque};
use super::session::{Cluster, Session};
use super::window::Fate;
use crate::buffer::{Block, Chunk, Reader};
use crate::crash::part_point;
use crate::domain::{DeadLetter, Durable, Record, Sequence, SequenceRange};
use crate::mapping::Outcome;
use crate::observe::{EdgeMeter, SinkState};
use crate::part::{Control, Phase};
use crate::retry::Backoff;

/// Bytes of the log asked for at a time; the next such piece is read while this one is sent.
const CHUNK_BYTES: usize = 256 * 1024;
/// The reports, the phase and the age of what is unreported are looked at this often at least.
const TICK: Duration = Duration::from_millis(100);
/// librdkafka's queue is full: it empties by itself.
const QUEUE_FULL_PAUSE: Duration = Duration::from_millis(2);
/// A window that was full is filled again once this part of it is free: not a wake-up per record.
const ROOM_PART: usize = 8;
/// Nothing confirmed for this long shows as waiting.
const SHOW_WAITING_AFTER: Duration = Duration::from_secs(2);
/// A fatal producer returns what it held at once; this is for one that does not.
const FATAL_GRACE: Duration = Duration::from_secs(2);
/// When the node stops at once, what is on its way may still be confirmed for this long.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Where there is nothing to deliver, a producer is good when it has lived for so long: the brokers have let it have an
/// identity, which is where a missing right shows.
const EMPTY_TRIAL: Duration = Duration::from_secs(3);
/// Beyond this many times the message timeout a stream's silence counts even when others are served.
const STUCK_FACTOR: u32 = 10;

/// Why a stretch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The phase or a pause.
    Ended,
    /// A delivery failed or the producer is in its fatal state.
    Failed,
    /// librdkafka did not take this record at all.
    Refused(Sequence, Code),
    /// Nothing was reported for too long.
    Stuck,
    /// The log lost these records.
    Lost(SequenceRange),
    /// The records to be sent one by one are through.
    Single,
}

enum Interrupt {
    Stop(Stop),
    Error(KafkaError),
}

impl<E: Into<KafkaError>> From<E> for Interrupt {
    fn from(error: E) -> Self {
        Interrupt::Error(error.into())
    }
}

/// What a stretch works with.
pub(super) struct Delivery<'a> {
    pub session: &'a Arc<Session>,
    pub reports: Arc<Reports>,
    pub lane: usize,
    pub cluster: &'a Cluster,
    pub outbox: &'a mut Outbox,
    pub ledger: &'a mut Ledger,
    pub backoff: &'a mut Backoff,
    pub in_flight: &'a EdgeMeter,
    pub control: &'a mut Control,
    pub record_bytes_max: usize,
    pub single_until: Option<Sequence>,
    /// When the cursor last moved, or nothing was unreported.
    pub last_moved: Instant,
    /// Records that may be taken up before anybody looks how many are there.
    pub room_left: usize,
    /// The record whose way to its confirmation is timed at the moment.
    pub timed: Option<(Sequence, Instant)>,
    /// Shown since the cursor last moved.
    pub waiting_told: bool,
}

impl Delivery<'_> {
    /// From the cursor on. Whatever ended it, [`Delivery::settle_down`] comes next.
    pub async fn run(&mut self, reader: &mut Reader) -> Result<Stop, KafkaError> {
        self.reports.window().begin(self.ledger.cursor());
        match self.deliver(reader).await {
            Ok(stop) | Err(Interrupt::Stop(stop)) => Ok(stop),
            Err(Interrupt::Error(error)) => Err(error),
        }
    }

    async fn deliver(&mut self, reader: &mut Reader) -> Result<Stop, Interrupt> {
        let chunk_bytes = if self.single_until.is_some() { 1 } else { CHUNK_BYTES };
        let mut durable = reader.durable();
        let mut chunk = reader.read(self.ledger.cursor(), chunk_bytes).await?;
        let begun = Instant::now();
        loop {
            let pending = self.absorb()?;
            if self.single_until.is_some_and(|until| self.ledger.cursor() >= until) {
                return Ok(Stop::Single);
            }
            if self.ends(&chunk, pending) {
                return Ok(Stop::Ended);
            }
            match chunk.lost {
                Some(range) if pending == 0 => return Ok(Stop::Lost(range)),
                Some(_) => self.tick().await,
                None if chunk.blocks.is_empty() => {
                    durable.borrow_and_update();
                    let last = self.reports.window().last();
                    chunk = reader.read(last, chunk_bytes).await?;
                    if chunk.blocks.is_empty() && chunk.lost.is_none() {
                        let good = begun.elapsed() > EMPTY_TRIAL;
                        if good && self.single_until.is_some() && pending == 0 {
                            return Ok(Stop::Single);
                        }
                        self.idle(pending, good, &mut durable).await;
                    }
                }
                None => {
                    self.control.progress.set_work_waiting(true);
                    part_point(|| format!("part_kafka_{}", self.ledger.stream())).await;
                    let next = chunk.blocks.last().map_or(Sequence::ZERO, |b| b.range().last);
                    let (read, sent) =
                        tokio::join!(reader.read(next, chunk_bytes), self.send(&chunk.blocks));
                    sent?;
                    chunk = read?;
                }
            }
        }
    }

    /// The phase or a pause ends the stretch; a drain goes on until nothing is left.
    fn ends(&self, chunk: &Chunk, pending: usize) -> bool {
        let nothing_left = chunk.blocks.is_empty() && chunk.lost.is_none() && pending == 0;
        match self.control.phase() {
            Phase::Stopping => true,
            Phase::Draining { deadline } => {
                Instant::now() >= deadline || nothing_left || self.control.paused()
            }
            Phase::Running => self.control.paused(),
        }
    }

    /// `good`: what the lane was held for would have shown by now.
    async fn idle(&mut self, pending: usize, good: bool, durable: &mut watch::Receiver<Durable>) {
        self.control.progress.set_work_waiting(pending > 0);
        let up = !self.cluster.health.is_down() && self.single_until.is_none();
        if pending == 0 && up && (good || self.ledger.view().status().state != SinkState::Held) {
            self.ledger.show(SinkState::Delivering, None);
        }
        tokio::select! {
            _ = durable.changed() => {}
            () = self.reports.changed() => {}
            () = self.control.changed() => {}
            () = tokio::time::sleep(TICK) => {}
        }
    }

    async fn tick(&mut self) {
        tokio::select! {
            () = self.reports.changed() => {}
            () = self.control.changed() => {}
            () = tokio::time::sleep(TICK) => {}
        }
    }

    async fn send(&mut self, blocks: &[Block]) -> Result<(), Interrupt> {
        let mut letters = Vec::new();
        let sent = self.send_blocks(blocks, &mut letters).await;
        // Also after an interruption: a letter that is stored needs no second look.
        let stored = self.store(&mut letters).await;
        self.ledger.observed(self.outbox.observed());
        sent.and(stored)
    }

    async fn send_blocks(
        &mut self,
        blocks: &[Block],
        letters: &mut Vec<DeadLetter>,
    ) -> Result<(), Interrupt> {
        for block in blocks {
            let taken_up = self.reports.window().last();
            for record in block.records_after(taken_up) {
                self.room(letters).await?;
                if let Err(interrupt) = self.take_up(&record, letters).await {
                    self.reports.window().give_back_after(Sequence(record.sequence.0 - 1));
                    return Err(interrupt);
                }
            }
            if self.reports.has_news() {
                self.absorb()?;
            }
            // The other streams of this cluster share the thread.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Waits until one more record may be on its way. Only this lane's own doing makes or takes room, so that most
    /// records need no look at the window, which librdkafka's thread writes to.
    async fn room(&mut self, letters: &mut Vec<DeadLetter>) -> Result<(), Interrupt> {
        if let Some(left) = self.room_left.checked_sub(1) {
            self.room_left = left;
            return Ok(());
        }
        let limit = match self.single_until {
            Some(_) => 1,
            None => self.cluster.settings.in_flight_max.max(1),
        };
        let mut enough = 0;
        loop {
            // Unstored letters would hold the front of the window for ever.
            self.store(letters).await?;
            self.absorb()?;
            let room = limit.saturating_sub(self.reports.window().len());
            if room > enough {
                self.room_left = room - 1;
                return Ok(());
            }
            enough = limit / ROOM_PART;
            if self.control.paused() || self.has_to_stop() {
                return Err(Interrupt::Stop(Stop::Ended));
            }
            self.tick().await;
        }
    }

    fn has_to_stop(&self) -> bool {
        match self.control.phase() {
            Phase::Running => false,
            Phase::Stopping => true,
            Phase::Draining { deadline } => Instant::now() >= deadline,
        }
    }

    async fn take_up(
        &mut self,
        record: &Record<'_>,
        letters: &mut Vec<DeadLetter>,
    ) -> Result<(), Interrupt> {
        let sequence = self.reports.window().push(record.arrival);
        debug_assert_eq!(sequence, record.sequence, "the log is contiguous");
        let fault = match self.outbox.map(record)? {
            Outcome::Mapped(()) => {
                let bytes = self.outbox.wire_bytes();
                if bytes <= self.record_bytes_max && self.hand_over(record).await? {
                    return Ok(());
                }
                too_large(bytes, self.record_bytes_max)
            }
            Outcome::Filtered => {
                self.reports.window().settled(sequence, Fate::Filtered);
                return Ok(());
            }
            Outcome::Incomplete => {
                self.reports.window().settled(sequence, Fate::Incomplete);
                return Ok(());
            }
            Outcome::Dead(fault) => fault,
        };
        letters.push(fault.into_letter(self.ledger.stream(), self.ledger.sink(), record, None));
        Ok(())
    }

    /// Gives the record mapped last to librdkafka. False when it finds it too large.
    async fn hand_over(&mut self, record: &Record<'_>) -> Result<bool, Interrupt> {
        let opaque = opaque(self.lane, record.sequence);
        loop {
            let outgoing = self.outbox.outgoing(record.sequence, record.arrival, opaque);
            let code = match self.session.producer().send(outgoing) {
                Ok(()) => {
                    self.timed.get_or_insert_with(|| (record.sequence, Instant::now()));
                    return Ok(true);
                }
                Err((ClientError::MessageProduction(code), _)) => code,
                Err((error, _)) => error.rdkafka_error_code().unwrap_or(Code::InvalidArgument),
            };
            match code {
                Code::QueueFull => {
                    tokio::time::sleep(QUEUE_FULL_PAUSE).await;
                    self.absorb()?;
                    if self.has_to_stop() {
                        return Err(Interrupt::Stop(Stop::Ended));
                    }
                }
                Code::MessageSizeTooLarge => return Ok(false),
                Code::Fatal => {
                    self.session.context().give_up();
                    return Err(Interrupt::Stop(Stop::Failed));
                }
                code => return Err(Interrupt::Stop(Stop::Refused(record.sequence, code))),
            }
        }
    }

    /// Stores dead letters, then lets the cursor pass them.
    async fn store(&mut self, letters: &mut Vec<DeadLetter>) -> Result<(), Interrupt> {
        if letters.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(letters);
        let sequences: Vec<_> = batch.iter().map(|letter| letter.key.sequence).collect();
        let stored = self.ledger.set_aside(batch).await;
        let mut window = self.reports.window();
        for sequence in sequences {
            match &stored {
                Ok(()) => window.settled(sequence, Fate::DeadLettered),
                Err(_) => window.forget(sequence),
            }
        }
        drop(window);
        Ok(stored?)
    }

    /// Enters what was reported; answers how many are not yet. Interrupts when something is wrong with the producer
    /// or a record.
    fn absorb(&mut self) -> Result<usize, Interrupt> {
        let pending = self.settle();
        self.control.progress.beat();
        if self.reports.window().failure().is_some() || self.session.is_fatal() {
            return Err(Interrupt::Stop(Stop::Failed));
        }
        let moved = self.last_moved.elapsed();
        if pending > 0 && moved > SHOW_WAITING_AFTER {
            self.show_waiting(moved);
        }
        let silence = Silence {
            stream: moved,
            producer: self.session.context().last_report().elapsed(),
            cluster_is_down: self.cluster.health.is_down(),
        };
        match pending > 0 && silence.is_stuck(self.cluster.settings.message_timeout) {
            true => Err(Interrupt::Stop(Stop::Stuck)),
            false => Ok(pending),
        }
    }

    fn settle(&mut self) -> usize {
        self.reports.take_news();
        let mut window = self.reports.window();
        let passed = window.settle();
        let (pending, oldest) = (window.pending(), window.oldest_arrival());
        self.in_flight.set(window.len());
        drop(window);
        if pending == 0 || passed.records > 0 {
            self.last_moved = Instant::now();
            self.waiting_told = false;
        }
        self.ledger.enter(passed, oldest);
        let cursor = self.ledger.cursor();
        if let Some((_, begun)) = self.timed.take_if(|(sequence, _)| *sequence <= cursor) {
            self.ledger.view().meters.batch_duration.observe(begun.elapsed().as_secs_f64());
        }
        if passed.delivered > 0 {
            self.cluster.health.reached();
            self.backoff.reset();
            self.ledger.show(SinkState::Delivering, None);
        }
        pending
    }

    fn show_waiting(&mut self, since: Duration) {
        let trouble = match self.cluster.health.is_down() {
            true => self.cluster.health.trouble(),
            false => format!(
                "the cluster answers, but no delivery was confirmed for {} s: look at the topic's leaders and in-sync replicas",
                since.as_secs()
            ),
        };
        let oldest = self.reports.window().oldest_arrival();
        self.ledger.view().update(|status| status.oldest_pending = oldest);
        let state = match self.cluster.health.refusal() {
            Some(_) => SinkState::Held,
            None => SinkState::Waiting,
        };
        // The seconds alone are no news.
        let told = std::mem::replace(&mut self.waiting_told, true);
        if !told || self.ledger.view().status().state != state {
            self.ledger.show(state, Some(trouble));
        }
    }

    /// Waits for what is on its way, so that nothing is sent a second time that is about to be confirmed. Answers how
    /// many records remain without a report.
    pub async fn settle_down(&mut self, stuck: bool) -> usize {
        let begun = Instant::now();
        loop {
            let pending = self.settle();
            if pending == 0 || stuck || begun.elapsed() >= self.grace() {
                return pending;
            }
            self.control.progress.beat();
            tokio::select! {
                () = self.reports.changed() => {}
                () = tokio::time::sleep(TICK.min(self.grace())) => {}
            }
        }
    }

    fn grace(&self) -> Duration {
        let running = self.control.phase() == Phase::Running && !self.control.paused();
        match (running, self.session.is_fatal()) {
            (false, _) => STOP_GRACE,
            (true, true) => FATAL_GRACE,
            (true, false) => self.cluster.settings.message_timeout,
        }
    }
}

/// How long nothing has been heard.
struct Silence {
    /// The stream's cursor has not moved for this long, with records on their way.
    stream: Duration,
    /// No record of any stream was reported for this long.
    producer: Duration,
    cluster_is_down: bool,
}

impl Silence {
    /// A producer that reports nothing although its cluster answers has lost its thread or its reports: it is renewed.
    /// While the cluster is away it is left alone, and so it is when other streams are served and this one's leader
    /// may be missing; but not for ever.
    fn is_stuck(&self, message_timeout: Duration) -> bool {
        let unexplained = self.stream.min(self.producer) > message_timeout && !self.cluster_is_down;
        unexplained || self.stream > message_timeout * STUCK_FACTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_producer_is_renewed_and_an_absent_cluster_waited_for() {
        let s = Duration::from_secs;
        let silence = |stream, producer, cluster_is_down| Silence {
            stream: s(stream),
            producer: s(producer),
            cluster_is_down,
        };
        assert!(!silence(20, 20, false).is_stuck(s(30)));
        assert!(silence(31, 31, false).is_stuck(s(30)));
        assert!(!silence(31, 31, true).is_stuck(s(30)), "the cluster is away");
        assert!(!silence(31, 2, false).is_stuck(s(30)), "others are served");
        assert!(silence(301, 2, false).is_stuck(s(30)), "not for ever");
        assert!(silence(301, 301, true).is_stuck(s(30)), "not for ever");
    }
}
