//! The buffer against a model of three lines: a list of payloads per stream, of which every sink sees each once.

mod calls;
#[path = "buffer_model/kills.rs"]
mod kills;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use indexmap::IndexMap;
use proptest::prelude::*;
use telemetry::buffer::{Buffer, BufferError, DeadLetterFilter, Incoming, Reader};
use telemetry::config::{
    BufferSettings, HttpSettings, LogFormat, LogSettings, NodeSettings, Settings,
    SupervisionSettings,
};
use telemetry::domain::{
    Arrival, Books, DeadLetter, DeadLetterKey, Delivered, DeliveryFlags, Durable, NodeName, Reason,
    Sequence, SequenceRange, SinkName, Stage, StreamName,
};
use telemetry::observe::Board;
use tokio::sync::oneshot;

/// Nothing here takes long; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

fn stream(name: &str) -> StreamName {
    StreamName::parse(name).unwrap()
}

fn sink(name: &str) -> SinkName {
    SinkName::parse(name).unwrap()
}

fn small() -> BufferSettings {
    BufferSettings {
        quota_bytes: 1 << 30,
        generation_bytes: 256 << 10,
        sync_linger: Duration::ZERO,
        group_messages_max: 1024,
        tail_bytes_max: 64 << 10,
        dead_letter_quota_bytes: 1 << 20,
        ballast_bytes: 1 << 16,
        free_bytes_min: 0,
    }
}

fn board() -> Arc<Board> {
    let nothing = Duration::from_secs(1);
    Board::new(&Settings {
        node: NodeSettings {
            name: NodeName::parse("test").unwrap(),
            state_dir: "/nonexistent".into(),
            drain_timeout: nothing,
            stream_threads: 1,
        },
        buffer: small(),
        http: HttpSettings {
            listen: ([127, 0, 0, 1], 0).into(),
            certificate: None,
            guarded: false,
            requests_per_minute_max: 600,
            connections_per_peer_max: 64,
        },
        log: LogSettings { format: LogFormat::Text, filter: "info".into() },
        supervision: SupervisionSettings {
            restarts_max: 1,
            restart_window: nothing,
            backoff_min: nothing,
            backoff_max: nothing,
            parked_retry: nothing,
            stall_timeout: nothing,
        },
        brokers: IndexMap::new(),
        clusters: IndexMap::new(),
        databases: IndexMap::new(),
        streams: IndexMap::new(),
    })
}

/// Streams `a` (sinks `one`, `two`) and `b` (sink `one`).
fn streams() -> Vec<(StreamName, Vec<SinkName>)> {
    vec![(stream("a"), vec![sink("one"), sink("two")]), (stream("b"), vec![sink("one")])]
}

fn try_open(folder: &Path, settings: &BufferSettings) -> Result<Buffer, BufferError> {
    Buffer::open(folder, settings, &streams(), board())
}

fn open(folder: &Path) -> Buffer {
    try_open(folder, &small()).unwrap()
}

async fn close(buffer: &Buffer) {
    buffer.close(PATIENCE).await.unwrap();
}

fn message(payload: Vec<u8>) -> Incoming {
    Incoming {
        topic: Bytes::from_static("house/küche/sensor".as_bytes()),
        payload: payload.into(),
        arrival: Arrival(1_700_000_000_000_000),
        flags: DeliveryFlags { qos: 1, ..DeliveryFlags::default() },
        packet_id: 7,
    }
}

fn hand_over(buffer: &Buffer, name: &str, payloads: Vec<Vec<u8>>) -> oneshot::Receiver<Durable> {
    let batch = payloads.into_iter().map(message).collect();
    buffer.appender(&stream(name)).try_append(batch).unwrap()
}

async fn answered(receiver: oneshot::Receiver<Durable>) -> Sequence {
    tokio::time::timeout(PATIENCE, receiver).await.expect("in time").expect("answered").0
}

async fn append(buffer: &Buffer, name: &str, payloads: Vec<Vec<u8>>) -> Sequence {
    answered(hand_over(buffer, name, payloads)).await
}

/// What a sink saw: payloads by sequence, and what it was told is lost.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    payloads: BTreeMap<u64, Vec<u8>>,
    lost: Vec<SequenceRange>,
}

async fn drain(reader: &mut Reader, from: Sequence, bytes_max: usize) -> Seen {
    let mut seen = Seen::default();
    let mut position = from;
    loop {
        let chunk = tokio::time::timeout(PATIENCE, reader.read(position, bytes_max));
        let chunk = chunk.await.expect("in time").unwrap();
        if let Some(lost) = chunk.lost {
            assert!(chunk.blocks.is_empty());
            assert_eq!(lost.first, position.next(), "a loss begins right after the position");
            position = lost.last;
            seen.lost.push(lost);
            continue;
        }
        if chunk.blocks.is_empty() {
            return seen;
        }
        for block in &chunk.blocks {
            for record in block.records_after(position) {
                assert_eq!(record.sequence, position.next(), "contiguous");
                assert_eq!(record.topic, "house/küche/sensor");
                position = record.sequence;
                seen.payloads.insert(position.0, record.payload.to_vec());
            }
        }
    }
}

async fn all(buffer: &Buffer, name: &str, from: Sequence) -> Seen {
    drain(&mut buffer.reader(&stream(name)), from, 16 << 10).await
}

fn generations(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder.join("buffer"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("generation-"))
        .collect();
    names.sort();
    names
}

fn payloads(count: usize, bytes: usize) -> Vec<Vec<u8>> {
    (0..count).map(|n| [n.to_be_bytes().as_slice(), &vec![b'x'; bytes]].concat()).collect()
}

