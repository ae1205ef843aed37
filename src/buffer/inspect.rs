//! Looking into a buffer from outside, read only: for `telemetry buffer inspect`, `verify` and `export`.
//!
//! Generations are read in place, without sled (`frames.rs`). That works beside a running node, whose newest generation
//! is then seen as a crash at this moment would leave it: what was acknowledged before is in it. sled locks its files and
//! writes when it opens a database, so the state database is copied into a temporary folder and the copy is opened.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::frames::Frames;
use super::generation::{self, Contents};
use super::log::{Loss, Marks};
use super::recovery::IdentityFile;
use super::state_store::StateStore;
use super::store::{self, Store};
use super::{BufferError, DeadLetterFilter, LostLetters, disk, lost_letters, reached};
use crate::domain::{
    Arrival, Books, DeadLetter, LogIdentity, Record, Sequence, SequenceRange, SinkName, StreamName,
};

/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;

/// How often a file is read again because the running node wrote, moved or removed something in it meanwhile.
const READS_MAX: usize = 5;

/// What stands in a state directory.
#[derive(Debug, Serialize)]
pub struct Inspection {
    pub identity: LogIdentity,
    pub created: Arrival,
    pub generations: Vec<GenerationReport>,
    pub quarantine: Vec<FolderReport>,
    pub losses: Vec<Loss>,
    pub letter_losses: Vec<LostLetters>,
    /// The last record of each stream, as far as the files tell.
    pub last: BTreeMap<StreamName, Sequence>,
    pub sinks: Vec<SinkReport>,
    /// Why books and dead letters are not shown, if so.
    pub state_trouble: Option<String>,
}

