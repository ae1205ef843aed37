//! The judgement: every acknowledged message once in each table, in Kafka, or among the dead letters, as its kind says;
//! and nothing that nobody published.

use std::collections::HashMap;

use rig::{Books, Entry};

use crate::books::Accounts;
use crate::collect::{Found, Letter, Reading};
use crate::traffic::{Kind, Message, STREAMS, Stream, Table, number_in};
use crate::verdict::Verdict;

/// Lines of the node's log that send the operator to the page of lost data.
pub fn alarms(log: &str) -> Vec<String> {
    let lines = log.lines().filter(|line| {
        let line = serde_json::from_str::<serde_json::Value>(line).unwrap_or_default();
        line["runbook"] == "data-lost"
    });
    lines.map(str::to_owned).collect()
}

/// What a message becomes at a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    There,
    Dead,
    Nowhere,
    /// In the row of its device, until the next message takes its place: judged by what that row says in the end.
    InTheLatest,
}

fn fate_in_table(kind: Kind) -> Fate {
    match kind {
        Kind::Reading => Fate::There,
        Kind::Poison | Kind::Malformed => Fate::Dead,
        Kind::Filtered | Kind::Incomplete => Fate::Nowhere,
    }
}

/// Refused rows were replayed after the table was mended.
fn fate_in_mended_table(kind: Kind) -> Fate {
    match kind {
        Kind::Poison => Fate::There,
        other => fate_in_table(other),
    }
}

fn fate_in_latest_table(kind: Kind) -> Fate {
    match fate_in_table(kind) {
        Fate::There => Fate::InTheLatest,
        other => other,
    }
}

fn fate_in_kafka(kind: Kind) -> Fate {
    match kind {
        Kind::Reading | Kind::Poison | Kind::Incomplete => Fate::There,
        Kind::Malformed => Fate::Dead,
        Kind::Filtered => Fate::Nowhere,
    }
}

/// Why a message of this kind is a dead letter: the reason, and what the database said of it.
fn cause(kind: Kind) -> Option<(&'static str, Option<&'static str>)> {
    match kind {
        Kind::Malformed => Some(("not_json", None)),
        // A check violation.
        Kind::Poison => Some(("database_refused", Some("23514"))),
        Kind::Reading | Kind::Filtered | Kind::Incomplete => None,
    }
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
}

impl Case<'_> {
    fn is_said_by(&self, there: &[&Reading], dead: &[&Letter]) -> bool {
        let Message { device, value, kind, payload, .. } = self.message;
        let value = (*kind != Kind::Incomplete).then_some(*value);
        there.iter().all(|reading| reading.device == *device && reading.value == value)
            && dead.iter().all(|letter| letter.payload == *payload)
    }
}

