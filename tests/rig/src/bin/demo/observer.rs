//! A second listener at the broker: what was really sent, to work out what must be in topics and tables.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bytes::BytesMut;
use rig::{Homelab, Mqtt, MqttOptions, block_on, spawn};
use rumqttc::v5::mqttbytes::v5::{Packet, PubAck};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A message as the broker handed it out.
#[derive(Debug, Clone)]
pub struct Message {
    pub topic: String,
    pub sha256: String,
    /// `None` when it is not JSON.
    pub payload: Option<Value>,
}

type Seen = Arc<Mutex<Vec<(String, Message)>>>;

/// Listens to every stream of the configuration, from its making until its end.
pub struct Observer {
    seen: Seen,
}

impl Observer {
    /// Subscribes.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn start(port: u16, homelab: &Homelab) -> Result<Self> {
        let seen = Seen::default();
        for stream in homelab.names("streams") {
            let filter = homelab.text(&["streams", &stream, "topic_filter"]);
            let filter =
                filter.with_context(|| format!("{stream} has no topic_filter"))?.to_owned();
            let options = MqttOptions::new(port, &format!("demo-observer-{stream}"));
            let mqtt = block_on(async move {
                let mut mqtt = Mqtt::connect(&options).await?;
                mqtt.subscribe(&filter).await?;
                anyhow::Ok(mqtt)
            })?;
            // It ends with the broker, which the demo itself ends last.
            spawn(listen(mqtt, stream, seen.clone()));
        }
        Ok(Self { seen })
    }

    /// What a stream has sent so far, in the broker's order.
    pub fn stream(&self, name: &str) -> Vec<Message> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter()
            .filter(|(stream, _)| stream == name)
            .map(|(_, message)| message.clone())
            .collect()
    }
}

async fn listen(mut mqtt: Mqtt, stream: String, seen: Seen) -> Result<()> {
    let mut answers = BytesMut::new();
    loop {
        while let Some(packet) = mqtt.take()? {
            let Packet::Publish(message) = packet else { continue };
            let entry = Message {
                topic: String::from_utf8_lossy(&message.topic).into_owned(),
                sha256: Sha256::digest(&message.payload)
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect(),
                payload: serde_json::from_slice(&message.payload).ok(),
            };
            seen.lock().unwrap_or_else(PoisonError::into_inner).push((stream.clone(), entry));
            if message.pkid != 0 {
                PubAck::new(message.pkid, None).write(&mut answers)?;
            }
        }
        mqtt.write(&answers).await?;
        answers.clear();
        mqtt.fill().await?;
    }
}
