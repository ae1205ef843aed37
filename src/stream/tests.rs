//! The connection's loop against a scripted broker on a local socket, with a stand-in for the buffer.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rumqttc::v5::mqttbytes::v5;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::timeout;

use super::codec::ConnectRequest;
use super::connection::{Connection, Ended, Limits, Lost, Watcher};
use super::error::StreamError;
use super::inlet::Inlet;
use super::redelivery::Repeats;
use super::session::SessionSettings;
use super::unacknowledged::{Intake, Unacknowledged};
use crate::buffer::Incoming;
use crate::config::{MqttVersion, Settings};
use crate::domain::{Durable, Sequence, StreamName};
use crate::observe::{Board, DisconnectReason, Redelivery, StreamView};
use crate::part::{Control, Phase, Progress};

/// Nothing here takes long; what takes this long has failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// A buffer that becomes durable when the test says so.
#[derive(Clone, Default)]
struct StandIn(Rc<StandInState>);

#[derive(Default)]
struct StandInState {
    kept: RefCell<Vec<Incoming>>,
    waiting: RefCell<VecDeque<(oneshot::Sender<Durable>, Durable)>>,
    by_itself: std::cell::Cell<bool>,
    full: std::cell::Cell<bool>,
    ready: Notify,
}

impl StandIn {
    fn kept(&self) -> usize {
        self.0.kept.borrow().len()
    }

    fn sync(&self) {
        for (answer, durable) in self.0.waiting.borrow_mut().drain(..) {
            // The reader may be gone.
            let _ = answer.send(durable);
        }
    }

    fn set_full(&self, full: bool) {
        self.0.full.set(full);
        self.0.ready.notify_waiters();
    }
}

impl Intake for StandIn {
    fn try_append(
        &self,
        batch: Vec<Incoming>,
    ) -> Result<oneshot::Receiver<Durable>, Vec<Incoming>> {
        if self.0.full.get() {
            return Err(batch);
        }
        self.0.kept.borrow_mut().extend(batch);
        let durable = Durable(Sequence(self.kept() as u64));
        let (answer, receiver) = oneshot::channel();
        self.0.waiting.borrow_mut().push_back((answer, durable));
        if self.0.by_itself.get() {
            self.sync();
        }
        Ok(receiver)
    }

    async fn ready(&self) {
        while self.0.full.get() {
            self.0.ready.notified().await;
        }
    }
}

#[derive(Default)]
struct Seen {
    granted_qos: Option<u8>,
}

impl Watcher for Seen {
    fn let_in(&mut self, _: bool) {}

    fn subscribed(&mut self, granted_qos: u8) {
        self.granted_qos = Some(granted_qos);
    }

    fn tick<I: Intake>(&mut self, _: &Inlet<I>) {}
}

/// The broker's end of one connection.
struct Broker {
    tcp: TcpStream,
    input: BytesMut,
}

impl Broker {
    async fn hear(&mut self) -> v5::Packet {
        timeout(PATIENCE, async {
            loop {
                if let Ok(packet) = v5::Packet::read(&mut self.input, None) {
                    return packet;
                }
                let count = self.tcp.read_buf(&mut self.input).await.unwrap();
                assert!(count > 0, "the reader hung up");
            }
        })
        .await
        .expect("the reader says something")
    }

    async fn say(&mut self, bytes: &[u8]) {
        self.tcp.write_all(bytes).await.unwrap();
    }

    /// Up to a granted subscription.
    async fn welcome(&mut self, session_present: bool) {
        assert!(matches!(self.hear().await, v5::Packet::Connect(..)));
        self.say(&[0x20, 3, u8::from(session_present), 0, 0]).await;
        assert!(matches!(self.hear().await, v5::Packet::Subscribe(_)));
        self.say(&[0x90, 4, 0, 1, 0, 1]).await;
    }

    async fn hear_pubacks(&mut self, count: usize) -> Vec<u16> {
        let mut ids = Vec::new();
        while ids.len() < count {
            match self.hear().await {
                v5::Packet::PubAck(ack) => ids.push(ack.pkid),
                v5::Packet::PingReq(_) => self.say(&[0xD0, 0]).await,
                other => panic!("a PUBACK, not {other:?}"),
            }
        }
        ids
    }

    /// DISCONNECT, then the end.
    async fn hears_farewell(&mut self) {
        let mut rest = std::mem::take(&mut self.input).to_vec();
        timeout(PATIENCE, self.tcp.read_to_end(&mut rest)).await.unwrap().unwrap();
        assert_eq!(rest, [0xE0, 0]);
    }

