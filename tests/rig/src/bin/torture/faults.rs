//! What can happen to a node and its surroundings. Each fault is over when it returns: whatever it stopped runs again,
//! though nothing need have recovered.

mod broker;
mod crash;
mod database;
mod disk;
mod kafka;
mod leader;
mod network;
mod node;
mod replay;

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
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

/// Where the faults of a group have their place; those of one place do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Broker,
    Database,
    Kafka,
    Network,
    /// Process and disk: a node that is started needs its disk.
    Node,
    AtRest,
}

impl Fault {
    /// Whether the other one may happen while this one lasts.
    pub fn may_last_over(&self, other: &Fault) -> bool {
        let (place, others) = (self.place(), other.place());
        place != others && place != Place::Node && ![place, others].contains(&Place::AtRest)
    }

    /// One of the node's own, which not every system lets us have.
    pub fn needs_disk(&self) -> bool {
        ["disk-", "power-"].iter().any(|begin| self.name.starts_with(begin))
    }

    /// The node is made to end at a step of its own.
    pub fn needs_fail_points(&self) -> bool {
        self.name.starts_with("crash-")
    }

    /// One that takes more than one Kafka broker.
    fn needs_cluster(&self) -> bool {
        self.name.starts_with("kafka-leader-")
    }

    fn place(&self) -> Place {
        match self.name.split('-').next().unwrap_or_default() {
            _ if self.at_rest => Place::AtRest,
            "broker" => Place::Broker,
            "postgres" => Place::Database,
            "kafka" => Place::Kafka,
            "network" => Place::Network,
            _ => Place::Node,
        }
    }

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
    leader::FAULTS,
    network::FAULTS,
    disk::FAULTS,
    crash::FAULTS,
    replay::FAULTS,
];

/// Those whose name contains one of the words; of a word that is a whole name, that one alone; all without a word.
/// A lone Kafka broker has nobody to lead in its place.
///
/// # Errors
/// When none does.
pub fn chosen(words: &str, kafka_nodes: usize) -> Result<Vec<&'static Fault>> {
    let words: Vec<&str> =
        words.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    let possible = |fault: &&Fault| kafka_nodes > 1 || !fault.needs_cluster();
    let all = || ALL.iter().flat_map(|group| group.iter()).filter(possible);
    let is_name = |word: &str| all().any(|fault| fault.name == word);
    let means =
        |word: &str, name: &str| if is_name(word) { name == word } else { name.contains(word) };
    let wanted =
        |fault: &&Fault| words.is_empty() || words.iter().any(|word| means(word, fault.name));
    let chosen: Vec<_> = all().filter(wanted).collect();
    if chosen.is_empty() {
        bail!(
            "no fault is called anything like {words:?}: see --list (kafka-leader needs --kafka-nodes 3)"
        );
    }
    Ok(chosen)
}

/// As [`last`]; the fault that waits for such a moment happens in it.
fn linger(lab: &mut Lab, dice: &mut StdRng, millis: std::ops::Range<u64>) -> Result<()> {
    let Some(other) = lab.meanwhile.waiting.take() else {
        last(dice, millis);
        return Ok(());
    };
    let half = millis.start / 2..millis.end.div_ceil(2);
    last(dice, half.clone());
    if (other.take)(other, lab, dice).with_context(|| format!("meanwhile {}", other.name))? {
        lab.meanwhile.taken.push(other.name);
    }
    last(dice, half);
    Ok(())
}

/// Lets some time pass in which the fault has its effect.
fn last(dice: &mut StdRng, millis: std::ops::Range<u64>) {
    sleep(Duration::from_millis(dice.random_range(millis)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_name_means_one_fault_and_a_part_of_names_all_of_those() {
        assert_eq!(chosen("crash-cursor", 1).unwrap().len(), 1);
        assert!(chosen("crash-cur", 1).unwrap().len() > 2);
        assert!(chosen("no-such", 1).is_err());
        assert!(chosen("kafka-leader", 1).is_err());
        assert_eq!(chosen("kafka-leader", 3).unwrap().len(), 4);
    }

    #[test]
    fn what_restarts_a_node_never_lasts_and_what_needs_rest_stays_alone() {
        let named = |name: &str| chosen(name, 1).unwrap()[0];
        assert!(named("postgres-kill").may_last_over(named("node-kill")));
        assert!(!named("node-freeze").may_last_over(named("postgres-kill")));
        assert!(!named("disk-full").may_last_over(named("node-kill")));
        assert!(!named("postgres-kill").may_last_over(named("replay")));
    }
}
