//! Which acknowledgements the broker is proved to have read: a PUBACK has no answer, a ping behind it has.

use std::collections::VecDeque;

use super::redelivery::Acknowledged;

/// By the pings that were sent behind them. It dies with the connection.
#[derive(Debug, Default)]
pub struct Proof {
    /// Not yet answered; answers come in their order.
    pings: VecDeque<Ping>,
    /// PUBACKs written on this connection.
    written: u64,
    proved: u64,
}

#[derive(Debug)]
struct Ping {
    behind: Acknowledged,
    written: u64,
}

impl Proof {
    /// PUBACKs were written.
    pub fn on_written(&mut self, pubacks: usize) {
        self.written += pubacks as u64;
    }

    /// A ping was written behind these acknowledgements.
    pub fn on_ping(&mut self, behind: Acknowledged) {
        self.pings.push_back(Ping { behind, written: self.written });
    }

    /// What an answered ping proves.
    pub fn on_answer(&mut self) -> Option<Acknowledged> {
        let ping = self.pings.pop_front()?;
        self.proved = ping.written;
        Some(ping.behind)
    }

    /// PUBACKs the broker may not have read.
    pub fn unproved(&self) -> usize {
        usize::try_from(self.written - self.proved).unwrap_or(usize::MAX)
    }

    /// Of these, the ones no ping was sent behind.
    pub fn unpinged(&self) -> usize {
        let pinged = self.pings.back().map_or(self.proved, |ping| ping.written);
        usize::try_from(self.written - pinged).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Sequence;

    #[test]
    fn a_ping_proves_only_what_was_written_before_it() {
        let upto = |taken| Acknowledged { taken, sequence: Sequence(taken) };
        let mut proof = Proof::default();
        proof.on_written(10);
        proof.on_ping(upto(10));
        proof.on_written(10);
        proof.on_ping(upto(20));
        proof.on_written(5);
        assert_eq!((proof.unproved(), proof.unpinged()), (25, 5));
        assert_eq!(proof.on_answer(), Some(upto(10)));
        assert_eq!((proof.unproved(), proof.unpinged()), (15, 5));
        assert_eq!(proof.on_answer(), Some(upto(20)));
        assert_eq!((proof.unproved(), proof.unpinged()), (5, 5));
        assert_eq!(proof.on_answer(), None, "an answer nobody asked for proves nothing");
    }
}
