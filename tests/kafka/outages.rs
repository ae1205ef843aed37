//! Kafka away, killed, robbed of a topic and told to take less: nothing is lost, nothing overtakes, and the tables do not notice.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rig::{Kafka, KafkaOptions, Link, eventually};

use crate::site::{STREAM, Site};
use crate::world::SOON;

const TOPIC: &str = "readings";
const ENSURE: &str = "ensure = { partitions = 2, replication = 1, retention_days = 1 }";
/// As the site sets it.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn a_kafka_that_comes_late_and_is_killed_under_load_loses_nothing() {
    let mut kafka = Kafka::prepare(&KafkaOptions::default()).unwrap();
    let mut site = Site::start(&kafka.bootstrap(), TOPIC, "", ENSURE);
    site.publish(1_000);
    site.assert_table_follows();
    site.says("waiting", &["no broker"]);

    kafka.restart().unwrap();
    site.assert_topic_is_whole(&kafka);

    site.publish(3_000);
    kafka.kill();
    site.publish(1_000);
    site.assert_table_follows();
    site.says("waiting", &[]);
    kafka.restart().unwrap();
    site.publish(1_000);
    site.assert_topic_is_whole(&kafka);

    // A node that dies while Kafka is away, too.
    kafka.kill();
    site.publish(500);
    site.assert_table_follows();
    site.world.node.kill();
    site.world.node.start().unwrap();
    site.world.subscribed();
    kafka.restart().unwrap();
    site.assert_topic_is_whole(&kafka);
}

/// Its connections stay: nobody is told that it is away, and the producer that waits for it may be renewed meanwhile.
#[test]
fn a_kafka_that_stands_still_longer_than_its_timeouts_loses_nothing() {
    let kafka = Kafka::start().unwrap();
    let mut site = Site::start(&kafka.bootstrap(), TOPIC, "", ENSURE);
    site.publish(1_000);
    site.assert_topic_is_whole(&kafka);

    kafka.freeze();
    let since = Instant::now();
    site.publish(3_000);
    site.assert_table_follows();
    site.says("waiting", &[]);
    eventually(MESSAGE_TIMEOUT * 3, "the whole of it", || {
        since.elapsed() > MESSAGE_TIMEOUT * 5 / 2
    });
    site.publish(500);
    site.assert_table_follows();
    kafka.thaw();
    site.publish(500);
    site.assert_topic_is_whole(&kafka);
}

#[test]
fn a_deleted_topic_is_asked_for() {
    let kafka = Kafka::start().unwrap();
    kafka.create_topic(TOPIC, 2).unwrap();
    let mut site = Site::start(&kafka.bootstrap(), TOPIC, "", "");
    site.publish(100);
    site.assert_topic_is_whole(&kafka);

    kafka.delete_topics(&[TOPIC]).unwrap();
    site.publish(100);
    site.assert_table_follows();
    site.says("held", &[TOPIC, "create it"]);
    kafka.create_topic(TOPIC, 2).unwrap();
    site.world.drained(SOON);
    // What was delivered left with the topic.
    site.assert_topic_has(&kafka, 101..=200);
}

#[test]
fn a_deleted_topic_with_ensure_is_made_again() {
    let kafka = Kafka::start().unwrap();
    let mut site = Site::start(&kafka.bootstrap(), TOPIC, "", ENSURE);
    site.publish(100);
    site.assert_topic_is_whole(&kafka);

    kafka.delete_topics(&[TOPIC]).unwrap();
    site.publish(100);
    site.assert_table_follows();
    site.world.drained(SOON);
    // What was delivered left with the topic.
    site.assert_topic_has(&kafka, 101..=200);
}

/// Of all requests only the one to make a topic names its retention.
#[test]
fn a_topic_whose_making_is_never_answered_is_given_up_on_and_made_later() {
    let kafka = Kafka::start_with(KafkaOptions { far: true, ..KafkaOptions::default() }).unwrap();
    let mut site = Site::start(&kafka.far_bootstrap(), TOPIC, "", ENSURE);
    site.publish(100);
    site.assert_topic_is_whole(&kafka);

    let link = kafka.link().unwrap();
    link.set(Link::Withholding(b"retention.ms"));
    kafka.delete_topics(&[TOPIC]).unwrap();
    site.publish(100);
    site.assert_table_follows();
    site.says("waiting", &["create the topic"]);
    link.set(Link::Fine);
    site.world.drained(SOON);
    // What was delivered left with the topic.
    site.assert_topic_has(&kafka, 101..=200);
}