/// Where the books count a message of this kind.
fn entry_of(books: &mut Books, fate: Fate, kind: Kind) -> &mut u64 {
    match fate {
        Fate::There | Fate::InTheLatest => &mut books.delivered,
        Fate::Dead => &mut books.dead_lettered,
        Fate::Nowhere if kind == Kind::Incomplete => &mut books.incomplete,
        Fate::Nowhere => &mut books.filtered,
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
    fn judge(&mut self, case: &Case<'_>, verdict: &mut Verdict) -> usize {
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
            match self.stream.keeps_repeats && (case.broker_was_cut || entry.resent) {
                true => verdict.made_twice += 1,
                false => verdict.doubled.push(format!("{}, {right} times", name())),
            }
        }
        if !case.is_said_by(&there, &dead) {
            verdict.changed.push(name());
        }
        if let Some(cause) = cause(message.kind).filter(|_| wrong == 0) {
            let of_another = dead.iter().filter(|letter| letter.cause() != cause);
            let told = of_another.map(|letter| format!("{}, dead of {:?}", name(), letter.cause()));
            verdict.misjudged.extend(told);
        }
        verdict.dead += dead.len() as u64;
        *entry_of(&mut self.account, fate, message.kind) += right as u64;
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
pub fn judge(
    published: &Published<'_>,
    found: &Found,
    fresh: &[(&str, Reading)],
) -> (Verdict, Accounts) {
    let mut verdict = Verdict::default();
    let mut accounts = Accounts::default();
    for stream in &STREAMS {
        let mut sinks = sinks(stream, published, found, fresh);
        for (message, entry) in published.messages.iter().zip(published.entries) {
            if message.stream.name == stream.name {
                let (broker_was_cut, copies) = (published.broker_was_cut, entry.acked.into());
                let case = Case { message, entry, broker_was_cut, copies };
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
        let right = sink.judge(&case, verdict);
        everywhere &= right > 0;
        case.copies = case.copies.max(right);
    }
    everywhere
}

fn sinks<'a>(
    stream: &'static Stream,
    published: &Published<'_>,
    found: &'a Found,
    fresh: &'a [(&str, Reading)],
) -> Vec<Sink<'a>> {
    let records = fresh.iter().filter(|(of, _)| *of == stream.name).map(|(_, record)| record);
    let kafka = Sink::new(stream, KAFKA, fate_in_kafka, records, found);
    let tables = stream.tables.iter().map(|table: &Table| {
        if table.latest {
            return Sink::new(stream, table.name, fate_in_latest_table, std::iter::empty(), found);
        }
        let rows = found.rows.get(table.name).into_iter().flatten();
        let fate = if published.replayed { fate_in_mended_table } else { fate_in_table };
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
mod tests {
    use super::*;

    #[test]
    fn a_line_that_tells_of_lost_data_is_an_alarm() {
        let alarm = r#"{"level":"ERROR","event":"buffer_quarantined","runbook":"data-lost"}"#;
        let other = r#"{"level":"WARN","event":"dependency_lost","runbook":"dependency-down"}"#;
        assert_eq!(alarms(&format!("{other}\n{alarm}\nno JSON\n")), [alarm]);
    }

    fn message(number: u64, kind: Kind) -> Message {
        let payload = format!("{{\"number\":{number},");
        let device = "r1-0".to_owned();
        Message { number, stream: &STREAMS[0], device, value: 7, kind, payload }
    }

    fn entry(message: &Message) -> Entry {
        Entry {
            id: 0,
            stream: message.stream.name.to_owned(),
            topic: String::new(),
            payload: message.payload.clone().into_bytes(),
            acked: true,
            refused: None,
            resent: false,
        }
    }

    fn reading(number: u64) -> Reading {
        Reading { device: "r1-0".to_owned(), number, value: Some(7) }
    }

    fn letter(sink: &str, number: u64) -> Letter {
        let payload = format!("{{\"number\":{number},");
        let reason = "not_json".to_owned();
        Letter { letter: format!("energy/{sink}/9"), payload, reason, sqlstate: None }
    }

    fn refused(number: u64) -> Letter {
        let (reason, sqlstate) = ("database_refused".to_owned(), Some("23514".to_owned()));
        Letter { reason, sqlstate, ..letter("energy_consumption", number) }
    }

    fn verdict(kinds: &[Kind], rows: &[u64], records: &[u64], letters: Vec<Letter>) -> Verdict {
        let messages: Vec<_> =
            kinds.iter().zip(1..).map(|(kind, number)| message(number, *kind)).collect();
        let entries: Vec<_> = messages.iter().map(entry).collect();
        let published = Published {
            messages: &messages,
            entries: &entries,
            broker_was_cut: false,
            replayed: false,
        };
        let rows = rows.iter().map(|number| reading(*number)).collect();
        let rows = [("energy_consumption", rows)].into();
        let found = Found { rows, letters, ..Found::default() };
        let fresh: Vec<_> = records.iter().map(|number| ("energy", reading(*number))).collect();
        judge(&published, &found, &fresh).0
    }

    #[test]
    fn each_kind_has_its_place() {
        use Kind::{Filtered, Malformed, Poison, Reading};
        let letters = vec![refused(2), letter("energy_consumption", 3), letter(KAFKA, 3)];
        let kinds = [Reading, Poison, Malformed, Filtered];
        let verdict = verdict(&kinds, &[1], &[1, 2], letters);
        assert!(verdict.holds(), "{verdict}");
        assert_eq!((verdict.dead, verdict.delivered), (3, 4));
    }

    #[test]
    fn what_is_missing_twice_there_unknown_or_in_the_wrong_place_is_told() {
        use Kind::Reading;
        let two = [Reading, Reading];
        let one_lost = verdict(&two, &[1], &[1, 2], Vec::new());
        assert_eq!((one_lost.lost.len(), one_lost.delivered), (1, 1));
        assert_eq!(verdict(&two, &[1, 2], &[1], Vec::new()).lost.len(), 1);
        assert_eq!(verdict(&two, &[1, 2, 2], &[1, 2], Vec::new()).doubled.len(), 1);
        assert_eq!(verdict(&two, &[1, 2, 3], &[1, 2], Vec::new()).foreign.len(), 1);
        let letters = vec![letter("energy_consumption", 2)];
        let dead = verdict(&two, &[1], &[1, 2], letters);
        assert_eq!((dead.misjudged.len(), dead.lost.len()), (1, 1));
    }

    #[test]
    fn another_value_than_was_published_is_told() {
        let mut wrong = reading(1);
        wrong.value = Some(8);
        let messages = [message(1, Kind::Reading)];
        let entries = [entry(&messages[0])];
        let published = Published {
            messages: &messages,
            entries: &entries,
            broker_was_cut: false,
            replayed: false,
        };
        let found =
            Found { rows: [("energy_consumption", vec![wrong])].into(), ..Found::default() };
        let verdict = judge(&published, &found, &[("energy", reading(1))]).0;
        assert_eq!(verdict.changed.len(), 1, "{verdict}");
    }

    /// One reading of the stream came to Kafka and into its table twice.
    fn two_copies(stream: &'static Stream, broker_was_cut: bool, resent: bool) -> Verdict {
        let messages = [Message { stream, ..message(1, Kind::Reading) }];
        let entries = [Entry { resent, ..entry(&messages[0]) }];
        let published =
            Published { messages: &messages, entries: &entries, broker_was_cut, replayed: false };
        let rows = [(stream.tables[0].name, vec![reading(1), reading(1)])].into();
        let fresh = [(stream.name, reading(1)), (stream.name, reading(1))];
        judge(&published, &Found { rows, ..Found::default() }, &fresh).0
    }

    #[test]
    fn copies_are_the_brokers_only_in_the_stream_that_keeps_repeats_and_with_a_cause() {
        let [keeps, knows_again] = [&STREAMS[0], &STREAMS[1]];
        for (cut, resent) in [(true, false), (false, true)] {
            let verdict = two_copies(keeps, cut, resent);
            assert!(verdict.holds(), "{verdict}");
            assert_eq!(verdict.made_twice, 2);
            assert_eq!(two_copies(knows_again, cut, resent).doubled.len(), 2);
        }
        let verdict = two_copies(keeps, false, false);
        assert_eq!((verdict.doubled.len(), verdict.made_twice), (2, 0));
    }

    #[test]
    fn a_letter_that_is_missing_of_another_reason_or_of_no_sink_is_told() {
        use Kind::{Malformed, Poison, Reading};
        let both = || vec![letter("energy_consumption", 1), letter(KAFKA, 1)];
        assert!(verdict(&[Malformed], &[], &[], both()).holds());
        let missing = verdict(&[Malformed], &[], &[], vec![letter(KAFKA, 1)]);
        assert_eq!(missing.lost, ["energy/energy_consumption: Malformed 1"]);
        let mut letters = both();
        letters[1].reason = "too_deep".to_owned();
        assert_eq!(verdict(&[Malformed], &[], &[], letters).misjudged.len(), 1);
        let other = Letter { sqlstate: Some("23505".to_owned()), ..refused(1) };
        assert_eq!(verdict(&[Poison], &[], &[1], vec![other]).misjudged.len(), 1);
        let elsewhere = vec![letter("no_such", 1)];
        assert_eq!(verdict(&[Reading], &[1], &[1], elsewhere).foreign, ["energy/no_such/9"]);
    }

    #[test]
    fn letters_of_the_latest_tables_are_looked_at_too() {
        let message = Message { stream: &STREAMS[3], ..message(1, Kind::Malformed) };
        let verdict = |sinks: &[&str]| {
            let letters = sinks
                .iter()
                .map(|sink| Letter { letter: format!("plug/{sink}/9"), ..letter(sink, 1) });
            let found = Found { letters: letters.collect(), ..Found::default() };
            let (messages, entries) = ([message.clone()], [entry(&message)]);
            let published = Published {
                messages: &messages,
                entries: &entries,
                broker_was_cut: false,
                replayed: false,
            };
            judge(&published, &found, &[]).0
        };
        assert!(verdict(&[KAFKA, "power_plugs"]).holds());
        assert_eq!(verdict(&[KAFKA]).lost, ["plug/power_plugs: Malformed 1"]);
        assert_eq!(verdict(&[KAFKA, "power_plugs", "power_plugs"]).doubled.len(), 1);
    }

    #[test]
    fn the_books_are_to_count_each_kind_at_its_place_and_each_copy() {
        let kinds =
            [Kind::Reading, Kind::Incomplete, Kind::Poison, Kind::Malformed, Kind::Filtered];
        let messages: Vec<_> =
            kinds.iter().zip(1..).map(|(kind, number)| message(number, *kind)).collect();
        let entries: Vec<_> = messages.iter().map(entry).collect();
        let published = Published {
            messages: &messages,
            entries: &entries,
            broker_was_cut: true,
            replayed: false,
        };
        let rows = [("energy_consumption", vec![reading(1)])].into();
        let letters = vec![refused(3), letter("energy_consumption", 4), letter(KAFKA, 4)];
        let found = Found { rows, letters, ..Found::default() };
        let incomplete = || ("energy", Reading { value: None, ..reading(2) });
        let fresh = [("energy", reading(1)), incomplete(), incomplete(), ("energy", reading(3))];
        let (verdict, accounts) = judge(&published, &found, &fresh);
        assert!(verdict.holds(), "{verdict}");
        let table = Books {
            delivered: 1,
            incomplete: 2,
            dead_lettered: 2,
            filtered: 1,
            ..Books::default()
        };
        assert_eq!(accounts.of("energy", "energy_consumption"), table);
        let kafka = Books { delivered: 4, dead_lettered: 1, filtered: 1, ..Books::default() };
        assert_eq!(accounts.of("energy", KAFKA), kafka);
    }

    #[test]
    fn a_latest_table_counts_every_message_as_delivered() {
        let messages = [Message { stream: &STREAMS[3], ..message(1, Kind::Reading) }];
        let entries = [entry(&messages[0])];
        let published = Published {
            messages: &messages,
            entries: &entries,
            broker_was_cut: false,
            replayed: false,
        };
        let (verdict, accounts) = judge(&published, &Found::default(), &[("plug", reading(1))]);
        assert!(verdict.holds(), "{verdict}");
        assert_eq!(accounts.of("plug", "power_plugs").delivered, 1);
    }
}
