//! Of several Kafka brokers the one that leads a partition ends, stops for a while, or hands over.

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;

use super::{Fault, linger};
use crate::lab::{KAFKA_PARTITIONS, Lab};

pub static FAULTS: &[Fault] = &[
    Fault::new("kafka-leader-stop", "SIGTERM to a partition's leader and a new start", stop),
    Fault::new("kafka-leader-kill", "kill -9 of a partition's leader and a new start", kill),
    Fault::new(
        "kafka-leader-freeze",
        "a partition's leader says nothing until another leads",
        freeze,
    ),
    Fault::new("kafka-leader-move", "another broker is to lead a partition", hand_over),
];

/// How long the cluster is without the broker that led.
const ALONE_MS: std::ops::Range<u64> = 300..2_000;

/// A partition of a stream's topic.
fn partition(lab: &Lab, dice: &mut StdRng) -> (String, i32) {
    let topic = &lab.topics[dice.random_range(0..lab.topics.len())];
    (topic.clone(), dice.random_range(0..KAFKA_PARTITIONS))
}

fn leader(lab: &Lab, dice: &mut StdRng) -> Result<usize> {
    let (topic, partition) = partition(lab, dice);
    lab.kafka.leader(&topic, partition)
}

fn stop(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let leader = leader(lab, dice)?;
    lab.kafka.node(leader).stop()?;
    linger(lab, dice, ALONE_MS)?;
    lab.kafka.node(leader).restart()?;
    Ok(true)
}

fn kill(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let leader = leader(lab, dice)?;
    lab.kafka.node(leader).kill();
    linger(lab, dice, ALONE_MS)?;
    lab.kafka.node(leader).restart()?;
    Ok(true)
}

/// It comes back believing that it still leads.
fn freeze(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let (topic, partition) = partition(lab, dice);
    let leader = lab.kafka.leader(&topic, partition)?;
    lab.kafka.node(leader).freeze();
    let led = lab.kafka.led_by_another(&topic, partition, leader);
    linger(lab, dice, ALONE_MS)?;
    lab.kafka.node(leader).thaw();
    led.map(|()| true)
}

fn hand_over(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let (topic, partition) = partition(lab, dice);
    lab.kafka.hand_over(&topic, partition)?;
    linger(lab, dice, 0..300)?;
    Ok(true)
}
