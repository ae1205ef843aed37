//! The power goes, or the space. Only where the system lets us have a disk of our own (root, loop devices).

use anyhow::{Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;

use super::{Fault, last};
use crate::lab::Lab;

/// Less than the node wants free, and more than it needs to go on.
const TIGHT_BYTES: u64 = 12 << 20;

pub static FAULTS: &[Fault] = &[
    Fault::new("power-cut", "only what was durable is on the disk", cut),
    Fault::new("power-cut-twice", "and again while it recovers", cut_twice),
    Fault::new("disk-tight", "others use up the space it wants free", tight),
    Fault::new("disk-full", "others use up all space", full),
];

fn cut(_: &Fault, lab: &mut Lab, _: &mut StdRng) -> Result<bool> {
    let Some(disk) = &mut lab.disk else { return Ok(false) };
    lab.node.kill();
    disk.cut()?;
    lab.node.start()?;
    Ok(true)
}

fn cut_twice(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let Some(disk) = &mut lab.disk else { return Ok(false) };
    lab.node.kill();
    disk.cut()?;
    lab.node.spawn()?;
    last(dice, 20..300);
    lab.node.kill();
    disk.cut()?;
    lab.node.start()?;
    Ok(true)
}

fn tight(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let Some(disk) = &lab.disk else { return Ok(false) };
    let filling = disk.fill(TIGHT_BYTES)?;
    last(dice, 500..2_000);
    drop(filling);
    ensure!(lab.node.daemon().is_running(), "the node ended, though there was room");
    Ok(true)
}

/// It may end over this, and is then started by whoever looks after it.
fn full(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let Some(disk) = &lab.disk else { return Ok(false) };
    let filling = disk.fill(dice.random_range(0..2) << 20)?;
    last(dice, 500..2_000);
    drop(filling);
    if let Some(status) = lab.node.daemon().exit_status()? {
        ensure!(status.code() == Some(1), "a full disk ended the node with {status}");
        lab.node.kill();
        lab.node.start()?;
    }
    Ok(true)
}