    /// Nothing but pings for a while.
    async fn hears_no_puback(&mut self, while_: Duration) {
        let heard = timeout(while_, async {
            loop {
                if let v5::Packet::PubAck(ack) = self.hear().await {
                    return ack.pkid;
                }
            }
        });
        assert!(heard.await.is_err(), "an early PUBACK");
    }
}

fn publish(dup: bool, packet_id: u16, payload: &[u8]) -> Vec<u8> {
    let mut message =
        v5::Publish::new("a/b", rumqttc::v5::mqttbytes::QoS::AtLeastOnce, payload.to_vec(), None);
    (message.dup, message.pkid) = (dup, packet_id);
    let mut out = BytesMut::new();
    message.write(&mut out).unwrap();
    out.to_vec()
}

fn session_settings() -> SessionSettings {
    SessionSettings {
        broker: "127.0.0.1".to_owned(),
        connect: ConnectRequest {
            client_id: "node-energy".to_owned(),
            fresh: false,
            keepalive: Duration::from_secs(30),
            username: None,
            password: None,
            session_expiry: Duration::from_secs(60),
            receive_maximum: 100,
        },
        filter: "a/#".to_owned(),
        qos: 1,
        connect_timeout: PATIENCE,
        operation_timeout: PATIENCE,
    }
}

fn limits() -> Limits {
    Limits {
        version: MqttVersion::V5,
        packet_bytes_max: 100_000,
        unacknowledged_messages_max: 1000,
        unacknowledged_bytes_max: 1 << 20,
        operation_timeout: PATIENCE,
    }
}

/// The configuration of a node with one stream, `energy`.
fn settings(port: u16) -> Settings {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("telemetry.toml");
    let text = format!(
        r#"
        [node]
        name = "node"
        state_dir = "state"
        [brokers.home]
        host = "127.0.0.1"
        port = {port}
        [clusters.main]
        bootstrap_servers = ["127.0.0.1:1"]
        [streams.energy]
        broker = "home"
        topic_filter = "a/#"
        [streams.energy.fields]
        device = {{ path = "id", type = "text", device_id = true, tag = true }}
        [streams.energy.kafka]
        cluster = "main"
        topic = "energy"
        "#
    );
    std::fs::write(&file, text).unwrap();
    crate::config::load(&file, &|_| None).unwrap().settings
}

fn view() -> Arc<StreamView> {
    Board::new(&settings(1)).stream(&StreamName::parse("energy").unwrap())
}

/// A reader without its part: what outlives a connection, and the orders it hears.
struct Node {
    settings: SessionSettings,
    limits: Limits,
    buffer: StandIn,
    inlet: Inlet<StandIn>,
    view: Arc<StreamView>,
    control: Control,
    phase: watch::Sender<Phase>,
    _paused: watch::Sender<bool>,
    listener: TcpListener,
}

impl Node {
    async fn new() -> Self {
        let view = view();
        let buffer = StandIn::default();
        let inlet =
            Inlet::new(buffer.clone(), Repeats::new(None), Unacknowledged::default(), view.clone());
        let (phase, phases) = watch::channel(Phase::Running);
        let (paused, pauses) = watch::channel(false);
        let control = Control::new(phases, pauses, Arc::new(Progress::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Node {
            settings: session_settings(),
            limits: limits(),
            buffer,
            inlet,
            view,
            control,
            phase,
            _paused: paused,
            listener,
        }
    }

    /// Runs one connection while `script` plays the broker.
    async fn connect<S>(&mut self, script: S) -> Result<Ended, Lost>
    where
        S: AsyncFnOnce(Broker, &StandIn, &watch::Sender<Phase>),
    {
        let address = self.listener.local_addr().unwrap();
        let tcp = TcpStream::connect(address).await.unwrap();
        let (broker, _) = self.listener.accept().await.unwrap();
        let broker = Broker { tcp: broker, input: BytesMut::new() };
        let mut seen = Seen::default();
        let connection =
            Connection::new(Box::new(tcp), &self.settings, self.limits, &mut self.inlet, &mut seen)
                .map_err(|error| Lost { error, active_for: Duration::ZERO })?;
        let playing = script(broker, &self.buffer, &self.phase);
        let both = async { tokio::join!(connection.run(&mut self.control), playing).0 };
        timeout(2 * PATIENCE, both).await.expect("the connection ends")
    }
}

fn stop(phase: &watch::Sender<Phase>) {
    phase.send(Phase::Stopping).unwrap();
}

async fn until(condition: impl Fn() -> bool) {
    timeout(PATIENCE, async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the condition comes true");
}

#[tokio::test]
async fn a_puback_leaves_after_the_sync_and_in_order() {
    let mut node = Node::new().await;
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            broker.welcome(false).await;
            let messages: Vec<u8> =
                (1..=50_u16).flat_map(|id| publish(false, id, b"value")).collect();
            broker.say(&messages).await;
            until(|| buffer.kept() == 50).await;
            broker.hears_no_puback(Duration::from_millis(50)).await;
            buffer.sync();
            assert_eq!(broker.hear_pubacks(50).await, (1..=50).collect::<Vec<u16>>());
            stop(phase);
            broker.hears_farewell().await;
        })
        .await;
    assert_eq!(ended.unwrap(), Ended::Told);
    assert_eq!(node.view.meters.accepted_messages.get(), 50);
    assert_eq!(node.inlet.unacknowledged.sequence(), Sequence(50));
}

#[tokio::test]
async fn what_was_under_way_when_a_connection_died_is_kept_once_and_acknowledged_on_the_next() {
    let mut node = Node::new().await;
    let lost = node
        .connect(async |mut broker, buffer, _| {
            broker.welcome(false).await;
            broker.say(&publish(false, 1, b"one")).await;
            broker.say(&publish(false, 2, b"two")).await;
            until(|| buffer.kept() == 2).await;
        })
        .await;
    assert!(matches!(lost.unwrap_err().error, StreamError::Closed { .. }));
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            broker.welcome(true).await;
            let again = [publish(true, 1, b"one"), publish(true, 2, b"two")].concat();
            broker.say(&again).await;
            broker.say(&publish(false, 3, b"three")).await;
            until(|| buffer.kept() == 3).await;
            broker.hears_no_puback(Duration::from_millis(50)).await;
            buffer.sync();
            assert_eq!(broker.hear_pubacks(3).await, [1, 2, 3]);
            stop(phase);
        })
        .await;
    ended.unwrap();
    assert_eq!(node.view.meters.redelivered(Redelivery::Dup).get(), 2);
    assert_eq!(node.view.meters.accepted_messages.get(), 3);
}

