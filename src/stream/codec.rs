//! Bytes to the few packets a QoS 1 subscriber needs, and back, the same for MQTT 5 and 3.1.1: whatever differs between
//! the two ends here.
//!
//! Framing is ours: the library's "not enough bytes" also means "malformed" once a frame is whole, a packet over the limit
//! has to be cut instead of refused, and brokers send DISCONNECT without a property length, which the library does not read.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use rumqttc::mqttbytes::{self, v4};
use rumqttc::v5::mqttbytes::{self as mqttbytes5, v5};

use crate::config::MqttVersion;
use crate::domain::{DeliveryFlags, Secret};

/// Of a message over the packet limit this many bytes of payload are kept.
pub const TRUNCATED_PAYLOAD_BYTES: usize = 64 * 1024;

/// Enough for the longest topic, some properties and the payload that is kept.
const OVERSIZED_HEAD_BYTES: usize = TRUNCATED_PAYLOAD_BYTES + 96 * 1024;

const CONNACK: u8 = 2;
const PUBLISH: u8 = 3;
const DISCONNECT: u8 = 14;

/// What a broker says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inbound {
    ConnAck(ConnAck),
    SubAck {
        packet_id: u16,
        /// The granted QoS, or the reason code of the refusal.
        granted: Result<u8, u8>,
    },
    Publish(Publish),
    PingResp,
    /// MQTT 5: why; 0 in 3.1.1.
    Disconnect {
        reason: u8,
    },
    /// Nothing a broker has to say to a subscriber.
    Unexpected(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnAck {
    pub session_present: bool,
    pub answer: Result<(), Refusal>,
    /// MQTT 5: the broker's own keep-alive, which replaces ours.
    pub keepalive: Option<Duration>,
    pub limits: BrokerLimits,
}

/// MQTT 5: what the broker allows where it says so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BrokerLimits {
    pub session_expiry: Option<Duration>,
    pub receive_maximum: Option<u16>,
}

/// Why a broker does not let us in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Version,
    ClientId,
    Unavailable,
    BadCredentials,
    NotAuthorized,
    Banned,
    Quota,
    Moved,
    Other(u8),
}

impl Refusal {
    /// The codes of 3.1.1 (1 to 5) and of 5 (128 and above) do not overlap, and a 3.1.1 broker answers a client of 5 with
    /// its own.
    fn of(code: u8) -> Self {
        match code {
            1 | 0x84 => Refusal::Version,
            2 | 0x85 => Refusal::ClientId,
            3 | 0x88 | 0x89 | 0x9F => Refusal::Unavailable,
            4 | 0x86 => Refusal::BadCredentials,
            5 | 0x87 => Refusal::NotAuthorized,
            0x8A => Refusal::Banned,
            0x97 => Refusal::Quota,
            0x9C | 0x9D => Refusal::Moved,
            other => Refusal::Other(other),
        }
    }
}

/// A message. Topic and payload are views into the read buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Checked to be UTF-8.
    pub topic: Bytes,
    pub payload: Bytes,
    /// 0 with QoS 0.
    pub packet_id: u16,
    pub flags: DeliveryFlags,
}

/// What we say, acknowledgements apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outbound {
    Connect(Box<ConnectRequest>),
    Subscribe {
        packet_id: u16,
        filter: String,
        qos: u8,
    },
    PingReq,
    Disconnect,
    /// The session is not wanted any more.
    Farewell,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    pub client_id: String,
    /// No session from before, and in 3.1.1 none afterwards.
    pub fresh: bool,
    pub keepalive: Duration,
    pub username: Option<String>,
    pub password: Option<Secret>,
    pub session_expiry: Duration,
    pub receive_maximum: u16,
}

/// What arrived is not MQTT as we speak it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CodecError(pub String);

impl From<mqttbytes::Error> for CodecError {
    fn from(error: mqttbytes::Error) -> Self {
        CodecError(error.to_string())
    }
}

impl From<mqttbytes5::Error> for CodecError {
    fn from(error: mqttbytes5::Error) -> Self {
        CodecError(error.to_string())
    }
}

/// One per connection: it remembers how much of a packet over the limit is still to come.
#[derive(Debug)]
pub struct Codec {
    version: MqttVersion,
    packet_bytes_max: usize,
    oversized: Option<Oversized>,
}

/// A message that is handed on once the rest of its bytes has gone by: an acknowledgement may not overtake them.
#[derive(Debug)]
struct Oversized {
    publish: Publish,
    skip: usize,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    first: u8,
    header: usize,
    body: usize,
}

