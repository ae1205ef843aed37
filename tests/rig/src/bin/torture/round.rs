//! One round: publish, break, rest, judge.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rand::Rng;
use rand::rngs::StdRng;
use rig::{Follower, Streams};

use crate::books::{self, Accounts};
use crate::chronicle::Chronicle;
use crate::collect::{self, Found};
use crate::faults::Fault;
use crate::lab::Lab;
use crate::latest;
use crate::oracle::{self, Published};
use crate::plan::{self, Step};
use crate::traffic::{Load, STREAMS};
use crate::verdict::Verdict;

/// After the last fault everything must have come to rest within this time: the promise of liveness.
pub const RECOVER_WITHIN: Duration = Duration::from_secs(30);
const LOOK_PAUSE: Duration = Duration::from_millis(100);
const STOP_WITHIN: Duration = Duration::from_secs(20);
const PAUSE_MAX_MS: u64 = 300;

/// What a round came to, or all of them together.
#[derive(Debug, Default)]
pub struct Outcome {
    pub acked: u64,
    /// From the end of faults and publishing until everything was in its place; of what is taken at rest, from its end.
    pub recovery: Duration,
    pub taken: Vec<&'static str>,
    /// Faults that happened while another lasted.
    pub overlapped: u64,
    /// How often the node was asked for its books just before or after a fault, and answered.
    pub asked: u64,
    /// What no book accounted for then.
    pub unbalanced: Vec<String>,
    pub verdict: Verdict,
}

impl Outcome {
    pub fn add(&mut self, other: Outcome) {
        self.acked += other.acked;
        self.recovery = self.recovery.max(other.recovery);
        self.overlapped += other.overlapped;
        self.asked += other.asked;
        let (sum, new) = (&mut self.verdict, other.verdict);
        sum.lost.extend(new.lost);
        sum.doubled.extend(new.doubled);
        sum.reordered.extend(new.reordered);
        sum.delivered += new.delivered;
        sum.dead += new.dead;
        sum.repeated += new.repeated;
        sum.made_twice += new.made_twice;
    }
}

/// All rounds of one run, over the same servers.
pub struct Run {
    lab: Lab,
    follower: Follower,
    chronicle: Chronicle,
    round: u64,
    /// By append table: the rows of the rounds before, and those of all rounds as last seen.
    rows_before: BTreeMap<&'static str, u64>,
    rows: BTreeMap<&'static str, u64>,
    /// What the books are to say of the rounds before, and of all rounds as last judged.
    accounts_before: Accounts,
    accounts: Accounts,
    /// How much of the node's log was looked at.
    log_bytes: usize,
}

impl Run {
    /// # Errors
    /// When Kafka does not answer.
    pub fn new(lab: Lab) -> Result<Self> {
        let topics: Vec<&str> = lab.topics.iter().map(String::as_str).collect();
        let follower = lab.kafka.follow(&topics)?;
        let chronicle = Chronicle::new(&topics);
        Ok(Self {
            lab,
            follower,
            chronicle,
            round: 0,
            rows_before: BTreeMap::new(),
            rows: BTreeMap::new(),
            accounts_before: Accounts::default(),
            accounts: Accounts::default(),
            log_bytes: 0,
        })
    }

    /// # Errors
    /// When something failed that is not the judgement's to tell: a server or node that does not start, does not
    /// answer, or ends by itself.
    pub fn round(&mut self, seed: u64, steps: &[Step]) -> Result<Outcome> {
        self.round += 1;
        let mut outcome = Outcome::default();
        self.chronicle.begin_round();
        let load = Load::start(self.lab.mosquitto.port(), self.round, plan::dice(seed, 1));
        self.lab.gate = load.gate.clone();
        let mut dice = plan::dice(seed, 2);
        let broken = self.break_things(steps, &mut dice, &mut outcome);
        let (publisher, messages) = load.end();
        broken?;
        let rest = Instant::now();
        publisher.flush(RECOVER_WITHIN).context("the broker takes what is published")?;
        let ledger = publisher.ledger();
        let mut published = Published {
            messages: &messages,
            entries: ledger.entries(),
            broker_was_cut: steps.iter().any(|step| step.cuts_broker()),
            replayed: false,
        };
        outcome.acked = ledger.acked_count() as u64;
        outcome.verdict = self.settle(&published, rest)?;
        outcome.recovery = rest.elapsed();
        for step in steps.iter().filter(|step| step.fault.at_rest) {
            if !outcome.verdict.holds() {
                break;
            }
            self.take(step, &mut dice, &mut outcome)?;
            published.replayed = true;
            let rest = Instant::now();
            outcome.verdict = self.settle(&published, rest)?;
            outcome.recovery = outcome.recovery.max(rest.elapsed());
        }
        self.close(&mut outcome)?;
        Ok(outcome)
    }