async fn until(what: &str, mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !met() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn what_was_answered_is_there_after_opening_again_under_the_same_identity() {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let identity = buffer.identity();
    assert_eq!(buffer.oldest(&stream("a")), Sequence(1));
    assert_eq!(append(&buffer, "a", vec![b"1".to_vec(), b"2".to_vec()]).await, Sequence(2));
    assert_eq!(append(&buffer, "a", vec![b"3".to_vec()]).await, Sequence(3));
    assert_eq!(append(&buffer, "b", vec![b"x".to_vec()]).await, Sequence(1));
    let before = all(&buffer, "a", Sequence::ZERO).await;
    close(&buffer).await;
    let buffer = open(folder.path());
    assert_eq!(buffer.identity(), identity);
    assert_eq!(buffer.durable(&stream("a")), Durable(Sequence(3)));
    assert_eq!(all(&buffer, "a", Sequence::ZERO).await, before);
    assert_eq!(before.payloads.into_values().collect::<Vec<_>>(), [b"1", b"2", b"3"]);
    assert_eq!(append(&buffer, "a", vec![b"4".to_vec()]).await, Sequence(4));
    close(&buffer).await;
}

#[tokio::test]
async fn a_second_buffer_on_the_same_folder_is_refused_until_the_first_has_closed() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    assert!(matches!(try_open(folder.path(), &small()), Err(BufferError::Locked { .. })));
    close(&first).await;
    close(&open(folder.path())).await;
    let answer = hand_over(&first, "a", vec![b"late".to_vec()]);
    assert!(answer.await.is_err(), "a closed buffer acknowledges nothing");
    let read = first.reader(&stream("a")).read(Sequence::ZERO, 1).await;
    assert!(matches!(read, Err(BufferError::Stopped { .. })));
}

/// Each start makes a generation, so a node that crashes again and again while its sinks are away makes many of them.
#[tokio::test]
async fn many_starts_with_few_messages_cost_little_lose_nothing_and_end_at_the_quota() {
    const STARTS: u64 = 70;
    const EACH: usize = 3;
    /// Of small generations this many are kept for those who ask what came lately, beside the one that is written.
    const KEPT: usize = 65;
    let folder = tempfile::tempdir().unwrap();
    let roomy = BufferSettings { generation_bytes: 64 << 20, ..small() };
    let mut last = Sequence::ZERO;
    for _ in 0..STARTS {
        let buffer = try_open(folder.path(), &roomy).unwrap();
        last = append(&buffer, "a", payloads(EACH, 100)).await;
        close(&buffer).await;
        forget_the_orderly_stop(folder.path());
    }
    let board = board();
    let buffer = Buffer::open(folder.path(), &roomy, &streams(), board.clone()).unwrap();
    until("the sizes are shown", || board.buffer().generations == STARTS + 1).await;
    let bytes = board.buffer().bytes;
    assert!(bytes < (STARTS + 1) * (32 << 10), "{bytes} bytes");
    let seen = all(&buffer, "a", Sequence::ZERO).await;
    assert_eq!((seen.payloads.len(), seen.lost.len()), (STARTS as usize * EACH, 0));
    close(&buffer).await;

    // No room is left: a start may need none that the next one does not give back.
    let tight = BufferSettings { quota_bytes: bytes, ..roomy.clone() };
    for _ in 0..4 {
        let buffer = try_open(folder.path(), &tight).unwrap();
        let mut answer = hand_over(&buffer, "a", payloads(EACH, 100));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(answer.try_recv().is_err(), "not acknowledged");
        close(&buffer).await;
        forget_the_orderly_stop(folder.path());
        assert_eq!(generations(folder.path()).len() as u64, STARTS + 1);
    }
    let buffer = try_open(folder.path(), &roomy).unwrap();
    assert_eq!(buffer.durable(&stream("a")).0, last);
    for name in ["one", "two"] {
        buffer.delivered(&stream("a"), &sink(name), Delivered(last));
    }
    until("the oldest are gone", || generations(folder.path()).len() <= KEPT).await;
    append(&buffer, "a", payloads(1, 1)).await;
    close(&buffer).await;
}

/// Bytes that no compression makes smaller.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}

#[tokio::test]
async fn large_records_go_over_several_keys_and_never_into_blob_files() {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let large: Vec<_> = (1..=40).map(|seed| noise(seed, 300 << 10)).collect();
    for payload in &large {
        append(&buffer, "a", vec![payload.clone(), b"small".to_vec()]).await;
    }
    let seen = all(&buffer, "a", Sequence::ZERO).await;
    let odd: Vec<_> = seen.payloads.values().step_by(2).cloned().collect();
    assert!(odd == large);
    assert_eq!(seen.payloads.len(), 80);
    assert_eq!(blobs(folder.path()), 0);
    close(&buffer).await;
}

/// Pages that sled made files of their own, which it never syncs.
fn blobs(folder: &Path) -> usize {
    let names = generations(folder).into_iter().map(|name| Path::new("buffer").join(name));
    let folders = names.chain(["state".into()]).map(|name| folder.join(name).join("blobs"));
    folders.map(|blobs| fs::read_dir(blobs).map_or(0, Iterator::count)).sum()
}

/// What `kill -9` would leave: the files as they are, of a buffer that does not know it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test]
async fn what_was_answered_survives_a_kill_and_no_number_is_used_twice() {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let mut last = Sequence::ZERO;
    for _ in 0..12 {
        last = append(&buffer, "a", payloads(64, 400)).await;
    }
    let before = all(&buffer, "a", Sequence::ZERO).await;
    let killed = tempfile::tempdir().unwrap();
    copy(folder.path(), killed.path());
    close(&buffer).await;
    let buffer = open(killed.path());
    assert_eq!(buffer.durable(&stream("a")).0, last);
    assert!(all(&buffer, "a", Sequence::ZERO).await == before);
    assert!(buffer.losses().is_empty());
    assert_eq!(append(&buffer, "a", payloads(1, 1)).await, last.next());
    close(&buffer).await;
}

