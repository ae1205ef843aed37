//! Runs a simulation: every feed at its rate, every answer into the ledger and the totals.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::SimulateError;
use super::faults::FaultRates;
use super::generator::{Generator, Message};
use super::kind::Kind;
use super::ledger::{Ledger, payload_hash};
use super::publisher::{Answer, Link, Publication, Publisher, Ticket};
use crate::config::BrokerSettings;

/// For the last PUBACKs, after the last message was sent.
const LAST_ANSWERS_WAIT: Duration = Duration::from_secs(10);
/// A feed this far behind its schedule does not try to catch up.
const LAG_MAX: Duration = Duration::from_secs(1);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// One stream to feed.
#[derive(Debug, Clone)]
pub struct Feed {
    pub stream: String,
    pub kind: Kind,
    /// Index into [`Order::brokers`].
    pub broker: usize,
    pub topic_filter: String,
    /// Messages per second, all devices together.
    pub rate: f64,
}

/// What to simulate.
#[derive(Debug, Clone)]
pub struct Order {
    pub brokers: Vec<BrokerSettings>,
    pub feeds: Vec<Feed>,
    pub seed: u64,
    pub devices: usize,
    pub faults: FaultRates,
    /// None = until told to stop.
    pub duration: Option<Duration>,
    /// Publications per stream; none = no bound.
    pub count: Option<u64>,
    pub ledger: Option<PathBuf>,
}

/// The books of one stream.
#[derive(Debug, Clone, Default, Serialize, PartialEq, Eq)]
pub struct StreamTotals {
    pub published: u64,
    pub acknowledged: u64,
    /// By the broker, with a reason (MQTT 5).
    pub refused: u64,
    /// On its way when a connection ended: the broker may have it or not.
    pub unconfirmed: u64,
    /// By name of the fault; a gap is not published.
    pub faults: BTreeMap<&'static str, u64>,
}

/// The books of a run, by stream in the order of the feeds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Totals {
    pub streams: Vec<(String, StreamTotals)>,
    pub seconds: f64,
    /// The last problem of a connection, while it lasts.
    pub problem: Option<String>,
}

impl Totals {
    /// All streams together.
    pub fn acknowledged(&self) -> u64 {
        self.streams.iter().map(|(_, totals)| totals.acknowledged).sum()
    }
}

/// What a feed reports to the one who keeps the books.
enum Report {
    Published { feed: usize, fault: Option<&'static str> },
    Gap { feed: usize },
}

/// Simulates until the order is carried out or `stop` becomes true. `progress` is called twice a second.
///
/// # Errors
/// A ledger that cannot be written, TLS files that cannot be used, or brokers that never acknowledged anything.
pub async fn run(
    order: Order,
    mut stop: watch::Receiver<bool>,
    mut progress: impl FnMut(&Totals),
) -> Result<Totals, SimulateError> {
    let (answer_sender, answers) = mpsc::unbounded_channel();
    let (report_sender, reports) = mpsc::channel(1024);
    let (end_sender, end) = watch::channel(false);
    let publishers = publishers(&order, answer_sender)?;
    let mut books = Books::new(&order, &publishers, answers, reports)?;
    let mut feeds = JoinSet::new();
    for (index, feed) in order.feeds.iter().enumerate() {
        let generator =
            Generator::new(feed.kind, &feed.topic_filter, order.devices, order.faults, order.seed);
        let task = FeedTask {
            index,
            generator,
            publisher: publishers[feed.broker].clone(),
            reports: report_sender.clone(),
            rate: feed.rate,
            count: order.count,
        };
        feeds.spawn(task.run(end.clone()));
    }
    drop(report_sender);
    let deadline = order.duration.map(|duration| Instant::now() + duration);
    let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
    loop {
        tokio::select! {
            () = at(deadline) => break,
            _ = stop.wait_for(|stop| *stop) => break,
            more = books.take() => if !more? { break },
            _ = tick.tick() => progress(books.totals()),
        }
    }
    end_sender.send_replace(true);
    while feeds.join_next().await.is_some() {}
    books.take_last().await?;
    progress(books.totals());
    books.close()
}

fn publishers(
    order: &Order,
    answers: mpsc::UnboundedSender<Answer>,
) -> Result<Vec<Arc<Publisher>>, SimulateError> {
    let mut publishers = Vec::new();
    for (index, broker) in order.brokers.iter().enumerate() {
        let client_id = format!("telemetry-simulate-{}-{index}", std::process::id());
        publishers.push(Arc::new(Publisher::start(broker, &client_id, answers.clone())?));
    }
    Ok(publishers)
}

/// A moment that never comes when there is none.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Publishes the messages of one stream on schedule.
struct FeedTask {
    index: usize,
    generator: Generator,
    publisher: Arc<Publisher>,
    reports: mpsc::Sender<Report>,
    rate: f64,
    count: Option<u64>,
}

impl FeedTask {
    async fn run(mut self, mut end: watch::Receiver<bool>) {
        tokio::select! {
            _ = end.wait_for(|end| *end) => {}
            () = self.feed() => {}
        }
    }