    /// The last judgements, and what the next round must know of this one.
    fn close(&mut self, outcome: &mut Outcome) -> Result<()> {
        outcome.verdict.books.append(&mut outcome.unbalanced);
        if outcome.verdict.holds() {
            let log = self.lab.node.log_text();
            outcome.verdict.alarms = oracle::alarms(&log, self.log_bytes)?;
            self.log_bytes = log.len();
        }
        if outcome.verdict.holds() {
            collect::purge_letters(&self.lab.node)?;
            self.rows_before.clone_from(&self.rows);
            self.accounts_before.clone_from(&self.accounts);
        }
        Ok(())
    }

    fn break_things(
        &mut self,
        steps: &[Step],
        dice: &mut StdRng,
        outcome: &mut Outcome,
    ) -> Result<()> {
        pause(dice);
        for step in steps.iter().filter(|step| !step.fault.at_rest) {
            self.take(step, dice, outcome)?;
            pause(dice);
        }
        Ok(())
    }

    fn take(&mut self, step: &Step, dice: &mut StdRng, outcome: &mut Outcome) -> Result<()> {
        let fault = step.fault;
        self.lab.meanwhile.waiting = step.meanwhile;
        self.ask_for_the_books("before", fault, outcome);
        let done = (fault.take)(fault, &mut self.lab, dice);
        self.ask_for_the_books("after", fault, outcome);
        if done.with_context(|| format!("fault {}", fault.name))? {
            outcome.taken.push(fault.name);
        }
        outcome.overlapped += self.lab.meanwhile.taken.len() as u64;
        outcome.taken.append(&mut self.lab.meanwhile.taken);
        Ok(())
    }

    /// They balance at any moment, also before it is killed and after it was started. A node that does not answer just
    /// now has not failed in that.
    fn ask_for_the_books(&self, when: &str, fault: &Fault, outcome: &mut Outcome) {
        let Ok(streams) = Streams::of(&self.lab.node) else { return };
        outcome.asked += 1;
        let wrong = books::unbalanced(&streams).into_iter();
        outcome.unbalanced.extend(wrong.map(|what| format!("{when} {}: {what}", fault.name)));
    }

    /// Looks until everything is in its place, or the time is over, or something cannot mend any more.
    fn settle(&mut self, published: &Published<'_>, rest: Instant) -> Result<Verdict> {
        loop {
            if let Some(status) = self.lab.node.daemon().exit_status()? {
                bail!("the node ended by itself: {status}");
            }
            let verdict = self.look(published).unwrap_or_else(|error| Verdict {
                stuck: vec![format!("{error:#}")],
                ..Verdict::default()
            });
            if verdict.holds() || !verdict.may_mend() || rest.elapsed() > RECOVER_WITHIN {
                return Ok(verdict);
            }
            sleep(LOOK_PAUSE);
        }
    }

    fn look(&mut self, published: &Published<'_>) -> Result<Verdict> {
        let streams = Streams::of(&self.lab.node)?;
        let unbalanced = books::unbalanced(&streams);
        if let Some(why) = books::at_rest(&streams) {
            return Ok(Verdict { stuck: vec![why], books: unbalanced, ..Verdict::default() });
        }
        self.chronicle.read_on(&mut self.follower)?;
        let found = collect::found(self.round, &self.lab.postgres, &self.lab.node)?;
        let (mut verdict, accounts) = oracle::judge(published, &found, &self.chronicle.fresh);
        verdict.books = unbalanced;
        verdict.reordered.clone_from(&self.chronicle.reordered);
        verdict.changed.extend(self.chronicle.changed.iter().cloned());
        verdict.repeated = self.chronicle.repeated;
        // While something is on its way, rows come between one count and the next.
        if verdict.lost.is_empty() {
            self.judge_tables(&found, &mut verdict);
        }
        if verdict.holds() {
            let fresh = &self.chronicle.fresh;
            self.lab.shapes.judge(published.messages, fresh, &mut verdict);
            self.accounts = self.accounts_before.clone().and(&accounts);
            books::compare(&Streams::of(&self.lab.node)?, &self.accounts, &accounts, &mut verdict);
        }
        self.rows = found.totals;
        Ok(verdict)
    }

    /// Tables of the latest state, and rows that came too late for their own round.
    fn judge_tables(&self, found: &Found, verdict: &mut Verdict) {
        for stream in &STREAMS {
            for table in stream.tables {
                let rows = found.rows.get(table.name).map(Vec::as_slice).unwrap_or_default();
                if table.latest {
                    latest::judge(table, rows, self.chronicle.newest(stream.name), verdict);
                    continue;
                }
                let total = found.totals.get(table.name).copied().unwrap_or_default();
                let before = self.rows_before.get(table.name).copied().unwrap_or_default();
                if total != before + rows.len() as u64 {
                    verdict.doubled.push(format!(
                        "{}: {total} rows after {before} and {} of this round",
                        table.name,
                        rows.len()
                    ));
                }
            }
        }
    }

    pub fn story(&mut self) -> String {
        self.lab.story()
    }

    /// Stops the node in order; how that goes is not judged here.
    pub fn end(mut self) {
        let _ = self.lab.node.stop(STOP_WITHIN);
    }
}

fn pause(dice: &mut StdRng) {
    sleep(Duration::from_millis(dice.random_range(0..PAUSE_MAX_MS)));
}
