//! One MQTT session as a pure state machine: a packet or the time goes in, what to do comes out. It knows neither sockets
//! nor versions nor the buffer.

use std::time::Duration;

use tokio::time::Instant;

use super::codec::{ConnectRequest, Inbound, Outbound, Publish};
use super::error::StreamError;

/// Ours, of our own number space: only one SUBSCRIBE is ever under way.
const SUBSCRIBE_PACKET_ID: u16 = 1;

/// What a session needs to know.
#[derive(Debug, Clone)]
pub struct SessionSettings {
    /// `host:port`, for texts.
    pub broker: String,
    pub connect: ConnectRequest,
    pub filter: String,
    pub qos: u8,
    pub connect_timeout: Duration,
    pub operation_timeout: Duration,
}

/// What a packet asks of the connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Let in: send this, and tell the memory of redeliveries whether the broker knew the session.
    LetIn {
        session_present: bool,
        send: Outbound,
    },
    /// The subscription is granted: from now on the stream is active.
    Subscribed {
        granted_qos: u8,
    },
    Message(Publish),
    /// The broker has read everything that was sent before the oldest unanswered ping.
    PingAnswered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// CONNECT is sent.
    Connecting,
    /// SUBSCRIBE is sent; a resumed session may already deliver.
    Subscribing,
    Active,
}

/// The state of one connection, from CONNECT on.
#[derive(Debug)]
pub struct Session<'a> {
    settings: &'a SessionSettings,
    stage: Stage,
    /// When the stage began.
    since: Instant,
    keepalive: Duration,
    heard: Instant,
    pinged: Instant,
    /// False while we leave the socket unread on purpose: silence is then our own doing.
    reading: bool,
}

impl<'a> Session<'a> {
    /// A session whose CONNECT (returned) is about to be written.
    pub fn begin(settings: &'a SessionSettings, now: Instant) -> (Self, Outbound) {
        let session = Session {
            settings,
            stage: Stage::Connecting,
            since: now,
            keepalive: settings.connect.keepalive,
            heard: now,
            pinged: now,
            reading: true,
        };
        (session, Outbound::Connect(Box::new(settings.connect.clone())))
    }

    pub fn is_active(&self) -> bool {
        self.stage == Stage::Active
    }

    /// CONNECT was answered.
    pub fn is_let_in(&self) -> bool {
        self.stage != Stage::Connecting
    }

    /// How long the subscription has held.
    pub fn active_for(&self, now: Instant) -> Duration {
        if self.is_active() { now.saturating_duration_since(self.since) } else { Duration::ZERO }
    }

    /// Bytes came.
    pub fn on_bytes(&mut self, now: Instant) {
        self.heard = now;
    }

    /// The socket is read, or left alone on purpose, from now on.
    pub fn set_reading(&mut self, reading: bool, now: Instant) {
        if reading && !self.reading {
            self.heard = now;
        }
        self.reading = reading;
    }

    pub fn on_packet(&mut self, packet: Inbound, now: Instant) -> Result<Step, StreamError> {
        match (self.stage, packet) {
            (Stage::Connecting, Inbound::ConnAck(connack)) => {
                if let Err(refusal) = connack.answer {
                    let SessionSettings { broker, connect, .. } = self.settings;
                    let user = connect.username.as_deref();
                    return Err(StreamError::refused(refusal, broker, &connect.client_id, user));
                }
                if let Some(keepalive) = connack.keepalive.filter(|k| !k.is_zero()) {
                    self.keepalive = keepalive;
                }
                self.enter(Stage::Subscribing, now);
                let send = Outbound::Subscribe {
                    packet_id: SUBSCRIBE_PACKET_ID,
                    filter: self.settings.filter.clone(),
                    qos: self.settings.qos,
                };
                Ok(Step::LetIn { session_present: connack.session_present, send })
            }
            (Stage::Subscribing, Inbound::SubAck { packet_id: SUBSCRIBE_PACKET_ID, granted }) => {
                let granted_qos = granted.map_err(|code| self.subscription_refused(code))?;
                self.enter(Stage::Active, now);
                Ok(Step::Subscribed { granted_qos })
            }
            (Stage::Subscribing | Stage::Active, Inbound::Publish(publish)) => {
                if publish.flags.qos > 1 {
                    return Err(self.protocol("a QoS 2 message, though at most 1 was asked for"));
                }
                Ok(Step::Message(publish))
            }
            (Stage::Subscribing | Stage::Active, Inbound::PingResp) => Ok(Step::PingAnswered),
            (_, Inbound::Disconnect { reason }) => Err(self.disconnected(reason)),
            (_, Inbound::Unexpected(what)) => Err(self.protocol(what)),
            (stage, packet) => Err(self.protocol(&format!("{} in {stage:?}", name(&packet)))),
        }
    }

