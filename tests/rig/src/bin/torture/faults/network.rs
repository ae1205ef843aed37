//! What a network does between the node and broker or database.

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;
use rig::{Link, Proxy};

use super::{Fault, last};
use crate::lab::Lab;

/// Bytes a second: some 20 messages, or a transaction in ten seconds.
const SLOW: usize = 10_000;

pub static FAULTS: &[Fault] = &[
    Fault::new("network-black-hole", "nothing arrives and nobody is told", black_hole),
    Fault::new("network-one-way", "one direction carries nothing", one_way),
    Fault::new("network-reset", "connections are reset in the middle of whatever they say", reset),
    Fault::new("network-slow", "a link of 80 kbit/s", slow),
];

fn black_hole(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    pass_through(lab, dice, Link::BlackHole);
    Ok(true)
}

fn one_way(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let link = if dice.random() { Link::SilentToServer } else { Link::SilentToClient };
    pass_through(lab, dice, link);
    Ok(true)
}

fn slow(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    pass_through(lab, dice, Link::Slow(SLOW));
    Ok(true)
}

fn reset(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    for _ in 0..dice.random_range(1..6) {
        side(lab, dice.random()).reset();
        last(dice, 0..200);
    }
    Ok(true)
}

fn pass_through(lab: &Lab, dice: &mut StdRng, link: Link) {
    let proxy = side(lab, dice.random());
    proxy.set(link);
    last(dice, 300..3_500);
    // As often as not the connections do not outlive it.
    if dice.random() {
        proxy.reset();
    }
    proxy.set(Link::Fine);
}

fn side(lab: &Lab, of_broker: bool) -> &Proxy {
    if of_broker { &lab.to_broker } else { &lab.to_database }
}
