//! The MQTT broker ends, stops for a while, or gives the session to another.

use anyhow::{Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rig::{Mqtt, MqttOptions, block_on};

use super::{Fault, last, linger};
use crate::lab::Lab;
use crate::traffic::STREAMS;

pub static FAULTS: &[Fault] = &[
    Fault::new("broker-restart", "SIGTERM to Mosquitto and a new start", restart).cutting_broker(),
    Fault::new("broker-kill", "kill -9 of Mosquitto while nobody publishes", kill).cutting_broker(),
    Fault::new("broker-freeze", "Mosquitto says nothing for a while", freeze),
    Fault::new("broker-takeover", "another client takes the session and leaves", takeover),
];

fn restart(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.mosquitto.stop()?;
    linger(lab, dice, 0..500)?;
    lab.mosquitto.restart()?;
    Ok(true)
}

/// Mosquitto acknowledges to a publisher before it saves, so what it forgets of that is its own: publishers rest.
fn kill(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let gate = lab.gate.clone();
    let closed = gate.lock().expect("no holder panics");
    last(dice, 200..400);
    lab.mosquitto.kill();
    linger(lab, dice, 0..300)?;
    lab.mosquitto.restart()?;
    drop(closed);
    Ok(true)
}

fn freeze(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.mosquitto.freeze();
    linger(lab, dice, 300..2_500)?;
    lab.mosquitto.thaw();
    Ok(true)
}

fn takeover(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let stream = &STREAMS[dice.random_range(0..STREAMS.len())];
    let mut options = MqttOptions::new(lab.mosquitto.port(), &format!("homelab-1-{}", stream.name));
    options.clean_start = false;
    let thief = block_on(async move { Mqtt::connect(&options).await })?;
    ensure!(thief.session_present, "there was no session of stream {} to take", stream.name);
    linger(lab, dice, 0..200)?;
    drop(thief);
    Ok(true)
}
