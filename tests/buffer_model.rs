//! The buffer against a model of three lines: a list of payloads per stream, of which every sink sees each once.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
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
        http: HttpSettings { listen: "127.0.0.1:0".parse().unwrap() },
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

#[tokio::test]
async fn large_records_go_over_several_keys_and_never_into_blob_files() {
    let folder = tempfile::tempdir().unwrap();
    let buffer = open(folder.path());
    let large: Vec<_> = (0..40u8).map(|n| vec![n; 300 << 10]).collect();
    for payload in &large {
        append(&buffer, "a", vec![payload.clone(), b"small".to_vec()]).await;
    }
    let seen = all(&buffer, "a", Sequence::ZERO).await;
    let odd: Vec<_> = seen.payloads.values().step_by(2).cloned().collect();
    assert_eq!(odd, large);
    assert_eq!(seen.payloads.len(), 80);
    for name in generations(folder.path()) {
        let blobs = folder.path().join("buffer").join(name).join("blobs");
        assert_eq!(fs::read_dir(blobs).map_or(0, Iterator::count), 0, "sled never syncs a blob");
    }
    close(&buffer).await;
}
