//! Starts of a process of their own, killed at one system call after the other: whatever is left, the next start finds all.

use std::env;
use std::process::Command;

use super::*;

/// What changes files. The program of a test makes some of these calls too, which costs nothing.
const CALLS: [&str; 9] = [
    "pwrite64",
    "write",
    "copy_file_range",
    "rename",
    "unlink",
    "unlinkat",
    "mkdir",
    "ftruncate",
    "fsync",
];

/// Names, to the process that is to be killed, the folder it opens.
const FOLDER: &str = "TELEMETRY_TEST_OPENS";

impl Node {
    /// Opens it in a process that is killed at such a call; false when it makes fewer of them.
    fn killed_at(&self, test: &str, call: &str, when: usize) -> bool {
        let output = Command::new("strace")
            .args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:signal=KILL:when={when}")])
            .arg(env::current_exe().unwrap())
            .args(["--exact", &format!("{}::{test}", module_path!().split_once("::").unwrap().1)])
            .env(FOLDER, self.folder.path())
            .output()
            .expect("strace is there: scripts/setup installs it");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(!said.contains("FAILED") && !said.contains("0 passed"), "{said}");
        !output.status.success()
    }

    fn found(&self) -> (BTreeSet<u64>, u64, usize) {
        let held = sequences(&self.held());
        (held, self.told(), fs::read_dir(self.quarantine()).map_or(0, Iterator::count))
    }
}

fn killed_at_every_call(test: &str, node: impl FnOnce() -> Node) {
    if let Ok(folder) = env::var(FOLDER) {
        let mut state = open(Path::new(&folder), QUOTA, &|| ()).unwrap();
        state.count_start().unwrap();
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
            assert_eq!(node.found(), expected, "{call} {when}");
            when += 1;
            kills += 1;
        }
    }
    assert!(kills > 40, "{kills}");
}

/// The run before was killed too.
fn killed() -> Node {
    Node::without(&letters(12), &BTreeSet::from([3]), false, true)
}

#[test]
fn a_sound_one() {
    killed_at_every_call("a_sound_one", killed);
}

#[test]
fn one_that_sled_does_not_open() {
    killed_at_every_call("one_that_sled_does_not_open", || {
        let node = killed();
        fs::write(node.state().join("conf"), [0xa5; 300]).unwrap();
        node
    });
}

#[test]
fn one_with_a_letter_on_its_way() {
    killed_at_every_call("one_with_a_letter_on_its_way", || {
        let node = killed();
        node.leave_behind(&letter(41, b"last".to_vec()));
        node
    });
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