    /// What is due: an answer that did not come, a silence that lasted too long, a ping.
    ///
    /// A ping leaves every half keep-alive, traffic or not: its answer is the only proof that the broker has read the
    /// acknowledgements sent before it.
    pub fn on_tick(&mut self, now: Instant) -> Result<Option<Outbound>, StreamError> {
        let waited = now.saturating_duration_since(self.since);
        match self.stage {
            Stage::Connecting if waited > self.settings.connect_timeout => {
                return Err(self.timed_out("CONNECT", self.settings.connect_timeout));
            }
            Stage::Subscribing if self.reading && waited > self.settings.operation_timeout => {
                return Err(self.timed_out("SUBSCRIBE", self.settings.operation_timeout));
            }
            _ => {}
        }
        let silence = now.saturating_duration_since(self.heard);
        if self.reading && silence > self.keepalive.mul_f64(1.5) {
            return Err(StreamError::Keepalive { broker: self.settings.broker.clone(), silence });
        }
        if self.stage != Stage::Connecting
            && now.saturating_duration_since(self.pinged) >= self.keepalive / 2
        {
            self.pinged = now;
            return Ok(Some(Outbound::PingReq));
        }
        Ok(None)
    }

    fn enter(&mut self, stage: Stage, now: Instant) {
        self.stage = stage;
        self.since = now;
    }

    fn timed_out(&self, doing: &'static str, limit: Duration) -> StreamError {
        StreamError::TimedOut { doing, broker: self.settings.broker.clone(), limit }
    }

    fn protocol(&self, problem: &str) -> StreamError {
        let broker = self.settings.broker.clone();
        StreamError::Protocol { broker, problem: problem.to_owned() }
    }

    fn subscription_refused(&self, code: u8) -> StreamError {
        let (reason, remedy) = match code {
            0x87 => ("not authorized", "allow this user to read it in the broker's access list"),
            0x8F => ("invalid filter", "correct the stream's topic filter"),
            0x97 => ("quota exceeded", "raise the broker's limit on subscriptions"),
            0x9E => ("shared subscriptions are not supported", "use a plain topic filter"),
            0xA2 => ("wildcards are not supported", "use a topic filter without wildcards"),
            // All that 3.1.1 and Mosquitto say; nearly always the access list.
            _ => ("no reason given", "look into the broker's access list and log"),
        };
        StreamError::SubscriptionRefused {
            broker: self.settings.broker.clone(),
            filter: self.settings.filter.clone(),
            reason: format!("{reason}, code {code:#04x}"),
            remedy,
        }
    }

    fn disconnected(&self, code: u8) -> StreamError {
        let broker = self.settings.broker.clone();
        let reason = match code {
            0x8E => {
                let client_id = self.settings.connect.client_id.clone();
                return StreamError::TakenOver { broker, client_id };
            }
            0x81 | 0x82 => return self.protocol("the broker says that we broke the protocol"),
            0x87 => {
                let client_id = self.settings.connect.client_id.clone();
                return StreamError::NotAuthorized { broker, client_id };
            }
            0x00 => "it gave no reason".to_owned(),
            0x89 => "it is busy".to_owned(),
            0x8B => "it is shutting down".to_owned(),
            0x8D => "it heard nothing of us for too long".to_owned(),
            0x93 => "it counts more messages in flight than we allow".to_owned(),
            0x98 => "an administrator did".to_owned(),
            other => format!("reason code {other:#04x}"),
        };
        StreamError::Disconnected { broker, reason }
    }
}