impl Codec {
    pub fn new(version: MqttVersion, packet_bytes_max: usize) -> Self {
        Codec { version, packet_bytes_max, oversized: None }
    }

    /// Takes the next packet off `buffer`; `None` when it is not there yet.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Inbound>, CodecError> {
        if self.oversized.is_some() {
            return Ok(self.skip(buffer));
        }
        let Some(frame) = frame(buffer)? else { return Ok(None) };
        if frame.header + frame.body > self.packet_bytes_max {
            return self.begin_oversized(frame, buffer);
        }
        if buffer.len() < frame.header + frame.body {
            buffer.reserve(frame.header + frame.body - buffer.len());
            return Ok(None);
        }
        match frame.first >> 4 {
            CONNACK => self.connack(frame, buffer).map(Some),
            DISCONNECT => {
                let packet = buffer.split_to(frame.header + frame.body);
                let reason = packet.get(frame.header).copied().unwrap_or(0);
                Ok(Some(Inbound::Disconnect { reason }))
            }
            _ => self.read(buffer).map(Some),
        }
    }

    fn read(&self, buffer: &mut BytesMut) -> Result<Inbound, CodecError> {
        match self.version {
            MqttVersion::V5 => read_v5(v5::Packet::read(buffer, None)?),
            MqttVersion::V311 => read_v4(v4::Packet::read(buffer, usize::MAX)?),
        }
    }

    fn connack(&self, frame: Frame, buffer: &mut BytesMut) -> Result<Inbound, CodecError> {
        let Some(&[flags, code]) = buffer.get(frame.header..frame.header + frame.body.min(2))
        else {
            return Err(CodecError("CONNACK without a reason code".to_owned()));
        };
        let session_present = flags & 1 == 1;
        let (mut keepalive, mut limits) = (None, BrokerLimits::default());
        if code != 0 {
            buffer.advance(frame.header + frame.body);
            let answer = Err(Refusal::of(code));
            return Ok(Inbound::ConnAck(ConnAck { session_present, answer, keepalive, limits }));
        }
        match self.version {
            MqttVersion::V5 => {
                if let v5::Packet::ConnAck(connack) = v5::Packet::read(buffer, None)? {
                    let properties = connack.properties.as_ref();
                    keepalive = properties
                        .and_then(|properties| properties.server_keep_alive)
                        .map(|seconds| Duration::from_secs(seconds.into()));
                    limits = properties.map(broker_limits).unwrap_or_default();
                }
            }
            MqttVersion::V311 => buffer.advance(frame.header + frame.body),
        }
        Ok(Inbound::ConnAck(ConnAck { session_present, answer: Ok(()), keepalive, limits }))
    }

    fn begin_oversized(
        &mut self,
        frame: Frame,
        buffer: &mut BytesMut,
    ) -> Result<Option<Inbound>, CodecError> {
        if frame.first >> 4 != PUBLISH {
            let text = format!("a packet of {} bytes that is no message", frame.body);
            return Err(CodecError(text));
        }
        let head = frame.body.min(OVERSIZED_HEAD_BYTES);
        if buffer.len() < frame.header + head {
            buffer.reserve(frame.header + head - buffer.len());
            return Ok(None);
        }
        buffer.advance(frame.header);
        let mut shortened = BytesMut::with_capacity(head + 5);
        shortened.put_u8(frame.first);
        put_remaining_length(&mut shortened, head);
        shortened.extend_from_slice(&buffer.split_to(head));
        let Inbound::Publish(mut publish) = self.read(&mut shortened)? else {
            return Err(CodecError("a message that is none".to_owned()));
        };
        publish.payload.truncate(TRUNCATED_PAYLOAD_BYTES.min(self.packet_bytes_max));
        publish.flags.truncated = true;
        self.oversized = Some(Oversized { publish, skip: frame.body - head });
        Ok(self.skip(buffer))
    }

    fn skip(&mut self, buffer: &mut BytesMut) -> Option<Inbound> {
        let oversized = self.oversized.as_mut()?;
        let here = oversized.skip.min(buffer.len());
        buffer.advance(here);
        oversized.skip -= here;
        if oversized.skip > 0 {
            return None;
        }
        self.oversized.take().map(|done| Inbound::Publish(done.publish))
    }

    /// Appends `packet` to `out`.
    pub fn encode(&self, packet: &Outbound, out: &mut BytesMut) -> Result<(), CodecError> {
        match self.version {
            MqttVersion::V5 => write_v5(packet).write(out, None)?,
            MqttVersion::V311 => write_v4(packet).write(out, usize::MAX)?,
        };
        Ok(())
    }
}

