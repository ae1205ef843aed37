//! Where delivery reports meet the stream they belong to: librdkafka's thread writes, the stream's lane reads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode as Code};
use rdkafka::producer::{DeliveryResult, ProducerContext};
use tokio::sync::Notify;

use super::error::Access;
use super::health::{ClusterHealth, Lacks};
use super::window::{Fate, Window};
use crate::crash::crash_point;
use crate::domain::Sequence;

/// Bits of the delivery opaque that hold the sequence; the lane's number is above them.
const SEQUENCE_BITS: u32 = 48;
const SEQUENCE_MASK: u64 = (1 << SEQUENCE_BITS) - 1;
/// Lanes one producer can tell apart, those that have ended included; a slot takes 16 bytes.
pub(super) const LANES_MAX: usize = 4096;
const _: () = assert!(LANES_MAX <= 1 << (usize::BITS - SEQUENCE_BITS));

/// Lane and sequence in one integer: a boxed opaque would cost an allocation per record.
pub(super) fn opaque(lane: usize, sequence: Sequence) -> usize {
    ((lane as u64) << SEQUENCE_BITS | sequence.0 & SEQUENCE_MASK) as usize
}

fn from_opaque(opaque: usize) -> (usize, Sequence) {
    let bits = opaque as u64;
    ((bits >> SEQUENCE_BITS) as usize, Sequence(bits & SEQUENCE_MASK))
}

/// One lane's side of one producer. A fresh producer has fresh ones, so a late report of an old one reaches nobody.
#[derive(Debug, Default)]
pub(super) struct Reports {
    window: Mutex<Window>,
    /// Set by the first report after [`Reports::take_news`]: one wake-up per look, not per record.
    news: AtomicBool,
    wake: Notify,
}

impl Reports {
    pub fn window(&self) -> MutexGuard<'_, Window> {
        // A panic between two assignments of a counter is none we know of; the lane's age watch would end it.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self) {
        if !self.news.swap(true, Ordering::AcqRel) {
            self.wake.notify_one();
        }
    }

    /// Call before looking at the window.
    pub fn take_news(&self) {
        self.news.store(false, Ordering::Release);
    }

    /// Something was reported since [`Reports::take_news`].
    pub fn has_news(&self) -> bool {
        self.news.load(Ordering::Acquire)
    }

    pub async fn changed(&self) {
        self.wake.notified().await;
    }

    /// Returns once nothing in the window waits for a report.
    pub async fn all_reported(&self) {
        loop {
            self.take_news();
            if self.window().pending() == 0 {
                return;
            }
            self.changed().await;
        }
    }
}

/// librdkafka's callbacks of one producer. A panic in one would end its polling thread without a word, so none
/// leaves.
pub(super) struct Context {
    /// Made when a lane first asks for its own; read for each report, so without a lock.
    reports: Box<[OnceLock<Arc<Reports>>]>,
    health: Arc<ClusterHealth>,
    lacks: Lacks,
    fatal: AtomicBool,
    last_report: Mutex<Instant>,
}

impl Context {
    pub fn new(health: Arc<ClusterHealth>, lacks: Lacks) -> Self {
        let last_report = Mutex::new(Instant::now());
        let reports = (0..LANES_MAX).map(|_| OnceLock::new()).collect();
        Context { reports, health, lacks, fatal: AtomicBool::new(false), last_report }
    }

    /// Of the lane with this number, which is below [`LANES_MAX`].
    pub fn reports(&self, lane: usize) -> Arc<Reports> {
        self.reports[lane].get_or_init(Arc::default).clone()
    }

    /// The producer will deliver nothing any more.
    pub fn is_fatal(&self) -> bool {
        self.fatal.load(Ordering::Acquire)
    }

