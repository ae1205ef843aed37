//! Repeats by what the stream declares: a message id, or the whole message, that came before within a window.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use super::message_id::MessageIdPath;
use super::redelivery::Fingerprint;
use crate::config::{DedupeKey, DedupeSettings};
use crate::domain::Arrival;

/// Message ids (or whole messages) of the last while.
#[derive(Debug)]
pub struct Declared {
    /// Empty: topic and payload are the id.
    paths: Vec<MessageIdPath>,
    window: Duration,
    window_messages: usize,
    seen: HashSet<u64>,
    order: VecDeque<(u64, Arrival)>,
}

impl Declared {
    pub fn new(settings: &DedupeSettings) -> Self {
        let paths = match &settings.key {
            DedupeKey::Payload => Vec::new(),
            DedupeKey::MessageId(paths) => paths.iter().map(|p| MessageIdPath::parse(p)).collect(),
        };
        Declared {
            paths,
            window: settings.window,
            window_messages: settings.window_messages,
            seen: HashSet::new(),
            order: VecDeque::new(),
        }
    }

    /// True when it came before within the window; else it is remembered. A message without an id never repeats.
    pub fn seen(
        &mut self,
        topic: &[u8],
        payload: &[u8],
        fingerprint: Fingerprint,
        arrival: Arrival,
    ) -> bool {
        let Some(id) = self.id(topic, payload, fingerprint) else { return false };
        self.forget_older_than_the_window(arrival);
        if self.seen.contains(&id) {
            return true;
        }
        while self.order.len() >= self.window_messages.max(1) {
            self.forget_oldest();
        }
        self.seen.insert(id);
        self.order.push_back((id, arrival));
        false
    }

    fn id(&self, topic: &[u8], payload: &[u8], fingerprint: Fingerprint) -> Option<u64> {
        if self.paths.is_empty() {
            return Some(fingerprint.message);
        }
        let document: serde_json::Value = serde_json::from_slice(payload).ok()?;
        let mut id = Vec::new();
        for path in &self.paths {
            let value = path.find(&document).filter(|value| !value.is_null())?;
            // Writing a value to a Vec cannot fail.
            serde_json::to_writer(&mut id, value).ok()?;
            id.push(0);
        }
        // The topic belongs to the id: it often names the device, and counters of two devices meet.
        Some(Fingerprint::of(topic, &id).message)
    }

    fn forget_older_than_the_window(&mut self, now: Arrival) {
        let window = i64::try_from(self.window.as_micros()).unwrap_or(i64::MAX);
        while let Some(&(_, arrival)) = self.order.front()
            && now.as_micros().saturating_sub(arrival.as_micros()) > window
        {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((id, _)) = self.order.pop_front() {
            self.seen.remove(&id);
        }
    }
}
