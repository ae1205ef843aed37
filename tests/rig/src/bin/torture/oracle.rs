//! The judgement: every acknowledged message once in each table, in Kafka, or among the dead letters, as its kind says;
//! and nothing that nobody published.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use rig::{Books, Entry};

use crate::books::Accounts;
use crate::chronicle::Fresh;
use crate::collect::{Found, Letter, Reading};
use crate::fate::{self, Fate};
use crate::traffic::{Kind, Message, STREAMS, Stream, Table, number_in};
use crate::verdict::Verdict;

/// Lines of the node's log, from this byte on, that send the operator to the page of lost data.
///
/// # Errors
/// When nothing in the log can be read: then its silence would mean nothing.
pub fn alarms(log: &str, from: usize) -> Result<Vec<String>> {
    let read = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
    ensure!(log.lines().any(|line| read(line).is_some()), "the node's log has no line of JSON");
    let is_alarm = |line: &&str| read(line).is_some_and(|said| said["runbook"] == "data-lost");
    Ok(log[from..].lines().filter(is_alarm).map(str::to_owned).collect())
}

/// One round's publications.
pub struct Published<'a> {
    pub messages: &'a [Message],
    /// A message's place is its entry's.
    pub entries: &'a [Entry],
    /// The broker died or was restarted in this round: it may hand out a second time what it had handed out.
    pub broker_was_cut: bool,
    /// What the table refused was replayed.
    pub replayed: bool,
}

/// One message before its judges.
struct Case<'a> {
    message: &'a Message,
    entry: &'a Entry,
    broker_was_cut: bool,
    /// As far as is known, how often the node kept it. Of what leaves no trace at a sink, that many are in its books.
    copies: usize,
    /// When those arrived, as far as Kafka shows it: the same at every other sink.
    times: Vec<String>,
}

impl Case<'_> {
    fn is_said_by(&self, there: &[&Reading], dead: &[&Letter]) -> bool {
        let Message { device, value, kind, payload, .. } = self.message;
        let value = (*kind != Kind::Incomplete).then_some(*value);
        let in_time = |time: &String| self.times.is_empty() || self.times.contains(time);
        let is_row = |row: &&Reading| row.device == *device && row.value == value;
        there.iter().all(|row| is_row(row) && in_time(&row.time))
            && dead.iter().all(|letter| letter.payload == *payload && in_time(&letter.arrival))
    }
}

/// Copies of each message at one sink.
struct Sink<'a> {
    stream: &'static Stream,
    name: &'static str,
    fate: fn(Kind) -> Fate,
    /// What the node's books are to say of the messages judged so far.
    account: Books,
    /// By number.
    there: HashMap<u64, Vec<&'a Reading>>,
    dead: HashMap<u64, Vec<&'a Letter>>,
}

impl<'a> Sink<'a> {
    fn new(
        stream: &'static Stream,
        name: &'static str,
        fate: fn(Kind) -> Fate,
        there: impl Iterator<Item = &'a Reading>,
        found: &'a Found,
    ) -> Self {
        let mut sink = Sink {
            stream,
            name,
            fate,
            account: Books::default(),
            there: HashMap::new(),
            dead: HashMap::new(),
        };
        for reading in there {
            sink.there.entry(reading.number).or_default().push(reading);
        }
        for letter in found.letters.iter().filter(|letter| letter.is_of(stream.name, name)) {
            let number = number_in(&letter.payload).unwrap_or_default();
            sink.dead.entry(number).or_default().push(letter);
        }
        sink
    }

