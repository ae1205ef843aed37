//! A publishing MQTT connection. The only file of this folder that knows the client library.
//!
//! A publication is acknowledged when its PUBACK came without an error. When a connection ends, what was on its way is
//! *unconfirmed*: the broker may have it or not, and it is not sent again, so nothing is ever published twice by us.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rumqttc::v5::mqttbytes::v5::{Packet as PacketV5, PubAckReason};
use rumqttc::{Outgoing, Packet as PacketV4, TlsConfiguration, Transport, v5};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::config::{BrokerSettings, MqttVersion};
use crate::retry::Backoff;
use crate::tls;

/// Publications of one connection without an answer yet.
const WINDOW: u16 = 256;
/// Packet ids go round far above the window, so that one is free again before its turn comes.
const PACKET_IDS: u16 = 4096;
/// The library's shortest keep-alive, and ours.
const KEEPALIVE_SECONDS_MIN: u64 = 5;

/// What a caller wants to know again when the answer comes.
#[derive(Debug)]
pub(super) struct Publication {
    pub(super) feed: usize,
    pub(super) topic: String,
    pub(super) id: u64,
    pub(super) sha256: String,
}

/// A publication and its place in the window, given back when the answer was dealt with.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) publication: Publication,
    _place: OwnedSemaphorePermit,
}

/// What became of a publication.
#[derive(Debug)]
pub(super) enum Answer {
    Acknowledged(Ticket),
    /// The broker's reason.
    Refused(Ticket, String),
    Unconfirmed(Ticket),
}

/// How a connection is doing, for the person in front of the screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    Connecting,
    Up,
    Down(String),
}

/// One connection; publications share its window.
#[derive(Debug)]
pub(super) struct Publisher {
    client: Client,
    window: Arc<Semaphore>,
    flight: Arc<Mutex<Flight>>,
    pub(super) link: watch::Receiver<Link>,
    task: JoinHandle<()>,
}

/// Publications by how far they have come. Whoever hands one to the client library or clears its queues holds the
/// lock meanwhile, so the order here is the order in which the library sends.
#[derive(Debug, Default)]
struct Flight {
    queued: VecDeque<Ticket>,
    sent: HashMap<u16, Ticket>,
}