#[tokio::test]
async fn a_generation_every_sink_has_passed_is_dropped_and_the_newest_sealed_one_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let mut last = Sequence::ZERO;
    while generations(folder.path()).len() < 5 {
        last = append(&buffer, "a", payloads(64, 400)).await;
    }
    buffer.delivered(&stream("a"), &sink("one"), Delivered(last));
    let five = generations(folder.path());
    let second = range_in(folder.path(), &five[1], "a");
    buffer.delivered(&stream("a"), &sink("two"), Delivered(Sequence(second.last.0 - 1)));
    until("the first is gone", || !generations(folder.path()).contains(&five[0])).await;
    // The thread that drops looks at the next one at once; a write to the disk takes longer.
    append(&buffer, "a", payloads(1, 1)).await;
    assert_eq!(buffer.oldest(&stream("a")), second.first, "sink two needs the second");
    let rest = all(&buffer, "a", second.last).await;
    assert!(rest.lost.is_empty() && rest.payloads.into_keys().eq(second.last.0 + 1..=last.0 + 1));
    assert_eq!(generations(folder.path()), five[1..]);
    buffer.delivered(&stream("a"), &sink("two"), Delivered(last));
    until("the drained ones are gone", || generations(folder.path()).len() == 2).await;
    let oldest = buffer.oldest(&stream("a"));
    assert!(oldest > Sequence(1));
    let recent = buffer.recent(&stream("a"), 100).unwrap();
    assert_eq!(recent.last().unwrap().range().last, last.next());
    let records: usize =
        recent.iter().map(|block| block.records_after(Sequence::ZERO).count()).sum();
    assert!((100..164).contains(&records), "{records}: the first block may begin before");
    close(&buffer).await;
    let buffer = open(folder.path());
    assert_eq!(buffer.oldest(&stream("a")), oldest);
    assert!(buffer.losses().is_empty(), "what was dropped is not lost");
    assert_eq!(append(&buffer, "a", payloads(1, 1)).await, Sequence(last.0 + 2));
    close(&buffer).await;
}

/// Fills five generations with streams `a` and `b`; returns what sinks would see.
async fn five_generations(folder: &Path) -> (Seen, Seen) {
    let buffer = open(folder);
    while generations(folder).len() < 5 {
        append(&buffer, "a", payloads(64, 400)).await;
        append(&buffer, "b", payloads(10, 100)).await;
    }
    append(&buffer, "a", payloads(10, 10)).await;
    let seen = (all(&buffer, "a", Sequence::ZERO).await, all(&buffer, "b", Sequence::ZERO).await);
    close(&buffer).await;
    seen
}

/// Overwrites a database's file.
fn damage(folder: &Path, generation: &str) {
    let path = folder.join("buffer").join(generation).join("db");
    let bytes = vec![0xa5; fs::metadata(&path).unwrap().len() as usize];
    fs::write(path, bytes).unwrap();
}

fn sidecar(folder: &Path, generation: &str) -> PathBuf {
    folder.join("buffer").join(generation).join("sealed.json")
}

fn range_in(folder: &Path, generation: &str, name: &str) -> SequenceRange {
    let text = fs::read_to_string(sidecar(folder, generation)).unwrap();
    let json = text.split_once('\n').unwrap().1;
    let value: serde_json::Value = serde_json::from_str(json).unwrap();
    serde_json::from_value(value["ranges"][name].clone()).unwrap()
}

fn count(lost: &[SequenceRange]) -> u64 {
    lost.iter().map(|range| range.count()).sum()
}

#[tokio::test]
async fn an_unreadable_generation_is_set_aside_and_exactly_its_records_are_lost() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = five_generations(folder.path()).await;
    let third = generations(folder.path())[2].clone();
    let ranges = ["a", "b"].map(|name| range_in(folder.path(), &third, name));
    damage(folder.path(), &third);
    for opening in 0..2 {
        let buffer = open(folder.path());
        for (name, whole, range) in [("a", &a, ranges[0]), ("b", &b, ranges[1])] {
            let seen = all(&buffer, name, Sequence::ZERO).await;
            assert_eq!(count(&seen.lost), range.count(), "{name}, opening {opening}");
            assert_eq!(seen.lost.first().unwrap().first, range.first);
            assert_eq!(seen.lost.last().unwrap().last, range.last);
            let mut expected = whole.payloads.clone();
            expected.retain(|n, _| *n < range.first.0 || *n > range.last.0);
            let appended_since = seen.payloads.len() - expected.len();
            assert_eq!(appended_since, if name == "a" { opening } else { 0 });
            let fine = expected.iter().all(|(n, payload)| seen.payloads.get(n) == Some(payload));
            assert!(fine, "the neighbours are fine");
        }
        let lost: u64 = buffer.losses().iter().map(|loss| loss.range.count()).sum();
        assert_eq!(lost, ranges[0].count() + ranges[1].count(), "noted once");
        append(&buffer, "a", payloads(1, 1)).await;
        close(&buffer).await;
    }
    assert!(!generations(folder.path()).contains(&third));
    assert_eq!(fs::read_dir(folder.path().join("buffer/quarantine")).unwrap().count(), 1);
}