/// A PUBACK without a reason is the same four bytes in both versions.
pub fn put_puback(out: &mut BytesMut, packet_id: u16) {
    let [high, low] = packet_id.to_be_bytes();
    out.put_slice(&[0x40, 0x02, high, low]);
}

fn put_remaining_length(out: &mut BytesMut, mut length: usize) {
    loop {
        let low = (length % 128) as u8;
        length /= 128;
        out.put_u8(if length > 0 { low | 0x80 } else { low });
        if length == 0 {
            return;
        }
    }
}

/// The fixed header, once it is whole.
fn frame(buffer: &[u8]) -> Result<Option<Frame>, CodecError> {
    let Some((&first, rest)) = buffer.split_first() else { return Ok(None) };
    let mut body = 0;
    for (index, byte) in rest.iter().take(4).enumerate() {
        body |= usize::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some(Frame { first, header: index + 2, body }));
        }
    }
    if rest.len() < 4 {
        Ok(None)
    } else {
        Err(CodecError("a packet length of more than four bytes".to_owned()))
    }
}

fn read_v5(packet: v5::Packet) -> Result<Inbound, CodecError> {
    Ok(match packet {
        v5::Packet::Publish(publish) => {
            if publish
                .properties
                .as_ref()
                .is_some_and(|properties| properties.topic_alias.is_some())
            {
                return Err(CodecError("a topic alias, though none was allowed".to_owned()));
            }
            if std::str::from_utf8(&publish.topic).is_err() {
                return Err(CodecError("a topic that is not UTF-8".to_owned()));
            }
            let flags = DeliveryFlags {
                qos: publish.qos as u8,
                retain: publish.retain,
                dup: publish.dup,
                truncated: false,
            };
            let (topic, payload, packet_id) = (publish.topic, publish.payload, publish.pkid);
            checked(Publish { topic, payload, packet_id, flags })?
        }
        v5::Packet::SubAck(suback) => {
            let granted = match suback.return_codes.as_slice() {
                [v5::SubscribeReasonCode::Success(qos)] => Ok(*qos as u8),
                [refused] => Err(refusal_code(*refused)),
                _ => return Err(CodecError("SUBACK for another number of filters".to_owned())),
            };
            Inbound::SubAck { packet_id: suback.pkid, granted }
        }
        v5::Packet::PingResp(_) => Inbound::PingResp,
        v5::Packet::PubRel(_) => Inbound::Unexpected("PUBREL"),
        v5::Packet::Auth(_) => Inbound::Unexpected("AUTH"),
        _ => Inbound::Unexpected("a packet of clients"),
    })
}

fn read_v4(packet: v4::Packet) -> Result<Inbound, CodecError> {
    Ok(match packet {
        v4::Packet::Publish(publish) => {
            let flags = DeliveryFlags {
                qos: publish.qos as u8,
                retain: publish.retain,
                dup: publish.dup,
                truncated: false,
            };
            let topic = Bytes::from(publish.topic);
            let (payload, packet_id) = (publish.payload, publish.pkid);
            checked(Publish { topic, payload, packet_id, flags })?
        }
        v4::Packet::SubAck(suback) => {
            let granted = match suback.return_codes.as_slice() {
                [v4::SubscribeReasonCode::Success(qos)] => Ok(*qos as u8),
                [v4::SubscribeReasonCode::Failure] => Err(0x80),
                _ => return Err(CodecError("SUBACK for another number of filters".to_owned())),
            };
            Inbound::SubAck { packet_id: suback.pkid, granted }
        }
        v4::Packet::PingResp => Inbound::PingResp,
        v4::Packet::PubRel(_) => Inbound::Unexpected("PUBREL"),
        _ => Inbound::Unexpected("a packet of clients"),
    })
}

fn checked(publish: Publish) -> Result<Inbound, CodecError> {
    if publish.topic.is_empty() {
        return Err(CodecError("a message without a topic".to_owned()));
    }
    Ok(Inbound::Publish(publish))
}