    /// Takes out what belongs to the message; what is left in the end is foreign. How many copies are where they belong.
    fn judge(&mut self, case: &mut Case<'_>, verdict: &mut Verdict) -> usize {
        let Case { message, entry, .. } = *case;
        let there = self.there.remove(&message.number).unwrap_or_default();
        let dead = self.dead.remove(&message.number).unwrap_or_default();
        let name = || format!("{}: {:?} {}", self.title(), message.kind, message.number);
        let fate = (self.fate)(message.kind);
        let (right, wrong) = match fate {
            Fate::There => (there.len(), dead.len()),
            Fate::Dead => (dead.len(), there.len()),
            Fate::Nowhere | Fate::InTheLatest => (case.copies, there.len() + dead.len()),
        };
        if wrong > 0 {
            verdict.misjudged.push(name());
        }
        if right == 0 && entry.acked {
            verdict.lost.push(name());
        }
        if right > 1 {
            // More often than it was kept it can only be the node that doubled it.
            let by_others = self.name == KAFKA || right <= case.copies;
            let by_others = by_others && (case.broker_was_cut || entry.resent);
            match self.stream.keeps_repeats && by_others {
                true => verdict.made_twice += 1,
                false => verdict.doubled.push(format!("{}, {right} times", name())),
            }
        }
        if !case.is_said_by(&there, &dead) {
            verdict.changed.push(name());
        }
        if let Some(cause) = fate::cause(message.kind).filter(|_| wrong == 0) {
            let of_another = dead.iter().filter(|letter| letter.cause() != cause);
            let told = of_another.map(|letter| format!("{}, dead of {:?}", name(), letter.cause()));
            verdict.misjudged.extend(told);
        }
        if self.name == KAFKA {
            let arrivals = dead.iter().map(|letter| &letter.arrival);
            case.times = there.iter().map(|row| &row.time).chain(arrivals).cloned().collect();
        }
        verdict.dead += dead.len() as u64;
        *fate::entry_of(&mut self.account, fate, message.kind) += right as u64;
        right
    }

    fn title(&self) -> String {
        format!("{}/{}", self.stream.name, self.name)
    }

    fn leftovers(&self, verdict: &mut Verdict) {
        let numbers = self.there.keys().chain(self.dead.keys());
        verdict.foreign.extend(numbers.map(|number| format!("{}: {number}", self.title())));
    }
}

pub const KAFKA: &str = "kafka";

/// Judges one round; `fresh` is what came to Kafka in it. Gives the verdict, and what the books are to say of the round.
pub fn judge(published: &Published<'_>, found: &Found, fresh: &[Fresh]) -> (Verdict, Accounts) {
    let mut verdict = Verdict::default();
    let mut accounts = Accounts::default();
    for stream in &STREAMS {
        let mut sinks = sinks(stream, published, found, fresh);
        for (message, entry) in published.messages.iter().zip(published.entries) {
            if message.stream.name == stream.name {
                let (broker_was_cut, copies) = (published.broker_was_cut, entry.acked.into());
                let case = Case { message, entry, broker_was_cut, copies, times: Vec::new() };
                verdict.delivered += u64::from(at_every_sink(case, &mut sinks, &mut verdict));
            }
        }
        sinks.iter().for_each(|sink| sink.leftovers(&mut verdict));
        for sink in sinks {
            accounts.add(stream.name, sink.name, sink.account);
        }
    }
    let homeless = found.letters.iter().filter(|letter| !has_a_sink(letter));
    verdict.foreign.extend(homeless.map(|letter| letter.letter.clone()));
    (verdict, accounts)
}

/// Kafka comes first, for it shows most: how often the node kept the message.
fn at_every_sink(mut case: Case<'_>, sinks: &mut [Sink<'_>], verdict: &mut Verdict) -> bool {
    let mut everywhere = case.entry.acked;
    for sink in sinks {
        let right = sink.judge(&mut case, verdict);
        everywhere &= right > 0;
        case.copies = case.copies.max(right);
    }
    everywhere
}

fn sinks<'a>(
    stream: &'static Stream,
    published: &Published<'_>,
    found: &'a Found,
    fresh: &'a [Fresh],
) -> Vec<Sink<'a>> {
    let of_stream = fresh.iter().filter(|record| record.stream == stream.name);
    let records = of_stream.map(|record| &record.reading);
    let kafka = Sink::new(stream, KAFKA, fate::in_kafka, records, found);
    let tables = stream.tables.iter().map(|table: &Table| {
        if table.latest {
            return Sink::new(stream, table.name, fate::in_latest_table, std::iter::empty(), found);
        }
        let rows = found.rows.get(table.name).into_iter().flatten();
        let fate = if published.replayed { fate::in_mended_table } else { fate::in_table };
        Sink::new(stream, table.name, fate, rows, found)
    });
    std::iter::once(kafka).chain(tables).collect()
}

fn has_a_sink(letter: &Letter) -> bool {
    STREAMS.iter().any(|stream| {
        let tables = stream.tables.iter().map(|table| table.name);
        tables.chain([KAFKA]).any(|sink| letter.is_of(stream.name, sink))
    })
}

#[cfg(test)]
mod tests;
