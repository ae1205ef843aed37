//! What a run prints.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;

use crate::faults::Fault;
use crate::plan::Step;
use crate::round::Outcome;

/// Everything so far.
pub struct Report {
    rounds: u64,
    sum: Outcome,
    /// By fault: how often it was taken. Every fault of the list is here.
    taken: BTreeMap<&'static str, u64>,
    failed: bool,
}

impl Report {
    pub fn new(faults: &[&'static Fault]) -> Self {
        let taken = faults.iter().map(|fault| (fault.name, 0)).collect();
        Self { rounds: 0, sum: Outcome::default(), taken, failed: false }
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
        for name in &outcome.taken {
            *self.taken.entry(name).or_default() += 1;
        }
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
        self.sum.add(outcome);
        held
    }

    pub fn held(&self) -> bool {
        !self.failed
    }

    /// Of the list: what no round has taken so far.
    pub fn never_taken(&self) -> Vec<&'static str> {
        let never = self.taken.iter().filter(|(_, times)| **times == 0);
        never.map(|(name, _)| *name).collect()
    }

    /// So many rounds were to take every fault.
    pub fn demand_all(&mut self) {
        self.failed |= !self.never_taken().is_empty();
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome { acked, recovery, overlapped, verdict, .. } = &self.sum;
        writeln!(f, "\n{:<30} taken", "fault")?;
        for (name, times) in self.taken.iter().filter(|(_, times)| **times > 0) {
            writeln!(f, "{name:<30} {times:>5}")?;
        }
        let never = self.never_taken();
        if !never.is_empty() {
            writeln!(f, "never taken: {}", never.join(", "))?;
        }
        writeln!(f, "taken while another lasted: {overlapped}")?;
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
