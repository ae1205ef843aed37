//! Whole runs of the buffer in a process of their own, killed at one system call after the other: what was answered is
//! there, and nothing is called damaged.

use std::env;
use std::process::Command;

use super::*;

/// What changes files, or makes a change durable.
const CALLS: [&str; 8] =
    ["pwrite64", "write", "rename", "unlinkat", "mkdir", "ftruncate", "fsync", "fdatasync"];

/// Names, to the process that is to be killed, the folder it opens.
const FOLDER: &str = "TELEMETRY_TEST_RUNS";
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

/// What it said, and whether it was killed.
fn killed_at(folder: &Path, test: &str, call: &str, when: usize) -> (String, bool) {
    let output = Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}")])
        .args(["-e", &format!("inject={call}:signal=KILL:when={when}")])
        .arg(env::current_exe().unwrap())
        .args(["--exact", &format!("kills::{test}"), "--nocapture"])
        .env(FOLDER, folder)
        .output()
        .expect("strace is there: scripts/setup installs it");
    (String::from_utf8(output.stdout).unwrap(), !output.status.success())
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
async fn killed_at_every_call(test: &str, before: impl FnOnce(&Path) -> String) {
    if let Ok(folder) = env::var(FOLDER) {
        return run_and_say(Path::new(&folder)).await;
    }
    let left = tempfile::tempdir().unwrap();
    let said_before = before(left.path());
    let mut kills = 0;
    for call in CALLS {
        for when in 1.. {
            let folder = tempfile::tempdir().unwrap();
            copy(left.path(), folder.path());
            let (text, killed) = killed_at(folder.path(), test, call, when);
            judge_what_is_left(folder.path(), &(said_before.clone() + &text)).await;
            if !killed {
                assert!(said(&text, "saved") >= BATCHES * BATCH);
                break;
            }
            kills += 1;
        }
    }
    assert!(kills > 100, "{kills}");
}

#[tokio::test]
async fn the_first_run() {
    killed_at_every_call("the_first_run", |_| String::new()).await;
}

#[tokio::test]
async fn a_run_after_one_that_was_killed() {
    let test = "a_run_after_one_that_was_killed";
    let killed = |folder: &Path| {
        let (text, killed) = killed_at(folder, test, "pwrite64", 10);
        assert!(killed && said(&text, "answered") > 0, "{text}");
        text
    };
    killed_at_every_call(test, killed).await;
}