/// The node is allowed more than the broker takes, which it learns from a refusal of a whole batch alone.
/// As librdkafka may, when the last broker said in its farewell that there is none.
#[test]
fn a_producer_that_does_not_find_back_to_a_cluster_that_answers_is_replaced() {
    let mut kafka = Kafka::start().unwrap();
    let mut site = Site::start(&kafka.bootstrap(), TOPIC, "", ENSURE);
    site.world.node.kill();
    site.world.node.set_failpoints("kafka_deaf=return");
    site.world.node.start().unwrap();
    site.world.subscribed();
    site.publish(100);
    site.assert_topic_is_whole(&kafka);
    kafka.kill();
    site.publish(100);
    site.says("waiting", &["brokers are down"]);
    kafka.restart().unwrap();
    site.assert_topic_is_whole(&kafka);
    site.assert_table_follows();
    assert!(site.world.node.log_text().contains("kafka_producer_deaf"));
}

#[test]
fn a_limit_lowered_below_ours_sets_aside_what_is_above_it_and_nothing_else() {
    let kafka = Kafka::start().unwrap();
    kafka.create_topic(TOPIC, 2).unwrap();
    let mut site = Site::start(&kafka.bootstrap(), TOPIC, "", "");
    site.publish(100);
    site.assert_topic_is_whole(&kafka);

    // Some six records. The broker says yes before it goes by it.
    kafka.set_topic(TOPIC, &[("max.message.bytes", "2000")]).unwrap();
    eventually(SOON, "a batch is refused", || {
        site.publish(1_000);
        site.assert_table_follows();
        site.refused() > 0
    });
    site.publish_one(&"x".repeat(5_000));
    let too_large = site.published();
    site.publish(500);
    site.assert_topic_has(&kafka, (1..=site.published()).filter(|sequence| *sequence != too_large));
    site.assert_table_follows();
    let letters = site.world.node.command(&["dlq", "list", "--json"]).unwrap();
    let letters = String::from_utf8(letters.stdout).unwrap();
    let letters: Vec<serde_json::Value> =
        letters.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told = letters.iter().map(|letter| (&letter["letter"], &letter["reason"]));
    let name = format!("{STREAM}/kafka/{too_large}").into();
    assert_eq!(told.collect::<Vec<_>>(), [(&name, &"kafka_too_large".into())]);

    kafka.set_topic(TOPIC, &[]).unwrap();
    let replay = site.world.node.command(&["dlq", "replay"]).unwrap();
    assert!(replay.status.success(), "{}", String::from_utf8_lossy(&replay.stdout));
    let newest = kafka.read_topic(TOPIC).unwrap();
    assert!(newest.iter().any(|record| record.value.len() > 5_000), "it came in the end");
}

#[test]
fn a_replay_to_kafka_killed_half_way_and_repeated_leaves_no_letter_out() {
    const LETTERS: u64 = 400;
    const KILLS: usize = 3;
    let kafka = Kafka::start_with(KafkaOptions { far: true, ..KafkaOptions::default() }).unwrap();
    let link = kafka.link().unwrap();
    kafka.create_topic(TOPIC, 2).unwrap();
    kafka.set_topic(TOPIC, &[("max.message.bytes", "2000")]).unwrap();
    let mut site = Site::start(&kafka.far_bootstrap(), TOPIC, "", "");
    for _ in 0..LETTERS {
        site.publish_one(&"x".repeat(5_000));
    }
    site.assert_table_follows();
    site.world.drained(SOON);
    assert_eq!(site.world.books(STREAM, "kafka", "dead_lettered"), LETTERS);
    assert_eq!(kafka.count(TOPIC).unwrap(), 0);
    kafka.set_topic(TOPIC, &[]).unwrap();
    for _ in 0..KILLS {
        let before = kafka.count(TOPIC).unwrap();
        // All of them would take half a minute, so that none is through before the kill.
        link.set(Link::Slow(60_000));
        let mut replay = site.world.node.begin(&["dlq", "replay"]).unwrap();
        eventually(SOON, "the replay is under way", || {
            kafka.count(TOPIC).is_ok_and(|count| count >= before + 20)
        });
        site.world.node.kill();
        link.set(Link::Fine);
        assert!(!replay.wait().unwrap().success(), "the command says that it was cut off");
        site.world.node.start().unwrap();
        site.world.subscribed();
    }
    let replay = site.world.node.command(&["dlq", "replay"]).unwrap();
    assert!(replay.status.success(), "{}", String::from_utf8_lossy(&replay.stdout));
    // The lane enters a replayed letter when it comes by.
    eventually(SOON, "the books have moved", || {
        site.world.books(STREAM, "kafka", "delivered") == LETTERS
    });
    site.assert_topic_is_whole(&kafka);
    let letters = site.world.node.command(&["dlq", "list", "--json"]).unwrap();
    assert!(letters.stdout.is_empty());
    // A kill between the confirmation and the removal of the letter repeats its record, as it was.
    let mut contents = BTreeMap::new();
    let records = kafka.read_topic(TOPIC).unwrap();
    assert!(records.len() <= LETTERS as usize + KILLS, "{} records", records.len());
    for record in records {
        let id = record.header("telemetry-id").unwrap().to_owned();
        let content = (record.key.clone(), record.value.clone(), record.timestamp);
        assert_eq!(contents.entry(id).or_insert(content.clone()), &content);
    }
}
