//! How much of its limits a batch may use. A link or a server too slow for a whole batch in the time a statement has
//! would never take any: so after one that ran out of time come smaller ones, and larger ones again as they succeed.

/// After a transaction that ran out of time.
const SHRINK: usize = 4;
/// So many in time, and the next ones are twice as large.
const GROW_AFTER: u32 = 8;
const DIVISOR_MAX: usize = 1024;

/// By what the limits are divided.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    divisor: usize,
    in_time: u32,
}

impl Pace {
    pub fn whole() -> Pace {
        Pace { divisor: 1, in_time: 0 }
    }

    pub fn of(self, limit: usize) -> usize {
        (limit / self.divisor).max(1)
    }

    pub fn ran_out_of_time(&mut self) {
        *self = Pace { divisor: (self.divisor * SHRINK).min(DIVISOR_MAX), in_time: 0 };
    }

    pub fn in_time(&mut self) {
        self.in_time += 1;
        if self.in_time >= GROW_AFTER && self.divisor > 1 {
            *self = Pace { divisor: self.divisor / 2, in_time: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_shrinks_at_once_to_a_bound_and_grows_back_slowly() {
        let mut pace = Pace::whole();
        assert_eq!(pace.of(10_000), 10_000);
        pace.ran_out_of_time();
        assert_eq!(pace.of(10_000), 2_500);
        (0..7).for_each(|_| pace.in_time());
        assert_eq!(pace.of(10_000), 2_500);
        pace.in_time();
        assert_eq!(pace.of(10_000), 5_000);
        (0..100).for_each(|_| pace.ran_out_of_time());
        assert_eq!((pace.of(10_000), pace.of(100)), (9, 1));
        (0..80).for_each(|_| pace.in_time());
        assert_eq!(pace.of(10_000), 10_000);
    }
}
