//! Starts of a process of their own, which at one system call after the other are killed, or see it fail: whatever is left,
//! the next start finds all.

use std::env;
use std::process::Command;

use super::*;

/// What changes files, or makes a change durable. The program of a test makes some of these calls too, which costs nothing.
const CALLS: [&str; 11] = [
    "pwritev",
    "write",
    "copy_file_range",
    "fallocate",
    "rename",
    "unlink",
    "unlinkat",
    "mkdir",
    "ftruncate",
    "fsync",
    "fdatasync",
];

/// Names, to the process that is to be killed, the folder it opens.
const FOLDER: &str = "TELEMETRY_TEST_OPENS";
const NOTE: &str = "stream/a";
/// Put by that process when it has opened it.
const ANSWERED: u64 = 50;

impl Node {
    /// Opens it in a process to which that is done; false when it was killed. The calls go to `trace`.
    fn opened_under(
        &self,
        test: &str,
        call: &str,
        inject: &str,
        trace: &Path,
        paths: &[&Path],
    ) -> bool {
        let output = Command::new("strace")
            .args(["-f", "-e", &format!("trace={call}"), "-e", &format!("inject={call}:{inject}")])
            .arg("-o")
            .arg(trace)
            .args(paths.iter().flat_map(|path| [Path::new("-P"), path]))
            .arg(env::current_exe().unwrap())
            .args(["--exact", &format!("{}::{test}", module_path!().split_once("::").unwrap().1)])
            .env(FOLDER, self.folder.path())
            .output()
            .expect("strace is there: scripts/setup installs it");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(!said.contains("FAILED") && !said.contains("0 passed"), "{said}");
        output.status.success()
    }

    /// False when it makes fewer of these calls.
    fn killed_at(&self, test: &str, call: &str, when: usize) -> bool {
        let inject = format!("signal=KILL:when={when}");
        !self.opened_under(test, call, &inject, Path::new("/dev/null"), &[])
    }

    /// False when it makes fewer of these calls.
    fn failed_at(&self, test: &str, call: &str, when: usize) -> bool {
        let trace = self.folder.path().join("trace");
        self.opened_under(test, call, &format!("error=EIO:when={when}"), &trace, &[]);
        fs::read_to_string(trace).unwrap().contains("(INJECTED)")
    }

    fn found(&self) -> (BTreeSet<u64>, u64, usize, Option<Vec<u8>>) {
        let held = sequences(&self.held());
        let state = self.open().unwrap();
        let note = state.note(NOTE).unwrap();
        self.closed(state);
        (held, self.told(), fs::read_dir(self.quarantine()).map_or(0, Iterator::count), note)
    }
}

/// What the process does that is killed, or sees a call fail: then it may end with an error.
fn is_the_child() -> bool {
    let Ok(folder) = env::var(FOLDER) else { return false };
    let answered = || {
        let mut state = open(Path::new(&folder), QUOTA, &|| ())?;
        state.count_start()?;
        state.put_letters(&[letter(ANSWERED, Vec::new())])?;
        state.flush()
    };
    if answered().is_ok() {
        fs::write(Path::new(&folder).join("answered"), []).unwrap();
    }
    true
}

fn killed_at_every_call(test: &str, node: impl FnOnce() -> Node) {
    if is_the_child() {
        return;
    }
    let node = node();
    let expected = node.copied().found();
    let mut kills = 0;
    for call in CALLS {
        let mut when = 1;
        loop {
            let node = node.copied();
            if !node.killed_at(test, call, when) {
                break;
            }
            let mut found = node.found();
            found.0.remove(&ANSWERED);
            assert_eq!(found, expected, "{call} {when}");
            when += 1;
            kills += 1;
        }
    }
    assert!(kills > 40, "{kills}");
}

/// Each call fails once.
fn failed_at_every(test: &str, calls: &[&str], node: impl FnOnce() -> Node) {
    if is_the_child() {
        return;
    }
    let node = node();
    let expected = node.copied().found();
    let mut failures = 0;
    for call in calls {
        for when in 1.. {
            let node = node.copied();
            if !node.failed_at(test, call, when) {
                break;
            }
            let mut found = node.found();
            let answered = node.folder.path().join("answered").exists();
            assert!(found.0.remove(&ANSWERED) || !answered, "{call} {when}");
            assert_eq!(found, expected, "{call} {when}");
            failures += 1;
        }
    }
    assert!(failures > 7, "{failures}");
}

