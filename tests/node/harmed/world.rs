//! A node stopped with a buffer of several generations, as often as a case needs it, and the judgement of what became
//! of the records.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rig::{Folder, until};
use serde_json::{Value, json};

use super::Case;
use super::files::{copy, delete, generations};
use crate::world::{Changes, SOON, World};

const SETTINGS: &str = r#"
[node]
drain_timeout_seconds = 1
[buffer]
generation_bytes = 1048576
tail_bytes_max = 1048576
ballast_bytes = 65536
free_bytes_min = 0
"#;

/// Delivered before the database went away, and dead letters among them.
const EARLY: u64 = 10;
const BROKEN: u64 = 40;
const GENERATIONS: usize = 5;
/// After the harm, to see that the streams go on.
const LATE: u64 = 5;
const LATE_FROM: u64 = 1_000_000;
/// Makes a record large, and no compression makes it small.
const PAD_BYTES: u64 = 3_000;

/// Stream, topic, table, the column that carries the sequence.
const STREAMS: [(&str, &str, &str, &str); 2] = [
    ("energy", "saveeye/telemetry", "energy_consumption", "active_energy_total"),
    ("temperature_outdoor", "homelab/temperature/outdoor", "temperature_sensors", "temperature_c"),
];

/// What a harm may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Nothing,
    /// Records of this generation, by its place.
    Generation(usize),
    /// A few blocks of this generation.
    Blocks(usize),
    /// Records of the newest one. After `kill -9` nobody knows how many there were.
    Newest,
    /// So many dead letters, and each of them is counted.
    Letters(u64),
    /// The log itself is gone.
    Everything,
}

type Ranges = BTreeMap<String, (u64, u64)>;

pub struct Base {
    world: World,
    folder: Folder,
    /// The last sequence of each stream.
    last: BTreeMap<&'static str, u64>,
    /// By place; the newest one begins behind the last of these.
    sealed: Vec<Ranges>,
}

fn payload(stream: &str, number: u64) -> String {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let pad: String = (0..PAD_BYTES)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            char::from(b'0' + (state >> 32) as u8 % 75).to_string().replace('\\', "-")
        })
        .collect();
    match stream {
        "energy" => json!({"saveeyeDeviceSerialNumber": "SE-1", "pad": pad,
            "activeActualConsumption": {"total": 500}, "activeTotalConsumption": {"total": number}}),
        _ => json!({"temperature_c": number, "humidity_pct": 50, "pad": pad}),
    }
    .to_string()
}

impl Base {
    /// Some records and dead letters delivered, and generations that wait for the database.
    pub fn build() -> Self {
        let mut world = World::start(Changes { extra: SETTINGS.to_owned(), ..Changes::default() });
        let folder = Folder::new(None, "harmed").unwrap();
        let mut last = BTreeMap::new();
        let publisher = world.publisher();
        for (stream, topic, ..) in STREAMS {
            for number in 1..=EARLY {
                publisher.publish(stream, topic, payload(stream, number));
            }
            last.insert(stream, EARLY);
        }
        for number in EARLY + 1..=EARLY + BROKEN {
            publisher.publish("energy", STREAMS[0].1, &payload("energy", number)[1..]);
        }
        *last.get_mut("energy").unwrap() += BROKEN;
        publisher.flush(SOON).unwrap();
        until(SOON, "the first ones are kept", || Ok(kept(&world, &last).then_some(()))).unwrap();
        world.drained(SOON);
        assert!(world.node.stop(SOON).unwrap().success());
        world.postgres.execute("postgres", "CREATE DATABASE early TEMPLATE telemetry").unwrap();
        world.postgres.stop().unwrap();
        world.node.start().unwrap();
        world.subscribed();
        let state = state_dir(&world);
        let mut further = 1;
        while generations(&state).len() < GENERATIONS || further > 0 {
            // And once more, so that the newest holds some of each stream.
            further -= u32::from(generations(&state).len() >= GENERATIONS);
            for (stream, topic, ..) in STREAMS {
                for _ in 0..20 {
                    let number = last.get_mut(stream).unwrap();
                    *number += 1;
                    publisher.publish(stream, topic, payload(stream, *number));
                }
            }
            publisher.flush(SOON).unwrap();
            until(SOON, "they are kept", || Ok(kept(&world, &last).then_some(()))).unwrap();
        }
        copy(&state, &folder.join("killed"));
        assert!(world.node.stop(SOON).unwrap().success());
        copy(&state, &folder.join("stopped"));
        world.postgres.restart().unwrap();
        let sealed = generations(&state).iter().filter_map(|folder| ranges(folder)).collect();
        Base { world, folder, last, sealed }
    }

