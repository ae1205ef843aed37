//! A bare MQTT 5 connection: rumqttc's packet codec over a TCP stream, and nothing in between.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, Connect, ConnectProperties, ConnectReturnCode, Filter, Login, Packet, Subscribe,
    SubscribeReasonCode,
};
use rumqttc::v5::mqttbytes::{Error as CodecError, QoS};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const READ_BYTES: usize = 256 * 1024;
const SESSION_EXPIRY_SECS: u32 = 3_600;
/// Long: a bare client sends no pings, its traffic must do.
const KEEPALIVE_SECS: u16 = 600;

/// Who connects, and how.
#[derive(Debug, Clone)]
pub struct MqttOptions {
    pub port: u16,
    pub client_id: String,
    pub login: Option<(String, String)>,
    pub clean_start: bool,
    /// How many messages the broker may send without an acknowledgement.
    pub receive_maximum: u16,
}

impl MqttOptions {
    pub fn new(port: u16, client_id: &str) -> Self {
        Self {
            port,
            client_id: client_id.to_owned(),
            login: None,
            clean_start: true,
            receive_maximum: u16::MAX,
        }
    }
}

/// An open connection.
#[derive(Debug)]
pub struct Mqtt {
    stream: TcpStream,
    incoming: BytesMut,
    /// Came before the answer that was waited for: a resumed session does not wait for SUBACK.
    early: VecDeque<Packet>,
    /// What the broker granted: how many of our messages may wait for an acknowledgement.
    pub send_maximum: u16,
    pub session_present: bool,
}

impl Mqtt {
    /// Connects and waits for CONNACK.
    ///
    /// # Errors
    /// When the broker is away or refuses.
    pub async fn connect(options: &MqttOptions) -> Result<Self> {
        let stream = timeout(ANSWER_WITHIN, TcpStream::connect(("127.0.0.1", options.port)))
            .await
            .context("connect to the broker: no answer")?
            .context("connect to the broker")?;
        stream.set_nodelay(true)?;
        let incoming = BytesMut::with_capacity(READ_BYTES);
        let mut mqtt = Self {
            stream,
            incoming,
            early: VecDeque::new(),
            send_maximum: u16::MAX,
            session_present: false,
        };
        mqtt.send(&connect_packet(options)).await?;
        let Packet::ConnAck(answer) = mqtt.answer().await? else { bail!("no CONNACK") };
        mqtt.take_over(&answer)?;
        Ok(mqtt)
    }

    fn take_over(&mut self, answer: &ConnAck) -> Result<()> {
        if answer.code != ConnectReturnCode::Success {
            bail!("the broker refuses: {:?}", answer.code);
        }
        self.session_present = answer.session_present;
        if let Some(granted) = answer.properties.as_ref().and_then(|all| all.receive_max) {
            self.send_maximum = granted;
        }
        Ok(())
    }

    /// Subscribes with QoS 1 and waits for SUBACK.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn subscribe(&mut self, filter: &str) -> Result<()> {
        let mut packet = Subscribe::new(Filter::new(filter, QoS::AtLeastOnce), None);
        packet.pkid = 1;
        self.send(&Packet::Subscribe(packet)).await?;
        let mut early = Vec::new();
        let answer = loop {
            match self.answer().await? {
                Packet::SubAck(answer) => break answer,
                other => early.push(other),
            }
        };
        self.early.extend(early);
        match answer.return_codes.first() {
            Some(SubscribeReasonCode::Success(QoS::AtLeastOnce)) => Ok(()),
            other => bail!("subscription to {filter} refused: {other:?}"),
        }
    }

    async fn send(&mut self, packet: &Packet) -> Result<()> {
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes, None).context("encode a packet")?;
        self.write(&bytes).await
    }

    /// Sends packets that are already encoded.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.context("write to the broker")
    }

    async fn answer(&mut self) -> Result<Packet> {
        loop {
            if let Some(packet) = self.take()? {
                return Ok(packet);
            }
            timeout(ANSWER_WITHIN, self.fill()).await.context("the broker does not answer")??;
        }
    }

    /// Waits for more bytes. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn fill(&mut self) -> Result<()> {
        self.incoming.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.incoming).await.context("read from the broker")? {
            0 => bail!("the broker closed the connection"),
            _ => Ok(()),
        }
    }

    /// The next packet of those already received.
    ///
    /// # Errors
    /// When what came is not MQTT.
    pub fn take(&mut self) -> Result<Option<Packet>> {
        if let Some(packet) = self.early.pop_front() {
            return Ok(Some(packet));
        }
        match Packet::read(&mut self.incoming, None) {
            Ok(packet) => Ok(Some(packet)),
            Err(CodecError::InsufficientBytes(_)) => Ok(None),
            Err(error) => Err(error).context("decode a packet"),
        }
    }
}

fn connect_packet(options: &MqttOptions) -> Packet {
    let mut properties = ConnectProperties::new();
    properties.session_expiry_interval = (!options.clean_start).then_some(SESSION_EXPIRY_SECS);
    properties.receive_maximum = Some(options.receive_maximum);
    let connect = Connect {
        keep_alive: KEEPALIVE_SECS,
        client_id: options.client_id.clone(),
        clean_start: options.clean_start,
        properties: Some(properties),
    };
    let login = options.login.as_ref().map(|(user, password)| Login::new(user, password));
    Packet::Connect(connect, None, login)
}