fn refusal_code(reason: v5::SubscribeReasonCode) -> u8 {
    use v5::SubscribeReasonCode as Code;
    match reason {
        Code::ImplementationSpecific => 0x83,
        Code::NotAuthorized => 0x87,
        Code::TopicFilterInvalid => 0x8F,
        Code::PkidInUse => 0x91,
        Code::QuotaExceeded => 0x97,
        Code::SharedSubscriptionsNotSupported => 0x9E,
        Code::SubscriptionIdNotSupported => 0xA1,
        Code::WildcardSubscriptionsNotSupported => 0xA2,
        Code::Success(_) | Code::Failure | Code::Unspecified => 0x80,
    }
}

fn broker_limits(properties: &v5::ConnAckProperties) -> BrokerLimits {
    let expiry = properties.session_expiry_interval;
    BrokerLimits {
        session_expiry: expiry.map(|seconds| Duration::from_secs(seconds.into())),
        receive_maximum: properties.receive_max,
    }
}

fn seconds<T: TryFrom<u64>>(duration: Duration, max: T) -> T {
    T::try_from(duration.as_secs()).unwrap_or(max)
}

fn write_v5(packet: &Outbound) -> v5::Packet {
    match packet {
        Outbound::Connect(request) => {
            let properties = v5::ConnectProperties {
                session_expiry_interval: Some(seconds(request.session_expiry, u32::MAX)),
                receive_maximum: Some(request.receive_maximum),
                // No largest packet: what is above it a broker must drop and forget, without a word to anybody.
                ..v5::ConnectProperties::new()
            };
            let connect = v5::Connect {
                keep_alive: seconds(request.keepalive, u16::MAX),
                client_id: request.client_id.clone(),
                clean_start: request.fresh,
                properties: Some(properties),
            };
            let login = login(request).map(|(username, password)| v5::Login { username, password });
            v5::Packet::Connect(connect, None, login)
        }
        Outbound::Subscribe { packet_id, filter, qos } => {
            let mut filter = v5::Filter::new(filter.clone(), qos_v5(*qos));
            filter.retain_forward_rule = v5::RetainForwardRule::OnNewSubscribe;
            let mut subscribe = v5::Subscribe::new(filter, None);
            subscribe.pkid = *packet_id;
            v5::Packet::Subscribe(subscribe)
        }
        Outbound::PingReq => v5::Packet::PingReq(v5::PingReq),
        Outbound::Disconnect => v5::Packet::Disconnect(v5::Disconnect::new(
            v5::DisconnectReasonCode::NormalDisconnection,
        )),
        Outbound::Farewell => {
            let mut disconnect = v5::Disconnect::new(v5::DisconnectReasonCode::NormalDisconnection);
            disconnect.properties = Some(v5::DisconnectProperties {
                session_expiry_interval: Some(0),
                reason_string: None,
                user_properties: Vec::new(),
                server_reference: None,
            });
            v5::Packet::Disconnect(disconnect)
        }
    }
}

fn write_v4(packet: &Outbound) -> v4::Packet {
    match packet {
        Outbound::Connect(request) => {
            let mut connect = v4::Connect::new(request.client_id.clone());
            connect.keep_alive = seconds(request.keepalive, u16::MAX);
            connect.clean_session = request.fresh;
            connect.login =
                login(request).map(|(username, password)| v4::Login { username, password });
            v4::Packet::Connect(connect)
        }
        Outbound::Subscribe { packet_id, filter, qos } => {
            let mut subscribe = v4::Subscribe::new(filter.clone(), qos_v4(*qos));
            subscribe.pkid = *packet_id;
            v4::Packet::Subscribe(subscribe)
        }
        Outbound::PingReq => v4::Packet::PingReq,
        Outbound::Disconnect | Outbound::Farewell => v4::Packet::Disconnect,
    }
}

fn login(request: &ConnectRequest) -> Option<(String, String)> {
    if request.username.is_none() && request.password.is_none() {
        return None;
    }
    let username = request.username.clone().unwrap_or_default();
    let password = request.password.as_ref().map(|p| p.expose().to_owned()).unwrap_or_default();
    Some((username, password))
}

fn qos_v5(qos: u8) -> mqttbytes5::QoS {
    if qos == 0 { mqttbytes5::QoS::AtMostOnce } else { mqttbytes5::QoS::AtLeastOnce }
}

fn qos_v4(qos: u8) -> mqttbytes::QoS {
    if qos == 0 { mqttbytes::QoS::AtMostOnce } else { mqttbytes::QoS::AtLeastOnce }
}

#[cfg(test)]
mod tests;
