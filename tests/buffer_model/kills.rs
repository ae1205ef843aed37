//! Whole runs of the buffer in a process of their own, which are killed at one system call after the other, or see it
//! fail: what was answered is there, and nothing is called damaged.

use super::*;
use crate::calls::{self, Fate, Kind};

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

/// The same run at each of its calls. `before` makes what the run finds, and tells what was said of that.
async fn at_every(
    (kind, fate): (Kind, Fate),
    test: &str,
    before: impl FnOnce(&str, &Path) -> String,
) {
    if let Some(folder) = calls::folder() {
        return run_and_say(&folder).await;
    }
    let test = format!("kills::{test}");
    let left = tempfile::tempdir().unwrap();
    let said_before = before(&test, left.path());
    for call in 1.. {
        let folder = tempfile::tempdir().unwrap();
        copy(left.path(), folder.path());
        let run = calls::run(&test, folder.path(), (kind, fate), call);
        judge_what_is_left(folder.path(), &(said_before.clone() + &run.said)).await;
        let Some(hit) = run.hit else {
            assert!(said(&run.said, "saved") >= BATCHES * BATCH);
            assert!(call > if kind == Kind::Change { 250 } else { 100 }, "{call}");
            break;
        };
        println!("{call} {hit}");
    }
}

fn nothing(_: &str, _: &Path) -> String {
    String::new()
}

fn one_that_was_killed(test: &str, folder: &Path) -> String {
    let run = calls::run(test, folder, (Kind::Change, Fate::Killed), 150);
    assert!(run.hit.is_some() && said(&run.said, "answered") > 0, "{}", run.said);
    run.said
}

#[tokio::test]
async fn the_first_run_is_killed() {
    at_every((Kind::Change, Fate::Killed), "the_first_run_is_killed", nothing).await;
}

#[tokio::test]
async fn the_first_run_sees_changes_fail() {
    at_every((Kind::Change, Fate::Failed), "the_first_run_sees_changes_fail", nothing).await;
}

#[tokio::test]
async fn the_second_run_is_killed() {
    let test = "the_second_run_is_killed";
    at_every((Kind::Change, Fate::Killed), test, one_that_was_killed).await;
}

#[tokio::test]
async fn the_second_run_sees_changes_fail() {
    let test = "the_second_run_sees_changes_fail";
    at_every((Kind::Change, Fate::Failed), test, one_that_was_killed).await;
}

#[tokio::test]
async fn the_second_run_sees_reads_fail() {
    let test = "the_second_run_sees_reads_fail";
    at_every((Kind::Read, Fate::Failed), test, one_that_was_killed).await;
}

#[tokio::test]
async fn the_second_run_sees_looks_fail() {
    let test = "the_second_run_sees_looks_fail";
    at_every((Kind::Look, Fate::Failed), test, one_that_was_killed).await;
}