#[tokio::test]
async fn an_unreadable_newest_generation_costs_its_records_and_never_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _) = five_generations(folder.path()).await;
    let names = generations(folder.path());
    let before = range_in(folder.path(), &names[3], "a").last;
    let last = Sequence(*a.payloads.last_key_value().unwrap().0);
    damage(folder.path(), &names[4]);
    let buffer = open(folder.path());
    assert_eq!(buffer.durable(&stream("a")).0, last, "the stop was orderly: the numbers are exact");
    let seen = all(&buffer, "a", before).await;
    assert_eq!(seen.lost, [SequenceRange { first: before.next(), last }]);
    assert_eq!(append(&buffer, "a", payloads(1, 1)).await, last.next());
    close(&buffer).await;
}

#[tokio::test]
async fn an_unreadable_newest_generation_after_a_kill_never_gives_a_number_twice() {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let last = append(&buffer, "a", payloads(500, 40)).await;
    let killed = tempfile::tempdir().unwrap();
    copy(folder.path(), killed.path());
    close(&buffer).await;
    let newest = generations(killed.path()).pop().unwrap();
    damage(killed.path(), &newest);
    let buffer = open(killed.path());
    assert!(buffer.durable(&stream("a")).0 >= last);
    let seen = all(&buffer, "a", Sequence::ZERO).await;
    assert!(seen.payloads.is_empty());
    assert!(count(&seen.lost) >= last.0, "at least what was there is reported");
    close(&buffer).await;
}

#[tokio::test]
async fn a_sealed_generation_without_its_sidecar_is_read_instead() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _) = five_generations(folder.path()).await;
    let names = generations(folder.path());
    fs::remove_file(sidecar(folder.path(), &names[1])).unwrap();
    fs::write(sidecar(folder.path(), &names[2]), "damaged").unwrap();
    let buffer = open(folder.path());
    assert!(all(&buffer, "a", Sequence::ZERO).await == a);
    assert!(buffer.losses().is_empty());
    close(&buffer).await;
}

#[tokio::test]
async fn at_the_quota_nothing_is_answered_until_a_sink_has_caught_up() {
    let folder = tempfile::tempdir().unwrap();
    let settings = BufferSettings { quota_bytes: 6 << 20, generation_bytes: 1 << 20, ..small() };
    let board = board();
    let buffer = Buffer::open(folder.path(), &settings, &streams(), board.clone()).unwrap();
    let mut last = Sequence::ZERO;
    let mut waiting = loop {
        let mut answer = hand_over(&buffer, "a", payloads(64, 4000));
        tokio::select! {
            biased;
            durable = &mut answer => last = durable.unwrap().0,
            () = until("answered, or full", || !board.buffer().accepting) => break answer,
        }
    };
    assert!(board.buffer().refusing_because.unwrap().contains("quota"));
    assert!(waiting.try_recv().is_err(), "not acknowledged");
    for name in ["one", "two"] {
        buffer.delivered(&stream("a"), &sink(name), Delivered(last));
    }
    assert_eq!(answered(waiting).await, Sequence(last.0 + 64));
    until("the board says so", || board.buffer().accepting).await;
    close(&buffer).await;
}

#[tokio::test]
async fn a_full_buffer_closes_without_acknowledging_what_waits() {
    let folder = tempfile::tempdir().unwrap();
    let settings = BufferSettings { free_bytes_min: u64::MAX, ..small() };
    let buffer = try_open(folder.path(), &settings).unwrap();
    let answer = hand_over(&buffer, "a", payloads(1, 1));
    close(&buffer).await;
    assert!(answer.await.is_err());
    let buffer = open(folder.path());
    assert_eq!(append(&buffer, "a", payloads(1, 1)).await, Sequence(1));
    close(&buffer).await;
}

#[tokio::test]
async fn a_stream_with_sixteen_batches_waiting_gets_the_next_one_back() {
    let folder = tempfile::tempdir().unwrap();
    let settings = BufferSettings { sync_linger: Duration::from_secs(1), ..small() };
    let buffer = try_open(folder.path(), &settings).unwrap();
    let appender = buffer.appender(&stream("a"));
    let batch = || vec![message(b"m".to_vec())];
    let answers: Vec<_> = (0..16).map(|_| appender.try_append(batch()).unwrap()).collect();
    assert_eq!(appender.try_append(batch()).unwrap_err().len(), 1);
    tokio::time::timeout(PATIENCE, appender.ready()).await.expect("a permit comes back");
    for (n, answer) in answers.into_iter().enumerate() {
        assert_eq!(answered(answer).await, Sequence(n as u64 + 1));
    }
    assert!(appender.try_append(batch()).is_ok());
    close(&buffer).await;
}

fn letter(sink_name: &str, sequence: u64, bytes: usize) -> DeadLetter {
    let key =
        DeadLetterKey { sink: sink(sink_name), stream: stream("a"), sequence: Sequence(sequence) };
    DeadLetter {
        key,
        topic: "house/küche".into(),
        payload: (0..bytes).map(|n| n as u8).collect(),
        arrival: Arrival(1),
        dead_at: Arrival(sequence as i64),
        stage: Stage::Map,
        reason: Reason::WrongType,
        detail: "value: a text".into(),
        sqlstate: None,
        column: Some("value".into()),
        attempts: 1,
        retain: false,
    }
}

