//! Which faults a round takes: from its seed alone, so that one round can be repeated without those before it.

use std::fmt;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::faults::Fault;

/// Faults of each round that follow the seed through the list.
const BY_TURNS: usize = 2;
/// Beside those.
const FURTHER_MAX: usize = 1;

/// One fault, and the one that happens while it lasts.
#[derive(Clone, Copy)]
pub struct Step {
    pub fault: &'static Fault,
    pub meanwhile: Option<&'static Fault>,
}

impl Step {
    pub fn cuts_broker(&self) -> bool {
        self.fault.cuts_broker || self.meanwhile.is_some_and(|fault| fault.cuts_broker)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.meanwhile {
            Some(other) => write!(f, "{} during {}", other.name, self.fault.name),
            None => f.write_str(self.fault.name),
        }
    }
}

/// The first two faults follow the seed through the list, in an order that is another each time around, so that
/// consecutive rounds take all of it and meet ever new pairs; every other pair that can overlaps. One more may be drawn.
pub fn of(seed: u64, faults: &[&'static Fault]) -> Vec<Step> {
    let mut dice = StdRng::seed_from_u64(seed);
    let slot = seed.saturating_sub(1) as usize * BY_TURNS;
    let by_turns = (slot..slot + BY_TURNS.min(faults.len())).map(|slot| in_turn(slot, faults));
    let by_turns: Vec<_> = by_turns.collect();
    let mut steps = match by_turns[..] {
        [one, other] if dice.random() => pair(one, other),
        _ => by_turns.into_iter().map(alone).collect(),
    };
    let further = dice.random_range(0..=FURTHER_MAX);
    steps.extend((0..further).map(|_| alone(faults[dice.random_range(0..faults.len())])));
    steps
}

fn in_turn(slot: usize, faults: &[&'static Fault]) -> &'static Fault {
    let mut order = faults.to_vec();
    order.shuffle(&mut StdRng::seed_from_u64((slot / faults.len()) as u64));
    order[slot % faults.len()]
}

fn pair(one: &'static Fault, other: &'static Fault) -> Vec<Step> {
    match (one.may_last_over(other), other.may_last_over(one)) {
        (true, _) => vec![Step { fault: one, meanwhile: Some(other) }],
        (_, true) => vec![Step { fault: other, meanwhile: Some(one) }],
        _ => vec![alone(one), alone(other)],
    }
}

fn alone(fault: &'static Fault) -> Step {
    Step { fault, meanwhile: None }
}

/// Whether so many rounds in a row take each fault at least once.
pub fn takes_all(rounds: u64, faults: &[&'static Fault]) -> bool {
    rounds as usize * BY_TURNS >= faults.len()
}

/// What chance decides within a round: moments, messages, places.
pub fn dice(seed: u64, purpose: u64) -> StdRng {
    StdRng::seed_from_u64(seed.rotate_left(32) ^ purpose)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults;

    fn names(seed: u64, all: &[&'static Fault]) -> Vec<&'static str> {
        let both = |step: Step| std::iter::once(step.fault).chain(step.meanwhile);
        of(seed, all).into_iter().flat_map(both).map(|fault| fault.name).collect()
    }

    #[test]
    fn a_seed_always_says_the_same_and_forty_rounds_take_every_fault() {
        let all = faults::chosen("", 1).unwrap();
        assert_eq!(names(7, &all), names(7, &all));
        assert!(takes_all(40, &all), "{} faults", all.len());
        let taken: std::collections::BTreeSet<_> =
            (1..=40).flat_map(|seed| names(seed, &all)).collect();
        assert_eq!(taken.len(), all.len());
    }

    #[test]
    fn of_one_fault_each_round_takes_it_and_many_rounds_overlap() {
        let one = faults::chosen("node-kill-twice", 1).unwrap();
        assert!((1..9).all(|seed| names(seed, &one).contains(&"node-kill-twice")));
        let all = faults::chosen("", 1).unwrap();
        let overlaps = |seed: &u64| of(*seed, &all).iter().any(|step| step.meanwhile.is_some());
        assert!((1..=40).filter(overlaps).count() >= 8);
    }
}
