//! Which faults a round takes: from its seed alone, so that one round can be repeated without those before it.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::faults::Fault;

/// Beside the first.
const FURTHER_MAX: usize = 2;

/// The first fault follows the seed through the list, so that consecutive rounds take all of it; up to two more are
/// drawn.
pub fn of(seed: u64, faults: &[&'static Fault]) -> Vec<&'static Fault> {
    let mut dice = StdRng::seed_from_u64(seed);
    let first = (seed % faults.len() as u64) as usize;
    let further = dice.random_range(0..=FURTHER_MAX);
    let drawn = (0..further).map(|_| dice.random_range(0..faults.len()));
    std::iter::once(first).chain(drawn).map(|place| faults[place]).collect()
}

/// What chance decides within a round: moments, messages, places.
pub fn dice(seed: u64, purpose: u64) -> StdRng {
    StdRng::seed_from_u64(seed.rotate_left(32) ^ purpose)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults;

    #[test]
    fn a_seed_always_says_the_same_and_consecutive_ones_take_every_fault() {
        let all = faults::chosen("").unwrap();
        let names = |seed| of(seed, &all).iter().map(|fault| fault.name).collect::<Vec<_>>();
        assert_eq!(names(7), names(7));
        let taken: std::collections::BTreeSet<_> = (1..=all.len() as u64).flat_map(names).collect();
        assert_eq!(taken.len(), all.len());
    }
}
