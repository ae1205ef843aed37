//! What a network does between the node and broker, database or Kafka.

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;
use rig::{Link, Proxy};

use super::{Fault, linger};
use crate::lab::Lab;

/// Bytes a second, 80 kbit/s: some 20 messages, or a transaction in ten seconds.
const SLOW: usize = 10_000;
/// 8 kbit/s: two messages a second, or not a whole transaction while it lasts.
const SLOWEST: usize = 1_000;

pub static FAULTS: &[Fault] = &[
    Fault::new("network-black-hole", "nothing arrives and nobody is told", |_, lab, dice| {
        let side = near(dice);
        pass_through(lab, dice, side, Link::BlackHole)
    }),
    Fault::new("network-one-way", "one direction carries nothing", |_, lab, dice| {
        let (side, link) = (near(dice), one_way(dice));
        pass_through(lab, dice, side, link)
    }),
    Fault::new("network-reset", "connections are reset in the middle of it", |_, lab, dice| {
        let side = near(dice);
        reset(lab, dice, side)
    }),
    Fault::new("network-slow", "a link of 80 or of 8 kbit/s", |_, lab, dice| {
        let (side, bytes_per_second) = (near(dice), if dice.random() { SLOW } else { SLOWEST });
        pass_through(lab, dice, side, Link::Slow(bytes_per_second))
    }),
    Fault::new("network-kafka-black-hole", "the same on the way to Kafka", |_, lab, dice| {
        pass_through(lab, dice, Side::Kafka, Link::BlackHole)
    }),
    Fault::new("network-kafka-one-way", "the same on the way to Kafka", |_, lab, dice| {
        let link = one_way(dice);
        pass_through(lab, dice, Side::Kafka, link)
    }),
    Fault::new("network-kafka-reset", "the same on the way to Kafka", |_, lab, dice| {
        reset(lab, dice, Side::Kafka)
    }),
    Fault::new("network-kafka-slow", "a link of 8 kbit/s to Kafka", |_, lab, dice| {
        pass_through(lab, dice, Side::Kafka, Link::Slow(SLOWEST))
    }),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Broker,
    Database,
    Kafka,
}

fn near(dice: &mut StdRng) -> Side {
    if dice.random() { Side::Broker } else { Side::Database }
}

fn one_way(dice: &mut StdRng) -> Link {
    if dice.random() { Link::SilentToServer } else { Link::SilentToClient }
}

fn reset(lab: &mut Lab, dice: &mut StdRng, side: Side) -> Result<bool> {
    for _ in 0..dice.random_range(1..6) {
        proxies(lab, side).into_iter().for_each(Proxy::reset);
        linger(lab, dice, 0..200)?;
    }
    Ok(true)
}

fn pass_through(lab: &mut Lab, dice: &mut StdRng, side: Side, link: Link) -> Result<bool> {
    proxies(lab, side).into_iter().for_each(|proxy| proxy.set(link));
    // One in four outlasts every time limit of the lab's node.
    let milliseconds = if dice.random_ratio(1, 4) { 8_000..9_000 } else { 300..3_500 };
    linger(lab, dice, milliseconds)?;
    // As often as not the connections do not outlive it.
    if dice.random() {
        proxies(lab, side).into_iter().for_each(Proxy::reset);
    }
    proxies(lab, side).into_iter().for_each(|proxy| proxy.set(Link::Fine));
    Ok(true)
}

fn proxies(lab: &Lab, side: Side) -> Vec<&Proxy> {
    match side {
        Side::Broker => vec![&lab.to_broker],
        Side::Database => vec![&lab.to_database],
        Side::Kafka => lab.kafka.links(),
    }
}
