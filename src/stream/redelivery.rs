//! Which arriving messages were kept already.
//!
//! Three kinds, each with its own memory:
//! - **A DUP copy.** The broker sends again what it has no PUBACK for. A message counts as such a copy when it carries DUP, the
//!   session was resumed, and packet id, topic and payload are those of a record whose PUBACK may not have arrived. The id
//!   alone will not do (ids are used again), nor the payload alone (a switch says "on" many times). A record leaves this
//!   memory when the broker answers a ping that was sent after its PUBACK: from then on the id can belong to another message
//!   with the same bytes, and dropping that one would be a loss. What earlier connections left unproved is proved once a
//!   message that is no copy was acknowledged so: a broker sends its copies before anything new.
//! - **A retained copy**, sent again at a new subscription, equal to the last kept message of its topic.
//! - **A declared repeat**: same message id (or same bytes) within a window, where the stream declares one.
//!
//! Fingerprints stand in for the bytes: 64 bits of SipHash over topic and payload.

use std::collections::{HashMap, VecDeque};
use std::hash::Hasher as _;
use std::num::NonZeroUsize;

use lru::LruCache;

use super::codec::Publish;
use super::declared::Declared;
use crate::config::DedupeSettings;
use crate::domain::{Arrival, Record, Sequence};
use crate::observe::Redelivery;

/// Topics whose last kept message is remembered; beyond it the one unused for longest is forgotten, and its retained copy
/// would be kept once more.
pub const RETAINED_TOPICS_MAX: usize = 10_000;

/// A message in 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// Kept messages whose PUBACK is not proved to have arrived, remembered to know their copies by; beyond it the oldest are
/// forgotten, and a copy of one would be kept once more. Several times the packet ids there are: Mosquitto that drains a
/// queue puts all of it in flight whatever the receive maximum, uses ids again meanwhile, and answers a ping behind it all.
pub const UNPROVED_MAX: usize = 1 << 18;

/// How far acknowledgement has come: the messages taken in by this process, and the sequence of the last record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Acknowledged {
    pub taken: u64,
    pub sequence: Sequence,
}

/// By what a copy is known: packet id, and topic and payload.
type Key = (u16, u64);

/// What a broker may send again on this connection: left unproved by earlier ones.
#[derive(Debug, Clone, Default)]
struct Carried {
    /// Oldest first.
    order: Vec<Key>,
    /// How many of each are in `order`, less what was found again.
    counts: HashMap<Key, u32>,
}

impl Carried {
    fn push(&mut self, key: Key) {
        self.order.push(key);
        *self.counts.entry(key).or_default() += 1;
    }

    /// True once for each that was pushed.
    fn find(&mut self, key: Key) -> bool {
        let Some(count) = self.counts.get_mut(&key) else { return false };
        *count -= 1;
        if *count == 0 {
            self.counts.remove(&key);
        }
        true
    }

    fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// What was not found again, oldest first.
    fn into_rest(mut self) -> Vec<Key> {
        let order = std::mem::take(&mut self.order);
        let mut rest: Vec<_> = order.into_iter().rev().filter(|key| self.find(*key)).collect();
        rest.reverse();
        rest
    }
}

/// The memory of one stream. It lives as long as the part, over all its connections.
#[derive(Debug)]
pub struct Repeats {
    /// Taken on this connection and not proved, each with its number among all taken.
    unproved: VecDeque<(Key, u64)>,
    carried: Carried,
    /// The first message on this connection that was no copy of any kind.
    first_new: Option<u64>,
    resumed: bool,
    taken: u64,
    /// Until everything up to here is durable, what is carried and copied cannot be told from what is not.
    unclear_upto: u64,
    /// Everything up to here is proved to be acknowledged at the broker.
    proved: Sequence,
    retained: LruCache<u64, u64>,
    declared: Option<Declared>,
}

impl Repeats {
    pub fn new(dedupe: Option<&DedupeSettings>) -> Self {
        let topics = NonZeroUsize::new(RETAINED_TOPICS_MAX).expect("a constant above zero");
        Repeats {
            unproved: VecDeque::new(),
            carried: Carried::default(),
            first_new: None,
            resumed: false,
            taken: 0,
            unclear_upto: 0,
            proved: Sequence::ZERO,
            retained: LruCache::new(topics),
            declared: dedupe.map(Declared::new),
        }
    }