#[tokio::test]
async fn books_notes_and_dead_letters_survive_and_keep_their_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let state = buffer.state();
    let (a, one) = (stream("a"), sink("one"));
    assert_eq!(state.books(&a, &one).await.unwrap(), None);
    let books = Books { cursor: Sequence(9), delivered: 8, lost: 1, ..Books::default() };
    state.save_books(&a, &one, books).await.unwrap();
    state.put_note("stream/retained", vec![3; 50_000]).await.unwrap();
    state.put_note("stream/retained", vec![4; 20_000]).await.unwrap();
    let letters: Vec<_> = [(2, 30_000), (1, 10), (3, 0)].map(|(n, b)| letter("one", n, b)).into();
    state.put_dead_letters(letters.clone()).await.unwrap();
    state.put_dead_letters(letters).await.unwrap();
    state.put_dead_letters(vec![letter("two", 2, 5)]).await.unwrap();
    let too_many = state.put_dead_letters(vec![letter("one", 4, 2 << 20)]).await;
    assert!(matches!(too_many, Err(BufferError::DeadLettersFull { .. })));
    close(&buffer).await;

    let buffer = open(folder.path());
    let state = buffer.state();
    assert_eq!(state.books(&a, &one).await.unwrap(), Some(books));
    assert_eq!(state.note("stream/retained").await.unwrap(), Some(vec![4; 20_000]));
    assert_eq!(state.note("stream/ret").await.unwrap(), None);
    let every = DeadLetterFilter::default();
    let found = state.dead_letters(every.clone(), None, 10).await.unwrap();
    let expected = [("one", 1, 10), ("one", 2, 30_000), ("one", 3, 0), ("two", 2, 5)]
        .map(|(s, n, b)| letter(s, n, b));
    assert_eq!(found, expected);
    let page = state.dead_letters(every.clone(), Some(found[1].key.clone()), 1).await.unwrap();
    assert_eq!(page, expected[2..3]);
    let since =
        DeadLetterFilter { since: Some(Arrival(2)), sink: Some(one.clone()), ..every.clone() };
    assert_eq!(state.dead_letters(since, None, 10).await.unwrap(), expected[1..3]);
    state.remove_dead_letters(vec![found[1].key.clone(), found[1].key.clone()]).await.unwrap();
    assert_eq!(state.dead_letters(every, None, 10).await.unwrap().len(), 3);
    close(&buffer).await;
    let blobs = folder.path().join("state/blobs");
    assert_eq!(fs::read_dir(blobs).map_or(0, Iterator::count), 0);
}

/// A sink counts its letters while a person replays or purges some: whoever asks after that finds those that wait.
#[tokio::test]
async fn a_view_shows_the_letters_that_wait_whoever_put_or_removed_them() {
    let example = Path::new("examples/homelab/telemetry.toml");
    let settings = telemetry::config::load(example, &|_| None).unwrap().settings;
    let (energy, consumption) = (stream("energy"), sink("energy_consumption"));
    let sinks = [(energy.clone(), vec![consumption.clone()])];
    let letters: Vec<_> = (1..=40)
        .map(|sequence| {
            let mut letter = letter("energy_consumption", sequence, 10);
            letter.key.stream = energy.clone();
            letter
        })
        .collect();
    let shown = |board: &Board| board.sink(&energy, &consumption).status().dead_letters;
    let folder = tempfile::tempdir().unwrap();
    let opened = || {
        let board = Board::new(&settings);
        (Buffer::open(folder.path(), &small(), &sinks, board.clone()).unwrap(), board)
    };

    let (buffer, board) = opened();
    let state = buffer.state();
    state.put_dead_letters(letters.clone()).await.unwrap();
    state.put_dead_letters(letters.clone()).await.unwrap();
    assert_eq!(shown(&board), 40, "a repeat doubles nothing");
    state.remove_dead_letters(vec![letters[0].key.clone()]).await.unwrap();
    assert!(state.remove_replayed(&letters[1].key).await.unwrap());
    assert!(!state.remove_replayed(&letters[1].key).await.unwrap());
    assert_eq!(shown(&board), 38);
    close(&buffer).await;

    let (buffer, board) = opened();
    let state = buffer.state();
    assert_eq!(shown(&board), 0, "nobody has asked");
    state.show_dead_letters(&energy, &consumption).await.unwrap();
    assert_eq!(shown(&board), 38);
    let removals = letters[2..].iter().map(|letter| {
        let (state, key) = (state.clone(), letter.key.clone());
        tokio::spawn(async move { state.remove_dead_letters(vec![key]).await })
    });
    let removals: Vec<_> = removals.collect();
    for (left, removal) in removals.into_iter().enumerate().map(|(n, removal)| (37 - n, removal)) {
        state.show_dead_letters(&energy, &consumption).await.unwrap();
        removal.await.unwrap().unwrap();
        assert!(shown(&board) <= left as u64, "{} instead of {left}", shown(&board));
    }
    assert_eq!(shown(&board), 0);
    close(&buffer).await;
}

/// A person who lists them must not cost the node as much memory as they have on disk.
#[tokio::test]
async fn dead_letters_come_in_pages_of_few_bytes_and_all_of_them_come() {
    const LETTERS: u64 = 30;
    let folder = tempfile::tempdir().unwrap();
    let settings = BufferSettings { dead_letter_quota_bytes: 64 << 20, ..small() };
    let buffer = try_open(folder.path(), &settings).unwrap();
    let state = buffer.state();
    for n in 1..=LETTERS {
        state.put_dead_letters(vec![letter("one", n, 400_000)]).await.unwrap();
    }
    let (mut after, mut seen) = (None, Vec::new());
    loop {
        let page =
            state.dead_letters(DeadLetterFilter::default(), after, usize::MAX).await.unwrap();
        let bytes: usize = page.iter().map(|letter| letter.payload.len()).sum();
        assert!(bytes < 5 << 20, "{bytes} bytes in one page");
        let Some(last) = page.last() else { break };
        after = Some(last.key.clone());
        seen.extend(page.iter().map(|letter| letter.key.sequence.0));
    }
    assert_eq!(seen, (1..=LETTERS).collect::<Vec<_>>());
    let key = letter("one", 7, 0).key;
    assert_eq!(state.dead_letter(&key).await.unwrap(), Some(letter("one", 7, 400_000)));
    assert_eq!(state.dead_letter(&letter("two", 7, 0).key).await.unwrap(), None);
    close(&buffer).await;
}

