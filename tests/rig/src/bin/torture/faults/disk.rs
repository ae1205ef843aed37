//! The power goes, or the space. Only where the system lets us have a disk of our own (root, loop devices).

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rig::until;

use super::{Fault, last, node};
use crate::lab::Lab;

/// Less than the node wants free, and more than it needs to go on.
const TIGHT_BYTES: u64 = 12 << 20;
const CUTS: usize = 10;
/// It looks whenever it writes.
const REFUSES_WITHIN: Duration = Duration::from_secs(3);
const LOOK_PAUSE: Duration = Duration::from_millis(50);
/// It notices with its next sync, which is under way, and waits for no sink longer than it was told to.
const ENDS_WITHIN: Duration = Duration::from_secs(15);

pub static FAULTS: &[Fault] = &[
    Fault::new("power-cut", "only what was durable is on the disk", cut),
    Fault::new("power-cut-twice", "and again while it recovers", cut_twice),
    Fault::new("power-cut-ten", "ten of them, a moment apart", cut_ten),
    Fault::new("disk-gone", "every call to the disk fails, until it is mounted again", gone),
    Fault::new("disk-tight", "others use up the space it wants free", tight),
    Fault::new("disk-full", "others use up all space", full),
];

/// False without a disk of the node's own.
fn power_cut(lab: &mut Lab) -> Result<bool> {
    let Some(disk) = &lab.disk else { return Ok(false) };
    disk.lose_power()?;
    lab.node.kill();
    disk.restore_power()?;
    Ok(true)
}

fn cut(_: &Fault, lab: &mut Lab, _: &mut StdRng) -> Result<bool> {
    let taken = power_cut(lab)?;
    if taken {
        lab.node.start()?;
    }
    Ok(taken)
}

fn cut_twice(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    if !power_cut(lab)? {
        return Ok(false);
    }
    lab.node.spawn()?;
    last(dice, node::EARLY_MS);
    let recovered = node::is_live(lab);
    power_cut(lab)?;
    lab.node.start()?;
    Ok(!recovered)
}

/// After each the binary itself says what the disk still holds, before a node mends anything.
fn cut_ten(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    for _ in 0..CUTS {
        if !power_cut(lab)? {
            return Ok(false);
        }
        let answer = lab.node.command(&["buffer", "verify"])?;
        let said = String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).into_owned();
        ensure!(answer.status.success(), "after a power cut records are missing: {said}");
        lab.node.start()?;
        last(dice, 0..300);
    }
    Ok(true)
}

/// It must end by itself, for after the first failed sync no later one can be believed.
fn gone(_: &Fault, lab: &mut Lab, _: &mut StdRng) -> Result<bool> {
    let Some(disk) = &lab.disk else { return Ok(false) };
    disk.lose_power()?;
    let node = lab.node.daemon();
    let status = until(ENDS_WITHIN, "the node to end over its disk", || node.exit_status())?;
    ensure!(status.code() == Some(1), "a disk that fails ended the node with {status}");
    lab.node.kill();
    disk.restore_power()?;
    lab.node.start()?;
    Ok(true)
}

fn tight(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let Some(disk) = &lab.disk else { return Ok(false) };
    let filling = disk.fill(TIGHT_BYTES)?;
    let refused = refuses(lab)?;
    last(dice, 500..2_000);
    drop(filling);
    ensure!(lab.node.daemon().is_running(), "the node ended, though there was room");
    Ok(refused)
}

/// Whether it takes no more messages, as it says, or has ended; with so little space left that it must, soon.
fn refuses(lab: &mut Lab) -> Result<bool> {
    let began = Instant::now();
    while began.elapsed() < REFUSES_WITHIN {
        let health = lab.node.get("/health").and_then(|answer| answer.json());
        let accepting = health.map_or(true, |health| health["buffer"]["accepting"] != false);
        if !accepting || lab.node.daemon().exit_status()?.is_some() {
            return Ok(true);
        }
        sleep(LOOK_PAUSE);
    }
    Ok(false)
}

/// It may end over this, and is then started by whoever looks after it.
fn full(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let Some(disk) = &lab.disk else { return Ok(false) };
    let filling = disk.fill(dice.random_range(0..2) << 20)?;
    let refused = refuses(lab)?;
    last(dice, 500..2_000);
    drop(filling);
    if let Some(status) = lab.node.daemon().exit_status()? {
        ensure!(status.code() == Some(1), "a full disk ended the node with {status}");
        lab.node.kill();
        lab.node.start()?;
    }
    Ok(refused)
}
