//! Whether the cluster answers: one line in the log each way, and the dependency on the board.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::config::RDKafkaLogLevel;
use tokio::sync::{Notify, watch};

use super::error::{Access, KafkaError};
use crate::breaker::Breaker;
use crate::observe::{Board, DependencyView};

/// Facilities of librdkafka whose lines repeat what `dependency_lost` says, or comment on properties the node itself sets.
/// A producer that ended is renewed, one without an identity asks again.
const QUIET_FACILITIES: [&str; 8] =
    ["FAIL", "ERROR", "REQTMOUT", "CONNECT", "DISCONNECT", "CONFWARN", "FATAL", "GETPID"];
/// Distinct facilities remembered as already logged.
const FACILITIES_MAX: usize = 64;

/// librdkafka tells the same refusal again every 30 s or so while it keeps trying; one older than this is over.
const REFUSAL_HOLDS: Duration = Duration::from_secs(90);

/// The brokers are there and do not let the node in.
#[derive(Debug, Clone)]
struct Refusal {
    access: Access,
    why: String,
    at: Instant,
}

/// Shared by every producer of one cluster.
#[derive(Debug)]
pub(super) struct ClusterHealth {
    cluster: String,
    dependency: Arc<DependencyView>,
    down: AtomicBool,
    known: AtomicBool,
    logged: Mutex<BTreeSet<String>>,
    news: Notify,
    refusal: watch::Sender<Option<Refusal>>,
    /// What was told of a single broker last, until the cluster answers.
    broker_failure: Mutex<Option<String>>,
    /// Which of the cluster's settings its listener seems to want, until the cluster answers.
    missed: Mutex<Option<&'static str>>,
}

impl ClusterHealth {
    pub fn new(cluster: &str, board: &Board) -> Self {
        Self::with(cluster, board.dependency(&format!("kafka:{cluster}")))
    }

    /// For whoever has no board.
    pub fn detached(cluster: &str) -> Self {
        Self::with(cluster, Arc::new(DependencyView::new(cluster, Default::default())))
    }

    fn with(cluster: &str, dependency: Arc<DependencyView>) -> Self {
        ClusterHealth {
            cluster: cluster.to_owned(),
            dependency,
            down: AtomicBool::new(false),
            known: AtomicBool::new(false),
            logged: Mutex::default(),
            news: Notify::new(),
            refusal: watch::Sender::new(None),
            broker_failure: Mutex::default(),
            missed: Mutex::default(),
        }
    }

    pub fn is_down(&self) -> bool {
        self.down.load(Ordering::Acquire)
    }

    /// Cheap when it is no news: called once per batch.
    pub fn reached(&self) {
        if self.known.load(Ordering::Acquire) && !self.is_down() {
            return;
        }
        self.refusal.send_replace(None);
        self.down.store(false, Ordering::Release);
        self.known.store(true, Ordering::Release);
        self.dependency.breaker().succeeded();
        self.dependency.reachable();
        self.logged.lock().unwrap_or_else(PoisonError::into_inner).clear();
        *self.broker_failure() = None;
        *self.missed() = None;
    }