#[derive(Debug, Clone)]
enum Step {
    Append { stream: usize, sizes: Vec<usize> },
    Read { stream: usize, from_percent: u64, bytes_max: usize },
    Deliver { stream: usize, sink: usize, percent: u64 },
    Reopen,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![8 => 0usize..600, 1 => 7_000usize..7_600, 1 => 10_000usize..60_000];
    prop_oneof![
        6 => (0usize..2, prop::collection::vec(size, 1..80))
            .prop_map(|(stream, sizes)| Step::Append { stream, sizes }),
        3 => (0usize..2, 0u64..=100, prop_oneof![Just(1usize), 1_000usize..100_000])
            .prop_map(|(stream, from_percent, bytes_max)| Step::Read { stream, from_percent, bytes_max }),
        3 => (0usize..2, 0usize..2, 0u64..=100)
            .prop_map(|(stream, sink, percent)| Step::Deliver { stream, sink, percent }),
        1 => Just(Step::Reopen),
        1 => Just(Step::Kill),
    ]
}

/// The whole truth about a log: what was appended, and how far each sink is.
#[derive(Default)]
struct Model {
    payloads: [Vec<Vec<u8>>; 2],
    delivered: [BTreeMap<&'static str, u64>; 2],
}

const NAMES: [&str; 2] = ["a", "b"];
const SINKS: [&[&str]; 2] = [&["one", "two"], &["one"]];

impl Model {
    /// What nobody may drop begins behind this.
    fn passed(&self, at: usize) -> u64 {
        let reported = SINKS[at].iter().map(|sink| self.delivered[at].get(sink).copied());
        reported.map(Option::unwrap_or_default).min().unwrap()
    }

    async fn check(&self, buffer: &Buffer, at: usize, from_percent: u64, bytes_max: usize) {
        let count = self.payloads[at].len() as u64;
        assert_eq!(buffer.durable(&stream(NAMES[at])), Durable(Sequence(count)));
        let oldest = buffer.oldest(&stream(NAMES[at])).0 - 1;
        assert!(oldest <= self.passed(at), "dropped what a sink still needs");
        // The janitor may drop what every sink has passed at any moment.
        let from = (count * from_percent / 100).max(self.passed(at));
        let mut reader = buffer.reader(&stream(NAMES[at]));
        let seen = drain(&mut reader, Sequence(from), bytes_max).await;
        assert!(seen.lost.is_empty(), "{:?}", seen.lost);
        let expected = self.payloads[at].iter().enumerate().skip(from as usize);
        let expected: BTreeMap<_, _> = expected.map(|(n, p)| (n as u64 + 1, p.clone())).collect();
        assert!(seen.payloads == expected, "payloads differ from the model's");
    }
}

/// Makes the files of a closed buffer those of a killed one: numbers are set aside beyond what is there.
fn forget_the_orderly_stop(folder: &Path) {
    let path = folder.join("buffer/marks");
    let text = fs::read_to_string(&path).unwrap();
    let mut marks: serde_json::Value =
        serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
    assert_eq!(marks["clean"], true);
    marks["clean"] = false.into();
    for reserved in marks["reserved"].as_object_mut().unwrap().values_mut() {
        *reserved = (reserved.as_u64().unwrap() + 65_536).into();
    }
    let json = marks.to_string();
    fs::write(path, format!("{:08x}\n{json}\n", crc32fast::hash(json.as_bytes()))).unwrap();
}

async fn run(steps: Vec<Step>) {
    let mut folder = tempfile::tempdir().unwrap();
    let mut buffer = open(folder.path());
    let mut model = Model::default();
    let mut salt = 0u8;
    for step in steps {
        match step {
            Step::Append { stream, sizes } => {
                salt = salt.wrapping_add(1);
                let batch: Vec<_> = sizes.into_iter().map(|size| vec![salt; size]).collect();
                model.payloads[stream].extend(batch.iter().cloned());
                let last = append(&buffer, NAMES[stream], batch).await;
                assert_eq!(last.0, model.payloads[stream].len() as u64);
            }
            Step::Read { stream, from_percent, bytes_max } => {
                model.check(&buffer, stream, from_percent, bytes_max).await;
            }
            Step::Deliver { stream: at, sink: which, percent } => {
                let name = SINKS[at][which % SINKS[at].len()];
                let position = model.payloads[at].len() as u64 * percent / 100;
                buffer.delivered(&stream(NAMES[at]), &sink(name), Delivered(Sequence(position)));
                let known = model.delivered[at].entry(name).or_default();
                *known = position.max(*known);
            }
            Step::Reopen => {
                close(&buffer).await;
                buffer = open(folder.path());
            }
            Step::Kill => {
                close(&buffer).await;
                let killed = tempfile::tempdir().unwrap();
                copy(folder.path(), killed.path());
                forget_the_orderly_stop(killed.path());
                folder = killed;
                buffer = open(folder.path());
            }
        }
    }
    for at in 0..2 {
        model.check(&buffer, at, 0, 32 << 10).await;
    }
    assert!(buffer.losses().is_empty());
    assert_eq!(blobs(folder.path()), 0);
    close(&buffer).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, max_shrink_iters: 60, ..ProptestConfig::default() })]
    #[test]
    fn the_buffer_does_what_the_model_does(steps in prop::collection::vec(step(), 1..40)) {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
            .block_on(run(steps));
    }
}

