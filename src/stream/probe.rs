//! A look at a broker with a client id of its own: what it grants, and what it says of itself. The session is given up
//! at the end, so that the broker keeps nothing for it.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::codec::{Codec, ConnAck, ConnectRequest, Inbound, Outbound, Publish};
use super::dial::{self, ByteStream};
use super::error::StreamError;
use crate::config::{BrokerSettings, MqttVersion, Password, StreamSettings};
use crate::domain::{Finding, Findings};

/// A broker sends what it retains at once, or not at all.
const RETAINED_TIMEOUT: Duration = Duration::from_secs(1);

/// Mosquitto and its like count here what they threw away.
const DROPPED_TOPIC: &str = "$SYS/broker/publish/messages/dropped";

/// Below this a busy stream waits for its own acknowledgements.
const RECEIVE_MAXIMUM_LOW: u16 = 100;

/// What one broker grants to these streams. Ends by itself: each step has the broker's own limits.
pub async fn probe(
    name: &str,
    broker: &BrokerSettings,
    streams: &[&StreamSettings],
) -> Vec<Finding> {
    let mut findings = Findings::about(format!("mqtt:{name}"));
    if let Err(error) = look(broker, streams, &mut findings).await {
        findings.failed("reachable", &error);
    }
    findings.done()
}

async fn look(
    broker: &BrokerSettings,
    streams: &[&StreamSettings],
    findings: &mut Findings,
) -> Result<(), StreamError> {
    let (mut visit, connack) = Visit::begin(broker).await?;
    let way = if broker.tls.is_some() { "over TLS" } else { "in clear text" };
    findings.ok("reachable", format!("{} lets the node in, {way}", visit.address));
    limits(broker, &connack, findings);
    for stream in streams {
        let granted = visit.subscribe(&stream.topic_filter, stream.qos).await?;
        grant(stream, granted, findings);
    }
    if let Ok(Some(dropped)) = visit.retained(DROPPED_TOPIC).await {
        told_dropped(&dropped, findings);
    }
    visit.end().await
}

fn limits(broker: &BrokerSettings, connack: &ConnAck, findings: &mut Findings) {
    if broker.version == MqttVersion::V311 {
        let days = "how long it keeps the session of an absent node is the broker's setting";
        findings.warn("session expiry", days, "check persistent_client_expiration at the broker");
        return;
    }
    let asked = broker.session_expiry;
    let kept = connack.limits.session_expiry.unwrap_or(asked);
    let figure = format!("{} h", kept.as_secs() / 3600);
    if kept < asked {
        let remedy = "the broker cuts session_expiry_seconds: an absence longer than this loses what it queued";
        findings.fail("session expiry", figure, remedy);
    } else {
        findings.ok("session expiry", figure);
    }
    // Absent means the largest.
    let receive_maximum = connack.limits.receive_maximum.unwrap_or(u16::MAX);
    let figure = receive_maximum.to_string();
    if receive_maximum < RECEIVE_MAXIMUM_LOW {
        let remedy = "raise max_inflight_messages at the broker: a busy stream waits for its acknowledgements";
        findings.warn("receive maximum", figure, remedy);
    } else {
        findings.ok("receive maximum", figure);
    }
}

fn grant(stream: &StreamSettings, granted: Result<u8, u8>, findings: &mut Findings) {
    let named = format!("{} ({})", stream.name, stream.topic_filter);
    match granted {
        Ok(qos) if qos >= stream.qos => findings.ok("granted QoS", format!("{named}: {qos}")),
        Ok(qos) => findings.fail(
            "granted QoS",
            format!("{named}: {qos} instead of {}", stream.qos),
            "the broker allows less than the stream needs: messages may be lost before they are acknowledged",
        ),
        Err(code) => findings.fail(
            "granted QoS",
            format!("{named}: refused with {code:#04x}"),
            "allow this user to read the topic in the broker's access list",
        ),
    }
}

fn told_dropped(payload: &[u8], findings: &mut Findings) {
    let text = String::from_utf8_lossy(payload);
    match text.trim().parse::<u64>() {
        Ok(0) => findings.ok("dropped by the broker", "0 messages since it started"),
        Ok(count) => findings.warn(
            "dropped by the broker",
            format!("{count} messages since it started, of all its clients"),
            "raise max_queued_messages and max_queued_bytes at the broker",
        ),
        Err(_) => {}
    }
}

/// One connection to a broker.
struct Visit<'a> {
    broker: &'a BrokerSettings,
    address: String,
    stream: Box<dyn ByteStream>,
    codec: Codec,
    input: BytesMut,
    packet_id: u16,
}

