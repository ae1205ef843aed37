//! Starts without room for the copy or for the new database, and how much room these take.

use std::process::Command;

use super::*;
use crate::buffer::{DeadLetterFilter, inspect};

/// Tells a run of a test in a process of its own the folder that it is about.
const FOLDER: &str = "TELEMETRY_TEST_FULL";
const SAID: &str = "telemetry-test-said ";

/// Runs a test again, for which there is no room where room is asked for; what it said of that.
fn run_without_room(test: &str, folder: &Path) -> String {
    let test = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    let output = Command::new("strace")
        .args(["-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=fallocate"])
        .args(["-e", "inject=fallocate:error=ENOSPC"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &test, "--nocapture", "--test-threads", "1"])
        .env(FOLDER, folder)
        .env("TMPDIR", folder)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let said = text.lines().find_map(|line| line.strip_prefix(SAID));
    said.unwrap_or_else(|| panic!("{}: {text}", output.status)).to_owned()
}

/// In that process does this, and says what came of it.
fn say_in(what: impl FnOnce(&Path) -> Result<(), BufferError>) -> bool {
    let Some(folder) = std::env::var_os(FOLDER) else { return false };
    println!("\n{SAID}{:?}", what(Path::new(&folder)));
    true
}

fn start(folder: &Path) -> Result<(), BufferError> {
    open(folder, QUOTA, &|| ()).map(drop)
}

/// By then its books are in memory alone.
#[test]
fn a_database_opened_without_a_copy_that_is_harmed_is_made_anew_with_the_room_there_is() {
    if say_in(start) {
        return;
    }
    let node = with_a_bit_flipped_behind_the_snapshot();
    let test =
        "a_database_opened_without_a_copy_that_is_harmed_is_made_anew_with_the_room_there_is";
    assert_eq!(run_without_room(test, node.folder.path()), "Ok(())");
    assert_eq!(node.delivered(), Some(300));
    assert_eq!(fs::read_dir(node.quarantine()).unwrap().count(), 1);
}

#[test]
fn a_database_whose_snapshot_is_harmed_is_left_alone_where_there_is_no_room_for_the_copy() {
    if say_in(start) {
        return;
    }
    let node = with_a_harmed_snapshot();
    let before = fs::read(node.state().join(FILE)).unwrap();
    let test =
        "a_database_whose_snapshot_is_harmed_is_left_alone_where_there_is_no_room_for_the_copy";
    let said = run_without_room(test, node.folder.path());
    assert!(said.contains("DiskFull") && said.contains("state.trial"), "{said}");
    assert!(fs::read(node.state().join(FILE)).unwrap() == before);
    assert_eq!(harmed_snapshots(&node.state()).unwrap().len(), 1);
    assert!(!node.folder.path().join("state.trial").exists());
    assert_eq!(node.delivered(), Some(300));
}

/// A write that the disk refuses would end the process, and leave the copy.
#[test]
fn a_look_from_outside_asks_for_the_room_to_open_its_copy() {
    let look =
        |folder: &Path| inspect::dead_letters(folder, &DeadLetterFilter::default()).map(drop);
    if say_in(look) {
        return;
    }
    let node = Node::with(&super::letters(9));
    let before = fs::read_dir(node.folder.path()).unwrap().count();
    let said = run_without_room(
        "a_look_from_outside_asks_for_the_room_to_open_its_copy",
        node.folder.path(),
    );
    assert!(said.contains("DiskFull"), "{said}");
    assert_eq!(fs::read_dir(node.folder.path()).unwrap().count(), before, "the copy is gone");
}

/// As it was the letters had come one by one.
#[test]
fn what_is_made_of_a_database_takes_no_more_room_than_was_asked_for() {
    let node = Node::with(&[]);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    for number in 1..=40 {
        let payload = (0..200_000_u64).map(|at| (at * number % 251) as u8).collect();
        state.put_letters(&[letter(number, payload)]).unwrap();
        state.flush().unwrap();
    }
    node.end(state, false);
    node.leave_behind(&letter(41, b"last".to_vec()));
    let places = Places::of(node.folder.path(), &|| ());
    let evidence = places.gather().unwrap();
    let Found::Incomplete(trial, gaps) = look(&places, &evidence).unwrap() else { panic!() };
    mend(&places, &evidence, &trial, &gaps).unwrap();
    let mended = disk::folder_bytes(&places.made);
    remove(&places.made).unwrap();
    make_of_bytes(&places, &evidence).unwrap();
    let made = disk::folder_bytes(&places.made);
    let asked = places.largest();
    assert!(mended <= asked && made <= asked, "{mended} and {made} of {asked}");
}