/// A generation as its small files describe it, or, where `verify` opened it, as it is.
#[derive(Debug, Serialize)]
pub struct GenerationReport {
    pub number: u64,
    pub folder: PathBuf,
    pub bytes: u64,
    pub sealed: bool,
    pub streams: BTreeMap<StreamName, SequenceRange>,
    /// Numbers within that are missing or damaged.
    pub holes: Vec<Hole>,
    /// Why it cannot be read.
    pub trouble: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct Hole {
    pub stream: StreamName,
    pub range: SequenceRange,
}

#[derive(Debug, Serialize)]
pub struct FolderReport {
    pub folder: PathBuf,
    pub bytes: u64,
}

/// One sink of one stream, from the state database.
#[derive(Debug, Serialize)]
pub struct SinkReport {
    pub stream: StreamName,
    pub sink: SinkName,
    pub books: Option<Books>,
    pub dead_letters: u64,
    pub dead_letter_bytes: u64,
}

/// What [`verify`] found.
#[derive(Debug, Serialize)]
pub struct Verification {
    pub generations: Vec<GenerationReport>,
    /// Records that should be there and are not, over all generations.
    pub missing: Vec<Hole>,
}

impl Verification {
    /// Every block has its check sum and every number is there.
    pub fn fine(&self) -> bool {
        self.missing.is_empty() && self.generations.iter().all(|report| report.trouble.is_none())
    }
}

/// A copy that may be opened; gone when dropped.
struct Copy {
    folder: PathBuf,
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Copy {
    fn of(folder: &Path) -> Result<Copy, BufferError> {
        let name = format!("telemetry-{}", uuid::Uuid::new_v4());
        let copy = Copy { folder: std::env::temp_dir().join(name) };
        let mut attempt = disk::copy_folder(folder, &copy.folder);
        for _ in 1..READS_MAX {
            // A file that vanished while we listed them: a snapshot that sled replaced.
            if !attempt.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
                break;
            }
            let _ = fs::remove_dir_all(&copy.folder);
            attempt = disk::copy_folder(folder, &copy.folder);
        }
        attempt.map_err(|error| BufferError::io("copy", folder, error))?;
        store::demand_room_to_open(&copy.folder)?;
        Ok(copy)
    }
}

/// What stands in `state_dir`, without reading the records of sealed generations.
pub fn inspect(state_dir: &Path) -> Result<Inspection, BufferError> {
    let buffer = state_dir.join("buffer");
    let identity = identity(&buffer)?;
    let list = generation::list(&buffer)?;
    let generations: Vec<_> = list
        .into_iter()
        .map(|(number, folder)| match generation::read_sidecar(&folder) {
            Some(contents) => report(number, folder, true, Ok(contents)),
            None => examine(number, folder),
        })
        .collect();
    let marks: Marks = disk::read_json(&buffer.join("marks"))?.unwrap_or_default();
    let mut last: BTreeMap<StreamName, Sequence> = marks.dropped.into_iter().collect();
    for (stream, range) in generations.iter().flat_map(|generation| &generation.streams) {
        let known = last.entry(stream.clone()).or_default();
        *known = range.last.max(*known);
    }
    let (sinks, state_trouble) = match sinks(&state_dir.join("state")) {
        Ok(sinks) => (sinks, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    Ok(Inspection {
        identity: identity.identity,
        created: identity.created,
        generations,
        quarantine: quarantine(&buffer.join("quarantine")),
        losses: disk::read_json(&buffer.join("losses"))?.unwrap_or_default(),
        letter_losses: disk::read_json(&buffer.join(lost_letters::NAME))?.unwrap_or_default(),
        last,
        sinks,
        state_trouble,
    })
}

/// Reads every block of every generation.
pub fn verify(state_dir: &Path) -> Result<Verification, BufferError> {
    let buffer = state_dir.join("buffer");
    identity(&buffer)?;
    let mut generations: Vec<GenerationReport> = Vec::new();
    let mut missing = Vec::new();
    // First: a running node goes on meanwhile.
    let reached = reached::read(&buffer)?;
    let marks: Marks = disk::read_json(&buffer.join("marks"))?.unwrap_or_default();
    let mut next: BTreeMap<StreamName, Sequence> = BTreeMap::new();
    for (stream, dropped) in marks.dropped {
        next.insert(stream, dropped.next());
    }
    for (number, folder) in generation::list(&buffer)? {
        let found = examine(number, folder);
        for (stream, range) in &found.streams {
            let expected = next.get(stream).copied().unwrap_or(Sequence(1));
            let before = SequenceRange { first: expected, last: Sequence(range.first.0 - 1) };
            if range.first > expected {
                missing.push(Hole { stream: stream.clone(), range: before });
            }
            next.insert(stream.clone(), range.last.next());
        }
        let inside = found.holes.iter().filter(|hole| within(&found.streams, hole));
        missing.extend(inside.map(|hole| Hole { stream: hole.stream.clone(), range: hole.range }));
        generations.push(found);
    }
    for (stream, last) in reached {
        let first = next.get(&stream).copied().unwrap_or(Sequence(1));
        if first <= last {
            missing.push(Hole { stream, range: SequenceRange { first, last } });
        }
    }
    Ok(Verification { generations, missing })
}

/// A hole before the first record of a generation shows between two generations already.
fn within(streams: &BTreeMap<StreamName, SequenceRange>, hole: &Hole) -> bool {
    streams.get(&hole.stream).is_some_and(|range| hole.range.first > range.first)
}

/// Writes records of a stream as JSON Lines, those within `range`; returns how many. Payloads that are no text stand
/// as `payload_hex`.
pub fn export(
    state_dir: &Path,
    stream: &StreamName,
    range: SequenceRange,
    out: &mut dyn Write,
) -> Result<u64, BufferError> {
    let buffer = state_dir.join("buffer");
    identity(&buffer)?;
    let prefix = generation::key_prefix(stream);
    let mut written = 0;
    for (_, folder) in generation::list(&buffer)? {
        let sidecar = generation::read_sidecar(&folder);
        let outside = |held: &Contents| {
            let held = held.ranges.get(stream);
            held.is_none_or(|held| held.last < range.first || held.first > range.last)
        };
        if sidecar.as_ref().is_some_and(outside) {
            continue;
        }
        let (frames, contents) = read_in_place(&folder)?;
        let Some(held) = contents.ranges.get(stream).filter(|_| !outside(&contents)) else {
            continue;
        };
        let mut position = Sequence(held.first.max(range.first).0 - 1);
        let last = held.last.min(range.last);
        while position < last {
            let wanted = SequenceRange { first: position.next(), last };
            let stretch = generation::read(&frames, &prefix, wanted, READ_BYTES)?;
            let records = stretch.blocks.iter().flat_map(|block| block.records_after(position));
            for record in records.take_while(|record| record.sequence <= last) {
                write_line(stream, &record, out)
                    .map_err(|error| BufferError::io("write", Path::new("the export"), error))?;
                written += 1;
            }
            let read = stretch.blocks.last().map(|block| block.range().last);
            position = read.or(stretch.hole.map(|hole| hole.last)).unwrap_or(last);
        }
    }
    Ok(written)
}

/// One record of an export.
#[derive(Serialize)]
struct Line<'a> {
    stream: &'a StreamName,
    sequence: Sequence,
    /// Microseconds since 1970-01-01 UTC.
    arrival: Arrival,
    topic: &'a str,
    qos: u8,
    retain: bool,
    dup: bool,
    truncated: bool,
    packet_id: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_hex: Option<String>,
}

fn write_line(
    stream: &StreamName,
    record: &Record<'_>,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    let payload = std::str::from_utf8(record.payload).ok();
    let line = Line {
        stream,
        sequence: record.sequence,
        arrival: record.arrival,
        topic: record.topic,
        qos: record.flags.qos,
        retain: record.flags.retain,
        dup: record.flags.dup,
        truncated: record.flags.truncated,
        packet_id: record.packet_id,
        payload,
        payload_hex: payload.is_none().then(|| hex::encode(record.payload)),
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.write_all(b"\n")
}

pub(super) fn identity(buffer: &Path) -> Result<IdentityFile, BufferError> {
    let path = buffer.join("identity");
    disk::read_json(&path)?.ok_or_else(|| {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        BufferError::io("find a buffer: there is no", &path, missing)
    })
}

/// All of a generation. One that is written is read until nothing is missing in it: sled may move a value behind our back.
fn read_in_place(folder: &Path) -> Result<(Frames, Contents), BufferError> {
    let mut attempts = 1;
    loop {
        let frames = Frames::open(folder)?;
        let contents = generation::verify(&frames, None)?;
        let is_written = generation::read_sidecar(folder).is_none();
        if contents.holes.is_empty() || !is_written || attempts == READS_MAX {
            return Ok((frames, contents));
        }
        attempts += 1;
    }
}

/// Reads all of it.
fn examine(number: u64, folder: PathBuf) -> GenerationReport {
    let sealed = generation::read_sidecar(&folder).is_some();
    let contents = read_in_place(&folder).and_then(|(_, contents)| match contents.number {
        held if held == number => Ok(contents),
        held => Err(BufferError::Misplaced { path: folder.clone(), number: held }),
    });
    report(number, folder, sealed, contents)
}

fn report(
    number: u64,
    folder: PathBuf,
    sealed: bool,
    contents: Result<Contents, BufferError>,
) -> GenerationReport {
    let bytes = disk::folder_bytes(&folder);
    let (contents, trouble) = match contents {
        Ok(contents) => (contents, None),
        Err(error) => (Contents::default(), Some(error.to_string())),
    };
    let hole = |(stream, range)| Hole { stream, range };
    let holes = contents.holes.into_iter().map(hole).collect();
    GenerationReport { number, folder, bytes, sealed, streams: contents.ranges, holes, trouble }
}

fn quarantine(folder: &Path) -> Vec<FolderReport> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let folders = entries.filter_map(Result::ok).map(|entry| entry.path());
    folders.map(|folder| FolderReport { bytes: disk::folder_bytes(&folder), folder }).collect()
}

fn sinks(folder: &Path) -> Result<Vec<SinkReport>, BufferError> {
    let copy = Copy::of(folder)?;
    let state = StateStore::open(Store::open(&copy.folder)?, u64::MAX)?;
    let mut sinks: BTreeMap<(StreamName, SinkName), SinkReport> = BTreeMap::new();
    let empty = |stream: &StreamName, sink: &SinkName| SinkReport {
        stream: stream.clone(),
        sink: sink.clone(),
        books: None,
        dead_letters: 0,
        dead_letter_bytes: 0,
    };
    for (stream, sink, books) in state.all_books()? {
        let report = sinks.entry((stream.clone(), sink.clone()));
        report.or_insert_with(|| empty(&stream, &sink)).books = Some(books);
    }
    for (sink, stream, count) in state.counts()? {
        let report = sinks.entry((stream.clone(), sink.clone()));
        let report = report.or_insert_with(|| empty(&stream, &sink));
        report.dead_letters = count.letters;
        report.dead_letter_bytes = count.bytes;
    }
    Ok(sinks.into_values().collect())
}

/// Every dead letter of a stopped node that matches, in key order. (A running one answers on its control socket.)
pub fn dead_letters(
    state_dir: &Path,
    filter: &DeadLetterFilter,
) -> Result<Vec<DeadLetter>, BufferError> {
    let copy = Copy::of(&state_dir.join("state"))?;
    let store = StateStore::open(Store::open(&copy.folder)?, u64::MAX)?;
    store.letters(None, usize::MAX, usize::MAX, |letter| filter.matches(letter))
}