    /// All cases, each from the same start; fails with all that were judged bad.
    pub fn judge(mut self, cases: &[Case]) {
        let mut bad = Vec::new();
        for case in cases {
            let name =
                format!("{} ({})", case.name, if case.killed { "killed" } else { "stopped" });
            let log = self.world.node.log_text().len();
            if let Err(error) = self.case(case) {
                let said = self.world.node.log_text()[log..].to_owned();
                let said =
                    said.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
                let said: Vec<&str> = said.take(20).collect();
                bad.push(format!("{name}: {error:#}\n{}", said.join("\n")));
            }
            self.world.node.kill();
        }
        assert!(bad.is_empty(), "{} of {}:\n{}", bad.len(), cases.len(), bad.join("\n\n"));
    }

    fn reset(&self, case: &Case) {
        let state = state_dir(&self.world);
        if state.exists() {
            delete(&state);
        }
        copy(&self.folder.join(if case.killed { "killed" } else { "stopped" }), &state);
        for sql in [
            "DROP DATABASE IF EXISTS telemetry WITH (FORCE)",
            "CREATE DATABASE telemetry TEMPLATE early",
        ] {
            self.world.postgres.execute("postgres", sql).unwrap();
        }
    }

    fn case(&mut self, case: &Case) -> Result<()> {
        self.reset(case);
        let said = self.world.node.log_text().len();
        (case.harm)(&state_dir(&self.world));
        let mut losses = None;
        for start in 0..2 {
            self.world.node.start()?;
            self.world.subscribed();
            let late = LATE_FROM + start * LATE..LATE_FROM + (start + 1) * LATE;
            self.publish(late.clone())?;
            self.settle(late.end)?;
            ensure!(self.world.node.daemon().is_running(), "the node ended");
            let found = self.losses()?;
            self.compare(case, &found, late.end)?;
            self.compare_letters(case, said)?;
            ensure!(*losses.get_or_insert(found.clone()) == found, "lost more: {found:?}");
            ensure!(self.world.node.stop(SOON)?.success(), "it does not stop in order");
        }
        Ok(())
    }

    fn publish(&self, numbers: std::ops::Range<u64>) -> Result<()> {
        let publisher = self.world.publisher();
        for (stream, topic, ..) in STREAMS {
            for number in numbers.clone() {
                publisher.publish(stream, topic, payload(stream, number));
            }
        }
        publisher.flush(SOON)
    }

    /// What came last is in the tables, and nothing is pending. A node that ends over what it found is started once
    /// more, as a service manager does.
    fn settle(&mut self, end: u64) -> Result<()> {
        let mut why = String::new();
        let mut ends = 0;
        let settled = until(Duration::from_secs(20), "everything delivered", || {
            if !self.world.node.daemon().is_running() {
                ends += 1;
                ensure!(ends == 1, "it ends again and again");
                self.world.node.start()?;
            }
            for (stream, _, table, column) in STREAMS {
                let late = format!("SELECT count(*) FROM {table} WHERE {column} = {}", end - 1);
                let sink = self.world.sink(stream, table);
                if self.world.postgres.value("telemetry", &late)? != "1"
                    || sink["pending"] != 0
                    || sink["difference"] != 0
                {
                    why = sink.to_string();
                    return Ok(None);
                }
            }
            Ok(Some(()))
        });
        settled.with_context(|| why)
    }