#[tokio::test]
async fn a_running_buffer_is_inspected_verified_and_exported_without_being_touched() {
    use telemetry::buffer::inspect;
    let folder = tempfile::tempdir().unwrap();
    let (a, _) = five_generations(folder.path()).await;
    let buffer = open(folder.path());
    let count = a.payloads.len() as u64 + 2;
    append(&buffer, "a", vec![vec![0xff, 0x00], b"text".to_vec()]).await;
    let books = Books { cursor: Sequence(3), delivered: 3, ..Books::default() };
    buffer.state().save_books(&stream("a"), &sink("one"), books).await.unwrap();
    buffer.state().put_dead_letters(vec![letter("one", 1, 9)]).await.unwrap();

    let inspection = inspect::inspect(folder.path()).unwrap();
    assert_eq!(inspection.identity, buffer.identity());
    assert_eq!(inspection.generations.len(), 6, "each start makes one");
    assert_eq!(inspection.sinks[0].books, Some(books));
    assert_eq!(inspection.sinks[0].dead_letters, 1);
    let last = inspection.generations.last().unwrap();
    assert!(!last.sealed);
    assert_eq!(last.streams[&stream("a")].last, Sequence(count));
    assert!(inspect::verify(folder.path()).unwrap().fine());

    let mut lines = Vec::new();
    let range = SequenceRange { first: Sequence(2), last: Sequence(u64::MAX) };
    let written = inspect::export(folder.path(), &stream("a"), range, &mut lines).unwrap();
    assert_eq!(written, count - 1);
    let lines = String::from_utf8(lines).unwrap();
    let tail: Vec<serde_json::Value> =
        lines.lines().rev().take(2).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(tail[0]["payload"], "text");
    assert_eq!(tail[1]["payload_hex"], "ff00");
    assert_eq!(append(&buffer, "a", payloads(1, 1)).await, Sequence(count + 1));
    close(&buffer).await;

    damage(folder.path(), &generations(folder.path())[1]);
    let verification = inspect::verify(folder.path()).unwrap();
    assert!(!verification.fine());
    assert!(verification.generations[1].trouble.is_some());
    assert!(generations(folder.path()).len() == 6, "looking moves nothing");
}

/// A log of two sealed generations and one that is written, copied as `kill -9` leaves it; what sinks would see.
async fn killed() -> (tempfile::TempDir, Seen, Seen) {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let mut seed = 1;
    let mut noises = |count: usize, bytes: usize| {
        seed += count as u64;
        (0..count as u64).map(|n| noise(seed - n, bytes)).collect::<Vec<_>>()
    };
    let mut rounds = 0;
    while generations(folder.path()).len() < 3 || rounds > 0 {
        rounds = if generations(folder.path()).len() < 3 { 4 } else { rounds - 1 };
        append(&buffer, "a", noises(64, 200)).await;
        append(&buffer, "b", noises(3, 60)).await;
    }
    let killed = tempfile::tempdir().unwrap();
    copy(folder.path(), killed.path());
    let seen = (all(&buffer, "a", Sequence::ZERO).await, all(&buffer, "b", Sequence::ZERO).await);
    close(&buffer).await;
    (killed, seen.0, seen.1)
}

/// Opens twice what is left of [`killed`]: whatever is not delivered is reported, exactly, and never delivered. How many
/// of each stream are lost.
async fn judge(folder: &Path, a: &Seen, b: &Seen) -> [u64; 2] {
    let mut lost = [0; 2];
    for opening in 0..2 {
        let buffer = open(folder);
        for (at, (name, whole)) in [("a", a), ("b", b)].into_iter().enumerate() {
            let mut seen = all(&buffer, name, Sequence::ZERO).await;
            let last = *whole.payloads.last_key_value().unwrap().0;
            let told: Vec<u64> =
                seen.lost.iter().flat_map(|hole| hole.first.0..=hole.last.0).collect();
            let missing =
                whole.payloads.keys().filter(|number| !seen.payloads.contains_key(number));
            assert_eq!(told, missing.copied().collect::<Vec<_>>(), "{name}, opening {opening}");
            let noted = buffer.losses().into_iter().filter(|loss| loss.stream == stream(name));
            let noted: Vec<u64> = noted.flat_map(|l| l.range.first.0..=l.range.last.0).collect();
            let (unique, told): (std::collections::BTreeSet<_>, _) =
                (noted.iter().copied().collect(), told.into_iter().collect());
            assert_eq!(unique, told, "{name}, opening {opening}");
            assert_eq!(unique.len(), noted.len(), "{name}: noted twice");
            if opening == 1 {
                assert_eq!(seen.payloads.remove(&(last + 1)).unwrap(), b"since");
            }
            for (number, payload) in &seen.payloads {
                assert!(whole.payloads[number] == *payload, "{name} {number} is another record");
            }
            if opening == 0 {
                lost[at] = unique.len() as u64;
                let next = append(&buffer, name, vec![b"since".to_vec()]).await;
                assert_eq!(next, Sequence(last + 1), "{name}");
            }
        }
        close(&buffer).await;
    }
    lost
}

/// The files of a generation, with the bytes that are used.
fn files(folder: &Path) -> Vec<(std::path::PathBuf, Vec<usize>)> {
    let used = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        (0..bytes.len()).filter(|at| bytes[*at] != 0).collect::<Vec<_>>()
    };
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.is_file());
    files.map(|path| (path.clone(), used(&path))).filter(|(_, used)| !used.is_empty()).collect()
}

