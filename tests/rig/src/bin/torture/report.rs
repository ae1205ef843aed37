//! What a run prints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use anyhow::Result;

use crate::faults::Fault;
use crate::plan::Step;
use crate::round::Outcome;

/// Everything so far.
pub struct Report {
    rounds: u64,
    sum: Outcome,
    /// By fault. Every fault of the list is here.
    tallies: BTreeMap<&'static str, Tally>,
    /// Those the run was told to go without.
    left_out: Vec<&'static str>,
    failed: bool,
}

/// What the rounds that took one fault came to. A round counts for each fault it took, so a column has no sum.
#[derive(Default)]
struct Tally {
    taken: u64,
    rounds: u64,
    acked: u64,
    delivered: u64,
    lost: usize,
    doubled: usize,
    recovery: Duration,
}

impl Tally {
    fn add(&mut self, outcome: &Outcome) {
        self.rounds += 1;
        self.acked += outcome.acked;
        self.delivered += outcome.verdict.delivered;
        self.lost += outcome.verdict.lost.len();
        self.doubled += outcome.verdict.doubled.len();
        self.recovery = self.recovery.max(outcome.recovery);
    }
}

impl Report {
    pub fn new(faults: &[&'static Fault], left_out: &[&'static Fault]) -> Self {
        let tallies = faults.iter().map(|fault| (fault.name, Tally::default())).collect();
        let left_out = left_out.iter().map(|fault| fault.name).collect();
        Self { rounds: 0, sum: Outcome::default(), tallies, left_out, failed: false }
    }