    /// By stream, as `telemetry buffer inspect` tells them.
    fn losses(&self) -> Result<BTreeMap<String, Vec<(u64, u64)>>> {
        let answer = self.world.node.command(&["buffer", "inspect", "--json"])?;
        let said = String::from_utf8_lossy(&answer.stderr).into_owned();
        ensure!(answer.status.success(), "buffer inspect: {said}");
        let inspection: Value = serde_json::from_slice(&answer.stdout)?;
        let mut losses: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
        for loss in inspection["losses"].as_array().context("losses")? {
            let stream = loss["stream"].as_str().context("a stream")?.to_owned();
            losses.entry(stream).or_default().push(range(&loss["range"])?);
        }
        Ok(losses)
    }

    fn compare(
        &self,
        case: &Case,
        losses: &BTreeMap<String, Vec<(u64, u64)>>,
        late_end: u64,
    ) -> Result<()> {
        let metrics = self.world.node.get("/metrics")?.body;
        let unwell = self.world.node.get("/health")?.body.contains("the disk lost kept records");
        ensure!(unwell != losses.is_empty(), "{losses:?} lost, and health says: {unwell}");
        for (stream, _, table, column) in STREAMS {
            let lost = losses.get(stream).map(Vec::as_slice).unwrap_or_default();
            let is_lost = |number: u64| lost.iter().any(|(a, b)| (*a..=*b).contains(&number));
            let reported: u64 = lost.iter().map(|(first, last)| last - first + 1).sum();
            let line =
                format!("telemetry_buffer_lost_messages{{stream=\"{stream}\"}} {reported}\n");
            ensure!(metrics.contains(&line), "{stream}: the metric does not say {reported}");
            let mut rows = self.rows(table, column)?;
            let last = self.last[stream];
            let mut missing = BTreeSet::new();
            for number in 1..=last {
                let broken = stream == "energy" && (EARLY + 1..=EARLY + BROKEN).contains(&number);
                match rows.remove(&number) {
                    Some(1) => {}
                    Some(copies) => bail!("{stream} {number} is there {copies} times"),
                    None if broken => {}
                    None => drop(missing.insert(number)),
                }
            }
            for number in LATE_FROM..late_end {
                ensure!(rows.remove(&number) == Some(1), "{stream} {number}, published since");
            }
            ensure!(rows.is_empty(), "{stream}: rows nobody published: {rows:?}");
            if case.fate == Fate::Everything {
                continue;
            }
            let silent: Vec<_> = missing.iter().filter(|number| !is_lost(**number)).collect();
            ensure!(silent.is_empty(), "{stream}: lost and not reported: {silent:?}");
            let allowed = self.allowed(case.fate, stream);
            let beyond = if case.killed { u64::MAX } else { last };
            let within = |number: u64| allowed.is_some_and(|(a, b)| a <= number && number <= b);
            for (first, end) in lost {
                let fine =
                    within(*first) && (within(*end) || case.fate == Fate::Newest && *end <= beyond);
                ensure!(fine, "{stream}: {first} to {end} reported as lost, allowed {allowed:?}");
            }
            // The first generation holds records that were delivered before.
            if matches!(case.fate, Fate::Generation(1..) | Fate::Blocks(1..)) {
                let delivered = reported - missing.len() as u64;
                ensure!(delivered == 0, "{stream}: {delivered} reported as lost are delivered");
            }
            if matches!(case.fate, Fate::Blocks(_)) {
                let whole = allowed.map_or(0, |(first, last)| last + 1 - first);
                ensure!(reported * 2 <= whole, "{stream}: {reported} lost of {whole}");
            }
        }
        Ok(())
    }

