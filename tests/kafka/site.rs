//! The node with a Kafka of its own, which a test may end as it likes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use rig::{Kafka, eventually};
use serde_json::json;

use crate::world::{Changes, SOON, World};

/// The node's stream and its table; both sinks are fed by it.
pub const STREAM: &str = "energy";
const TABLE: &str = "energy_consumption";
const DEVICES: u64 = 5;

/// The homelab example, one stream of which also goes to a topic.
pub struct Site {
    pub world: World,
    topic: String,
    publisher: rig::Publisher,
    published: u64,
}

/// Lines of `[clusters.main]` that make outages short.
const QUICK: &str = r#"
retry_min_ms = 50
retry_max_ms = 1000
operation_timeout_seconds = 5
message_timeout_seconds = 10
in_flight_max = 2000
cursor_save_ms = 20
"#;

impl Site {
    /// `cluster` is the rest of `[clusters.main]`, `route` of the stream's kafka table.
    pub fn start(bootstrap: &str, topic: &str, cluster: &str, route: &str) -> Self {
        let mut world = World::prepare(Changes::default());
        let config = world.node.config().to_owned();
        let own = fs::read_to_string(&config).unwrap();
        let route = format!(
            "{own}\n[streams.{STREAM}.kafka]\ncluster = \"main\"\ntopic = \"{topic}\"\n{route}\n\
             [clusters.main]\nbootstrap_servers = [\"{bootstrap}\"]\n{QUICK}{cluster}\n"
        );
        fs::write(&config, route).unwrap();
        world.node.start().unwrap();
        world.subscribed();
        let publisher = world.publisher();
        Site { world, topic: topic.to_owned(), publisher, published: 0 }
    }

    /// Hands `count` readings of several devices to the publisher.
    pub fn publish(&mut self, count: u64) {
        for _ in 0..count {
            self.publish_one("three-phase");
        }
    }

    /// One whose record is as large as its meter's type makes it.
    pub fn publish_one(&mut self, meter_type: &str) {
        let reading = json!({
            "saveeyeDeviceSerialNumber": format!("SE-{}", self.published % DEVICES),
            "meterType": meter_type,
            "activeActualConsumption": {"total": 500},
            "activeTotalConsumption": {"total": self.published}
        });
        self.publisher.publish(STREAM, "saveeye/telemetry", reading.to_string());
        self.published += 1;
    }

    /// Readings handed over, which is the last one's sequence.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// How often Kafka refused a batch for what is in it.
    pub fn refused(&self) -> u64 {
        let page = self.world.node.get("/metrics").unwrap().body;
        let series = format!(
            "telemetry_sink_errors_total{{stream=\"{STREAM}\",sink=\"kafka\",class=\"data\"}} "
        );
        page.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(0)
    }

    /// Every reading is in the table, whatever Kafka does.
    #[track_caller]
    pub fn assert_table_follows(&self) {
        self.publisher.flush(SOON).unwrap();
        let published = self.published;
        eventually(SOON, "the table has every reading", || {
            // The first thing is that the migrator makes it.
            self.world.postgres.count("telemetry", TABLE).is_ok_and(|rows| rows == published)
        });
    }

    pub fn kafka_state(&self) -> (String, String) {
        let status = &self.world.sink(STREAM, "kafka")["status"];
        let text = |name: &str| status[name].as_str().unwrap_or_default().to_owned();
        (text("state"), text("trouble"))
    }

    /// Waits until the Kafka sink is in this state, with a text that names all of `words`.
    #[track_caller]
    pub fn says(&self, state: &str, words: &[&str]) {
        let mut last = (String::new(), String::new());
        let found = rig::until(SOON, "the state", || {
            last = self.kafka_state();
            let fits = last.0 == state && words.iter().all(|word| last.1.contains(word));
            Ok(fits.then_some(()))
        });
        assert!(found.is_ok(), "expected {state} with {words:?}, it says {last:?}");
    }

    /// Waits until both sinks are through, then judges the topic: every reading, per key in order, once its repeats
    /// are dropped by their header.
    #[track_caller]
    pub fn assert_topic_is_whole(&self, kafka: &Kafka) {
        self.assert_topic_has(kafka, 1..=self.published);
        assert_eq!(self.world.books(STREAM, "kafka", "dead_lettered"), 0);
    }

    /// As [`Site::assert_topic_is_whole`], of readings counted from 1.
    #[track_caller]
    pub fn assert_topic_has(&self, kafka: &Kafka, expected: impl IntoIterator<Item = u64>) {
        self.publisher.flush(SOON).unwrap();
        self.world.drained(Duration::from_secs(60));
        let (mut ids, mut last) = (BTreeSet::new(), BTreeMap::new());
        for record in kafka.read_topic(&self.topic).unwrap() {
            let id = record.header("telemetry-id").expect("every record is signed").to_owned();
            let sequence: u64 = id.rsplit_once('/').unwrap().1.parse().unwrap();
            if !ids.insert(sequence) {
                continue;
            }
            let before = last.insert(record.key.clone(), sequence);
            assert!(before < Some(sequence), "{sequence} after {before:?} of {:?}", record.key);
        }
        let expected: BTreeSet<u64> = expected.into_iter().collect();
        let missing: Vec<_> = expected.difference(&ids).collect();
        let foreign: Vec<_> = ids.difference(&expected).collect();
        assert!(
            missing.is_empty() && foreign.is_empty(),
            "missing {missing:?}, foreign {foreign:?}"
        );
        assert_eq!(last.len() as u64, DEVICES.min(self.published));
    }
}