    /// Prints the round's line; false when it did not hold.
    pub fn enter(&mut self, seed: u64, plan: &[Step], outcome: Result<Outcome>) -> bool {
        self.rounds += 1;
        let names: Vec<_> = plan.iter().map(Step::to_string).collect();
        let names = names.join(", ");
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                self.failed = true;
                println!("seed {seed:<6} {names}: FAILED\n{error:#}");
                return false;
            }
        };
        println!(
            "seed {seed:<6} {:>5} acked  {:>5.1} s to recover  {names}",
            outcome.acked,
            outcome.recovery.as_secs_f64()
        );
        let held = outcome.verdict.holds();
        if !held {
            self.failed = true;
            println!("FAILED\n{}", outcome.verdict);
        }
        self.tally(&outcome);
        self.sum.add(outcome);
        held
    }

    fn tally(&mut self, outcome: &Outcome) {
        for name in &outcome.taken {
            self.tallies.entry(name).or_default().taken += 1;
        }
        for name in outcome.taken.iter().collect::<BTreeSet<_>>() {
            self.tallies.entry(name).or_default().add(outcome);
        }
    }

    pub fn held(&self) -> bool {
        !self.failed
    }

    /// Of the list: what no round has taken so far.
    pub fn never_taken(&self) -> Vec<&'static str> {
        let never = self.tallies.iter().filter(|(_, tally)| tally.taken == 0);
        never.map(|(name, _)| *name).collect()
    }

    /// So many rounds were to take every fault.
    pub fn demand_all(&mut self) {
        self.failed |= !self.never_taken().is_empty();
    }

    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<30} {:>5} {:>6} {:>7} {:>9} {:>4} {:>7} {:>10}",
            "fault", "taken", "rounds", "acked", "delivered", "lost", "doubled", "recovery_s"
        )?;
        for (name, tally) in self.tallies.iter().filter(|(_, tally)| tally.taken > 0) {
            let Tally { taken, rounds, acked, delivered, lost, doubled, recovery } = tally;
            let seconds = recovery.as_secs_f64();
            writeln!(
                f,
                "{name:<30} {taken:>5} {rounds:>6} {acked:>7} {delivered:>9} {lost:>4} {doubled:>7} {seconds:>10.1}"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome { acked, recovery, overlapped, asked, verdict, .. } = &self.sum;
        writeln!(f)?;
        self.table(f)?;
        let never = self.never_taken();
        if !never.is_empty() {
            writeln!(f, "never taken: {}", never.join(", "))?;
        }
        if !self.left_out.is_empty() {
            let names = self.left_out.join(", ");
            writeln!(f, "never taken, for want of a disk of the node's own: {names}")?;
        }
        writeln!(f, "taken while another lasted: {overlapped}")?;
        writeln!(f, "books asked for beside a fault: {asked}")?;
        write!(
            f,
            "\nrounds={} acked={acked} lost={} doubled={} reordered={} dead={} slowest_recovery_s={:.1}\n\
             (repeated to Kafka under the same telemetry-id {}, made twice by a broker that was cut off {})",
            self.rounds,
            verdict.lost.len(),
            verdict.doubled.len(),
            verdict.reordered.len(),
            verdict.dead,
            recovery.as_secs_f64(),
            verdict.repeated,
            verdict.made_twice,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults;
    use crate::verdict::Verdict;

    fn chosen(words: &str) -> Vec<&'static Fault> {
        faults::chosen(words, 1).unwrap()
    }

    fn outcome(taken: &[&'static str], acked: u64, seconds: u64, lost: u64) -> Outcome {
        let verdict = Verdict {
            delivered: acked - lost,
            lost: (0..lost).map(|number| number.to_string()).collect(),
            dead: 3,
            ..Verdict::default()
        };
        let recovery = Duration::from_secs(seconds);
        Outcome { acked, recovery, taken: taken.to_vec(), verdict, ..Outcome::default() }
    }

    #[test]
    fn each_fault_has_the_sums_of_the_rounds_that_took_it() {
        let mut report = Report::new(&chosen("node-"), &[]);
        assert!(report.enter(7, &[], Ok(outcome(&["node-kill", "node-stop"], 1_000, 2, 0))));
        assert!(!report.enter(8, &[], Ok(outcome(&["node-kill", "node-kill"], 500, 4, 2))));
        let expected = "
fault                          taken rounds   acked delivered lost doubled recovery_s
node-kill                          3      2    1500      1498    2       0        4.0
node-stop                          1      1    1000      1000    0       0        2.0
never taken: node-freeze, node-kill-in-start, node-kill-twice
taken while another lasted: 0
books asked for beside a fault: 0

rounds=2 acked=1500 lost=2 doubled=0 reordered=0 dead=6 slowest_recovery_s=4.0
(repeated to Kafka under the same telemetry-id 0, made twice by a broker that was cut off 0)";
        assert_eq!(report.to_string(), expected);
    }

    #[test]
    fn one_bad_round_fails_the_run_whatever_comes_after_it() {
        let bad = Verdict { stuck: vec!["energy".to_owned()], ..Verdict::default() };
        let bad = Outcome { verdict: bad, ..Outcome::default() };
        for outcome in [Ok(bad), Err(anyhow::anyhow!("the node ended by itself"))] {
            let mut report = Report::new(&chosen("node-kill"), &[]);
            assert!(report.held());
            assert!(!report.enter(1, &[], outcome));
            assert!(report.enter(2, &[], Ok(outcome_of("node-kill"))));
            assert!(!report.held());
            assert!(report.to_string().contains("rounds=2"));
        }
    }

    fn outcome_of(fault: &'static str) -> Outcome {
        outcome(&[fault], 1, 1, 0)
    }

    #[test]
    fn a_fault_never_taken_is_named_and_fails_the_run_unless_it_was_left_out() {
        let mut report = Report::new(&chosen("node-kill-twice,node-stop"), &chosen("power-cut"));
        report.enter(1, &[], Ok(outcome_of("node-stop")));
        assert_eq!(report.never_taken(), ["node-kill-twice"]);
        let text = report.to_string();
        assert!(text.contains("\nnever taken: node-kill-twice\n"), "{text}");
        let left_out = "\nnever taken, for want of a disk of the node's own: power-cut\n";
        assert!(text.contains(left_out), "{text}");
        report.demand_all();
        assert!(!report.held());
        let mut report = Report::new(&chosen("node-stop"), &chosen("power-cut"));
        report.enter(1, &[], Ok(outcome_of("node-stop")));
        report.demand_all();
        assert!(report.held());
    }
}