    async fn feed(&mut self) {
        let interval = Duration::from_secs_f64(1.0 / self.rate);
        let mut due = Instant::now();
        let mut id = 0;
        loop {
            tokio::time::sleep_until(due).await;
            due = (due + interval).max(Instant::now() - LAG_MAX);
            let messages = self.generator.next(Timestamp::now());
            if messages.is_empty() && !self.report(Report::Gap { feed: self.index }).await {
                return;
            }
            for message in messages {
                id += 1;
                if !self.publish(id, message).await || self.count.is_some_and(|count| id >= count) {
                    return;
                }
            }
        }
    }

    async fn publish(&self, id: u64, message: Message) -> bool {
        let sha256 = payload_hash(&message.payload);
        let publication = Publication { feed: self.index, topic: message.topic, id, sha256 };
        // The place in the books first: a publication that is cut off here is neither booked nor sent.
        let Ok(place) = self.reports.reserve().await else {
            return false;
        };
        let published = self.publisher.publish(publication, message.payload).await;
        if published {
            let fault = message.fault.map(super::Fault::name);
            place.send(Report::Published { feed: self.index, fault });
        }
        published
    }

    async fn report(&self, report: Report) -> bool {
        self.reports.send(report).await.is_ok()
    }
}

/// Keeps totals and ledger.
struct Books {
    totals: Totals,
    ledger: Option<Ledger>,
    answers: mpsc::UnboundedReceiver<Answer>,
    reports: mpsc::Receiver<Report>,
    publishers: Vec<Arc<Publisher>>,
    started: Instant,
}

impl Books {
    fn new(
        order: &Order,
        publishers: &[Arc<Publisher>],
        answers: mpsc::UnboundedReceiver<Answer>,
        reports: mpsc::Receiver<Report>,
    ) -> Result<Self, SimulateError> {
        let streams =
            order.feeds.iter().map(|feed| (feed.stream.clone(), StreamTotals::default())).collect();
        let ledger = order.ledger.as_deref().map(Ledger::create).transpose()?;
        Ok(Books {
            totals: Totals { streams, ..Totals::default() },
            ledger,
            answers,
            reports,
            publishers: publishers.to_vec(),
            started: Instant::now(),
        })
    }

    fn totals(&mut self) -> &Totals {
        self.totals.seconds = self.started.elapsed().as_secs_f64();
        self.totals.problem = self.problem();
        &self.totals
    }

    fn problem(&self) -> Option<String> {
        self.publishers.iter().find_map(|publisher| match &*publisher.link.borrow() {
            Link::Down(problem) => Some(problem.clone()),
            Link::Connecting | Link::Up => None,
        })
    }

    /// Takes one report or answer; `false` when every feed has ended.
    async fn take(&mut self) -> Result<bool, SimulateError> {
        tokio::select! {
            report = self.reports.recv() => match report {
                Some(report) => {
                    self.book(report);
                    Ok(true)
                }
                None => Ok(false),
            },
            Some(answer) = self.answers.recv() => self.settle(answer).map(|()| true),
        }
    }

    fn book(&mut self, report: Report) {
        let (feed, fault) = match report {
            Report::Gap { feed } => (feed, Some(super::Fault::Gap.name())),
            Report::Published { feed, fault } => {
                self.totals.streams[feed].1.published += 1;
                (feed, fault)
            }
        };
        if let Some(fault) = fault {
            *self.totals.streams[feed].1.faults.entry(fault).or_default() += 1;
        }
    }

    fn settle(&mut self, answer: Answer) -> Result<(), SimulateError> {
        match answer {
            Answer::Acknowledged(ticket) => {
                let Ticket { publication, .. } = &ticket;
                let (stream, totals) = &mut self.totals.streams[publication.feed];
                totals.acknowledged += 1;
                if let Some(ledger) = &mut self.ledger {
                    let Publication { topic, id, sha256, .. } = publication;
                    ledger.write(stream, topic, *id, sha256)?;
                }
            }
            Answer::Refused(ticket, reason) => {
                let feed = ticket.publication.feed;
                self.totals.streams[feed].1.refused += 1;
                tracing::debug!(event = "publication_refused", feed, reason);
            }
            Answer::Unconfirmed(ticket) => {
                self.totals.streams[ticket.publication.feed].1.unconfirmed += 1;
            }
        }
        Ok(())
    }

    /// Waits, within a bound, until every publication has its answer.
    async fn take_last(&mut self) -> Result<(), SimulateError> {
        while let Ok(report) = self.reports.try_recv() {
            self.book(report);
        }
        let deadline = Instant::now() + LAST_ANSWERS_WAIT;
        while self.publishers.iter().any(|publisher| publisher.open_count() > 0) {
            match tokio::time::timeout_at(deadline, self.answers.recv()).await {
                Ok(Some(answer)) => self.settle(answer)?,
                Ok(None) | Err(_) => break,
            }
        }
        for (_, totals) in &mut self.totals.streams {
            let answered = totals.acknowledged + totals.refused;
            totals.unconfirmed = totals.published.saturating_sub(answered);
        }
        Ok(())
    }

    fn close(mut self) -> Result<Totals, SimulateError> {
        let totals = self.totals().clone();
        let refused: u64 = totals.streams.iter().map(|(_, totals)| totals.refused).sum();
        match &totals.problem {
            Some(problem) if totals.acknowledged() + refused == 0 => {
                Err(SimulateError::NothingAcknowledged { problem: problem.clone() })
            }
            _ => Ok(totals),
        }
    }
}