impl<'a> Visit<'a> {
    async fn begin(broker: &'a BrokerSettings) -> Result<(Self, ConnAck), StreamError> {
        let mut visit = Visit {
            broker,
            address: dial::address(broker),
            stream: dial::dial(broker).await?,
            codec: Codec::new(broker.version, broker.packet_bytes_max),
            input: BytesMut::new(),
            packet_id: 0,
        };
        let client_id = format!("telemetry-doctor-{:08x}", rand::random::<u32>());
        let request = ConnectRequest {
            client_id: client_id.clone(),
            fresh: true,
            keepalive: broker.keepalive,
            username: broker.username.clone(),
            password: broker.password.as_ref().map(Password::current),
            session_expiry: broker.session_expiry,
            receive_maximum: broker.receive_maximum,
        };
        visit.send(&Outbound::Connect(Box::new(request))).await?;
        let connack = visit.until("waiting for CONNACK", |packet| match packet {
            Inbound::ConnAck(connack) => Some(connack),
            _ => None,
        });
        let connack = connack.await?;
        match connack.answer {
            Ok(()) => Ok((visit, connack)),
            Err(refusal) => {
                let user = broker.username.as_deref();
                Err(StreamError::refused(refusal, &visit.address, &client_id, user))
            }
        }
    }

    async fn subscribe(&mut self, filter: &str, qos: u8) -> Result<Result<u8, u8>, StreamError> {
        self.packet_id += 1;
        let (packet_id, filter) = (self.packet_id, filter.to_owned());
        self.send(&Outbound::Subscribe { packet_id, filter, qos }).await?;
        self.until("waiting for SUBACK", |packet| match packet {
            Inbound::SubAck { packet_id: of, granted } if of == packet_id => Some(granted),
            _ => None,
        })
        .await
    }

    /// The retained message of a topic, if the broker has one and shows it.
    async fn retained(&mut self, topic: &str) -> Result<Option<Vec<u8>>, StreamError> {
        if self.subscribe(topic, 0).await?.is_err() {
            return Ok(None);
        }
        let found = self.until("waiting for a retained message", |packet| match packet {
            Inbound::Publish(Publish { topic: of, payload, .. }) if of == topic.as_bytes() => {
                Some(payload.to_vec())
            }
            _ => None,
        });
        match timeout(RETAINED_TIMEOUT, found).await {
            Ok(found) => found.map(Some),
            Err(_) => Ok(None),
        }
    }

    async fn end(mut self) -> Result<(), StreamError> {
        self.send(&Outbound::Farewell).await?;
        let shut = timeout(self.broker.operation_timeout, self.stream.shutdown()).await;
        // The broker has read it or is gone; either way nothing is left to do.
        drop(shut);
        Ok(())
    }

    async fn send(&mut self, packet: &Outbound) -> Result<(), StreamError> {
        let mut out = BytesMut::new();
        let protocol = |error: super::codec::CodecError| StreamError::Protocol {
            broker: self.address.clone(),
            problem: error.to_string(),
        };
        self.codec.encode(packet, &mut out).map_err(protocol)?;
        let written = async {
            self.stream.write_all(&out).await?;
            self.stream.flush().await
        };
        let limit = self.broker.operation_timeout;
        match timeout(limit, written).await {
            Ok(written) => written.map_err(|error| StreamError::network(&self.address, &error)),
            Err(_) => Err(self.timed_out("sending")),
        }
    }

    /// The first packet `pick` takes; messages of the subscriptions go by unacknowledged.
    async fn until<T>(
        &mut self,
        doing: &'static str,
        mut pick: impl FnMut(Inbound) -> Option<T>,
    ) -> Result<T, StreamError> {
        let limit = self.broker.operation_timeout;
        let found = timeout(limit, async {
            loop {
                let protocol = |error: super::codec::CodecError| StreamError::Protocol {
                    broker: dial::address(self.broker),
                    problem: error.to_string(),
                };
                while let Some(packet) = self.codec.decode(&mut self.input).map_err(protocol)? {
                    if let Some(found) = pick(packet) {
                        return Ok(found);
                    }
                }
                let read = self.stream.read_buf(&mut self.input).await;
                if read.map_err(|error| StreamError::network(&self.address, &error))? == 0 {
                    let (broker, client_id) = (self.address.clone(), "telemetry-doctor".to_owned());
                    return Err(StreamError::Closed { broker, client_id });
                }
            }
        });
        match found.await {
            Ok(found) => found,
            Err(_) => Err(self.timed_out(doing)),
        }
    }

    fn timed_out(&self, doing: &'static str) -> StreamError {
        let (broker, limit) = (self.address.clone(), self.broker.operation_timeout);
        StreamError::TimedOut { doing, broker, limit }
    }
}