#[tokio::test]
async fn a_flipped_bit_anywhere_in_a_generation_costs_at_most_the_records_of_one_block() {
    let (base, a, b) = killed().await;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut dice = move |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) as usize % below
    };
    let (mut harmed, mut cases) = (0, Vec::new());
    for (place, generation) in generations(base.path()).into_iter().enumerate() {
        let folder = base.path().join("buffer").join(&generation);
        for (path, used) in files(&folder) {
            let file = path.strip_prefix(base.path()).unwrap().to_owned();
            let is_db = file.ends_with("db");
            // The head of the file, of its first message, of a segment; then anywhere.
            let fixed = [0, 3, 21, 30, 512 << 10, (512 << 10) + 25];
            let fixed = fixed.into_iter().filter(|at| is_db && *at < used[used.len() - 1]);
            let anywhere = if is_db { 14 } else { 2 };
            let random: Vec<usize> = (0..anywhere).map(|_| used[dice(used.len())]).collect();
            // What was written last stands there once.
            let end = [100, 500, 2_000].map(|back| used[used.len().saturating_sub(back)]);
            let end = end.into_iter().filter(|_| is_db);
            cases.extend(fixed.chain(random).chain(end).map(|at| (place, file.clone(), at)));
        }
    }
    assert!(cases.len() >= 60, "{}", cases.len());
    for (place, file, at) in cases {
        let folder = tempfile::tempdir().unwrap();
        copy(base.path(), folder.path());
        let path = folder.path().join(&file);
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] ^= 1 << dice(8);
        fs::write(&path, bytes).unwrap();
        let lost = judge(folder.path(), &a, &b).await;
        let worst = if lost[0] > 0 { 64 } else { 3 };
        assert!(
            lost[0] + lost[1] <= worst,
            "{lost:?} for byte {at} of {} ({place})",
            file.display()
        );
        harmed += u64::from(lost != [0, 0]);
    }
    assert!(harmed > 0, "it never hit a record");
}

#[tokio::test]
async fn a_zeroed_page_costs_what_stood_in_it_and_a_truncated_file_what_was_behind() {
    let (base, a, b) = killed().await;
    let names = generations(base.path());
    let (mut by_page, mut by_cut) = (0, 0);
    for (case, name) in names.iter().cycle().take(24).enumerate() {
        let folder = tempfile::tempdir().unwrap();
        copy(base.path(), folder.path());
        let path = folder.path().join("buffer").join(name).join("db");
        let mut bytes = fs::read(&path).unwrap();
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        let page = used * (case * 7 % 24) / 24 / 4096 * 4096;
        if case % 4 == 3 {
            bytes.truncate(page);
            fs::write(&path, bytes).unwrap();
            by_cut += judge(folder.path(), &a, &b).await.iter().sum::<u64>();
        } else {
            bytes[page..page + 4096].fill(0);
            fs::write(&path, bytes).unwrap();
            let lost = judge(folder.path(), &a, &b).await;
            // A block of `a` is larger than a page; blocks of `b` are small, and one of them comes with each.
            assert!(lost[0] <= 128 && lost[1] <= 9, "{lost:?} for page {page} of {name}");
            by_page += lost[0];
        }
    }
    assert!(by_page > 0 && by_cut > 0, "{by_page} {by_cut}");
}

/// The file is kept for a person, and what it still held has reached the sinks.
#[tokio::test]
async fn a_harmed_generation_is_set_aside_once_everybody_has_passed_it() {
    let (base, a, b) = killed().await;
    let first = generations(base.path())[0].clone();
    let path = base.path().join("buffer").join(&first).join("db");
    let mut bytes = fs::read(&path).unwrap();
    bytes.truncate(200 << 10);
    fs::write(&path, &bytes).unwrap();
    let lost = judge(base.path(), &a, &b).await;
    assert!(lost[0] > 0);
    let buffer = open(base.path());
    let quarantine = base.path().join("buffer/quarantine");
    assert!(generations(base.path()).contains(&first) && !quarantine.exists());
    for (name, sinks) in streams() {
        for sink in sinks {
            buffer.delivered(&name, &sink, Delivered(buffer.durable(&name).0));
        }
    }
    until("it is set aside", || !generations(base.path()).contains(&first)).await;
    until("it is there", || quarantine.exists()).await;
    let aside = fs::read_dir(&quarantine).unwrap().next().unwrap().unwrap().path();
    assert!(fs::read(aside.join("db")).unwrap() == bytes, "as the disk left it");
    close(&buffer).await;
}

#[tokio::test]
async fn a_buffer_of_another_format_is_refused_and_nothing_is_touched() {
    let (base, ..) = killed().await;
    let path = base.path().join("buffer/identity");
    let text = fs::read_to_string(&path).unwrap();
    let json = text.split_once('\n').unwrap().1.trim_end();
    let mut value: serde_json::Value = serde_json::from_str(json).unwrap();
    let now = value["format"].as_u64().unwrap();
    for format in [now - 1, now + 1] {
        value["format"] = format.into();
        let json = value.to_string();
        fs::write(&path, format!("{:08x}\n{json}\n", crc32fast::hash(json.as_bytes()))).unwrap();
        let before = generations(base.path());
        let refused = try_open(base.path(), &small()).err().expect("refused");
        assert!(matches!(refused, BufferError::Format { .. }), "{refused}");
        assert!(refused.to_string().contains(&format!("format {format}")), "{refused}");
        assert_eq!(generations(base.path()), before);
        assert!(!base.path().join("buffer/quarantine").exists());
    }
}

/// As the version before wrote it; the file `identity` is gone, so that only the generation itself tells.
#[tokio::test]
async fn a_generation_of_an_earlier_format_is_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    let generation = folder.path().join("buffer/generation-000001");
    fs::create_dir_all(&generation).unwrap();
    let db = sled::open(&generation).unwrap();
    let header = r#"{"format":1,"identity":"6b54c5bc-57b0-4a2e-a4a5-2f3b7cb1a2f1","number":1,"created":1,"next":{}}"#;
    db.insert(b"\0header", header).unwrap();
    drop(db);
    let refused = try_open(folder.path(), &small()).err().expect("refused");
    assert!(matches!(refused, BufferError::Format { format: 1, .. }), "{refused}");
    assert!(generation.exists() && !folder.path().join("buffer/quarantine").exists());
}
