//! Starts of a process of their own, which are killed at one system call after the other, or see it fail:
//! whatever is left, the next start finds all.

use super::calls::{Ended, Fate, Kind};
use super::*;

const NOTE: &str = "stream/a";
/// Put by that process when it has opened it.
const ANSWERED: u64 = 50;
const SAID: &str = "answered";

impl Node {
    /// Opens it in a process of its own.
    fn opened_under(&self, test: &str, what: (Kind, Fate), call: u64) -> Ended {
        let test = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
        let opened = calls::run(&test, self.folder.path(), what, call);
        assert!(!opened.said.contains("FAILED"), "{}", opened.said);
        opened
    }

    fn found(&self) -> (BTreeSet<u64>, u64, usize, Option<Vec<u8>>) {
        let held = sequences(&self.held());
        let state = self.open().unwrap();
        let note = state.note(NOTE).unwrap();
        self.closed(state);
        (held, self.told(), fs::read_dir(self.quarantine()).map_or(0, Iterator::count), note)
    }
}

/// What the process does to which that happens: then it may end with an error.
fn open_and_say(folder: &Path) {
    let answered = || {
        let mut state = open(folder, QUOTA, &|| ())?;
        state.count_start()?;
        state.put_letters(&[letter(ANSWERED, Vec::new())])?;
        state.flush()
    };
    if answered().is_ok() {
        println!("\n{SAID}");
    }
}

/// The same start at each of its calls; how many it makes.
fn at_every(what: (Kind, Fate), test: &str, node: impl FnOnce() -> Node) -> u64 {
    if let Some(folder) = calls::folder() {
        open_and_say(&folder);
        return u64::MAX;
    }
    let node = node();
    let expected = node.copied().found();
    for call in 1.. {
        let node = node.copied();
        let opened = node.opened_under(test, what, call);
        let mut found = node.found();
        let hit = format!("{call} {:?}", opened.hit);
        assert!(found.0.remove(&ANSWERED) || !opened.said.contains(SAID), "{hit}");
        assert_eq!(found, expected, "{hit}");
        if opened.hit.is_none() {
            assert!(opened.said.contains(SAID));
            return call;
        }
        println!("{hit}");
    }
    unreachable!()
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

fn killed_and_gone() -> Node {
    let node = killed();
    fs::remove_dir_all(node.state()).unwrap();
    node
}

fn none_yet() -> Node {
    let node = Node { folder: tempfile::tempdir().unwrap() };
    fs::create_dir(node.folder.path().join("buffer")).unwrap();
    node
}

/// A test for each start, and for each thing that may happen to one of its calls; it makes more than so many.
macro_rules! starts {
    ($($name:ident: $node:ident, $kind:ident, $fate:ident, $calls:literal;)*) => {
        $(
            #[test]
            fn $name() {
                let calls = at_every((Kind::$kind, Fate::$fate), stringify!($name), $node);
                assert!(calls > $calls, "{calls}");
            }
        )*
    };
}

starts! {
    the_first_one_is_killed: none_yet, Change, Killed, 50;
    the_first_one_sees_changes_fail: none_yet, Change, Failed, 50;
    the_first_one_sees_looks_fail: none_yet, Look, Failed, 60;
    a_sound_one_is_killed: killed, Change, Killed, 40;
    a_sound_one_sees_changes_fail: killed, Change, Failed, 40;
    a_sound_one_sees_reads_fail: killed, Read, Failed, 140;
    a_sound_one_sees_looks_fail: killed, Look, Failed, 50;
    one_with_a_letter_on_its_way_is_killed: killed_with_one_on_its_way, Change, Killed, 70;
    one_with_a_letter_on_its_way_sees_changes_fail: killed_with_one_on_its_way, Change, Failed, 70;
    one_with_a_letter_on_its_way_sees_reads_fail: killed_with_one_on_its_way, Read, Failed, 170;
    one_with_a_letter_on_its_way_sees_looks_fail: killed_with_one_on_its_way, Look, Failed, 90;
    one_that_is_gone_is_killed: killed_and_gone, Change, Killed, 50;
    one_that_is_gone_sees_changes_fail: killed_and_gone, Change, Failed, 50;
    one_that_is_gone_sees_reads_fail: killed_and_gone, Read, Failed, 70;
    one_that_is_gone_sees_looks_fail: killed_and_gone, Look, Failed, 60;
    one_that_sled_does_not_open_is_killed: killed_and_harmed, Change, Killed, 100;
    one_that_sled_does_not_open_sees_changes_fail: killed_and_harmed, Change, Failed, 100;
    one_that_sled_does_not_open_sees_reads_fail: killed_and_harmed, Read, Failed, 260;
    one_that_sled_does_not_open_sees_looks_fail: killed_and_harmed, Look, Failed, 130;
}
