//! The Kafka broker ends, or stops for a while; of a cluster all of them, at a stop one after the other.

use anyhow::Result;
use rand::rngs::StdRng;
use rig::Kafka;

use super::{Fault, linger};
use crate::lab::Lab;

pub static FAULTS: &[Fault] = &[
    Fault::new("kafka-restart", "SIGTERM to Kafka and a new start", restart),
    Fault::new("kafka-kill", "kill -9 of Kafka and a new start", kill),
    Fault::new("kafka-freeze", "Kafka says nothing for a while", freeze),
];

fn restart(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    for place in 0..lab.kafka.len() {
        lab.kafka.node(place).stop()?;
        linger(lab, dice, 0..300)?;
        lab.kafka.node(place).restart()?;
    }
    Ok(true)
}

fn kill(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    (0..lab.kafka.len()).for_each(|place| lab.kafka.node(place).kill());
    linger(lab, dice, 0..300)?;
    lab.kafka.restart()?;
    Ok(true)
}

fn freeze(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.kafka.nodes().iter().for_each(Kafka::freeze);
    linger(lab, dice, 300..4_000)?;
    lab.kafka.nodes().iter().for_each(Kafka::thaw);
    Ok(true)
}
