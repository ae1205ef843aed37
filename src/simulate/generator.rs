//! The messages of one stream, one after the other, the same for the same seed.

use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::faults::{Fault, FaultRates};
use super::kind::{Device, Kind};

/// One publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub fault: Option<Fault>,
}

/// Makes the messages of one stream; its devices take turns.
#[derive(Debug)]
pub struct Generator {
    topic_filter: String,
    devices: Vec<Device>,
    turn: usize,
    faults: FaultRates,
    random: StdRng,
}

impl Generator {
    /// `topic_filter` is what the node subscribes to: a wildcard in it becomes the device's name.
    pub fn new(
        kind: Kind,
        topic_filter: &str,
        devices: usize,
        faults: FaultRates,
        seed: u64,
    ) -> Self {
        // Streams differ although they share a seed.
        let own_seed = seed ^ (kind as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Generator {
            topic_filter: without_share(topic_filter).to_owned(),
            devices: (0..devices.max(1)).map(|n| Device::new(kind, n)).collect(),
            turn: 0,
            faults,
            random: StdRng::seed_from_u64(own_seed),
        }
    }

    /// What is published at this turn: one message, none (a gap) or two (a duplicate).
    pub fn next(&mut self, at: Timestamp) -> Vec<Message> {
        let fault = self.faults.draw(&mut self.random);
        let at_turn = self.turn % self.devices.len();
        self.turn += 1;
        let device = &mut self.devices[at_turn];
        let mut payload = device.next(&mut self.random, at, fault).into_bytes();
        if fault == Some(Fault::Malformed) {
            damage(&mut payload, &mut self.random);
        }
        let topic = self.topic_filter.replace(['+', '#'], &device.name);
        let message = Message { topic, payload, fault };
        match fault {
            Some(Fault::Gap) => Vec::new(),
            Some(Fault::Duplicate) => vec![message.clone(), message],
            _ => vec![message],
        }
    }
}

/// `$share/<group>/<filter>` is a way to subscribe, not to publish.
fn without_share(topic_filter: &str) -> &str {
    let shared = topic_filter.strip_prefix("$share/").and_then(|rest| rest.split_once('/'));
    shared.map_or(topic_filter, |(_, filter)| filter)
}

fn damage(payload: &mut Vec<u8>, random: &mut StdRng) {
    match random.random_range(0..3_u8) {
        0 => payload.clear(),
        1 => payload.truncate(random.random_range(1..payload.len())),
        _ => payload.insert(1, 0xFF),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::Value as Json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_773_472_865 + second).unwrap()
    }

    fn messages(kind: Kind, devices: usize, faults: &str, count: i64) -> Vec<Message> {
        let faults = FaultRates::parse(faults).unwrap();
        let mut generator = Generator::new(kind, kind.topic_filter(), devices, faults, 7);
        (0..count).flat_map(|second| generator.next(at(second))).collect()
    }

    #[test]
    fn the_same_seed_makes_the_same_messages_and_another_one_others() {
        for kind in Kind::ALL {
            let faults = "bad-value=0.1,gap=0.1,duplicate=0.1,wrong-clock=0.1,malformed=0.1";
            assert_eq!(messages(kind, 2, faults, 200), messages(kind, 2, faults, 200));
            let faults = FaultRates::default();
            let mut other = Generator::new(kind, kind.topic_filter(), 2, faults, 8);
            let others: Vec<_> = (0..200).flat_map(|second| other.next(at(second))).collect();
            assert_ne!(others, messages(kind, 2, "", 200));
        }
    }

    #[test]
    fn energy_stays_in_its_ranges_and_its_counter_moves_up() {
        let mut last = 100_000_000;
        for message in messages(Kind::Energy, 1, "", 500) {
            let json: Json = serde_json::from_slice(&message.payload).unwrap();
            let power = json["activeActualConsumption"]["total"].as_i64().unwrap();
            assert!((200..=1300).contains(&power));
            assert!((236..=240).contains(&json["rmsVoltage"]["L3"].as_i64().unwrap()));
            let counter = json["activeTotalConsumption"]["total"].as_i64().unwrap();
            assert!((1..=20).contains(&(counter - last)), "{last} -> {counter}");
            last = counter;
            assert_eq!(message.topic, "saveeye/telemetry");
        }
    }

    #[test]
    fn every_kind_sends_json_and_devices_take_turns() {
        for kind in Kind::ALL {
            let sent = messages(kind, 3, "", 30);
            assert_eq!(sent.len(), 30);
            for message in &sent {
                let json: Result<Json, _> = serde_json::from_slice(&message.payload);
                assert!(json.is_ok(), "{:?}", String::from_utf8_lossy(&message.payload));
                assert!(!message.topic.contains(['+', '#']));
            }
        }
        let topics: HashSet<String> =
            messages(Kind::Plug, 3, "", 9).into_iter().map(|message| message.topic).collect();
        let expected = ["tele/plug-desk/STATE", "tele/plug-1/STATE", "tele/plug-2/STATE"];
        assert_eq!(topics, expected.map(str::to_owned).into());
    }

    #[test]
    fn a_shared_subscription_is_published_to_without_its_group() {
        let faults = FaultRates::default();
        let mut generator = Generator::new(Kind::Plug, "$share/g/tele/+/STATE", 1, faults, 1);
        assert_eq!(generator.next(at(0))[0].topic, "tele/plug-desk/STATE");
    }

    #[test]
    fn each_fault_does_what_it_says() {
        assert_eq!(messages(Kind::Energy, 1, "gap=1", 10), []);
        let doubled = messages(Kind::Energy, 1, "duplicate=1", 5);
        assert_eq!(doubled.len(), 10);
        assert_eq!(doubled[0], doubled[1]);
        for message in messages(Kind::Plug, 1, "malformed=1", 50) {
            assert!(serde_json::from_slice::<Json>(&message.payload).is_err());
        }
        for message in messages(Kind::Plug, 1, "bad-value=1", 5) {
            let json: Json = serde_json::from_slice(&message.payload).unwrap();
            assert_eq!(json["POWER"], "TOGGLE");
        }
        for message in messages(Kind::Energy, 1, "wrong-clock=1", 20) {
            let json: Json = serde_json::from_slice(&message.payload).unwrap();
            assert!(!json["timestamp"].as_str().unwrap().starts_with("2026-03-14T07:2"));
        }
    }
}
