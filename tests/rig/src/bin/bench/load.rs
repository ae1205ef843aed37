//! Energy messages at full rate, or at a given one.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::{Bytes, BytesMut};
use rig::{Mqtt, MqttOptions};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PubAckReason, Publish};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{MissedTickBehavior, interval};

/// The counter of the first message; nine digits for as many messages as we can want.
pub const FIRST: u64 = 100_000_000;
/// Of each connection: sent and not yet acknowledged.
const WINDOW: usize = 500;
const CONNECTIONS: u64 = 4;
const WRITE_BYTES: usize = 64 * 1024;

/// The meter's message with this counter, in the form it has in the field.
pub fn payload(counter: u64) -> String {
    format!(
        r#"{{"saveeyeDeviceSerialNumber":"SE-4471-K","meterType":"three-phase","meterSerialNumber":"18402217","timestamp":"2026-03-14T07:21:05","wifiRssi":-41,"reactiveActualConsumption":{{"total":4}},"activeActualConsumption":{{"total":1284,"L1":612,"L2":389,"L3":283}},"activeActualProduction":{{"total":0,"L1":0,"L2":0,"L3":0}},"activeTotalConsumption":{{"total":{counter}}},"activeTotalProduction":{{"total":83}},"rmsVoltage":{{"L1":237,"L2":238,"L3":236}},"rmsCurrent":{{"L1":2583,"L2":1634,"L3":1199}},"powerFactor":{{"total":98}}}}"#
    )
}

/// An encoded PUBLISH in which only packet id and counter change from message to message.
struct Stencil {
    bytes: Vec<u8>,
    packet_id: usize,
    counter: usize,
}

impl Stencil {
    fn new(topic: &str) -> Result<Self> {
        let payload = payload(FIRST);
        let counter = payload.find(&FIRST.to_string()).context("a payload has its counter")?;
        let mut packet = Publish::new(topic, QoS::AtLeastOnce, Bytes::from(payload.clone()), None);
        packet.pkid = 1;
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes).context("encode a message")?;
        let start = bytes.len() - payload.len();
        // Before the payload stand the packet id and one byte of (no) properties.
        Ok(Self { packet_id: start - 3, counter: start + counter, bytes: bytes.to_vec() })
    }

    fn put(&mut self, packet_id: u16, counter: u64, into: &mut Vec<u8>) {
        self.bytes[self.packet_id..self.packet_id + 2].copy_from_slice(&packet_id.to_be_bytes());
        let digits = counter.to_string();
        self.bytes[self.counter..self.counter + digits.len()].copy_from_slice(digits.as_bytes());
        into.extend_from_slice(&self.bytes);
    }
}

/// Appends the PUBLISH with this packet id that a counter stands for.
pub type Messages = Box<dyn FnMut(u16, u64, &mut Vec<u8>) -> Result<()> + Send>;

/// The meter's.
///
/// # Errors
/// When it cannot be encoded.
pub fn meter(topic: &str) -> Result<Messages> {
    let mut stencil = Stencil::new(topic)?;
    Ok(Box::new(move |packet_id, counter, into| {
        stencil.put(packet_id, counter, into);
        Ok(())
    }))
}

/// Of so many plugs in turn, each on its own topic below this filter.
pub fn plugs(filter: &str, plugs: u64) -> Messages {
    let filter = filter.to_owned();
    Box::new(move |packet_id, counter, into| {
        let topic = filter.replace('+', &format!("plug-{}", counter % plugs));
        let payload = format!(r#"{{"POWER":"ON","UptimeSec":{counter},"Wifi":{{"RSSI":-61}}}}"#);
        let mut packet = Publish::new(topic, QoS::AtLeastOnce, payload, None);
        packet.pkid = packet_id;
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes).context("encode a message")?;
        into.extend_from_slice(&bytes);
        Ok(())
    })
}

/// A connection that publishes as fast as the broker acknowledges.
struct Sender {
    mqtt: Mqtt,
    messages: Messages,
    sent: u64,
    acknowledged: u64,
}

impl Sender {
    async fn connect(port: u16, messages: Messages, name: &str) -> Result<Self> {
        let mqtt = Mqtt::connect(&MqttOptions::new(port, name)).await?;
        Ok(Self { mqtt, messages, sent: 0, acknowledged: 0 })
    }

    fn waiting(&self) -> usize {
        (self.sent - self.acknowledged) as usize
    }

    fn encode(&mut self, counter: u64, into: &mut Vec<u8>) -> Result<()> {
        // Answers come in order, and far fewer wait than there are ids.
        let packet_id = (self.sent % u64::from(u16::MAX)) as u16 + 1;
        self.sent += 1;
        (self.messages)(packet_id, counter, into)
    }