#[tokio::test]
async fn messages_before_a_broken_packet_are_kept_and_their_copies_recognised() {
    let mut node = Node::new().await;
    let lost = node
        .connect(async |mut broker, _, _| {
            broker.welcome(false).await;
            let bytes = [&publish(false, 1, b"one")[..], &[0x36, 6, 0, 1, b'a', 0, 1, 0]].concat();
            broker.say(&bytes).await;
        })
        .await;
    assert_eq!(lost.unwrap_err().error.reason(), DisconnectReason::Protocol);
    assert_eq!(node.buffer.kept(), 1);
    node.buffer.sync();
    let ended = node
        .connect(async |mut broker, _, phase| {
            broker.welcome(true).await;
            broker.say(&publish(true, 1, b"one")).await;
            assert_eq!(broker.hear_pubacks(1).await, [1]);
            stop(phase);
        })
        .await;
    ended.unwrap();
    assert_eq!(node.buffer.kept(), 1);
}

#[tokio::test]
async fn a_full_buffer_stops_the_reading_and_not_the_pings() {
    let mut node = Node::new().await;
    node.settings.connect.keepalive = Duration::from_millis(200);
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            broker.welcome(false).await;
            buffer.set_full(true);
            broker.say(&publish(false, 1, b"held")).await;
            broker.say(&publish(false, 2, b"unread")).await;
            for _ in 0..10 {
                assert!(matches!(broker.hear().await, v5::Packet::PingReq(_)));
            }
            assert_eq!(buffer.kept(), 0);
            buffer.0.by_itself.set(true);
            buffer.set_full(false);
            assert_eq!(broker.hear_pubacks(2).await, [1, 2]);
            stop(phase);
        })
        .await;
    ended.unwrap();
}

#[tokio::test]
async fn above_its_own_bound_it_stops_reading_until_something_is_durable() {
    let mut node = Node::new().await;
    node.limits.unacknowledged_bytes_max = 200_000;
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            broker.welcome(false).await;
            let (payload, mut sent, mut stuck) = (vec![0; 10_000], 0_u16, false);
            // The broker ignores the receive maximum until the sockets are full.
            while !stuck {
                sent += 1;
                assert!(sent < 10_000, "reading never stops");
                let packet = publish(false, sent, &payload);
                let mut saying = std::pin::pin!(broker.say(&packet));
                stuck = timeout(Duration::from_millis(200), saying.as_mut()).await.is_err();
                if stuck {
                    assert!(buffer.kept() < 100, "{} taken in", buffer.kept());
                    buffer.0.by_itself.set(true);
                    buffer.sync();
                    timeout(PATIENCE, saying).await.expect("reading goes on");
                }
            }
            assert!(broker.hear_pubacks(usize::from(sent)).await.into_iter().eq(1..=sent));
            assert_eq!(buffer.kept(), usize::from(sent));
            stop(phase);
        })
        .await;
    ended.unwrap();
}