#[derive(Debug, Clone)]
enum Client {
    V4(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

enum Connection {
    V4(Box<rumqttc::EventLoop>),
    V5(Box<v5::EventLoop>),
}

/// What one turn of the connection brought.
enum News {
    Up,
    Sent(u16),
    Acknowledged(u16),
    Refused(u16, String),
    Nothing,
}

impl Publisher {
    /// Begins to connect and keeps trying. Answers are bounded by the window: a ticket holds its place.
    pub(super) fn start(
        broker: &BrokerSettings,
        client_id: &str,
        answers: mpsc::UnboundedSender<Answer>,
    ) -> Result<Self, tls::TlsError> {
        let (client, connection) = open(broker, client_id)?;
        let flight = Arc::new(Mutex::new(Flight::default()));
        let (link_news, link) = watch::channel(Link::Connecting);
        let backoff = Backoff::new(broker.reconnect);
        let driver =
            Driver { connection, flight: flight.clone(), answers, link: link_news, backoff };
        let task = tokio::spawn(driver.run());
        let window = Arc::new(Semaphore::new(usize::from(WINDOW)));
        Ok(Publisher { client, window, flight, link, task })
    }

    /// Waits for the connection and a place in the window, then hands the message over with QoS 1. `false`: the
    /// library took no more. Dropping the future before it is ready publishes nothing.
    pub(super) async fn publish(&self, publication: Publication, payload: Vec<u8>) -> bool {
        let Ok(place) = self.window.clone().acquire_owned().await else {
            return false;
        };
        let mut link = self.link.clone();
        if link.wait_for(|link| *link == Link::Up).await.is_err() {
            return false;
        }
        let mut flight = lock(&self.flight);
        let topic = publication.topic.clone();
        let taken = match &self.client {
            Client::V4(client) => {
                client.try_publish(topic, rumqttc::QoS::AtLeastOnce, false, payload).is_ok()
            }
            Client::V5(client) => {
                let qos = v5::mqttbytes::QoS::AtLeastOnce;
                client.try_publish(topic, qos, false, payload).is_ok()
            }
        };
        if taken {
            flight.queued.push_back(Ticket { publication, _place: place });
        }
        taken
    }

    /// Publications without an answer.
    pub(super) fn open_count(&self) -> usize {
        usize::from(WINDOW) - self.window.available_permits()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(flight: &Mutex<Flight>) -> MutexGuard<'_, Flight> {
    // Nothing in here panics half-way, so the state is good even then.
    flight.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection in a task of its own: the library loses a connection attempt that is not polled to its end.
struct Driver {
    connection: Connection,
    flight: Arc<Mutex<Flight>>,
    answers: mpsc::UnboundedSender<Answer>,
    link: watch::Sender<Link>,
    backoff: Backoff,
}

impl Driver {
    async fn run(mut self) {
        loop {
            match self.connection.poll().await {
                Ok(news) => self.settle(news),
                Err(problem) => {
                    self.give_up_flight();
                    self.link.send_replace(Link::Down(problem));
                    tokio::time::sleep(self.backoff.next_pause()).await;
                }
            }
        }
    }

    fn settle(&mut self, news: News) {
        let answer = match news {
            News::Nothing => None,
            News::Up => {
                self.backoff.reset();
                self.link.send_replace(Link::Up);
                None
            }
            News::Sent(packet_id) => {
                let mut flight = lock(&self.flight);
                let ticket = flight.queued.pop_front();
                ticket
                    .and_then(|ticket| flight.sent.insert(packet_id, ticket))
                    .map(Answer::Unconfirmed)
            }
            News::Acknowledged(packet_id) => self.take(packet_id).map(Answer::Acknowledged),
            News::Refused(packet_id, reason) => {
                self.take(packet_id).map(|ticket| Answer::Refused(ticket, reason))
            }
        };
        if let Some(answer) = answer {
            // Nobody listens any more at the very end.
            let _ = self.answers.send(answer);
        }
    }

    fn take(&self, packet_id: u16) -> Option<Ticket> {
        lock(&self.flight).sent.remove(&packet_id)
    }

    /// Forgets everything handed over, here and in the library, in one step.
    fn give_up_flight(&mut self) {
        let mut flight = lock(&self.flight);
        self.connection.forget();
        let Flight { queued, sent } = std::mem::take(&mut *flight);
        for ticket in sent.into_values().chain(queued) {
            let _ = self.answers.send(Answer::Unconfirmed(ticket));
        }
    }
}

impl Connection {
    async fn poll(&mut self) -> Result<News, String> {
        match self {
            Connection::V4(connection) => match connection.poll().await {
                Ok(event) => Ok(news_v4(event)),
                Err(error) => Err(error.to_string()),
            },
            Connection::V5(connection) => match connection.poll().await {
                Ok(event) => Ok(news_v5(event)),
                Err(error) => Err(error.to_string()),
            },
        }
    }

    /// Drops what the library would send or report after a reconnect: it belongs to the connection that ended.
    fn forget(&mut self) {
        match self {
            Connection::V4(connection) => {
                connection.clean();
                connection.pending.clear();
                connection.state.events.clear();
            }
            Connection::V5(connection) => {
                connection.clean();
                connection.pending.clear();
                connection.state.events.clear();
            }
        }
    }
}

fn news_v4(event: rumqttc::Event) -> News {
    match event {
        rumqttc::Event::Incoming(PacketV4::ConnAck(_)) => News::Up,
        rumqttc::Event::Incoming(PacketV4::PubAck(ack)) => News::Acknowledged(ack.pkid),
        rumqttc::Event::Outgoing(Outgoing::Publish(packet_id)) => News::Sent(packet_id),
        _ => News::Nothing,
    }
}

fn news_v5(event: v5::Event) -> News {
    match event {
        v5::Event::Incoming(PacketV5::ConnAck(_)) => News::Up,
        v5::Event::Incoming(PacketV5::PubAck(ack)) => match ack.reason {
            // Nobody subscribes, but the broker took it.
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {
                News::Acknowledged(ack.pkid)
            }
            reason => News::Refused(ack.pkid, format!("{reason:?}")),
        },
        v5::Event::Outgoing(Outgoing::Publish(packet_id)) => News::Sent(packet_id),
        _ => News::Nothing,
    }
}

fn open(broker: &BrokerSettings, client_id: &str) -> Result<(Client, Connection), tls::TlsError> {
    let transport = match &broker.tls {
        Some(settings) => {
            let config = tls::client_config(settings)?;
            Transport::tls_with_config(TlsConfiguration::Rustls(config))
        }
        None => Transport::Tcp,
    };
    // Room for every place of the window and the library's own requests.
    let capacity = usize::from(WINDOW) * 2;
    let keepalive = broker.keepalive.max(std::time::Duration::from_secs(KEEPALIVE_SECONDS_MIN));
    let password = broker.password.as_ref().map(|password| password.current());
    let password = password.as_ref().map_or("", |password| password.expose());
    let host = broker.host.as_str();
    Ok(match broker.version {
        MqttVersion::V311 => {
            let mut options = rumqttc::MqttOptions::new(client_id, host, broker.port);
            options.set_keep_alive(keepalive).set_clean_session(true).set_inflight(PACKET_IDS);
            options.set_transport(transport);
            options.set_max_packet_size(broker.packet_bytes_max, broker.packet_bytes_max);
            if let Some(user) = &broker.username {
                options.set_credentials(user, password);
            }
            let (client, mut connection) = rumqttc::AsyncClient::new(options, capacity);
            let mut network = connection.network_options();
            network.set_connection_timeout(broker.connect_timeout.as_secs().max(1));
            connection.set_network_options(network);
            (Client::V4(client), Connection::V4(Box::new(connection)))
        }
        MqttVersion::V5 => {
            let mut options = v5::MqttOptions::new(client_id, host, broker.port);
            options.set_keep_alive(keepalive).set_clean_start(true);
            options.set_outgoing_inflight_upper_limit(PACKET_IDS);
            options.set_transport(transport);
            options.set_connection_timeout(broker.connect_timeout.as_secs().max(1));
            if let Some(user) = &broker.username {
                options.set_credentials(user, password);
            }
            let (client, connection) = v5::AsyncClient::new(options, capacity);
            (Client::V5(client), Connection::V5(Box::new(connection)))
        }
    })
}