    /// `said`: where in the log the case begins.
    fn compare_letters(&self, case: &Case, said: usize) -> Result<()> {
        let letters = self.world.node.command(&["dlq", "list", "--json"])?;
        let letters = String::from_utf8_lossy(&letters.stdout).into_owned();
        let mut held = BTreeSet::new();
        for line in letters.lines() {
            let letter: Value = serde_json::from_str(line)?;
            let sequence = letter["sequence"].as_u64().context("a sequence")?;
            ensure!(held.insert(sequence), "letter {sequence} is there twice");
        }
        let known = EARLY + 1..=EARLY + BROKEN;
        ensure!(
            held.iter().all(|sequence| known.contains(sequence)),
            "letters of nobody: {held:?}"
        );
        let lost: BTreeSet<u64> = known.filter(|sequence| !held.contains(sequence)).collect();
        let told = self.letter_losses()?;
        let logged = self.world.node.log_text()[said..].contains("dead_letters_lost");
        ensure!(logged != told.is_empty(), "{told:?} lost, and the log says: {logged}");
        let metrics = self.world.node.get("/metrics")?.body;
        let unwell = self.world.node.get("/health")?.body.contains("the disk lost dead letters");
        ensure!(unwell != told.is_empty(), "{told:?} lost, and health says: {unwell}");
        let of = "telemetry_dead_letters_lost{stream=\"energy\",sink=\"energy_consumption\"}";
        let line = format!("{of} {}\n", told.len());
        ensure!(metrics.contains(&line), "the metric does not say {}", told.len());
        match case.fate {
            Fate::Everything => return Ok(()),
            Fate::Letters(most) => ensure!(lost.len() as u64 <= most, "{lost:?} lost"),
            _ => ensure!(lost.is_empty(), "{lost:?} lost"),
        }
        ensure!(lost == told, "{lost:?} lost, {told:?} reported");
        Ok(())
    }

    /// Which dead letters are reported as lost, as `telemetry buffer inspect` tells them.
    fn letter_losses(&self) -> Result<BTreeSet<u64>> {
        let answer = self.world.node.command(&["buffer", "inspect", "--json"])?;
        let inspection: Value = serde_json::from_slice(&answer.stdout)?;
        let mut lost = BTreeSet::new();
        for loss in inspection["letter_losses"].as_array().context("letter_losses")? {
            ensure!(loss["unnamed"] == 0, "nothing tells which: {loss}");
            for ranges in loss["sequences"].as_array().context("sequences")? {
                let (first, last) = range(ranges)?;
                lost.extend(first..=last);
            }
        }
        Ok(lost)
    }

    /// Which numbers may be reported as lost.
    fn allowed(&self, fate: Fate, stream: &str) -> Option<(u64, u64)> {
        match fate {
            Fate::Generation(place) | Fate::Blocks(place) => {
                self.sealed[place].get(stream).copied()
            }
            Fate::Newest => {
                let before = self.sealed.last().and_then(|ranges| ranges.get(stream));
                Some((before.map_or(1, |(_, last)| last + 1), self.last[stream]))
            }
            _ => None,
        }
    }

    fn rows(&self, table: &str, column: &str) -> Result<BTreeMap<u64, u64>> {
        let sql = format!("SELECT {column}::bigint, count(*) FROM {table} GROUP BY 1");
        let rows = self.world.postgres.query("telemetry", &sql)?;
        let number = |value: &Option<String>| value.as_deref().unwrap_or("0").parse().unwrap();
        Ok(rows.iter().map(|row| (number(&row[0]), number(&row[1]))).collect())
    }
}

fn state_dir(world: &World) -> PathBuf {
    world.node.config().with_file_name("state")
}

fn kept(world: &World, last: &BTreeMap<&'static str, u64>) -> bool {
    let all = world.node.streams().unwrap_or_default();
    let streams = all["streams"].as_array().cloned().unwrap_or_default();
    last.iter().all(|(name, count)| {
        let stream = streams.iter().find(|line| line["name"] == *name);
        stream.is_some_and(|line| line["status"]["sequence"] == *count)
    })
}

/// What a sealed generation says it holds.
fn ranges(folder: &Path) -> Option<Ranges> {
    let text = std::fs::read_to_string(folder.join("sealed.json")).ok()?;
    let value: Value = serde_json::from_str(text.split_once('\n')?.1).ok()?;
    let held = value["ranges"].as_object()?.iter();
    Some(held.map(|(stream, held)| (stream.clone(), range(held).unwrap())).collect())
}

fn range(value: &Value) -> Result<(u64, u64)> {
    let end = |name: &str| value[name].as_u64().with_context(|| format!("{name} in {value}"));
    Ok((end("first")?, end("last")?))
}