    fn missed(&self) -> MutexGuard<'_, Option<&'static str>> {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A listener seems to want this table of the cluster's. It does not once it has let the node in.
    pub fn suspect(&self, setting: &'static str) {
        if self.is_down() || !self.known.load(Ordering::Acquire) {
            *self.missed() = Some(setting);
        }
    }

    /// What to look at when brokers close the connection before anything was said; a question, for one that is about to
    /// stop does that too.
    pub fn question(&self) -> Option<String> {
        let (setting, cluster) = ((*self.missed())?, &self.cluster);
        Some(format!(
            "a broker closes the connection at once: does its listener want [clusters.{cluster}.{setting}]?"
        ))
    }

    fn broker_failure(&self) -> MutexGuard<'_, Option<String>> {
        self.broker_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One broker, with its address, and what keeps the node from it: a name without an address, a refused connection.
    pub fn broker_failed(&self, why: &str) {
        *self.broker_failure() = Some(why.to_owned());
    }

    /// The library counts brokers here; which one failed, and why, it told before.
    pub fn all_brokers_down(&self, count: &str) {
        let last = self.broker_failure().clone();
        self.lost(&last.map_or_else(|| count.to_owned(), |last| format!("{count}; {last}")));
    }

    pub fn lost(&self, why: &str) {
        let refusal = self.refusal().map(|refusal| refusal.to_string());
        let why = refusal.unwrap_or_else(|| match self.question() {
            Some(question) => format!("{why}; {question}"),
            None => why.to_owned(),
        });
        self.down.store(true, Ordering::Release);
        self.known.store(true, Ordering::Release);
        self.dependency.breaker().failed();
        self.dependency.unreachable(&why);
        self.news.notify_one();
    }

    /// The brokers refuse this node's login, or one side the other's certificate.
    pub fn turned_away(&self, access: Access, why: &str) {
        let refusal = Refusal { access, why: why.to_owned(), at: Instant::now() };
        self.refusal.send_replace(Some(refusal));
        self.lost(why);
    }

    /// Why the cluster lets nobody in, while that holds.
    pub fn refusal(&self) -> Option<KafkaError> {
        let refusal = self.refusal.borrow();
        let current = refusal.as_ref().filter(|refusal| refusal.at.elapsed() < REFUSAL_HOLDS)?;
        Some(self.error_of(current))
    }

    /// Pends until the cluster turns the node away once more.
    pub async fn refused(&self) -> KafkaError {
        let mut news = self.refusal.subscribe();
        loop {
            // The sender is ours: it cannot be gone.
            let _ = news.changed().await;
            if let Some(refusal) = news.borrow_and_update().as_ref() {
                return self.error_of(refusal);
            }
        }
    }

    fn error_of(&self, refusal: &Refusal) -> KafkaError {
        KafkaError::TurnedAway {
            cluster: self.cluster.clone(),
            access: refusal.access,
            why: refusal.why.clone(),
        }
    }

    /// Shared by the lanes, which rest while it is open, and the probe, which makes the trials: a lane with nothing on
    /// its way would never learn how its trial went.
    pub fn breaker(&self) -> &Arc<Breaker> {
        self.dependency.breaker()
    }

    /// Why it is down, or what else a stream waits for that has not delivered yet; for people.
    pub fn trouble(&self) -> String {
        let status = self.dependency.status();
        status.trouble.unwrap_or_else(|| match status.up {
            None => format!("cluster {:?} was not reached yet", self.cluster),
            Some(false) => "the cluster does not answer".to_owned(),
            Some(true) => "its topic is being looked up".to_owned(),
        })
    }

    /// Pends until the cluster may have become unreachable. A breaker that an earlier life of the producer left open says
    /// so too: without a trial nobody would ever close it.
    pub async fn maybe_lost(&self) {
        if !self.is_down() && self.breaker().rest().is_none() {
            self.news.notified().await;
        }
    }

    /// A line of the library: a warning once per kind until the cluster has answered anew, else for debugging.
    pub fn library_log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        let serious = (level as i32) <= (RDKafkaLogLevel::Warning as i32);
        if serious && !QUIET_FACILITIES.contains(&facility) && self.is_first(facility) {
            tracing::warn!(target: "librdkafka", event = "kafka_library", cluster = %self.cluster, facility, "{text}");
        } else {
            tracing::debug!(target: "librdkafka", cluster = %self.cluster, facility, "{text}");
        }
    }

    fn is_first(&self, facility: &str) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        logged.len() < FACILITIES_MAX && logged.insert(facility.to_owned())
    }
}

/// What a cluster's settings have not got of what a listener may want.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lacks {
    pub tls: bool,
    pub sasl: bool,
}

