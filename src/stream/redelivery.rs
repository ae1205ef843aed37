//! Which arriving messages were kept already.
//!
//! Three kinds, each with its own memory:
//! - **A DUP copy.** The broker sends again what it has no PUBACK for. A message counts as such a copy when it carries DUP, the
//!   session was resumed, and packet id, topic and payload are those of a record whose PUBACK may not have arrived. The id
//!   alone will not do (ids are used again), nor the payload alone (a switch says "on" many times). A record leaves this
//!   memory when the broker answers a ping that was sent after its PUBACK: from then on the id can belong to another message
//!   with the same bytes, and dropping that one would be a loss. What is not proved stays, over any number of connections.
//! - **A retained copy**, sent again at a new subscription, equal to the last kept message of its topic.
//! - **A declared repeat**: same message id (or same bytes) within a window, where the stream declares one.
//!
//! Fingerprints stand in for the bytes: 64 bits of SipHash over topic and payload.

use std::collections::{HashMap, VecDeque};
use std::hash::Hasher as _;
use std::num::NonZeroUsize;
use std::time::Duration;

use lru::LruCache;

use super::codec::Publish;
use super::message_id::MessageIdPath;
use crate::config::{DedupeKey, DedupeSettings};
use crate::domain::{Arrival, Record, Sequence};
use crate::observe::Redelivery;

/// Topics whose last kept message is remembered; beyond it the one unused for longest is forgotten, and its retained copy
/// would be kept once more.
pub const RETAINED_TOPICS_MAX: usize = 10_000;

/// A message in 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint {
    pub topic: u64,
    /// Of topic and payload.
    pub message: u64,
}

impl Fingerprint {
    pub fn of(topic: &[u8], payload: &[u8]) -> Self {
        // Without random keys: fingerprints outlive the process.
        let mut hasher = std::hash::DefaultHasher::new();
        hasher.write(topic);
        hasher.write_u8(0);
        let topic = hasher.finish();
        hasher.write(payload);
        Fingerprint { topic, message: hasher.finish() }
    }
}

/// How far acknowledgement has come: the messages taken in by this process, and the sequence of the last record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Acknowledged {
    pub taken: u64,
    pub sequence: Sequence,
}

#[derive(Debug, Clone, Copy)]
struct Unproved {
    message: u64,
    taken: u64,
}

/// The memory of one stream. It lives as long as the part, over all its connections.
#[derive(Debug)]
pub struct Repeats {
    /// By packet id, so bounded by the id space.
    unproved: HashMap<u16, Unproved>,
    resumed: bool,
    taken: u64,
    /// Everything up to here is proved to be acknowledged at the broker.
    proved: Sequence,
    retained: LruCache<u64, u64>,
    declared: Option<Declared>,
}

impl Repeats {
    pub fn new(dedupe: Option<&DedupeSettings>) -> Self {
        let topics = NonZeroUsize::new(RETAINED_TOPICS_MAX).expect("a constant above zero");
        Repeats {
            unproved: HashMap::new(),
            resumed: false,
            taken: 0,
            proved: Sequence::ZERO,
            retained: LruCache::new(topics),
            declared: dedupe.map(Declared::new),
        }
    }

    /// The broker let us in. Ids of a session it does not know any more mean nothing.
    pub fn on_let_in(&mut self, session_present: bool, durable: Sequence) {
        self.resumed = session_present;
        if !session_present {
            self.unproved.clear();
            self.proved = self.proved.max(durable);
        }
    }

    /// Counts a message, and says why it is not to be kept, if so. One that is to be kept is remembered by its id and by its
    /// declared id from here on, though not yet durable: acknowledgements leave in order, so a copy's waits for the original.
    ///
    /// `kept_last` answers what was last kept for a topic among what is not yet durable.
    pub fn judge(
        &mut self,
        publish: &Publish,
        fingerprint: Fingerprint,
        arrival: Arrival,
        kept_last: impl FnOnce(u64) -> Option<u64>,
    ) -> Option<Redelivery> {
        self.taken += 1;
        let verdict = self.repeat(publish, fingerprint, arrival, kept_last);
        if matches!(verdict, None | Some(Redelivery::Dup)) && publish.packet_id != 0 {
            let unproved = Unproved { message: fingerprint.message, taken: self.taken };
            self.unproved.insert(publish.packet_id, unproved);
        } else {
            // The broker uses the id again, so it has the PUBACK of whatever had it before.
            self.unproved.remove(&publish.packet_id);
        }
        verdict
    }

