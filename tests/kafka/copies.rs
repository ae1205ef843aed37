//! A copy of each dead letter in a topic of its own: every one of them, whatever was away meanwhile, and no sink waits
//! for it.

use std::collections::BTreeSet;
use std::fs;
use std::process::Output;

use rig::{Kafka, eventually};

use crate::world::{Changes, SOON, World};

const TOPIC: &str = "dead-letters";
const TABLE: &str = "energy_consumption";

/// A node whose cluster gets nothing but copies.
fn start(kafka: &Kafka, topic: &str) -> World {
    let mut world = World::prepare(Changes::default());
    let config = world.node.config().to_owned();
    let own = fs::read_to_string(&config).unwrap();
    let cluster = format!(
        "[clusters.copies]\nbootstrap_servers = [\"{}\"]\nretry_min_ms = 50\nretry_max_ms = 500\n\
         operation_timeout_seconds = 5\nmessage_timeout_seconds = 5\nmessage_bytes_max = 20_000\n\
         [clusters.copies.dead_letters]\n{topic}\n",
        kafka.bootstrap()
    );
    fs::write(&config, format!("{own}\n{cluster}")).unwrap();
    world.node.start().unwrap();
    world.subscribed();
    world
}

/// No number where one is needed: refused by the mapping.
fn bad(count: u64, pad: usize) -> String {
    let pad = "x".repeat(pad);
    format!(
        r#"{{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {{"total": "?"}}, "activeTotalConsumption": {{"total": {count}}}, "pad": "{pad}"}}"#
    )
}

fn good(count: u64) -> String {
    bad(count, 0).replace("\"?\"", "500")
}

/// Publishes and waits until the table's sink has judged all of it.
#[track_caller]
fn judged(world: &World, payloads: impl IntoIterator<Item = String>) {
    // After a start the books are known once the table's writer has read them.
    world.drained(SOON);
    let before = world.books("energy", TABLE, "cursor");
    let publisher = world.publisher();
    let mut count = 0;
    for payload in payloads {
        publisher.publish("energy", "saveeye/telemetry", payload);
        count += 1;
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the sink goes on", || {
        world.books("energy", TABLE, "cursor") == before + count
    });
}

fn waiting(world: &World) -> Option<u64> {
    let page = world.node.get("/metrics").ok()?.body;
    let name = "telemetry_dead_letter_copies_waiting{dependency=\"kafka:copies\"} ";
    page.lines().find_map(|line| line.strip_prefix(name))?.parse().ok()
}

fn copies(kafka: &Kafka) -> Vec<rig::Record> {
    kafka.read_topic(TOPIC).unwrap_or_default()
}

/// Waits until letters of these sequences have their copies.
#[track_caller]
fn copied(kafka: &Kafka, world: &World, sequences: impl Iterator<Item = u64>) {
    let wanted: BTreeSet<String> = sequences.map(|at| format!("energy/{TABLE}/{at}")).collect();
    let mut seen = BTreeSet::new();
    eventually(SOON, "each letter is copied", || {
        let key = |record: rig::Record| String::from_utf8(record.key.unwrap_or_default()).unwrap();
        seen = copies(kafka).into_iter().map(key).collect();
        seen == wanted && waiting(world) == Some(0)
    });
}

#[track_caller]
fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn every_letter_is_copied_though_kafka_is_away_and_the_node_is_killed() {
    let mut kafka = Kafka::start().unwrap();
    let ensure = "ensure = { partitions = 1, replication = 1, retention_days = 1 }";
    let mut world = start(&kafka, &format!("topic = \"{TOPIC}\"\n{ensure}"));
    judged(&world, [bad(1, 0), good(2), bad(3, 30_000)]);
    copied(&kafka, &world, [1, 3].into_iter());
    let records = copies(&kafka);
    let first = &records[0];
    assert_eq!(first.value, bad(1, 0).as_bytes(), "the payload as it came");
    for (header, value) in [
        ("telemetry-stream", "energy"),
        ("telemetry-sink", TABLE),
        ("telemetry-sequence", "1"),
        ("telemetry-reason", "wrong_type"),
        ("telemetry-stage", "map"),
        ("telemetry-topic", "saveeye/telemetry"),
        ("telemetry-column", "active_power_total"),
    ] {
        assert_eq!(first.header(header), Some(value), "{header}");
    }
    assert!(first.header("telemetry-id").unwrap().ends_with("/energy/1"));
    let letter = printed(&world.node.command(&["dlq", "list", "--json"]).unwrap());
    let letter: serde_json::Value = serde_json::from_str(letter.lines().next().unwrap()).unwrap();
    assert_eq!(first.header("telemetry-arrival"), letter["arrival"].as_str());
    // One that is larger than the brokers take is cut, and says so.
    let long = bad(3, 30_000);
    assert!(records[1].value.len() < 20_000 && long.as_bytes().starts_with(&records[1].value));
    assert_eq!(records[1].header("telemetry-payload-bytes"), Some(&*long.len().to_string()));

    // Kafka away: letters are kept, the sink goes on, and a killed node forgets nothing.
    kafka.kill();
    judged(&world, (4..54).map(|count| if count % 10 == 4 { bad(count, 0) } else { good(count) }));
    assert_eq!(world.count("telemetry", TABLE), 46);
    eventually(SOON, "five wait", || waiting(&world) == Some(5));
    world.node.kill();
    world.node.start().unwrap();
    world.subscribed();
    assert_eq!(waiting(&world), Some(5));
    // What leaves before it is copied is not copied.
    let purged = ["dlq", "purge", "--yes", "--since", "1h"];
    let key = format!("energy/{TABLE}/4");
    assert!(printed(&world.node.command(&["dlq", "show", &key]).unwrap()).contains("wrong_type"));
    kafka.restart().unwrap();
    copied(&kafka, &world, [1, 3, 4, 14, 24, 34, 44].into_iter());
    let before = copies(&kafka).len();

    // A start copies nothing again.
    world.node.stop(SOON).unwrap();
    world.node.start().unwrap();
    world.subscribed();
    judged(&world, [bad(54, 0)]);
    copied(&kafka, &world, [1, 3, 4, 14, 24, 34, 44, 54].into_iter());
    assert_eq!(copies(&kafka).len(), before + 1);

    kafka.kill();
    judged(&world, [bad(55, 0)]);
    eventually(SOON, "one waits", || waiting(&world) == Some(1));
    printed(&world.node.command(&purged).unwrap());
    eventually(SOON, "none waits", || waiting(&world) == Some(0));
    assert!(world.node.stop(SOON).unwrap().success());
}

#[test]
fn copies_wait_for_a_topic_that_is_missing_and_say_so_once() {
    let kafka = Kafka::start().unwrap();
    let world = start(&kafka, &format!("topic = \"{TOPIC}\""));
    judged(&world, [bad(1, 0), good(2)]);
    let told = || world.node.log_text().matches("dead_letter_copies_held").count();
    eventually(SOON, "the missing topic is told", || told() == 1);
    judged(&world, [bad(3, 0), good(4)]);
    assert_eq!(waiting(&world), Some(2));
    kafka.create_topic(TOPIC, 1).unwrap();
    copied(&kafka, &world, [1, 3].into_iter());
    assert_eq!(told(), 1, "{}", world.node.log_text());
}