/// A connection that lives this long was not closed for want of a setting.
const CLOSED_AT_ONCE_MS: u64 = 2_000;

impl Lacks {
    /// Which of them is to blame for a connection's end, by the library's line about it: a listener for TLS does not
    /// understand the first question, one for logins answers that and hangs up at the second. The library means to guess
    /// the same, but compares its own words with a format string.
    pub fn blamed(self, text: &str) -> Option<&'static str> {
        let (_, end) = text.split_once("Disconnected: ")?.1.rsplit_once("(after ")?;
        let (lived_ms, state) = end.split_once("ms in state ")?;
        if lived_ms.parse::<u64>().ok()? > CLOSED_AT_ONCE_MS {
            return None;
        }
        match state {
            state if self.tls && state.starts_with("APIVERSION_QUERY") => Some("tls"),
            state if self.sasl && state.starts_with("UP") => Some("sasl"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dependency_follows_and_trouble_is_told() {
        let health = ClusterHealth::detached("main");
        assert_eq!(health.trouble(), "cluster \"main\" was not reached yet");
        health.lost("no route");
        assert!(health.is_down());
        assert_eq!(health.trouble(), "no route");
        assert_eq!(health.dependency.status().up, Some(false));
        health.reached();
        assert!(!health.is_down());
        assert_eq!(health.dependency.status().up, Some(true));
    }

    #[test]
    fn brokers_that_are_down_are_named_with_the_reason() {
        let health = ClusterHealth::detached("main");
        health.broker_failed("kafka.test:9092/bootstrap: Failed to resolve 'kafka.test:9092'");
        health.all_brokers_down("1/1 brokers are down");
        assert!(health.trouble().contains("Failed to resolve 'kafka.test"), "{}", health.trouble());
        health.reached();
        health.all_brokers_down("1/1 brokers are down");
        assert_eq!(health.trouble(), "1/1 brokers are down");
    }

    #[test]
    fn a_listener_that_hangs_up_at_once_may_want_a_setting_that_is_not_there() {
        let health = ClusterHealth::detached("main");
        let closed = |state| {
            format!(
                "kafka.test:9094/bootstrap: Disconnected: connection closed by peer: receive 0 (after {state})"
            )
        };
        let lacks = Lacks { tls: true, sasl: true };
        for (state, setting) in [
            ("4ms in state APIVERSION_QUERY, 1 identical error(s) suppressed", "tls"),
            ("90ms in state UP", "sasl"),
        ] {
            assert_eq!(Lacks::default().blamed(&closed(state)), None, "it is there");
            health.suspect(lacks.blamed(&closed(state)).unwrap());
            health.all_brokers_down("1/1 brokers are down");
            let trouble = health.trouble();
            assert!(trouble.contains(&format!("want [clusters.main.{setting}]?")), "{trouble}");
        }
        assert_eq!(lacks.blamed(&closed("3600000ms in state UP")), None, "it was let in");
        health.reached();
        health.suspect("tls");
        health.lost("1/1 brokers are down");
        assert_eq!(health.trouble(), "1/1 brokers are down", "it was let in before");
    }

    #[test]
    fn a_refusal_explains_silence_until_the_cluster_answers() {
        let health = ClusterHealth::detached("main");
        health.turned_away(Access::Login, "SASL authentication error");
        health.lost("1/1 brokers are down");
        for text in [health.trouble(), health.refusal().unwrap().to_string()] {
            assert!(text.contains("[clusters.main.sasl]"), "{text}");
        }
        health.reached();
        assert!(health.refusal().is_none());
    }

    #[test]
    fn a_kind_of_library_line_is_news_once() {
        let health = ClusterHealth::detached("main");
        assert!(health.is_first("PARTCNT"));
        assert!(!health.is_first("PARTCNT"));
        health.lost("x");
        health.reached();
        assert!(health.is_first("PARTCNT"));
    }
}
