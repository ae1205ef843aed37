//! A publisher that knows, message by message, what the broker acknowledged.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PubAck, PubAckReason, Publish};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::background::spawn;
use crate::ledger::Ledger;
use crate::mqtt::{Mqtt, MqttOptions};
use crate::wait::until;

/// Messages given to the publisher and not yet sent; more, and `publish` blocks.
const QUEUE_MESSAGES: usize = 10_000;
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// Encoded messages that go out in one write.
const WRITE_BYTES: usize = 64 * 1024;

/// Who publishes, and how.
#[derive(Debug, Clone)]
pub struct PublisherOptions {
    pub mqtt: MqttOptions,
    /// Sent and not yet acknowledged, at most (and never more than the broker allows).
    pub window: u16,
}

/// Publishes with QoS 1. Reconnects by itself and sends again what was not acknowledged.
#[derive(Debug)]
pub struct Publisher {
    queue: mpsc::Sender<(u64, Publish)>,
    ledger: Arc<Mutex<Ledger>>,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Publishes to the broker on this port of 127.0.0.1; it may come later.
    pub fn new(port: u16, client_id: &str) -> Self {
        let mut mqtt = MqttOptions::new(port, client_id);
        mqtt.clean_start = false;
        Self::with(PublisherOptions { mqtt, window: 1_000 })
    }

    pub fn with(options: PublisherOptions) -> Self {
        let (queue, orders) = mpsc::channel(QUEUE_MESSAGES);
        let ledger = Arc::new(Mutex::new(Ledger::default()));
        let session = Session::new(options, ledger.clone(), orders);
        Self { queue, ledger, task: spawn(session.run()) }
    }

    /// Hands over a message, which is entered into the ledger at once; blocks while many wait. Gives its id.
    ///
    /// # Panics
    /// When the publisher's task has died, or when called from an async task (use a blocking thread there).
    pub fn publish(&self, stream: &str, topic: &str, payload: impl AsRef<[u8]>) -> u64 {
        let payload = payload.as_ref();
        let id = locked(&self.ledger).add(stream, topic, payload);
        let packet = Publish::new(topic, QoS::AtLeastOnce, Bytes::copy_from_slice(payload), None);
        let mut order = (id, packet);
        // Not `blocking_send`, which panics within a runtime.
        while let Err(error) = self.queue.try_send(order) {
            match error {
                mpsc::error::TrySendError::Full(back) => order = back,
                mpsc::error::TrySendError::Closed(_) => panic!("the publisher has ended"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        id
    }

    /// Waits until the broker has answered everything.
    ///
    /// # Errors
    /// When it has answered nothing more for so long: how fast it answers is the machine's matter.
    pub fn flush(&self, without_an_answer: Duration) -> Result<()> {
        let open = || {
            let ledger = locked(&self.ledger);
            ledger.entries().iter().filter(|e| !e.acked && e.refused.is_none()).count()
        };
        let mut before = open();
        while before > 0 {
            before = until(without_an_answer, "every publication answered by the broker", || {
                let now = open();
                Ok((now < before).then_some(now))
            })?;
        }
        Ok(())
    }

    /// How many publications the ledger has.
    pub fn count(&self) -> usize {
        locked(&self.ledger).entries().len()
    }

    /// What is known now.
    pub fn ledger(&self) -> Ledger {
        locked(&self.ledger).clone()
    }

    /// The ledger itself, which outlives the publisher.
    pub fn shared_ledger(&self) -> Arc<Mutex<Ledger>> {
        self.ledger.clone()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn locked(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().expect("no holder of the ledger panics")
}

/// What was sent and not yet answered, oldest first.
struct Sent {
    id: u64,
    packet: Publish,
}

struct Session {
    options: PublisherOptions,
    ledger: Arc<Mutex<Ledger>>,
    orders: mpsc::Receiver<(u64, Publish)>,
    sent: VecDeque<Sent>,
    next_packet_id: u16,
}

impl Session {
    fn new(
        options: PublisherOptions,
        ledger: Arc<Mutex<Ledger>>,
        orders: mpsc::Receiver<(u64, Publish)>,
    ) -> Self {
        Self { options, ledger, orders, sent: VecDeque::new(), next_packet_id: 1 }
    }

    /// Until the publisher is dropped.
    async fn run(mut self) {
        loop {
            if let Ok(mqtt) = Mqtt::connect(&self.options.mqtt).await
                && self.converse(mqtt).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    /// Ends well when there will be no more orders, badly when the connection is lost.
    async fn converse(&mut self, mut mqtt: Mqtt) -> Result<()> {
        let window = usize::from(self.options.window.min(mqtt.send_maximum));
        self.send_again(&mut mqtt).await?;
        let mut bytes = BytesMut::new();
        loop {
            tokio::select! {
                order = self.orders.recv(), if self.sent.len() < window => {
                    let Some((id, packet)) = order else { return Ok(()) };
                    self.encode(id, packet, &mut bytes)?;
                    while self.sent.len() < window && bytes.len() < WRITE_BYTES {
                        let Ok((id, packet)) = self.orders.try_recv() else { break };
                        self.encode(id, packet, &mut bytes)?;
                    }
                    mqtt.write(&bytes).await?;
                    bytes.clear();
                }
                filled = mqtt.fill() => {
                    filled?;
                    while let Some(packet) = mqtt.take()? {
                        if let Packet::PubAck(answer) = packet {
                            self.answered(&answer);
                        }
                    }
                }
            }
        }
    }

    async fn send_again(&mut self, mqtt: &mut Mqtt) -> Result<()> {
        let mut bytes = BytesMut::new();
        for sent in &mut self.sent {
            // A new session knows nothing of the first attempt: there it is no repetition.
            sent.packet.dup = mqtt.session_present;
            sent.packet.write(&mut bytes).context("encode a message")?;
            locked(&self.ledger).entry_mut(sent.id).resent = true;
        }
        mqtt.write(&bytes).await
    }

    fn encode(&mut self, id: u64, mut packet: Publish, bytes: &mut BytesMut) -> Result<()> {
        packet.pkid = self.free_packet_id();
        packet.write(bytes).context("encode a message")?;
        self.sent.push_back(Sent { id, packet });
        Ok(())
    }

    fn free_packet_id(&mut self) -> u16 {
        loop {
            let id = self.next_packet_id;
            self.next_packet_id = id.checked_add(1).unwrap_or(1);
            // Answers come in order, so the oldest is the only one that can still hold the id.
            if self.sent.front().is_none_or(|oldest| oldest.packet.pkid != id) {
                return id;
            }
        }
    }

    fn answered(&mut self, answer: &PubAck) {
        let place = self.sent.iter().position(|sent| sent.packet.pkid == answer.pkid);
        let Some(sent) = place.and_then(|place| self.sent.remove(place)) else { return };
        let mut ledger = locked(&self.ledger);
        let entry = ledger.entry_mut(sent.id);
        match answer.reason {
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => entry.acked = true,
            reason => entry.refused = Some(format!("{reason:?}")),
        }
    }
}
