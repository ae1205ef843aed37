//! The node's process ends, or stops for a while.

use std::time::Duration;

use anyhow::{Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;

use super::{Fault, last};
use crate::lab::Lab;

const STOP_WITHIN: Duration = Duration::from_secs(20);
/// From before it has opened its buffer to after that.
pub const EARLY_MS: std::ops::Range<u64> = 0..300;

pub static FAULTS: &[Fault] = &[
    Fault::new("node-kill", "kill -9 at a random moment", kill),
    Fault::new("node-kill-in-start", "kill -9 while it starts", kill_in_start),
    Fault::new("node-kill-twice", "kill -9, and again soon after the start", kill_twice),
    Fault::new("node-stop", "SIGTERM and a new start", stop),
    Fault::new("node-freeze", "SIGSTOP and SIGCONT", freeze),
];

fn kill(_: &Fault, lab: &mut Lab, _: &mut StdRng) -> Result<bool> {
    lab.node.kill();
    lab.node.start()?;
    Ok(true)
}

fn kill_in_start(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.node.kill();
    let mut early = false;
    for _ in 0..dice.random_range(1..3) {
        lab.node.spawn()?;
        last(dice, EARLY_MS);
        early |= !is_live(lab);
        lab.node.kill();
    }
    lab.node.start()?;
    Ok(early)
}

/// It answers once its buffer is open.
pub fn is_live(lab: &Lab) -> bool {
    lab.node.get("/health/live").is_ok_and(|answer| answer.status == 200)
}

fn kill_twice(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.node.kill();
    lab.node.start()?;
    last(dice, 0..300);
    lab.node.kill();
    lab.node.start()?;
    Ok(true)
}

fn stop(_: &Fault, lab: &mut Lab, _: &mut StdRng) -> Result<bool> {
    stop_alone(lab)?;
    lab.node.start()?;
    Ok(true)
}

/// SIGTERM, and no new start.
pub fn stop_alone(lab: &mut Lab) -> Result<()> {
    let status = lab.node.stop(STOP_WITHIN)?;
    ensure!(status.success(), "SIGTERM ended the node with {status}");
    Ok(())
}

fn freeze(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    lab.node.daemon().freeze();
    last(dice, 300..2_000);
    lab.node.daemon().thaw();
    Ok(true)
}
