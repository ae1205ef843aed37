//! What can happen to a node and its surroundings. Each fault is over when it returns: whatever it stopped runs again,
//! though nothing need have recovered.

mod broker;
mod crash;
mod database;
mod disk;
mod kafka;
mod network;
mod node;
mod replay;

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use rand::Rng;
use rand::rngs::StdRng;

use crate::lab::Lab;

/// One entry of the list.
pub struct Fault {
    pub name: &'static str,
    /// For people.
    pub meaning: &'static str,
    /// The broker ends: it may hand out again, under new packet ids, what it had handed out.
    pub cuts_broker: bool,
    /// Taken once the round has come to rest and was judged; then it is judged again.
    pub at_rest: bool,
    /// False when the moment it waited for did not come.
    pub take: fn(&Fault, &mut Lab, &mut StdRng) -> Result<bool>,
}

impl Fault {
    const fn new(
        name: &'static str,
        meaning: &'static str,
        take: fn(&Fault, &mut Lab, &mut StdRng) -> Result<bool>,
    ) -> Self {
        Self { name, meaning, cuts_broker: false, at_rest: false, take }
    }

    const fn at_rest(mut self) -> Self {
        self.at_rest = true;
        self
    }

    const fn cutting_broker(mut self) -> Self {
        self.cuts_broker = true;
        self
    }
}

/// All faults, in the order in which consecutive seeds take them.
pub static ALL: &[&[Fault]] = &[
    node::FAULTS,
    broker::FAULTS,
    database::FAULTS,
    kafka::FAULTS,
    network::FAULTS,
    disk::FAULTS,
    crash::FAULTS,
    replay::FAULTS,
];

/// Those whose name contains one of the words; all without a word.
///
/// # Errors
/// When none does.
pub fn chosen(words: &str) -> Result<Vec<&'static Fault>> {
    let words: Vec<&str> =
        words.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    let all = ALL.iter().flat_map(|group| group.iter());
    let wanted =
        |fault: &&Fault| words.is_empty() || words.iter().any(|word| fault.name.contains(word));
    let chosen: Vec<_> = all.filter(wanted).collect();
    if chosen.is_empty() {
        bail!("no fault is called anything like {words:?}: see --list");
    }
    Ok(chosen)
}

/// Lets some time pass in which the fault has its effect.
fn last(dice: &mut StdRng, millis: std::ops::Range<u64>) {
    sleep(Duration::from_millis(dice.random_range(millis)));
}