/// The file `letters` is read once more; without it, what is missing in the database would be told by nothing.
fn letters_that_cannot_be_read_once(test: &str, harm: impl FnOnce(&Node)) {
    if is_the_child() {
        return;
    }
    let node = killed();
    harm(&node);
    let expected = node.copied().found();
    for call in ["openat", "read"] {
        let node = node.copied();
        let letters = node.folder.path().join("buffer/letters");
        let trace = node.folder.path().join("trace");
        node.opened_under(test, call, "error=EIO:when=1", &trace, &[&letters]);
        assert_eq!(fs::read_to_string(trace).unwrap().matches("(INJECTED)").count(), 1);
        let mut found = node.found();
        found.0.remove(&ANSWERED);
        assert_eq!(found, expected, "{call}");
    }
}

/// The run before was killed too.
fn killed() -> Node {
    let node = Node::without(&letters(12), &BTreeSet::from([3]), true, true);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    state.put_note(NOTE, b"fingerprint").unwrap();
    state.flush().unwrap();
    node.end(state, false);
    node
}

fn killed_with_one_on_its_way() -> Node {
    let node = killed();
    node.leave_behind(&letter(41, b"last".to_vec()));
    node
}

fn killed_and_harmed() -> Node {
    let node = killed();
    fs::write(node.state().join("conf"), [0xa5; 300]).unwrap();
    node
}

/// The calls by which sled reads.
#[test]
fn a_sound_one_and_reads_that_fail() {
    failed_at_every("a_sound_one_and_reads_that_fail", &["preadv"], killed);
}

#[test]
fn one_with_a_letter_on_its_way_and_reads_that_fail() {
    let test = "one_with_a_letter_on_its_way_and_reads_that_fail";
    failed_at_every(test, &["preadv"], killed_with_one_on_its_way);
}

#[test]
fn one_that_sled_does_not_open_and_reads_that_fail() {
    let test = "one_that_sled_does_not_open_and_reads_that_fail";
    failed_at_every(test, &["preadv"], killed_and_harmed);
}

#[test]
fn one_with_a_letter_on_its_way_and_looks_that_fail() {
    let test = "one_with_a_letter_on_its_way_and_looks_that_fail";
    failed_at_every(test, &["statx"], killed_with_one_on_its_way);
}

#[test]
fn one_with_a_letter_on_its_way_and_changes_that_fail() {
    let test = "one_with_a_letter_on_its_way_and_changes_that_fail";
    failed_at_every(test, &CALLS, killed_with_one_on_its_way);
}

#[test]
fn one_that_is_gone_and_letters_that_cannot_be_read_once() {
    let test = "one_that_is_gone_and_letters_that_cannot_be_read_once";
    letters_that_cannot_be_read_once(test, |node| fs::remove_dir_all(node.state()).unwrap());
}

#[test]
fn one_that_sled_does_not_open_and_letters_that_cannot_be_read_once() {
    let test = "one_that_sled_does_not_open_and_letters_that_cannot_be_read_once";
    let harm = |node: &Node| fs::write(node.state().join("conf"), [0xa5; 300]).unwrap();
    letters_that_cannot_be_read_once(test, harm);
}

#[test]
fn a_sound_one() {
    killed_at_every_call("a_sound_one", killed);
}

#[test]
fn one_that_sled_does_not_open() {
    killed_at_every_call("one_that_sled_does_not_open", killed_and_harmed);
}

#[test]
fn one_with_a_letter_on_its_way() {
    killed_at_every_call("one_with_a_letter_on_its_way", killed_with_one_on_its_way);
}

#[test]
fn one_that_is_gone() {
    killed_at_every_call("one_that_is_gone", || {
        let node = killed();
        fs::remove_dir_all(node.state()).unwrap();
        node
    });
}

#[test]
fn the_first_one() {
    killed_at_every_call("the_first_one", || {
        let node = Node { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(node.folder.path().join("buffer")).unwrap();
        node
    });
}
