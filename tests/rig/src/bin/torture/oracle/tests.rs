use super::*;

const TIME: &str = "2026-03-14T07:21:05.412908Z";
const LATER: &str = "2026-03-14T07:21:05.412909Z";

/// What was published in a round, and what is there after it. Numbers go from 1.
struct World {
    messages: Vec<Message>,
    entries: Vec<Entry>,
    broker_was_cut: bool,
    replayed: bool,
    found: Found,
    fresh: Vec<Fresh>,
}

impl World {
    fn of(stream: &'static Stream, kinds: &[Kind]) -> Self {
        let numbered = kinds.iter().zip(1..);
        let messages: Vec<_> =
            numbered.map(|(kind, number)| message(stream, number, *kind)).collect();
        let entries = messages.iter().map(entry).collect();
        let found = Found::default();
        Self { messages, entries, broker_was_cut: false, replayed: false, found, fresh: Vec::new() }
    }

    /// Rows of the stream's first table and records in Kafka, by number.
    fn with(mut self, rows: &[u64], records: &[u64]) -> Self {
        let stream = self.messages[0].stream;
        let rows = rows.iter().map(|number| reading(*number)).collect();
        self.found.rows.insert(stream.tables[0].name, rows);
        self.fresh = records.iter().map(|number| fresh(stream, reading(*number))).collect();
        self
    }

    fn letters(mut self, letters: impl IntoIterator<Item = Letter>) -> Self {
        self.found.letters.extend(letters);
        self
    }

    fn judged(&self) -> (Verdict, Accounts) {
        let published = Published {
            messages: &self.messages,
            entries: &self.entries,
            broker_was_cut: self.broker_was_cut,
            replayed: self.replayed,
        };
        judge(&published, &self.found, &self.fresh)
    }

    fn verdict(&self) -> Verdict {
        self.judged().0
    }
}

fn message(stream: &'static Stream, number: u64, kind: Kind) -> Message {
    let payload = format!("{{\"number\":{number},");
    Message { number, stream, device: "r1-0".to_owned(), value: 7, kind, payload }
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
    Reading { device: "r1-0".to_owned(), number, value: Some(7), time: TIME.to_owned() }
}

fn fresh(stream: &Stream, reading: Reading) -> Fresh {
    Fresh { stream: stream.name, reading, text: String::new() }
}

/// Of a message that is no JSON; `place` is STREAM/SINK.
fn letter(place: &str, number: u64) -> Letter {
    Letter {
        letter: format!("{place}/9"),
        payload: format!("{{\"number\":{number},"),
        reason: "not_json".to_owned(),
        sqlstate: None,
        arrival: TIME.to_owned(),
    }
}

fn refused(number: u64) -> Letter {
    let (reason, sqlstate) = ("database_refused".to_owned(), Some("23514".to_owned()));
    Letter { reason, sqlstate, ..letter(TABLE, number) }
}

static ENERGY: &Stream = &STREAMS[0];
static INDOOR: &Stream = &STREAMS[1];
static PLUG: &Stream = &STREAMS[3];
const TABLE: &str = "energy/energy_consumption";
const TOPIC: &str = "energy/kafka";

#[test]
fn a_line_that_tells_of_lost_data_is_an_alarm() {
    let alarm = r#"{"level":"ERROR","event":"buffer_quarantined","runbook":"data-lost"}"#;
    let other = r#"{"level":"WARN","event":"dependency_lost","runbook":"dependency-down"}"#;
    assert_eq!(alarms(&format!("{other}\n{alarm}\nno JSON\n"), 0).unwrap(), [alarm]);
    assert!(alarms(&format!("{alarm}\n{other}\n"), alarm.len()).unwrap().is_empty());
    assert!(alarms("no JSON\n", 0).is_err(), "who cannot read it has seen nothing");
}

#[test]
fn each_kind_has_its_place() {
    let kinds = [Kind::Reading, Kind::Poison, Kind::Malformed, Kind::Filtered];
    let letters = [refused(2), letter(TABLE, 3), letter(TOPIC, 3)];
    let verdict = World::of(ENERGY, &kinds).with(&[1], &[1, 2]).letters(letters).verdict();
    assert!(verdict.holds(), "{verdict}");
    assert_eq!((verdict.dead, verdict.delivered), (3, 4));
}

#[test]
fn what_is_missing_twice_there_unknown_or_in_the_wrong_place_is_told() {
    let two = || World::of(ENERGY, &[Kind::Reading, Kind::Reading]);
    let no_row = two().with(&[1], &[1, 2]).verdict();
    assert_eq!((no_row.lost.len(), no_row.delivered), (1, 1));
    assert_eq!(two().with(&[1, 2], &[1]).verdict().lost.len(), 1);
    assert_eq!(two().with(&[1, 2, 2], &[1, 2]).verdict().doubled.len(), 1);
    assert_eq!(two().with(&[1, 2, 3], &[1, 2]).verdict().foreign.len(), 1);
    let dead = two().with(&[1], &[1, 2]).letters([letter(TABLE, 2)]).verdict();
    assert_eq!((dead.misjudged.len(), dead.lost.len()), (1, 1));
}

#[test]
fn what_was_never_acknowledged_may_be_there_or_not() {
    let mut world = World::of(ENERGY, &[Kind::Reading]).with(&[], &[]);
    world.entries[0].acked = false;
    assert!(world.verdict().holds());
    assert!(world.with(&[1], &[1]).verdict().holds());
}

#[test]
fn another_device_value_or_time_than_the_messages_is_told() {
    for change in [
        |row: &mut Reading| row.device = "r1-1".to_owned(),
        |row: &mut Reading| row.value = Some(8),
        |row: &mut Reading| row.time = LATER.to_owned(),
    ] {
        let mut world = World::of(ENERGY, &[Kind::Reading]).with(&[1], &[1]);
        assert!(world.verdict().holds());
        change(&mut world.found.rows.get_mut("energy_consumption").unwrap()[0]);
        assert_eq!(world.verdict().changed.len(), 1);
    }
}

