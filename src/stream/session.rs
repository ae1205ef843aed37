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
