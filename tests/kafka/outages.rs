//! Kafka away, killed and robbed of a topic: nothing is lost, nothing overtakes, and the tables do not notice.

use rig::{Kafka, KafkaOptions};

use crate::site::Site;
use crate::world::SOON;

const TOPIC: &str = "readings";
const ENSURE: &str = "ensure = { partitions = 2, replication = 1, retention_days = 1 }";

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
    assert_eq!(kafka.count(TOPIC).unwrap(), 100, "what was delivered left with the topic");
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
    assert_eq!(kafka.count(TOPIC).unwrap(), 100, "what was delivered left with the topic");
}