#[test]
fn a_letter_has_the_bytes_and_the_arrival_of_its_message() {
    let world =
        |letter: Letter| World::of(ENERGY, &[Kind::Poison]).with(&[], &[1]).letters([letter]);
    assert!(world(refused(1)).verdict().holds());
    let cut = Letter { payload: "{\"number\":1,\"".to_owned(), ..refused(1) };
    let late = Letter { arrival: LATER.to_owned(), ..refused(1) };
    for wrong in [cut, late] {
        assert_eq!(world(wrong).verdict().changed.len(), 1);
    }
}

#[test]
fn copies_are_the_brokers_only_in_the_stream_that_keeps_repeats_and_with_a_cause() {
    let verdict = |stream, cut, resent| {
        let mut world = World::of(stream, &[Kind::Reading]).with(&[1, 1], &[1, 1]);
        world.broker_was_cut = cut;
        world.entries[0].resent = resent;
        world.verdict()
    };
    for (cut, resent) in [(true, false), (false, true)] {
        let kept = verdict(ENERGY, cut, resent);
        assert!(kept.holds(), "{kept}");
        assert_eq!(kept.made_twice, 2);
        assert_eq!(verdict(INDOOR, cut, resent).doubled.len(), 2);
    }
    let without = verdict(ENERGY, false, false);
    assert_eq!((without.doubled.len(), without.made_twice), (2, 0));
}

#[test]
fn rows_of_a_message_that_was_kept_less_often_are_the_nodes_own() {
    for (rows, records) in [(&[1, 1][..], &[1][..]), (&[1, 1, 1], &[1, 1])] {
        let mut world = World::of(ENERGY, &[Kind::Reading]).with(rows, records);
        world.broker_was_cut = true;
        let doubled = world.verdict().doubled;
        assert_eq!(
            doubled,
            [format!("energy/energy_consumption: Reading 1, {} times", rows.len())]
        );
    }
}

#[test]
fn a_letter_that_is_missing_of_another_reason_or_of_no_sink_is_told() {
    let malformed = || World::of(ENERGY, &[Kind::Malformed]);
    let both = || [letter(TABLE, 1), letter(TOPIC, 1)];
    assert!(malformed().letters(both()).verdict().holds());
    let missing = malformed().letters([letter(TOPIC, 1)]).verdict();
    assert_eq!(missing.lost, ["energy/energy_consumption: Malformed 1"]);
    let mut letters = both();
    letters[1].reason = "too_deep".to_owned();
    assert_eq!(malformed().letters(letters).verdict().misjudged.len(), 1);
    let other = Letter { sqlstate: Some("23505".to_owned()), ..refused(1) };
    let poison = World::of(ENERGY, &[Kind::Poison]).with(&[], &[1]).letters([other]);
    assert_eq!(poison.verdict().misjudged.len(), 1);
    let homeless = World::of(ENERGY, &[Kind::Reading]).with(&[1], &[1]);
    let homeless = homeless.letters([letter("energy/no_such", 1)]).verdict();
    assert_eq!(homeless.foreign, ["energy/no_such/9"]);
}

#[test]
fn letters_of_the_latest_tables_are_looked_at_too() {
    let verdict = |places: &[&str]| {
        let letters = places.iter().map(|place| letter(place, 1));
        World::of(PLUG, &[Kind::Malformed]).letters(letters).verdict()
    };
    assert!(verdict(&["plug/kafka", "plug/power_plugs"]).holds());
    assert_eq!(verdict(&["plug/kafka"]).lost, ["plug/power_plugs: Malformed 1"]);
    let twice = verdict(&["plug/kafka", "plug/power_plugs", "plug/power_plugs"]);
    assert_eq!(twice.doubled.len(), 1);
}

#[test]
fn after_a_replay_what_was_refused_is_a_row() {
    let mut world = World::of(ENERGY, &[Kind::Poison]).with(&[1], &[1]);
    assert_eq!(world.verdict().misjudged.len(), 1);
    world.replayed = true;
    assert!(world.verdict().holds());
}

#[test]
fn the_books_are_to_count_each_kind_at_its_place_and_each_copy() {
    let kinds = [Kind::Reading, Kind::Incomplete, Kind::Poison, Kind::Malformed, Kind::Filtered];
    let letters = [refused(3), letter(TABLE, 4), letter(TOPIC, 4)];
    let mut world = World::of(ENERGY, &kinds).with(&[1], &[1, 3]).letters(letters);
    world.broker_was_cut = true;
    for _ in 0..2 {
        world.fresh.push(fresh(ENERGY, Reading { value: None, ..reading(2) }));
    }
    let (verdict, accounts) = world.judged();
    assert!(verdict.holds(), "{verdict}");
    let none = Books::default();
    let table = Books { delivered: 1, incomplete: 2, dead_lettered: 2, filtered: 1, ..none };
    assert_eq!(accounts.of("energy", "energy_consumption"), table);
    let kafka = Books { delivered: 4, dead_lettered: 1, filtered: 1, ..none };
    assert_eq!(accounts.of("energy", KAFKA), kafka);
}

#[test]
fn a_latest_table_counts_every_message_as_delivered() {
    let mut world = World::of(PLUG, &[Kind::Reading]);
    world.fresh.push(fresh(PLUG, reading(1)));
    let (verdict, accounts) = world.judged();
    assert!(verdict.holds(), "{verdict}");
    assert_eq!(accounts.of("plug", "power_plugs").delivered, 1);
}
