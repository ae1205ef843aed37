//! How often one caller may ask: evenly, with a minute's worth at once.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;

/// Callers remembered; the one not seen for longest is forgotten, and begins with a clean slate.
const CALLERS_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

const WINDOW: Duration = Duration::from_secs(60);

/// An address and, when it came with one that counts, the id of a token.
type Caller = (IpAddr, Option<String>);

/// One moment per caller (the generic cell rate algorithm): when its past requests, spread evenly, have been served.
#[derive(Debug)]
pub struct Limiter {
    spacing: Duration,
    served: Mutex<LruCache<Caller, Instant>>,
}

impl Limiter {
    pub fn new(requests_per_minute_max: u32) -> Self {
        let spacing = WINDOW / requests_per_minute_max.max(1);
        Limiter { spacing, served: Mutex::new(LruCache::new(CALLERS_MAX)) }
    }

    /// # Errors
    /// How long until the next request is taken.
    pub fn take(&self, address: IpAddr, token: Option<&str>, now: Instant) -> Result<(), Duration> {
        let caller = (network(address), token.map(str::to_owned));
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        let last = served.get_or_insert_mut(caller, || now);
        let next = (*last).max(now) + self.spacing;
        let ahead = next.duration_since(now);
        if ahead > WINDOW {
            return Err(ahead - WINDOW);
        }
        *last = next;
        Ok(())
    }
}

/// Whoever has one IPv6 address has 2⁶⁴ of them.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let mut segments = address.segments();
            segments[4..].fill(0);
            IpAddr::V6(segments.into())
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_worth_goes_at_once_and_then_evenly() {
        let limiter = Limiter::new(60);
        let (here, there) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into());
        let began = Instant::now();
        for _ in 0..60 {
            limiter.take(here, None, began).unwrap();
        }
        assert_eq!(limiter.take(here, None, began), Err(Duration::from_secs(1)));
        limiter.take(there, None, began).unwrap();
        limiter.take(here, Some("a1b2c3d4"), began).unwrap();
        let later = began + Duration::from_secs(2);
        limiter.take(here, None, later).unwrap();
        limiter.take(here, None, later).unwrap();
        assert!(limiter.take(here, None, later).is_err());
    }

    #[test]
    fn addresses_of_one_network_share_a_limit() {
        let limiter = Limiter::new(1);
        let now = Instant::now();
        limiter.take("fd00::1".parse().unwrap(), None, now).unwrap();
        limiter.take("fd00::2".parse().unwrap(), None, now).unwrap_err();
        limiter.take("::ffff:10.0.0.1".parse().unwrap(), None, now).unwrap();
        limiter.take("10.0.0.1".parse().unwrap(), None, now).unwrap_err();
    }
}