    fn repeat(
        &mut self,
        publish: &Publish,
        fingerprint: Fingerprint,
        arrival: Arrival,
        kept_last: impl FnOnce(u64) -> Option<u64>,
    ) -> Option<Redelivery> {
        if publish.flags.dup && self.resumed {
            let known = self.unproved.get(&publish.packet_id);
            if known.is_some_and(|known| known.message == fingerprint.message) {
                return Some(Redelivery::Dup);
            }
        }
        if publish.flags.retain {
            let last = kept_last(fingerprint.topic)
                .or_else(|| self.retained.get(&fingerprint.topic).copied());
            if last == Some(fingerprint.message) {
                return Some(Redelivery::Retained);
            }
        }
        let declared = self.declared.as_mut()?;
        let repeated = declared.seen(&publish.topic, &publish.payload, fingerprint, arrival);
        repeated.then_some(Redelivery::MessageId)
    }

    /// Messages judged so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// A kept message is durable.
    pub fn on_durable(&mut self, fingerprint: Fingerprint) {
        self.retained.put(fingerprint.topic, fingerprint.message);
    }

    /// The broker has read every acknowledgement up to here.
    pub fn on_proved(&mut self, upto: Acknowledged) {
        self.unproved.retain(|_, unproved| unproved.taken > upto.taken);
        self.proved = self.proved.max(upto.sequence);
    }

    pub fn proved(&self) -> Sequence {
        self.proved
    }

    /// Topic and message of each remembered topic, the one unused for longest first.
    pub fn retained(&self) -> impl Iterator<Item = Fingerprint> {
        self.retained.iter().rev().map(|(&topic, &message)| Fingerprint { topic, message })
    }

    /// At the start of the part: what an earlier life had proved and noted.
    pub fn restore_notes(&mut self, proved: Sequence, retained: &[Fingerprint]) {
        self.proved = proved;
        for fingerprint in retained {
            self.on_durable(*fingerprint);
        }
    }

    /// At the start of the part: a kept record, in order. `fresh` when the saved fingerprints do not cover it.
    pub fn restore(&mut self, record: &Record<'_>, fresh: bool) {
        let fingerprint = Fingerprint::of(record.topic.as_bytes(), record.payload);
        if record.packet_id != 0 && record.sequence > self.proved {
            self.taken += 1;
            let unproved = Unproved { message: fingerprint.message, taken: self.taken };
            self.unproved.insert(record.packet_id, unproved);
        }
        if fresh {
            self.on_durable(fingerprint);
        }
        if let Some(declared) = &mut self.declared {
            let (topic, payload) = (record.topic.as_bytes(), record.payload);
            declared.seen(topic, payload, fingerprint, record.arrival);
        }
    }
}

/// Which ping was sent after which acknowledgements. One is followed at a time; it dies with the connection.
#[derive(Debug, Default)]
pub struct Proof {
    asked: u64,
    answered: u64,
    followed: Option<(u64, Acknowledged)>,
}

impl Proof {
    /// A ping was written behind these acknowledgements.
    pub fn on_ping(&mut self, acknowledged: Acknowledged) {
        self.asked += 1;
        if self.followed.is_none() {
            self.followed = Some((self.asked, acknowledged));
        }
    }

    /// What an answered ping proves.
    pub fn on_answer(&mut self) -> Option<Acknowledged> {
        self.answered += 1;
        let (_, acknowledged) = self.followed.take_if(|(ping, _)| *ping <= self.answered)?;
        Some(acknowledged)
    }
}

/// Message ids (or whole messages) of the last while.
#[derive(Debug)]
struct Declared {
    /// Empty: topic and payload are the id.
    paths: Vec<MessageIdPath>,
    window: Duration,
    window_messages: usize,
    seen: HashMap<u64, Arrival>,
    order: VecDeque<(u64, Arrival)>,
}

impl Declared {
    fn new(settings: &DedupeSettings) -> Self {
        let paths = match &settings.key {
            DedupeKey::Payload => Vec::new(),
            DedupeKey::MessageId(paths) => paths.iter().map(|p| MessageIdPath::parse(p)).collect(),
        };
        Declared {
            paths,
            window: settings.window,
            window_messages: settings.window_messages,
            seen: HashMap::new(),
            order: VecDeque::new(),
        }
    }

    /// True when it came before within the window; else it is remembered. A message without an id never repeats.
    fn seen(
        &mut self,
        topic: &[u8],
        payload: &[u8],
        fingerprint: Fingerprint,
        arrival: Arrival,
    ) -> bool {
        let Some(id) = self.id(topic, payload, fingerprint) else { return false };
        self.forget(arrival);
        if self.seen.contains_key(&id) {
            return true;
        }
        self.seen.insert(id, arrival);
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

    fn forget(&mut self, now: Arrival) {
        let window = i64::try_from(self.window.as_micros()).unwrap_or(i64::MAX);
        while let Some(&(id, arrival)) = self.order.front() {
            let old = now.as_micros().saturating_sub(arrival.as_micros()) > window;
            if !old && self.order.len() < self.window_messages.max(1) {
                return;
            }
            self.order.pop_front();
            self.seen.remove(&id);
        }
    }
}