    /// The broker let us in. Ids of a session it does not know any more mean nothing.
    pub fn on_let_in(&mut self, session_present: bool, durable: Sequence) {
        self.resumed = session_present;
        self.first_new = None;
        self.unclear_upto = self.taken;
        let unproved = std::mem::take(&mut self.unproved);
        let carried = std::mem::take(&mut self.carried);
        if session_present {
            let mut known = carried.into_rest();
            known.extend(unproved.into_iter().map(|(key, _)| key));
            let forgotten = known.len().saturating_sub(UNPROVED_MAX);
            known.into_iter().skip(forgotten).for_each(|key| self.carried.push(key));
        } else {
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
            if self.unproved.len() == UNPROVED_MAX {
                self.unproved.pop_front();
            }
            self.unproved.push_back(((publish.packet_id, fingerprint.message), self.taken));
        }
        if verdict == Some(Redelivery::Dup) {
            self.unclear_upto = self.taken;
        }
        if !publish.flags.dup && !publish.flags.retain {
            self.first_new.get_or_insert(self.taken);
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
            // Not among what this connection brought: a broker repeats itself only after a new connection, and what has
            // the same id and bytes here is another publication of a broker with more in flight than there are ids.
            if self.carried.find((publish.packet_id, fingerprint.message)) {
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
        let proved = self.unproved.partition_point(|(_, taken)| *taken <= upto.taken);
        self.unproved.drain(..proved);
        if self.first_new.is_some_and(|first| first <= upto.taken) {
            self.carried = Carried::default();
        }
        if self.carried.is_empty() {
            self.proved = self.proved.max(upto.sequence);
        }
    }

    pub fn proved(&self) -> Sequence {
        self.proved
    }

    /// Topic and message of each remembered topic, the one unused for longest first.
    pub fn retained(&self) -> impl Iterator<Item = Fingerprint> {
        self.retained.iter().rev().map(|(&topic, &message)| Fingerprint { topic, message })
    }

    /// Packet id and message of what is durable and not proved; `None` while that is unclear.
    pub fn unproved(&self, durable: Acknowledged) -> Option<Vec<(u16, u64)>> {
        if self.unclear_upto > durable.taken {
            return None;
        }
        let mut known = self.carried.clone().into_rest();
        let of_this_connection = self.unproved.iter().filter(|(_, taken)| *taken <= durable.taken);
        known.extend(of_this_connection.map(|(key, _)| *key));
        Some(known)
    }

    /// At the start of the part: what an earlier life had proved and noted.
    pub fn restore_notes(
        &mut self,
        proved: Sequence,
        unproved: &[(u16, u64)],
        retained: &[Fingerprint],
    ) {
        self.proved = proved;
        unproved.iter().for_each(|key| self.carried.push(*key));
        for fingerprint in retained {
            self.on_durable(*fingerprint);
        }
    }

    /// At the start of the part: a kept record, in order. `fresh` when no note covers it.
    pub fn restore(&mut self, record: &Record<'_>, fresh: bool) {
        let fingerprint = Fingerprint::of(record.topic.as_bytes(), record.payload);
        if fresh {
            if record.packet_id != 0 {
                self.carried.push((record.packet_id, fingerprint.message));
            }
            self.on_durable(fingerprint);
        }
        if let Some(declared) = &mut self.declared {
            let (topic, payload) = (record.topic.as_bytes(), record.payload);
            declared.seen(topic, payload, fingerprint, record.arrival);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::config::DedupeKey;
    use crate::domain::DeliveryFlags;

    struct Memory {
        repeats: Repeats,
        now: i64,
    }

    impl Memory {
        fn new(dedupe: Option<&DedupeSettings>) -> Self {
            Memory { repeats: Repeats::new(dedupe), now: 0 }
        }

        /// In a session the broker knew.
        fn resumed() -> Self {
            let mut memory = Memory::new(None);
            memory.repeats.on_let_in(true, Sequence::ZERO);
            memory
        }

        fn judge(&mut self, packet_id: u16, payload: &str, marks: &str) -> Option<Redelivery> {
            let flags = DeliveryFlags {
                qos: 1,
                dup: marks.contains("dup"),
                retain: marks.contains("retain"),
                truncated: false,
            };
            let topic = Bytes::from_static(b"topic");
            let payload = Bytes::copy_from_slice(payload.as_bytes());
            let fingerprint = Fingerprint::of(&topic, &payload);
            let publish = Publish { topic, payload, packet_id, flags };
            let verdict = self.repeats.judge(&publish, fingerprint, Arrival(self.now), |_| None);
            if verdict.is_none() {
                self.repeats.on_durable(fingerprint);
            }
            verdict
        }

        /// A new connection, in the same session.
        fn reconnect(&mut self) {
            self.repeats.on_let_in(true, Sequence(self.repeats.taken()));
        }

        fn proved(&mut self, taken: u64) {
            self.repeats.on_proved(Acknowledged { taken, sequence: Sequence(taken) });
        }
    }

    #[test]
    fn a_dup_copy_in_a_resumed_session_is_recognised_over_any_number_of_connections() {
        let mut memory = Memory::resumed();
        assert_eq!(memory.judge(7, "on", ""), None);
        for _ in 0..3 {
            memory.reconnect();
            assert_eq!(memory.judge(7, "on", "dup"), Some(Redelivery::Dup));
        }
    }

    #[test]
    fn id_payload_mark_and_session_must_all_agree() {
        let mut memory = Memory::resumed();
        assert_eq!(memory.judge(7, "on", ""), None);
        memory.reconnect();
        assert_eq!(memory.judge(8, "on", "dup"), None, "another id");
        assert_eq!(memory.judge(7, "off", "dup"), None, "another payload");
        assert_eq!(memory.judge(7, "off", ""), None, "no mark: a second publication");
        memory.repeats.on_let_in(false, Sequence(4));
        assert_eq!(memory.judge(7, "off", "dup"), None, "another session");
    }

    #[test]
    fn each_kept_message_is_known_again_once() {
        let mut memory = Memory::resumed();
        memory.judge(7, "on", "");
        memory.reconnect();
        assert_eq!(memory.judge(7, "on", "dup"), Some(Redelivery::Dup));
        assert_eq!(memory.judge(7, "on", "dup"), None, "under way twice, received once");
        memory.reconnect();
        assert_eq!(memory.judge(7, "on", "dup"), Some(Redelivery::Dup));
        assert_eq!(memory.judge(7, "on", "dup"), Some(Redelivery::Dup));
        assert_eq!(memory.judge(7, "on", "dup"), None);
    }

    #[test]
    fn once_the_broker_has_the_puback_the_id_belongs_to_another_message() {
        let mut memory = Memory::resumed();
        memory.judge(7, "on", "");
        memory.judge(8, "on", "");
        memory.proved(1);
        memory.reconnect();
        assert_eq!(memory.judge(7, "on", "dup"), None, "proved");
        assert_eq!(memory.judge(8, "on", "dup"), Some(Redelivery::Dup), "not proved");
        assert_eq!(memory.repeats.proved(), Sequence(1));
    }

    #[test]
    fn what_an_earlier_connection_left_is_proved_by_the_first_new_message_only() {
        let mut memory = Memory::resumed();
        (1..=3).for_each(|id| assert_eq!(memory.judge(id, "on", ""), None));
        memory.reconnect();
        assert_eq!(memory.judge(1, "on", "dup"), Some(Redelivery::Dup));
        memory.proved(4);
        assert_eq!(memory.repeats.proved(), Sequence(0), "2 and 3 may still come again");
        assert_eq!(memory.judge(2, "on", "dup"), Some(Redelivery::Dup));
        assert_eq!(memory.judge(4, "on", ""), None);
        memory.proved(6);
        assert_eq!(memory.repeats.proved(), Sequence(6), "a new one: no more copies come");
        assert_eq!(memory.judge(3, "on", "dup"), None);
    }

    #[test]
    fn more_in_flight_than_there_are_packet_ids_is_known_again_up_to_the_bound() {
        let mut memory = Memory::resumed();
        let id = |n: usize| u16::try_from(n % 65_535 + 1).unwrap();
        let payload = |n: usize| n.to_string();
        let count = UNPROVED_MAX + 10;
        (0..count).for_each(|n| assert_eq!(memory.judge(id(n), &payload(n), ""), None));
        memory.reconnect();
        for n in 0..count {
            let known = (n >= 10).then_some(Redelivery::Dup);
            assert_eq!(memory.judge(id(n), &payload(n), "dup"), known, "{n}");
        }
    }

    #[test]
    fn a_retained_copy_counts_only_against_the_last_message_of_its_topic() {
        let mut memory = Memory::new(None);
        assert_eq!(memory.judge(1, "a", "retain"), None);
        assert_eq!(memory.judge(2, "a", "retain"), Some(Redelivery::Retained));
        assert_eq!(memory.judge(3, "a", ""), None, "without the mark it is a publication");
        assert_eq!(memory.judge(4, "b", ""), None);
        assert_eq!(memory.judge(5, "a", "retain"), None);
    }

    #[test]
    fn a_declared_id_repeats_within_its_window_of_time_and_count() {
        let settings = DedupeSettings {
            key: DedupeKey::MessageId(vec!["id".to_owned()]),
            window: Duration::from_secs(10),
            window_messages: 2,
        };
        let mut memory = Memory::new(Some(&settings));
        assert_eq!(memory.judge(1, r#"{"id":1,"v":1}"#, ""), None);
        assert_eq!(memory.judge(2, r#"{"id":1,"v":2}"#, ""), Some(Redelivery::MessageId));
        assert_eq!(memory.judge(3, r#"{"v":2}"#, ""), None, "no id");
        assert_eq!(memory.judge(4, r#"{"v":2}"#, ""), None, "no id never repeats");
        memory.now = 11_000_000;
        assert_eq!(memory.judge(5, r#"{"id":1}"#, ""), None, "too old");
        assert_eq!(memory.judge(6, r#"{"id":2}"#, ""), None);
        assert_eq!(memory.judge(7, r#"{"id":3}"#, ""), None);
        assert_eq!(memory.judge(8, r#"{"id":1}"#, ""), None, "too many since");
        assert_eq!(memory.judge(9, r#"{"id":3}"#, ""), Some(Redelivery::MessageId));
    }

    #[test]
    fn a_new_life_remembers_what_was_not_proved() {
        let record = |sequence, packet_id, payload: &'static str| Record {
            sequence: Sequence(sequence),
            arrival: Arrival(0),
            topic: "topic",
            payload: payload.as_bytes(),
            flags: DeliveryFlags { qos: 1, ..DeliveryFlags::default() },
            packet_id,
        };
        let mut memory = Memory::new(None);
        let of = |payload: &str| Fingerprint::of(b"topic", payload.as_bytes());
        let noted = [(4, of("of a dropped generation").message), (6, of("two").message)];
        memory.repeats.restore_notes(Sequence(1), &noted, &[of("old")]);
        memory.repeats.restore(&record(1, 5, "one"), false);
        memory.repeats.restore(&record(2, 6, "two"), false);
        assert_eq!(memory.judge(0, "old", "retain"), Some(Redelivery::Retained), "noted");
        memory.repeats.restore(&record(3, 7, "three"), true);
        assert_eq!(memory.judge(0, "three", "retain"), Some(Redelivery::Retained), "read again");
        memory.repeats.on_let_in(true, Sequence(3));
        assert_eq!(memory.judge(5, "one", "dup"), None, "proved before");
        assert_eq!(memory.judge(4, "of a dropped generation", "dup"), Some(Redelivery::Dup));
        assert_eq!(memory.judge(6, "two", "dup"), Some(Redelivery::Dup));
        assert_eq!(
            memory.judge(6, "two", "dup"),
            None,
            "in the note and in the log, yet one message"
        );
        assert_eq!(memory.judge(7, "three", "dup"), Some(Redelivery::Dup), "in no note");
    }

    #[test]
    fn a_note_waits_for_copies_under_way_and_holds_nothing_that_is_not_durable() {
        let upto = |taken| Acknowledged { taken, sequence: Sequence(taken) };
        let mut memory = Memory::resumed();
        memory.judge(1, "one", "");
        memory.judge(2, "two", "");
        let ids = |memory: &Memory, taken| -> Option<Vec<u16>> {
            Some(memory.repeats.unproved(upto(taken))?.into_iter().map(|(id, _)| id).collect())
        };
        assert_eq!(ids(&memory, 1), Some(vec![1]));
        memory.reconnect();
        assert_eq!(ids(&memory, 1), None, "the second is carried, and not durable");
        memory.judge(2, "two", "dup");
        assert_eq!(ids(&memory, 2), None);
        assert_eq!(ids(&memory, 3), Some(vec![1, 2]));
    }
}
