//! The Kafka broker ends, or stops for a while.

use anyhow::Result;
use rand::rngs::StdRng;

use super::{Fault, linger};
use crate::lab::Lab;

pub static FAULTS: &[Fault] = &[
    Fault::new("kafka-restart", "SIGTERM to Kafka and a new start", restart),
    Fault::new("kafka-kill", "kill -9 of Kafka and a new start", kill),
    Fault::new("kafka-freeze", "Kafka says nothing for a while", freeze),
];

fn restart(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.kafka.stop()?;
    linger(lab, dice, 0..300)?;
    lab.kafka.restart()?;
    Ok(true)
}

fn kill(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.kafka.kill();
    linger(lab, dice, 0..300)?;
    lab.kafka.restart()?;
    Ok(true)
}

fn freeze(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.kafka.freeze();
    linger(lab, dice, 300..4_000)?;
    lab.kafka.thaw();
    Ok(true)
}
