//! Readings at a steady pace, each with a number of its own, and the ledger of what the broker took.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rig::{Ledger, MqttOptions, Publisher, PublisherOptions};
use serde_json::{Value, json};

const PER_SECOND: u64 = 1_000;
const PACE: Duration = Duration::from_millis(10);
const STREAM: &str = "energy";
const TOPIC: &str = "saveeye/telemetry";
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

pub struct Load {
    publisher: Arc<Publisher>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Begins to publish to the broker on this port, as this user.
    pub fn begin(port: u16, login: (&str, &str)) -> Self {
        let mut mqtt = MqttOptions::new(port, "load");
        mqtt.clean_start = false;
        mqtt.login = Some((login.0.to_owned(), login.1.to_owned()));
        let publisher = Arc::new(Publisher::with(PublisherOptions { mqtt, window: 1_000 }));
        let ended = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (publisher, ended) = (publisher.clone(), ended.clone());
            move || publish(&publisher, &ended)
        });
        Load { publisher, ended, thread: Some(thread) }
    }

    /// What was published until now.
    pub fn published(&self) -> u64 {
        self.publisher.count() as u64
    }

    /// Ends, waits for the broker's answers, and gives the ledger.
    pub fn end(mut self) -> Result<Ledger> {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the publisher's thread panicked"))?;
        }
        self.publisher.flush(ANSWERED_WITHIN)?;
        Ok(self.publisher.ledger())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn publish(publisher: &Publisher, ended: &AtomicBool) {
    let began = Instant::now();
    let mut number = 0;
    while !ended.load(Ordering::Relaxed) {
        let due = began.elapsed().as_millis() as u64 * PER_SECOND / 1_000;
        while number < due {
            publisher.publish(STREAM, TOPIC, reading(number));
            number += 1;
        }
        std::thread::sleep(PACE);
    }
}

fn reading(number: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "meterType": "made up",
        "activeActualConsumption": {"total": number % 5_000}, "activeTotalConsumption": {"total": number}})
    .to_string()
}

/// The number of a reading.
pub fn number(payload: &[u8]) -> Result<String> {
    let reading: Value = serde_json::from_slice(payload).context("a reading")?;
    Ok(reading["activeTotalConsumption"]["total"].to_string())
}