    /// When any lane's record was last reported.
    pub fn last_report(&self) -> Instant {
        *self.last_report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, outcome: Result<(), Code>, opaque: usize) {
        let (lane, sequence) = from_opaque(opaque);
        let Some(reports) = self.reports.get(lane).and_then(OnceLock::get) else { return };
        crash_point("crash_report");
        match outcome {
            Ok(()) => reports.window().settled(sequence, Fate::Delivered),
            Err(code) => {
                if matches!(code, Code::Fatal | Code::GaplessGuarantee) {
                    self.set_fatal();
                }
                reports.window().failed(sequence, code);
            }
        }
        if !reports.news.load(Ordering::Acquire) {
            // Once per look of the lane is often enough for a clock that measures seconds.
            *self.last_report.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            reports.announce();
        }
    }

    fn trouble(&self, code: Code, reason: &str) {
        if let Some(access) = Access::of(code, reason) {
            return self.health.turned_away(access, reason);
        }
        match code {
            Code::Fatal | Code::GaplessGuarantee => self.set_fatal(),
            Code::AllBrokersDown => self.health.all_brokers_down(reason),
            Code::Resolve | Code::BrokerTransportFailure | Code::Authentication | Code::SSL => {
                self.health.broker_failed(reason);
            }
            _ => tracing::debug!(target: "librdkafka", %code, reason),
        }
    }

    /// Whoever waits for a report of this producer waits in vain from now on.
    pub fn give_up(&self) {
        self.set_fatal();
    }

    fn set_fatal(&self) {
        self.fatal.store(true, Ordering::Release);
        for reports in self.reports.iter().filter_map(OnceLock::get) {
            reports.announce();
        }
    }
}

/// Runs what a callback does. False when it panicked: its polling thread lives on.
fn guarded(callback: &'static str, body: impl FnOnce()) -> bool {
    let whole = catch_unwind(AssertUnwindSafe(body)).is_ok();
    if !whole {
        tracing::error!(
            event = "kafka_callback_panicked",
            callback,
            "what the library told was lost; for a delivery its stream sends again from its cursor"
        );
    }
    whole
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        let outcome = match result {
            Ok(_) => Ok(()),
            Err((error, _)) => Err(error.rdkafka_error_code().unwrap_or(Code::Unknown)),
        };
        let report = || {
            fail::fail_point!("callback_delivery");
            self.report(outcome, opaque);
        };
        if !guarded("delivery", report) {
            self.fatal.store(true, Ordering::Release);
        }
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        guarded("log", || {
            fail::fail_point!("callback_log");
            self.health.library_log(level, facility, text);
            if let Some(setting) = self.lacks.blamed(text) {
                self.health.suspect(setting);
            }
        });
    }

    fn error(&self, error: ClientError, reason: &str) {
        guarded("error", || {
            fail::fail_point!("callback_error");
            self.trouble(error.rdkafka_error_code().unwrap_or(Code::Unknown), reason);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lane_and_sequence_survive_the_opaque() {
        for (lane, sequence) in [(0, 0), (0, 1), (3, 77), (LANES_MAX - 1, SEQUENCE_MASK)] {
            assert_eq!(from_opaque(opaque(lane, Sequence(sequence))), (lane, Sequence(sequence)));
        }
    }

    #[test]
    fn a_connection_lost_while_logging_in_is_why_the_brokers_are_down() {
        let context = Context::new(Arc::new(ClusterHealth::detached("test")), Lacks::default());
        let reason = "SASL PLAIN mechanism handshake failed: Local: Broker transport failure: broker's supported mechanisms: (n/a)";
        context.trouble(Code::Authentication, reason);
        context.trouble(Code::AllBrokersDown, "1/1 brokers are down");
        assert!(context.health.refusal().is_none());
        assert!(context.health.trouble().contains("handshake failed"));
    }

    #[test]
    fn a_report_for_no_lane_is_ignored_and_a_fatal_one_wakes_every_lane() {
        let context = Context::new(Arc::new(ClusterHealth::detached("test")), Lacks::default());
        let lanes: Vec<_> = (0..2).map(|lane| context.reports(lane)).collect();
        context.report(Ok(()), opaque(7, Sequence(1)));
        assert!(!context.is_fatal());
        context.report(Err(Code::GaplessGuarantee), opaque(0, Sequence(1)));
        assert!(context.is_fatal());
        assert!(lanes.iter().all(|lane| lane.news.load(Ordering::Acquire)));
    }
}