fn name(packet: &Inbound) -> &'static str {
    match packet {
        Inbound::ConnAck(_) => "CONNACK",
        Inbound::SubAck { .. } => "SUBACK",
        Inbound::Publish(_) => "PUBLISH",
        Inbound::PingResp => "PINGRESP",
        Inbound::Disconnect { .. } => "DISCONNECT",
        Inbound::Unexpected(what) => what,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::codec::{BrokerLimits, ConnAck, Refusal};
    use super::*;
    use crate::domain::{DeliveryFlags, ErrorClass};
    use crate::observe::DisconnectReason;

    fn settings() -> SessionSettings {
        SessionSettings {
            broker: "broker:1883".to_owned(),
            connect: ConnectRequest {
                client_id: "node-energy".to_owned(),
                fresh: false,
                keepalive: Duration::from_secs(30),
                username: Some("node".to_owned()),
                password: None,
                session_expiry: Duration::from_secs(3600),
                receive_maximum: 1000,
            },
            filter: "energy/#".to_owned(),
            qos: 1,
            connect_timeout: Duration::from_secs(10),
            operation_timeout: Duration::from_secs(20),
        }
    }

    fn let_in(session_present: bool) -> Inbound {
        Inbound::ConnAck(ConnAck {
            session_present,
            answer: Ok(()),
            keepalive: None,
            limits: BrokerLimits::default(),
        })
    }

    fn message(qos: u8) -> Inbound {
        let flags = DeliveryFlags { qos, ..DeliveryFlags::default() };
        let (topic, payload) = (Bytes::from_static(b"t"), Bytes::from_static(b"p"));
        Inbound::Publish(Publish { topic, payload, packet_id: u16::from(qos), flags })
    }

    const GRANTED: Inbound = Inbound::SubAck { packet_id: SUBSCRIBE_PACKET_ID, granted: Ok(1) };

    fn after(seconds: u64, start: Instant) -> Instant {
        start + Duration::from_secs(seconds)
    }

    /// Let in and subscribed at `now`.
    fn active(settings: &SessionSettings, now: Instant) -> Session<'_> {
        let (mut session, _) = Session::begin(settings, now);
        session.on_packet(let_in(true), now).unwrap();
        session.on_packet(GRANTED, now).unwrap();
        session
    }

    #[test]
    fn subscribes_at_every_let_in_and_is_active_only_once_granted() {
        for session_present in [false, true] {
            let (settings, now) = (settings(), Instant::now());
            let (mut session, connect) = Session::begin(&settings, now);
            assert_eq!(connect, Outbound::Connect(Box::new(settings.connect.clone())));
            let step = session.on_packet(let_in(session_present), now).unwrap();
            let send = Outbound::Subscribe { packet_id: 1, filter: "energy/#".to_owned(), qos: 1 };
            assert_eq!(step, Step::LetIn { session_present, send });
            assert!(!session.is_active());
            assert!(
                matches!(session.on_packet(message(1), now), Ok(Step::Message(_))),
                "a resumed session delivers before it grants"
            );
            let step = session.on_packet(GRANTED, now).unwrap();
            assert_eq!(step, Step::Subscribed { granted_qos: 1 });
            assert!(session.is_active());
        }
    }

    #[test]
    fn each_refusal_is_told_apart_and_says_what_to_do() {
        for (refusal, says) in [
            (Refusal::BadCredentials, "password is wrong"),
            (Refusal::NotAuthorized, "access list"),
            (Refusal::ClientId, "another client_id"),
            (Refusal::Version, "set the broker's version"),
            (Refusal::Unavailable, "by itself"),
            (Refusal::Banned, "ban"),
        ] {
            let (settings, now) = (settings(), Instant::now());
            let (mut session, _) = Session::begin(&settings, now);
            let connack = ConnAck {
                session_present: false,
                answer: Err(refusal),
                keepalive: None,
                limits: BrokerLimits::default(),
            };
            let error = session.on_packet(Inbound::ConnAck(connack), now).unwrap_err();
            assert!(error.to_string().contains(says), "{refusal:?}: {error}");
            let mends_itself = error.class() == ErrorClass::Transient;
            assert_eq!(mends_itself, says == "by itself", "{refusal:?}: {error}");
            assert_eq!(error.reason(), DisconnectReason::Refused);
        }
    }

    #[test]
    fn a_refused_subscription_names_filter_and_remedy() {
        let (settings, now) = (settings(), Instant::now());
        let (mut session, _) = Session::begin(&settings, now);
        session.on_packet(let_in(false), now).unwrap();
        let refused = Inbound::SubAck { packet_id: SUBSCRIBE_PACKET_ID, granted: Err(0x87) };
        let error = session.on_packet(refused, now).unwrap_err();
        assert!(matches!(error, StreamError::SubscriptionRefused { .. }));
        assert!(error.to_string().contains("energy/#"));
        assert!(error.to_string().contains("access list"));
        assert!(!error.is_of_broker());
    }

    #[test]
    fn a_takeover_and_a_shutdown_are_told_apart() {
        let (settings, now) = (settings(), Instant::now());
        let mut session = active(&settings, now);
        let error = session.on_packet(Inbound::Disconnect { reason: 0x8E }, now).unwrap_err();
        assert_eq!(error.reason(), DisconnectReason::Takeover);
        assert_eq!(error.class(), ErrorClass::Standing);
        let error = session.on_packet(Inbound::Disconnect { reason: 0x8B }, now).unwrap_err();
        assert_eq!(error.reason(), DisconnectReason::Network);
        assert_eq!(error.class(), ErrorClass::Transient);
    }

    #[test]
    fn what_a_broker_may_not_send_is_a_protocol_error() {
        let (settings, now) = (settings(), Instant::now());
        for (stage, packet) in [
            (0, message(1)),
            (0, Inbound::PingResp),
            (1, let_in(true)),
            (1, Inbound::SubAck { packet_id: 7, granted: Ok(1) }),
            (2, message(2)),
            (2, GRANTED),
            (2, Inbound::Unexpected("PUBREL")),
        ] {
            let (mut session, _) = Session::begin(&settings, now);
            for before in [let_in(true), GRANTED].into_iter().take(stage) {
                session.on_packet(before, now).unwrap();
            }
            let what = format!("{packet:?}");
            let error = session.on_packet(packet, now).unwrap_err();
            assert_eq!(error.reason(), DisconnectReason::Protocol, "{what} in stage {stage}");
        }
    }

    #[test]
    fn missing_answers_end_the_connection() {
        let (settings, start) = (settings(), Instant::now());
        let (mut session, _) = Session::begin(&settings, start);
        assert_eq!(session.on_tick(after(9, start)).unwrap(), None);
        let error = session.on_tick(after(11, start)).unwrap_err();
        assert!(matches!(error, StreamError::TimedOut { doing: "CONNECT", .. }));

        let (mut session, _) = Session::begin(&settings, start);
        session.on_packet(let_in(true), start).unwrap();
        let error = session.on_tick(after(21, start)).unwrap_err();
        assert!(matches!(error, StreamError::TimedOut { doing: "SUBSCRIBE", .. }));
    }

    #[test]
    fn pings_every_half_keepalive_whatever_arrives() {
        let (settings, start) = (settings(), Instant::now());
        let mut session = active(&settings, start);
        let mut pings = Vec::new();
        for second in 1..=60 {
            session.on_bytes(after(second, start));
            if session.on_tick(after(second, start)).unwrap().is_some() {
                pings.push(second);
            }
        }
        assert_eq!(pings, [15, 30, 45, 60]);
    }

    #[test]
    fn silence_ends_the_connection_unless_it_is_our_own() {
        let (settings, start) = (settings(), Instant::now());
        let mut session = active(&settings, start);
        session.on_tick(after(44, start)).unwrap();
        let error = session.on_tick(after(46, start)).unwrap_err();
        assert_eq!(error.reason(), DisconnectReason::Keepalive);

        let mut session = active(&settings, start);
        session.set_reading(false, after(10, start));
        assert!(session.on_tick(after(500, start)).unwrap().is_some(), "pings go on");
        session.set_reading(true, after(501, start));
        assert!(session.on_tick(after(540, start)).is_ok(), "counted from the first read on");
        assert!(session.on_tick(after(550, start)).is_err());
    }

    #[test]
    fn the_brokers_keepalive_replaces_ours() {
        let (settings, start) = (settings(), Instant::now());
        let (mut session, _) = Session::begin(&settings, start);
        let keepalive = Some(Duration::from_secs(8));
        let connack = ConnAck {
            session_present: false,
            answer: Ok(()),
            keepalive,
            limits: BrokerLimits::default(),
        };
        session.on_packet(Inbound::ConnAck(connack), start).unwrap();
        assert_eq!(session.on_tick(after(4, start)).unwrap(), Some(Outbound::PingReq));
    }
}