    /// Takes the acknowledgements that are there.
    fn take_answers(&mut self) -> Result<()> {
        while let Some(packet) = self.mqtt.take()? {
            if let Packet::PubAck(answer) = packet {
                let taken = [PubAckReason::Success, PubAckReason::NoMatchingSubscribers];
                anyhow::ensure!(taken.contains(&answer.reason), "refused: {:?}", answer.reason);
                self.acknowledged += 1;
            }
        }
        Ok(())
    }

    async fn flood(&mut self, counters: std::ops::Range<u64>) -> Result<()> {
        let mut next = counters.start;
        let mut bytes = Vec::with_capacity(2 * WRITE_BYTES);
        while next < counters.end || self.waiting() > 0 {
            bytes.clear();
            while next < counters.end && self.waiting() < WINDOW && bytes.len() < WRITE_BYTES {
                self.encode(next, &mut bytes)?;
                next += 1;
            }
            if bytes.is_empty() {
                self.mqtt.fill().await?;
            } else {
                self.mqtt.write(&bytes).await?;
            }
            self.take_answers()?;
        }
        Ok(())
    }
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("make a runtime")
}

/// A publisher on a thread of its own.
pub struct Load<T>(JoinHandle<Result<T>>);

impl<T> Load<T> {
    /// Waits until the broker has acknowledged everything.
    ///
    /// # Errors
    /// When the broker refused a message or went away.
    pub fn join(self) -> Result<T> {
        self.0.join().unwrap_or_else(|_| Err(anyhow!("the publisher panicked")))
    }
}

/// Publishes so many messages over several connections as fast as the broker takes them.
pub fn flood(port: u16, topic: &str, count: u64) -> Load<()> {
    let topic = topic.to_owned();
    Load(std::thread::spawn(move || {
        runtime()?.block_on(async {
            let share = count.div_ceil(CONNECTIONS);
            let parts = (0..CONNECTIONS).map(|number| {
                let (first, last) = (number * share, ((number + 1) * share).min(count));
                let topic = topic.as_str();
                async move {
                    let mut sender =
                        Sender::connect(port, meter(topic)?, &format!("load-{number}")).await?;
                    sender.flood(FIRST + first..FIRST + last).await
                }
            });
            futures_util::future::try_join_all(parts).await.map(drop)
        })
    }))
}

/// Publishes the messages of these counters in order as fast as the broker takes them.
pub fn burst(port: u16, messages: Messages, counters: std::ops::Range<u64>) -> Load<()> {
    Load(std::thread::spawn(move || {
        runtime()?.block_on(async {
            Sender::connect(port, messages, "load").await?.flood(counters).await
        })
    }))
}

/// Publishes the messages of these counters, one every `pause`, and tells when each was sent.
pub fn pace(
    port: u16,
    topic: &str,
    counters: std::ops::Range<u64>,
    pause: Duration,
) -> Load<Vec<Instant>> {
    let topic = topic.to_owned();
    Load(std::thread::spawn(move || {
        runtime()?.block_on(async {
            let mut sender = Sender::connect(port, meter(&topic)?, "load").await?;
            let mut ticks = interval(pause);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let count = (counters.end - counters.start) as usize;
            let mut sent = Vec::with_capacity(count);
            let mut bytes = Vec::new();
            while sent.len() < count {
                tokio::select! {
                    _ = ticks.tick() => {
                        bytes.clear();
                        sender.encode(FIRST + counters.start + sent.len() as u64, &mut bytes)?;
                        sent.push(Instant::now());
                        sender.mqtt.write(&bytes).await?;
                    }
                    filled = sender.mqtt.fill() => {
                        filled?;
                        sender.take_answers()?;
                    }
                }
            }
            while sender.waiting() > 0 {
                sender.mqtt.fill().await?;
                sender.take_answers()?;
            }
            Ok(sent)
        })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stencil_gives_the_packet_that_the_codec_would() {
        let mut stencil = Stencil::new("some/topic").unwrap();
        let mut bytes = Vec::new();
        stencil.put(0x1234, FIRST + 7, &mut bytes);
        let Packet::Publish(packet) = Packet::read(&mut BytesMut::from(&bytes[..]), None).unwrap()
        else {
            panic!("not a PUBLISH")
        };
        assert_eq!((packet.pkid, packet.topic.as_ref()), (0x1234, &b"some/topic"[..]));
        assert_eq!(packet.payload, payload(FIRST + 7));
        serde_json::from_slice::<serde_json::Value>(&packet.payload).unwrap();
    }
}