#[tokio::test]
async fn a_large_message_is_kept_cut_and_acknowledged() {
    let mut node = Node::new().await;
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            buffer.0.by_itself.set(true);
            broker.welcome(false).await;
            broker.say(&publish(false, 1, &vec![1; 500_000])).await;
            broker.say(&publish(false, 2, b"small")).await;
            assert_eq!(broker.hear_pubacks(2).await, [1, 2]);
            stop(phase);
        })
        .await;
    ended.unwrap();
    let kept = node.buffer.0.kept.borrow();
    let seen: Vec<_> = kept.iter().map(|m| (m.payload.len(), m.flags.truncated)).collect();
    assert_eq!(seen, [(64 * 1024, true), (5, false)]);
}

#[tokio::test]
async fn a_silent_broker_and_a_silent_handshake_are_given_up() {
    let mut node = Node::new().await;
    node.settings.connect.keepalive = Duration::from_millis(200);
    let lost = node
        .connect(async |mut broker, _, _| {
            broker.welcome(false).await;
            while !matches!(broker.tcp.read_buf(&mut broker.input).await, Ok(0) | Err(_)) {}
        })
        .await;
    assert_eq!(lost.unwrap_err().error.reason(), DisconnectReason::Keepalive);

    node.settings.connect_timeout = Duration::from_millis(100);
    let lost =
        node.connect(async |mut broker, _, _| {
            while !matches!(broker.tcp.read_buf(&mut broker.input).await, Ok(0) | Err(_)) {}
        })
        .await;
    let error = lost.unwrap_err().error;
    assert!(matches!(error, StreamError::TimedOut { doing: "CONNECT", .. }), "{error}");
}

#[tokio::test]
async fn a_stop_waits_for_what_the_buffer_already_has() {
    let mut node = Node::new().await;
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            broker.welcome(false).await;
            broker.say(&publish(false, 1, b"one")).await;
            until(|| buffer.kept() == 1).await;
            stop(phase);
            tokio::task::yield_now().await;
            buffer.sync();
            assert_eq!(broker.hear_pubacks(1).await, [1]);
            broker.hears_farewell().await;
        })
        .await;
    assert_eq!(ended.unwrap(), Ended::Told);
}

/// A broker that reads late has all of them again after a lost connection.
#[tokio::test]
async fn half_of_what_may_be_unacknowledged_is_acknowledged_until_a_ping_is_answered() {
    const BOUND: usize = 50;
    let mut node = Node::new().await;
    node.limits.unacknowledged_messages_max = 2 * BOUND;
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            broker.welcome(false).await;
            for id in 1..=80 {
                broker.say(&publish(false, id, b"value")).await;
                until(|| buffer.kept() == usize::from(id)).await;
                buffer.sync();
            }
            let (mut acknowledged, mut pings) = (0, 0);
            while acknowledged < BOUND {
                match broker.hear().await {
                    v5::Packet::PubAck(_) => acknowledged += 1,
                    v5::Packet::PingReq(_) => pings += 1,
                    other => panic!("a PUBACK or a ping, not {other:?}"),
                }
            }
            assert!(pings > 0, "nothing would prove them");
            broker.hears_no_puback(Duration::from_millis(200)).await;
            broker.say(&[0xD0, 0].repeat(pings)).await;
            broker.hear_pubacks(80 - BOUND).await;
            stop(phase);
        })
        .await;
    ended.unwrap();
}

#[tokio::test]
async fn a_ping_answered_proves_the_pubacks_before_it() {
    let mut node = Node::new().await;
    node.settings.connect.keepalive = Duration::from_millis(200);
    let ended = node
        .connect(async |mut broker, buffer, phase| {
            buffer.0.by_itself.set(true);
            broker.welcome(false).await;
            broker.say(&publish(false, 1, b"on")).await;
            assert_eq!(broker.hear_pubacks(1).await, [1]);
            for _ in 0..2 {
                assert!(matches!(broker.hear().await, v5::Packet::PingReq(_)));
                broker.say(&[0xD0, 0]).await;
            }
            broker.say(&publish(false, 2, b"end")).await;
            assert_eq!(broker.hear_pubacks(1).await, [2]);
            stop(phase);
        })
        .await;
    ended.unwrap();
    assert!(node.inlet.repeats.proved() >= Sequence(1));
    node.phase.send(Phase::Running).unwrap();
    let again = node
        .connect(async |mut broker, _, phase| {
            broker.welcome(true).await;
            broker.say(&publish(true, 1, b"on")).await;
            assert_eq!(broker.hear_pubacks(1).await, [1]);
            stop(phase);
        })
        .await;
    again.unwrap();
    assert_eq!(node.buffer.kept(), 3, "another message with the same bytes is kept");
}
