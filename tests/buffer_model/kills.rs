//! Whole runs of the buffer in a process of their own, which at one system call after the other are killed, or see it fail:
//! what was answered is there, and nothing is called damaged.

use std::process::{Command, exit};
use std::{env, thread};

use super::*;

/// What changes files, or makes a change durable.
const CALLS: [&str; 8] =
    ["pwritev", "write", "rename", "unlinkat", "mkdir", "ftruncate", "fsync", "fdatasync"];

/// What is written by `write`, but for what sled writes at a start: see the starts of `buffer::salvage`.
const WRITTEN: [&str; 4] =
    ["ballast", "buffer/letters", "buffer/letters.draft", "buffer/marks.draft"];

/// Names, to the process that is to be killed, the folder it opens.
const FOLDER: &str = "TELEMETRY_TEST_RUNS";
/// How that process ends that does nothing for long.
const STUCK: i32 = 99;
const BATCHES: u64 = 12;
const BATCH: u64 = 20;
/// Once this was answered, every sink has passed `PASSED`.
const DELIVERED_AT: u64 = 180;
const PASSED: Sequence = Sequence(150);

fn payload(sequence: u64) -> Vec<u8> {
    noise(sequence, 3000)
}

/// Says on standard output what was answered.
async fn run_and_say(folder: &Path) {
    thread::spawn(|| {
        thread::sleep(PATIENCE);
        exit(STUCK);
    });
    let buffer = open(folder);
    let (a, sinks) = (stream("a"), [sink("one"), sink("two")]);
    let begin = buffer.durable(&a).0.0;
    for batch in 0..BATCHES {
        let first = begin + batch * BATCH + 1;
        let last = append(&buffer, "a", (first..first + BATCH).map(payload).collect()).await;
        println!("answered {last}");
        if last.0 == DELIVERED_AT {
            for name in &sinks {
                buffer.delivered(&a, name, Delivered(PASSED));
            }
        }
        buffer.state().put_dead_letters(vec![letter("one", last.0, 9000)]).await.unwrap();
        println!("kept {last}");
        let books = Books { cursor: last, ..Books::default() };
        buffer.state().save_books(&a, &sinks[0], books).await.unwrap();
        println!("saved {last}");
    }
    close(&buffer).await;
}

/// What happens to one system call of a run.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Killed,
    Failed,
}

/// What it said, and whether that happened.
fn run_with(fate: Fate, folder: &Path, test: &str, call: &str, when: usize) -> (String, bool) {
    let happens = match fate {
        Fate::Killed => "signal=KILL",
        Fate::Failed => "error=EIO",
    };
    // The drive fails, not the threads that wake each other by writing.
    let written = match (fate, call) {
        (Fate::Failed, "write") => &WRITTEN[..],
        _ => &[],
    };
    let written = written.iter().map(|name| folder.join(name));
    let trace = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new("strace")
        .args(["-f", "-e", &format!("trace={call}"), "-o"])
        .arg(trace.path())
        .args(written.flat_map(|path| ["-P".into(), path]))
        .args(["-e", &format!("inject={call}:{happens}:when={when}")])
        .arg(env::current_exe().unwrap())
        .args(["--exact", &format!("kills::{test}"), "--nocapture"])
        .env(FOLDER, folder)
        .output()
        .expect("strace is there: scripts/setup installs it");
    assert_ne!(output.status.code(), Some(STUCK), "{call} {when}: it neither went on nor ended");
    let happened = match fate {
        Fate::Killed => !output.status.success(),
        Fate::Failed => fs::read_to_string(trace.path()).unwrap().contains("(INJECTED)"),
    };
    (String::from_utf8(output.stdout).unwrap(), happened)
}

fn all_said(text: &str, what: &str) -> impl Iterator<Item = u64> {
    text.lines().filter_map(move |line| line.strip_prefix(what)?.trim().parse().ok())
}

/// The newest number that was said so.
fn said(text: &str, what: &str) -> u64 {
    all_said(text, what).max().unwrap_or(0)
}

async fn judge_what_is_left(folder: &Path, text: &str) {
    let buffer = open(folder);
    let (a, one) = (stream("a"), sink("one"));
    let answered = said(text, "answered");
    let from = if answered < DELIVERED_AT { Sequence::ZERO } else { PASSED };
    let seen = all(&buffer, "a", from).await;
    for sequence in from.0 + 1..=answered {
        assert!(seen.payloads.get(&sequence) == Some(&payload(sequence)), "{sequence}");
    }
    assert_eq!(seen.lost, []);
    assert_eq!(buffer.losses(), []);
    let letters = buffer.state().dead_letters(DeadLetterFilter::default(), None, usize::MAX).await;
    let letters: Vec<u64> = letters.unwrap().iter().map(|letter| letter.key.sequence.0).collect();
    for sequence in all_said(text, "kept") {
        assert!(letters.contains(&sequence), "letter {sequence}, {letters:?}");
    }
    let books = buffer.state().books(&a, &one).await.unwrap();
    assert!(books.unwrap_or_default().cursor.0 >= said(text, "saved"));
    let aside = folder.join("buffer/quarantine");
    let aside: Vec<_> = fs::read_dir(aside).into_iter().flatten().flatten().collect();
    assert!(aside.is_empty(), "{aside:?}");
    close(&buffer).await;
}

/// `before`: what the run before this one left, and said.
async fn at_every_call(fate: Fate, test: &str, before: impl FnOnce(&Path) -> String) {
    if let Ok(folder) = env::var(FOLDER) {
        return run_and_say(Path::new(&folder)).await;
    }
    let left = tempfile::tempdir().unwrap();
    let said_before = before(left.path());
    let mut times = 0;
    for call in CALLS {
        for when in 1.. {
            let folder = tempfile::tempdir().unwrap();
            copy(left.path(), folder.path());
            let (text, happened) = run_with(fate, folder.path(), test, call, when);
            judge_what_is_left(folder.path(), &(said_before.clone() + &text)).await;
            if !happened {
                assert!(said(&text, "saved") >= BATCHES * BATCH);
                break;
            }
            times += 1;
        }
    }
    assert!(times > 100, "{times}");
}

#[tokio::test]
async fn the_first_run() {
    at_every_call(Fate::Killed, "the_first_run", |_| String::new()).await;
}

#[tokio::test]
async fn the_first_run_sees_calls_fail() {
    at_every_call(Fate::Failed, "the_first_run_sees_calls_fail", |_| String::new()).await;
}

#[tokio::test]
async fn a_run_after_one_that_was_killed() {
    let test = "a_run_after_one_that_was_killed";
    at_every_call(Fate::Killed, test, |folder| killed(folder, test)).await;
}

#[tokio::test]
async fn a_run_after_one_that_was_killed_sees_calls_fail() {
    let test = "a_run_after_one_that_was_killed_sees_calls_fail";
    at_every_call(Fate::Failed, test, |folder| killed(folder, test)).await;
}

fn killed(folder: &Path, test: &str) -> String {
    let (text, killed) = run_with(Fate::Killed, folder, test, "pwritev", 10);
    assert!(killed && said(&text, "answered") > 0, "{text}");
    text
}
