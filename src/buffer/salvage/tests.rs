//! Databases that come to harm, and starts that end half-way: what is there afterwards, and what is told.

#[path = "../../../tests/calls/mod.rs"]
mod calls;
mod kills;
mod room;

use std::collections::BTreeSet;
use std::fs;

use proptest::prelude::*;

use super::*;
use crate::buffer::raw_state::RawState;
use crate::buffer::state_value::{
    BOOKS, COUNT, Count, META, START, encode_letter, join, letter_key,
};
use crate::domain::{
    Arrival, Books, DeadLetter, DeadLetterKey, Reason, Sequence, SinkName, Stage, StreamName,
};

const QUOTA: u64 = 64 << 20;

fn letter(sequence: u64, payload: Vec<u8>) -> DeadLetter {
    letter_of("one", sequence, payload)
}

fn letter_of(sink: &str, sequence: u64, payload: Vec<u8>) -> DeadLetter {
    DeadLetter {
        key: DeadLetterKey {
            sink: SinkName::parse(sink).unwrap(),
            stream: StreamName::parse("a").unwrap(),
            sequence: Sequence(sequence),
        },
        topic: "t".to_owned(),
        payload,
        arrival: Arrival(1),
        dead_at: Arrival(sequence as i64),
        stage: Stage::Map,
        reason: Reason::NotJson,
        detail: "x".to_owned(),
        sqlstate: None,
        column: None,
        attempts: 1,
        retain: false,
    }
}

/// Some of several parts, some of none.
fn letters(count: u64) -> Vec<DeadLetter> {
    let noise = |n: u64| (0..n * 977 % 30_000).map(move |at| (at * n % 251) as u8).collect();
    (1..=count).map(|n| letter(n, noise(n))).collect()
}

/// The page of a file, the last of which may be short.
fn page(bytes: &mut [u8], at: usize) -> &mut [u8] {
    bytes[at / 4096 * 4096..].chunks_mut(4096).next().unwrap()
}

struct Node {
    folder: tempfile::TempDir,
}

impl Node {
    /// A node that kept these in several steps, each synced.
    fn with(letters: &[DeadLetter]) -> Self {
        Self::without(letters, &BTreeSet::new(), true, true)
    }

    /// These were kept, and some of them removed: in the same run, or in the next one.
    fn without(all: &[DeadLetter], removed: &BTreeSet<u64>, in_order: bool, at_once: bool) -> Self {
        let node = Node { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(node.folder.path().join("buffer")).unwrap();
        let mut state = node.open().unwrap();
        state.count_start().unwrap();
        for some in all.chunks(7) {
            state.put_letters(some).unwrap();
            state.flush().unwrap();
        }
        if !at_once {
            node.closed(state);
            state = node.open().unwrap();
            state.count_start().unwrap();
        }
        let leaves = |letter: &&DeadLetter| removed.contains(&letter.key.sequence.0);
        for letter in all.iter().filter(leaves) {
            state.remove_letters(std::slice::from_ref(&letter.key)).unwrap();
            state.flush().unwrap();
        }
        node.end(state, in_order);
        node
    }

    /// In order, or as a kill leaves it.
    fn end(&self, mut state: StateStore, in_order: bool) {
        if in_order {
            state.close().unwrap();
            return self.closed(state);
        }
        let killed = self.folder.path().join("killed");
        disk::copy_folder(&self.state(), &killed).unwrap();
        self.closed(state);
        fs::remove_dir_all(self.state()).unwrap();
        fs::rename(killed, self.state()).unwrap();
    }

    /// sled closes its files on threads of its own.
    fn closed(&self, state: StateStore) {
        drop(state);
        drop(Store::open(&self.state()).unwrap());
    }

    fn open(&self) -> Result<StateStore, BufferError> {
        open(self.folder.path(), QUOTA, &|| ())
    }

    /// False where sled opens nothing. What is left of it was on stable storage before all else it did.
    fn start_without_room(&self, in_order: bool, left: Left) -> bool {
        let places = Places::of(self.folder.path(), &|| ());
        let evidence = places.gather().unwrap();
        let Ok(state) = open_in_place(&places.folder, QUOTA) else { return false };
        let before = self.folder.path().join("before");
        disk::copy_folder(&places.folder, &before).unwrap();
        let Ok(mut state) = take_as_it_is(&places, &evidence, state) else { return false };
        state.count_start().unwrap();
        self.end(state, in_order);
        match left {
            Left::All => {}
            Left::NoCountIsNamed => self.forget_counts(),
            Left::NothingIsDone => {
                self.forget_counts();
                fs::remove_dir_all(self.state()).unwrap();
                fs::rename(&before, self.state()).unwrap();
            }
        }
        true
    }

    /// Of `letters` nothing is left that was written after it began.
    fn forget_counts(&self) {
        let named = self.folder.path().join("buffer/letters");
        let text = fs::read_to_string(&named).unwrap();
        let begun: Vec<_> = text.split_inclusive(" .\n").take(1).collect();
        fs::write(&named, begun.concat()).unwrap();
    }

    /// Of six letters the third was removed and is there again, of the fifth sled finds nothing. There are as many as
    /// their count says, which is newer than all that `letters` says.
    fn with_one_in_place_of_another() -> (Self, Vec<DeadLetter>) {
        let mut all = letters(6);
        let node = Node::with(&all);
        let part = |letter: &DeadLetter| [letter_key(&letter.key).as_slice(), &[0, 0]].concat();
        let (third, fifth) = (part(&all[2]), part(&all[4]));
        let store = Store::open(&node.state()).unwrap();
        let old = store.get(&third).unwrap().unwrap();
        drop(store);
        let run = |remove: &[DeadLetterKey]| {
            let mut state = node.open().unwrap();
            state.count_start().unwrap();
            state.remove_letters(remove).unwrap();
            state.close().unwrap();
            node.closed(state);
        };
        run(&[all[2].key.clone()]);
        run(&[]);
        node.forget_counts();
        node.change_values(|harm| {
            harm.insert(third, old);
            harm.remove(fifth);
        });
        all.remove(2);
        (node, all)
    }

    /// Saves books that say so, one after the other, each synced.
    fn run_with_books(&self, delivered: std::ops::RangeInclusive<u64>, in_order: bool) {
        let DeadLetterKey { sink, stream, .. } = letter(1, Vec::new()).key;
        let mut state = self.open().unwrap();
        state.count_start().unwrap();
        for delivered in delivered {
            let books = Books { delivered, ..Books::default() };
            state.save_books(&stream, &sink, &books).unwrap();
            state.flush().unwrap();
        }
        self.end(state, in_order);
    }

    /// What the books say after a start.
    fn delivered(&self) -> Option<u64> {
        let DeadLetterKey { sink, stream, .. } = letter(1, Vec::new()).key;
        let state = self.open().unwrap();
        let books = state.books(&stream, &sink).unwrap();
        self.closed(state);
        books.map(|books| books.delivered)
    }

    /// Bytes of a letter of which nothing else is there.
    fn leave_behind(&self, letter: &DeadLetter) {
        let value = encode_letter(letter).unwrap();
        let key = [letter_key(&letter.key).as_slice(), &[0, 0]].concat();
        let state = open_in_place(&self.state(), QUOTA).unwrap();
        let last = state.framed(&key, value.len(), &value);
        self.closed(state);
        self.change_values(|values| values.insert(b"x", last));
        self.change_values(|values| values.remove(b"x"));
    }

    fn copied(&self) -> Self {
        let node = Node { folder: tempfile::tempdir().unwrap() };
        disk::copy_folder(self.folder.path(), node.folder.path()).unwrap();
        node
    }

    /// What a kill at each step of a start leaves: never nothing, so that a loop over it looks at something.
    fn ended_at_each_step(&self) -> Vec<Self> {
        let images = std::cell::RefCell::new(Vec::new());
        let step = || images.borrow_mut().push(self.copied());
        let state = open(self.folder.path(), QUOTA, &step).unwrap();
        self.closed(state);
        let images = images.into_inner();
        assert!(!images.is_empty());
        images
    }

    /// Those of a start that ended when the old database had gone, and the new one had not come.
    fn ended_in_between(&self) -> Vec<Self> {
        let images = self.ended_at_each_step().into_iter();
        let images = images.filter(|image| !image.state().exists() && image.draft().exists());
        let images: Vec<_> = images.collect();
        assert!(!images.is_empty());
        images
    }

    fn draft(&self) -> PathBuf {
        self.folder.path().join("state.draft")
    }

    fn quarantine(&self) -> PathBuf {
        self.folder.path().join("buffer/quarantine")
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let file = self.state().join("db");
        let mut bytes = fs::read(&file).unwrap();
        change(&mut bytes);
        fs::write(&file, bytes).unwrap();
    }

    /// Behind the back of all that frames, counts and names letters.
    fn change_values(&self, change: impl FnOnce(&mut sled::Batch)) {
        let store = Store::open(&self.state()).unwrap();
        let mut batch = sled::Batch::default();
        change(&mut batch);
        store.apply(batch).unwrap();
        store.flush().unwrap();
    }

    fn harm(&self, at: prop::sample::Index, harm: i32, bit: u32) {
        self.change(|bytes| {
            let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
            let at = at.index(used);
            match harm {
                0 => bytes[at] ^= 1_u8 << bit,
                1 => page(bytes, at).fill(0),
                2 => page(bytes, at).fill(0xa5),
                3 => bytes.truncate(at),
                _ => bytes.fill(0),
            }
        });
    }

    /// The letters that are there after a start.
    fn held(&self) -> Vec<DeadLetter> {
        let state = self.open().unwrap();
        let held = state.letters(None, usize::MAX, usize::MAX, |_| true).unwrap();
        let counted: u64 = state.counts().unwrap().iter().map(|(.., count)| count.letters).sum();
        assert_eq!(counted, held.len() as u64);
        self.closed(state);
        held
    }

    /// How many are told to be lost.
    fn told(&self) -> u64 {
        let list = lost_letters::read(&self.folder.path().join("buffer"), &self.quarantine());
        list.unwrap().iter().map(|lost| lost.letters()).sum()
    }

    /// Those that are told to be lost; nothing is lost of which nobody tells which.
    fn lost(&self) -> BTreeSet<u64> {
        let list = lost_letters::read(&self.folder.path().join("buffer"), &self.quarantine());
        let list = list.unwrap();
        assert!(list.iter().all(|lost| lost.unnamed == 0), "{list:?}");
        let ranges = list.iter().flat_map(|lost| lost.sequences.iter());
        ranges.flat_map(|range| range.first.0..=range.last.0).collect()
    }
}

/// What a power cut leaves of a start that had no room for the copy.
#[derive(Debug, Clone, Copy)]
enum Left {
    All,
    /// Of `letters` what was there before anything changed in the database.
    NoCountIsNamed,
    /// Of the database what was there before anything changed in it.
    NothingIsDone,
}

/// The letters that the bytes of the file still hold.
fn whole(node: &Node) -> Vec<DeadLetter> {
    let raw = RawState::search(&node.state()).unwrap();
    raw.letters().map(|found| raw.read(&found).unwrap().unwrap()).collect()
}

fn sequences(letters: &[DeadLetter]) -> BTreeSet<u64> {
    letters.iter().map(|letter| letter.key.sequence.0).collect()
}

#[test]
fn letters_of_any_size_are_found_in_the_file_without_sled() {
    let all = letters(40);
    let node = Node::with(&all);
    assert_eq!(whole(&node), all);
    assert_eq!(node.held(), all);
    assert!(!node.quarantine().exists());
    assert!(!node.folder.path().join("state.draft").exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What the file holds after the harm is there after the start, and again after the next; of all else it is told
    /// which letters were lost. What was removed before stays so.
    #[test]
    fn whatever_comes_to_harm_no_letter_is_lost_that_the_file_still_holds(
        at in any::<prop::sample::Index>(),
        harm in 0..5,
        bit in 0..8_u32,
        in_order in any::<bool>(),
        removed in prop::collection::btree_set(1..=40_u64, 0..8),
        at_once in any::<bool>(),
    ) {
        let mut all = letters(40);
        let node = Node::without(&all, &removed, in_order, at_once);
        node.harm(at, harm, bit);
        let whole = whole(&node);
        all.retain(|letter| !removed.contains(&letter.key.sequence.0));
        let held = node.held();
        for letter in whole.iter().filter(|letter| all.contains(letter)) {
            prop_assert!(held.contains(letter), "{}", letter.key);
        }
        prop_assert!(held.iter().all(|letter| all.contains(letter)));
        let missing: BTreeSet<u64> =
            sequences(&all).difference(&sequences(&held)).copied().collect();
        prop_assert!(harm > 2 || missing.len() <= 25, "{}", missing.len());
        prop_assert_eq!(node.lost(), missing.clone());
        prop_assert_eq!(sequences(&node.held()), sequences(&held));
        prop_assert_eq!(node.lost(), missing);
    }

    /// What sled does not find is told as lost, or is there after a start with more room.
    #[test]
    fn without_room_for_the_copy_no_letter_goes_without_a_word(
        at in any::<prop::sample::Index>(),
        harm in 0..4,
        in_order in any::<bool>(),
        removed in prop::collection::btree_set(1..=40_u64, 0..8),
        left in prop::sample::select(vec![Left::All, Left::NoCountIsNamed, Left::NothingIsDone]),
    ) {
        let mut all = letters(40);
        let node = Node::without(&all, &removed, in_order, true);
        node.harm(at, harm, 0);
        prop_assume!(node.start_without_room(in_order, left));
        all.retain(|letter| !removed.contains(&letter.key.sequence.0));
        let held = sequences(&node.held());
        let lost = node.lost();
        prop_assert!(held.is_disjoint(&lost), "{:?} {:?}", held, lost);
        prop_assert_eq!(&held | &lost, sequences(&all));
    }

    /// The database is whole, and tells all by itself.
    #[test]
    fn whatever_comes_to_harm_in_the_file_beside_it_costs_nothing(
        at in any::<prop::sample::Index>(),
        harm in 0..4,
        in_order in any::<bool>(),
        removed in prop::collection::btree_set(1..=40_u64, 0..8),
        at_once in any::<bool>(),
    ) {
        let mut all = letters(40);
        let node = Node::without(&all, &removed, in_order, at_once);
        let file = node.folder.path().join("buffer/letters");
        let mut bytes = fs::read(&file).unwrap();
        let at = at.index(bytes.len());
        match harm {
            0 => bytes[at] ^= 1,
            1 => bytes.truncate(at),
            2 => bytes[at..].fill(0),
            _ => bytes.clear(),
        }
        fs::write(&file, bytes).unwrap();
        all.retain(|letter| !removed.contains(&letter.key.sequence.0));
        prop_assert_eq!(sequences(&node.held()), sequences(&all));
        prop_assert_eq!(node.lost(), BTreeSet::new());
        prop_assert!(!node.quarantine().exists());
    }
}

#[test]
fn of_two_versions_of_a_letter_the_newer_comes_back_and_never_a_mixture() {
    let old = letter(1, vec![1; 40_000]);
    let new = letter(1, vec![2; 30_000]);
    let node = Node::with(std::slice::from_ref(&old));
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    state.put_letters(std::slice::from_ref(&new)).unwrap();
    state.flush().unwrap();
    node.closed(state);
    assert_eq!(whole(&node), std::slice::from_ref(&new));
    // sled's own book-keeping is gone.
    node.change(|bytes| bytes[..512].fill(0xff));
    let found = whole(&node);
    assert!(found == [new] || found == [old]);
    assert_eq!(node.held(), found);
}

/// Pages that hold nothing of letters, and are read when they are asked for.
#[test]
fn a_bad_page_without_letters_is_found_at_the_start() {
    const STEP_BYTES: usize = 32_768;
    let node = Node::with(&[]);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    for round in 0..6_u8 {
        for number in 0..40_u8 {
            let note = vec![round; 400 * usize::from(number)];
            state.put_note(&format!("n/{number}"), &note).unwrap();
            let stream = StreamName::parse(&format!("s{number}")).unwrap();
            let sink = SinkName::parse("one").unwrap();
            state.save_books(&stream, &sink, &Books::default()).unwrap();
        }
        state.flush().unwrap();
    }
    node.end(state, false);
    let file = fs::read(node.state().join("db")).unwrap();
    for at in (0..file.len()).step_by(STEP_BYTES) {
        fs::write(node.state().join("db"), &file).unwrap();
        node.change(|bytes| bytes[at..][..4096].fill(0xa5));
        let state = node.open().unwrap();
        state.read_through().unwrap();
        node.closed(state);
    }
}

/// `letters` does not name that sink any more.
#[test]
fn a_database_that_went_back_to_letters_all_of_which_were_removed_has_lost_none() {
    let all = letters(20);
    let node = Node::with(&all);
    let before = node.folder.path().join("before");
    disk::copy_folder(&node.state(), &before).unwrap();
    let keys: Vec<_> = all.iter().map(|letter| letter.key.clone()).collect();
    for remove in [keys.as_slice(), &[]] {
        let mut state = node.open().unwrap();
        state.count_start().unwrap();
        state.remove_letters(remove).unwrap();
        state.close().unwrap();
        node.closed(state);
    }
    fs::remove_dir_all(node.state()).unwrap();
    fs::rename(before, node.state()).unwrap();
    assert_eq!(node.held(), []);
    assert_eq!(node.lost(), BTreeSet::new());
}

#[test]
fn a_lost_count_or_format_is_made_again() {
    for lost in [join(COUNT, &["one", "a"]), META.to_vec()] {
        let all = letters(10);
        let node = Node::with(&all);
        node.change_values(|harm| {
            harm.remove(lost);
        });
        assert_eq!(node.held(), all);
        assert_eq!(node.lost(), BTreeSet::new());
    }
}

/// Kafka goes on from them.
#[test]
fn where_a_letter_is_missing_books_that_went_back_are_put_forward_again() {
    let all = letters(10);
    let node = Node::with(&all);
    let key = join(BOOKS, &["a", "one"]);
    node.run_with_books(1..=1, true);
    let store = Store::open(&node.state()).unwrap();
    let old = store.get(&key).unwrap().unwrap();
    drop(store);
    node.run_with_books(2..=2, true);
    node.change_values(|harm| {
        harm.insert(key, old);
        harm.remove([letter_key(&all[0].key).as_slice(), &[0, 0]].concat());
    });
    assert_eq!(node.held(), all);
    assert_eq!(node.delivered(), Some(2));
}

#[test]
fn a_database_that_went_back_is_told_by_what_it_lacks() {
    let all = letters(20);
    let node = Node::with(&all[..10]);
    let before = node.folder.path().join("before");
    disk::copy_folder(&node.state(), &before).unwrap();
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    state.put_letters(&all[10..]).unwrap();
    state.close().unwrap();
    node.closed(state);
    fs::remove_dir_all(node.state()).unwrap();
    fs::rename(before, node.state()).unwrap();
    assert_eq!(node.held(), all[..10]);
    assert_eq!(node.lost(), (11..=20).collect());
}

/// The number of starts tells which versions are newer, and may be lost: alone, or with a letter.
#[test]
fn what_is_kept_is_newer_than_all_before_also_when_the_number_of_starts_is_lost() {
    [false, true].into_iter().for_each(what_is_kept_is_newer);
}

fn what_is_kept_is_newer(letter_lost: bool) {
    let all = letters(5);
    let node = Node::with(&all);
    let put = |letters: &[DeadLetter]| {
        let mut state = node.open().unwrap();
        state.count_start().unwrap();
        state.put_letters(letters).unwrap();
        state.close().unwrap();
        node.closed(state);
    };
    (0..3).for_each(|_| put(&all));
    node.change_values(|lost| {
        lost.remove(START);
        if letter_lost {
            lost.remove([letter_key(&all[0].key).as_slice(), &[0, 0]].concat());
        }
    });
    assert_eq!(node.held(), all);
    let newer = letter(2, b"newer".to_vec());
    put(std::slice::from_ref(&newer));
    fs::write(node.state().join("conf"), [0xa5; 300]).unwrap();
    assert_eq!(node.held()[1], newer);
}

#[test]
fn a_letter_that_came_back_does_not_stand_for_one_that_is_missing() {
    let (node, all) = Node::with_one_in_place_of_another();
    assert_eq!(node.held(), all);
}

#[test]
fn what_there_was_no_room_to_put_back_is_put_back_when_there_is() {
    for left in [Left::All, Left::NoCountIsNamed, Left::NothingIsDone] {
        let (node, all) = Node::with_one_in_place_of_another();
        assert!(node.start_without_room(true, left));
        assert_eq!(node.held(), all, "{left:?}");
        assert_eq!(node.lost(), BTreeSet::new());
    }
}

/// A letter that was on its way when the node was killed: its record is in the log.
#[test]
fn what_was_never_answered_is_not_waited_for_where_there_was_no_room() {
    for left in [Left::All, Left::NoCountIsNamed, Left::NothingIsDone] {
        let (node, mut all) = Node::with_one_in_place_of_another();
        node.leave_behind(&letter(41, b"last".to_vec()));
        assert!(node.start_without_room(true, left));
        assert_eq!(node.held(), all, "{left:?}");
        assert_eq!(node.lost(), BTreeSet::new());

        all = letters(20);
        let node = Node::with(&all);
        node.leave_behind(&letter(41, b"last".to_vec()));
        assert!(node.start_without_room(true, left));
        assert_eq!(node.held(), all, "{left:?}");
        assert_eq!(node.lost(), BTreeSet::new());
        assert!(!node.quarantine().exists());
    }
}

/// `letters` tells of the removal only, and sled finds the old one.
#[test]
fn a_letter_kept_again_is_not_removed_with_what_came_back_of_it() {
    for room in [true, false] {
        let all = letters(6);
        let node = Node::with(&all);
        let key = [letter_key(&all[2].key).as_slice(), &[0, 0]].concat();
        let store = Store::open(&node.state()).unwrap();
        let old = store.get(&key).unwrap().unwrap();
        drop(store);
        let mut state = node.open().unwrap();
        state.count_start().unwrap();
        state.remove_letters(std::slice::from_ref(&all[2].key)).unwrap();
        state.flush().unwrap();
        let named = fs::read(node.folder.path().join("buffer/letters")).unwrap();
        state.put_letters(std::slice::from_ref(&all[2])).unwrap();
        state.close().unwrap();
        node.closed(state);
        fs::write(node.folder.path().join("buffer/letters"), named).unwrap();
        node.change_values(|harm| harm.insert(key, old));
        assert!(room || node.start_without_room(true, Left::All));
        assert_eq!(node.held(), all, "{room}");
        assert_eq!(node.lost(), BTreeSet::new());
    }
}

/// sled had written over it.
#[test]
fn what_there_was_no_room_to_put_back_and_is_gone_since_is_told() {
    let all = letters(6);
    let node = Node::with(&all);
    let mut state = node.open().unwrap();
    let mut held = state.held().unwrap();
    held.hide(ranges(&[letter(7, Vec::new()).key]));
    state.keep_journal(&node.folder.path().join("buffer"), &held).unwrap();
    state.count_start().unwrap();
    state.close().unwrap();
    node.closed(state);
    node.forget_counts();
    assert_eq!(node.held(), all);
    assert_eq!(node.lost(), BTreeSet::from([7]));
}

/// It would be shown as a letter cut short.
#[test]
fn a_part_of_a_removed_letter_that_came_back_alone_is_removed_again() {
    let all = [letter(1, vec![1; 40_000]), letter(2, vec![2; 10])];
    let node = Node::with(&all);
    let part = [letter_key(&all[0].key).as_slice(), &[0, 0]].concat();
    let store = Store::open(&node.state()).unwrap();
    let old = store.get(&part).unwrap().unwrap();
    drop(store);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    state.remove_letters(std::slice::from_ref(&all[0].key)).unwrap();
    state.close().unwrap();
    node.closed(state);
    let store = Store::open(&node.state()).unwrap();
    store.insert(&part, &old).unwrap();
    store.flush().unwrap();
    drop(store);
    assert_eq!(node.held(), all[1..]);
}

/// Before anything took the database's place.
#[test]
fn a_start_that_ended_when_it_had_told_what_is_lost_tells_it_once() {
    for nobody_names_them in [false, true] {
        let node = Node::with(&letters(40));
        let named = node.folder.path().join("buffer/letters");
        node.change(|bytes| {
            let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
            bytes[used / 8..used / 2].fill(0xa5);
        });
        if nobody_names_them {
            fs::remove_file(&named).unwrap();
        }
        let before = node.folder.path().join("before");
        disk::copy_folder(&node.state(), &before).unwrap();
        let names = fs::read(&named).ok();
        let held = node.held();
        fs::remove_dir_all(node.state()).unwrap();
        disk::copy_folder(&before, &node.state()).unwrap();
        match names {
            Some(names) => fs::write(&named, names).unwrap(),
            None => fs::remove_file(&named).unwrap(),
        }
        assert_eq!(node.held(), held);
        assert_eq!(node.told(), 40 - held.len() as u64);
        assert!(node.told() > 0);
    }
}

#[test]
fn a_letter_that_was_removed_stays_so_while_the_database_is_whole() {
    let all = letters(20);
    let node = Node::with(&all);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    state.remove_letters(&[all[3].key.clone(), all[4].key.clone()]).unwrap();
    state.close().unwrap();
    drop(state);
    let left: Vec<_> = all.iter().filter(|one| ![4, 5].contains(&one.key.sequence.0)).collect();
    assert!(node.held().iter().eq(left));
    assert!(!node.quarantine().exists());
}

/// Its frames stand in the file, and sled rightly takes none of it for written.
#[test]
fn what_is_left_of_a_batch_that_was_never_answered_is_no_loss() {
    ["one", "two"].into_iter().for_each(a_torn_count_is_no_loss);
}

/// Of a sink that had letters before, or none.
fn a_torn_count_is_no_loss(sink: &str) {
    let all = letters(20);
    let node = Node::with(&all);
    let key = join(COUNT, &[sink, "a"]);
    let count = Count { letters: 99, bytes: 99 };
    let state = node.open().unwrap();
    let torn = state.framed(&key, 16, &count.encode());
    node.closed(state);
    for _ in 0..3 {
        node.change(|bytes| bytes.extend_from_slice(&torn));
        let mut state = node.open().unwrap();
        state.count_start().unwrap();
        state.close().unwrap();
        node.closed(state);
        assert_eq!(node.held(), all);
        assert!(!node.quarantine().exists());
    }
}

/// What it finds and what it tells is the same.
#[test]
fn a_start_that_ended_at_any_step_is_made_again() {
    type Harm = fn(&Node);
    let harms: [(&str, Harm); 6] = [
        ("sled opens nothing", |node| fs::write(node.state().join("conf"), [0xa5; 300]).unwrap()),
        ("nothing is left", |node| node.change(|bytes| bytes.fill(0))),
        ("the database is gone", |node| fs::remove_dir_all(node.state()).unwrap()),
        ("a part is gone", |node| {
            node.change(|bytes| {
                let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
                bytes[used / 8..used / 2].fill(0xa5);
            });
        }),
        ("the only one of a sink is gone", |node| {
            let lost = letter_of("two", 1, b"lost".to_vec());
            let mut state = node.open().unwrap();
            state.put_letters(std::slice::from_ref(&lost)).unwrap();
            state.close().unwrap();
            node.closed(state);
            node.change_values(|harm| {
                harm.remove([letter_key(&lost.key).as_slice(), &[0, 0]].concat());
            });
            let key = letter_key(&lost.key);
            node.change(|bytes| {
                for at in 0..bytes.len() - key.len() {
                    if bytes[at..].starts_with(&key) {
                        bytes[at] ^= 1;
                    }
                }
            });
        }),
        ("sled does not find the last one", |node| {
            node.leave_behind(&letter(41, b"last".to_vec()));
        }),
    ];
    for (name, harm) in harms {
        let node = Node::with(&letters(20));
        harm(&node);
        let images = node.ended_at_each_step();
        let expected = (node.held(), node.lost());
        let more = ["the only one of a sink is gone", "sled does not find the last one"];
        let kept = 20 + usize::from(more.contains(&name));
        assert_eq!(expected.0.len() + expected.1.len(), kept, "{name}");
        assert!(images.len() > 2, "{name}");
        for (step, image) in images.into_iter().enumerate() {
            let found = (image.held(), image.lost());
            let told = (sequences(&found.0), &found.1);
            assert!(found == expected, "{name}, {step}: {told:?}");
            assert_eq!(image.told(), expected.1.len() as u64, "{name}, {step}");
            // There was something to set aside, once.
            let aside = fs::read_dir(image.quarantine()).map_or(0, Iterator::count);
            let databases = ["the database is gone", "sled does not find the last one"];
            assert_eq!(aside, usize::from(!databases.contains(&name)), "{name}, {step}");
        }
    }
}

#[test]
fn a_first_start_that_ended_at_any_step_is_made_again() {
    let node = Node { folder: tempfile::tempdir().unwrap() };
    fs::create_dir(node.folder.path().join("buffer")).unwrap();
    let mut images = node.ended_at_each_step();
    assert!(images.len() > 3);
    // In the middle of its first file.
    let node = Node { folder: tempfile::tempdir().unwrap() };
    fs::create_dir_all(node.folder.path().join("state.made")).unwrap();
    fs::create_dir(node.folder.path().join("buffer")).unwrap();
    fs::write(node.folder.path().join("state.made/conf"), [0xa5; 300]).unwrap();
    images.push(node);
    for (step, image) in images.into_iter().enumerate() {
        assert_eq!(image.held(), [], "{step}");
        assert_eq!(image.lost(), BTreeSet::new());
        assert!(!image.quarantine().exists(), "{step}");
    }
}

/// The count alone shows that it went back, and the new `letters` would excuse that.
#[test]
fn a_start_that_ended_at_any_step_does_not_go_on_with_older_books() {
    let all = letters(10);
    let node = Node::with(&all);
    let keys = [join(BOOKS, &["a", "one"]), join(COUNT, &["one", "a"])];
    node.run_with_books(1..=1, true);
    let store = Store::open(&node.state()).unwrap();
    let old = keys.each_ref().map(|key| store.get(key).unwrap().unwrap());
    drop(store);
    node.run_with_books(2..=2, true);
    node.forget_counts();
    node.change_values(|harm| {
        keys.into_iter().zip(old).for_each(|(key, old)| harm.insert(key, old));
    });
    for (step, image) in node.ended_at_each_step().into_iter().enumerate() {
        assert_eq!(image.held(), all, "{step}");
        assert_eq!(image.delivered(), Some(2), "{step}");
    }
}

#[test]
fn a_salvage_that_ended_half_way_is_made_again() {
    let all = letters(40);
    let node = Node::with(&all);
    fs::write(node.state().join("conf"), [0xa5; 300]).unwrap();
    let expected = whole(&node);
    let draft = node.draft();
    // In the middle of the copy, long ago.
    disk::copy_folder(&Node::with(&[letter(99, Vec::new())]).state(), &draft).unwrap();
    assert_eq!(node.held(), expected);
    assert!(!draft.exists());
    // Between the renames.
    drop(Store::open(&node.state()).unwrap());
    fs::rename(node.state(), &draft).unwrap();
    assert_eq!(node.held(), expected);
    assert_eq!(fs::read_dir(node.quarantine()).unwrap().count(), 1);
    // The same, and it came to harm: sled opens nothing, or finds less.
    let harms: [fn(&Node); 2] = [
        |node| fs::write(node.state().join("conf"), [0xa5; 300]).unwrap(),
        |node| {
            let part = [letter_key(&letter(3, Vec::new()).key).as_slice(), &[0, 0]].concat();
            node.change_values(|harm| harm.remove(part));
        },
    ];
    for (harm, aside) in harms.into_iter().zip([2, 3]) {
        harm(&node);
        drop(Store::open(&node.state()));
        fs::rename(node.state(), &draft).unwrap();
        assert_eq!(node.held(), expected);
        assert_eq!(fs::read_dir(node.quarantine()).unwrap().count(), aside);
        assert_eq!(node.lost(), BTreeSet::new());
    }
}

#[test]
fn a_harmed_snapshot_of_a_young_database_costs_nothing() {
    let all = letters(9);
    let node = Node::with(&all);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    state.put_note("stream/a", b"fingerprint").unwrap();
    state.close().unwrap();
    node.closed(state);
    let files = fs::read_dir(node.state()).unwrap().map(|entry| entry.unwrap().path());
    let is_snapshot = |path: &PathBuf| path.to_string_lossy().contains("/snap.");
    let snapshots: Vec<_> = files.filter(is_snapshot).collect();
    assert!(!snapshots.is_empty());
    for snapshot in snapshots {
        let mut bytes = fs::read(&snapshot).unwrap();
        bytes[0] ^= 1;
        fs::write(snapshot, bytes).unwrap();
    }
    assert_eq!(node.held(), all);
    assert!(!node.quarantine().exists());
    let state = node.open().unwrap();
    assert_eq!(state.note("stream/a").unwrap(), Some(b"fingerprint".to_vec()));
    node.closed(state);
}

/// A node that put a note of so many words 300 times, with books.
fn with_notes_and_books(words: usize) -> Node {
    let node = Node::with(&[]);
    let DeadLetterKey { sink, stream, .. } = letter(1, Vec::new()).key;
    for run in 0..3_u64 {
        let mut state = node.open().unwrap();
        state.count_start().unwrap();
        for number in run * 100 + 1..=run * 100 + 100 {
            state.put_note("stream/a", &vec![number.to_le_bytes(); words].concat()).unwrap();
            let books = Books { delivered: number, ..Books::default() };
            state.save_books(&stream, &sink, &books).unwrap();
            state.flush().unwrap();
        }
        state.close().unwrap();
        node.closed(state);
    }
    node
}

/// A node of which the beginning of sled's log is written over: a note of 16,000 bytes, put 300 times, with books. One bit of
/// the snapshot flips.
fn with_a_harmed_snapshot() -> Node {
    let node = with_notes_and_books(2_000);
    let files = fs::read_dir(node.state()).unwrap().map(|entry| entry.unwrap().path());
    let is_snapshot = |path: &PathBuf| path.to_string_lossy().contains("/snap.");
    let snapshots: Vec<_> = files.filter(is_snapshot).collect();
    assert_eq!(snapshots.len(), 1);
    let mut bytes = fs::read(&snapshots[0]).unwrap();
    bytes[0] ^= 1;
    fs::write(&snapshots[0], bytes).unwrap();
    node
}

/// One bit of what was written since the last snapshot flips.
fn with_a_bit_flipped_behind_the_snapshot() -> Node {
    let node = with_notes_and_books(500);
    node.change(|bytes| {
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        bytes[used / 6 * 5] ^= 0x10;
    });
    node
}

/// sled finds less, or nothing without the snapshot: what is written to it when it opens must not be to the database.
#[test]
fn harm_to_a_database_without_letters_costs_no_books_wherever_the_start_is_killed() {
    for node in [with_a_harmed_snapshot(), with_a_bit_flipped_behind_the_snapshot()] {
        let images = node.ended_at_each_step();
        assert!(images.len() > 4, "{}", images.len());
        for (step, image) in images.into_iter().enumerate() {
            assert_eq!(image.delivered(), Some(300), "{step}");
        }
    }
}

/// Without its snapshot sled would take the harm for the end of its log, and open what was there before.
#[test]
fn books_do_not_go_back_when_a_bit_flips() {
    for all in [Vec::new(), letters(3)] {
        let node = Node::with(&all);
        let (stream, sink) = (StreamName::parse("a").unwrap(), SinkName::parse("one").unwrap());
        for run in 0..3 {
            let mut state = node.open().unwrap();
            state.count_start().unwrap();
            for number in run * 10 + 1..=run * 10 + 10 {
                let books = Books { delivered: number, ..Books::default() };
                state.save_books(&stream, &sink, &books).unwrap();
                state.put_note("stream/a", number.to_string().as_bytes()).unwrap();
                state.flush().unwrap();
            }
            node.end(state, true);
        }
        let file = fs::read(node.state().join("db")).unwrap();
        let used = file.iter().rposition(|byte| *byte != 0).unwrap();
        for at in (0..used).step_by(used / 40) {
            let node = node.copied();
            node.change(|bytes| bytes[at] ^= 0x10);
            let state = node.open().unwrap();
            let books = state.books(&stream, &sink).unwrap().unwrap_or_default();
            assert_eq!(books.delivered, 30, "{at}");
            let note = state.note("stream/a").unwrap();
            assert!(node.quarantine().exists() || note == Some(b"30".to_vec()), "{at}");
            node.closed(state);
        }
    }
}

/// sled writes one whenever it opens a database, and takes one that is not whole for its newest.
#[test]
fn a_kill_while_sled_writes_its_snapshot_harms_nothing() {
    for (all, in_order) in [(letters(9), true), (letters(9), false), (Vec::new(), true)] {
        let node = Node::with(&all);
        let mut state = node.open().unwrap();
        state.count_start().unwrap();
        state.put_note("stream/a", b"fingerprint").unwrap();
        state.flush().unwrap();
        node.end(state, in_order);
        fs::write(node.state().join("snap.00000000000FFFFF.generating"), b"half").unwrap();
        assert_eq!(node.held(), all);
        assert!(!node.quarantine().exists());
        let state = node.open().unwrap();
        assert_eq!(state.note("stream/a").unwrap(), Some(b"fingerprint".to_vec()));
        node.closed(state);
    }
}

/// sled never syncs a page that it makes a file of its own.
#[test]
fn letters_of_any_size_that_come_and_go_never_become_files_of_their_own() {
    let node = Node::with(&[]);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    for first in (100..400_u64).step_by(3) {
        let of_any_size = |n: u64| letter(n, vec![n as u8; (n * 977 % 9_000 * 20) as usize]);
        state.put_letters(&[first, first + 1, first + 2].map(of_any_size)).unwrap();
        state.flush().unwrap();
        state.remove_letters(&[letter(first + 1, Vec::new()).key]).unwrap();
        state.flush().unwrap();
        assert_eq!(fs::read_dir(node.state().join("blobs")).unwrap().count(), 0, "{first}");
    }
    node.closed(state);
}

/// Nothing was written to the new one yet.
#[test]
fn an_old_database_that_is_still_there_counts_while_the_new_one_cannot_be_opened() {
    let all = letters(20);
    let node = Node::with(&all);
    node.leave_behind(&letter(41, b"last".to_vec()));
    let images = node.ended_at_each_step().into_iter();
    let both =
        |image: &Node| image.state().exists() && image.folder.path().join("state.old").exists();
    let images: Vec<_> = images.filter(both).collect();
    assert!(!images.is_empty());
    for image in images {
        image.change(|bytes| bytes.fill(0));
        assert_eq!(image.held()[..20], all);
        assert_eq!(image.told(), 0);
    }
}

#[test]
fn a_new_database_that_comes_to_harm_before_it_takes_over_is_looked_at_in_a_copy() {
    let node = Node::with(&letters(40));
    fs::write(node.state().join("conf"), [0xa5; 300]).unwrap();
    for image in node.ended_in_between() {
        let db = fs::read(image.draft().join("db")).unwrap();
        for at in (0..db.len()).step_by(96 << 10) {
            let image = image.copied();
            let mut db = db.clone();
            db[at] ^= 0x55;
            fs::write(image.draft().join("db"), db).unwrap();
            let raw = RawState::search(&image.draft()).unwrap();
            let whole: BTreeSet<u64> = raw.letters().map(|found| found.key.sequence.0).collect();
            let held = sequences(&image.held());
            assert!(whole.is_subset(&held), "{at}: {whole:?} {held:?}");
            assert_eq!(held.len() as u64 + image.told(), 40, "{at}");
        }
    }
}

#[test]
fn a_new_database_of_which_nothing_was_told_yet_does_not_take_over() {
    let node = Node::with(&letters(40));
    node.change(|bytes| {
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        bytes[used / 8..used / 2].fill(0xa5);
    });
    let images = node.ended_at_each_step().into_iter().enumerate();
    let images: Vec<_> = images.filter(|(_, image)| image.state().exists()).collect();
    assert!(images.iter().any(|(_, image)| image.draft().exists()));
    for (step, image) in images {
        fs::remove_dir_all(image.state()).unwrap();
        assert_eq!(image.held().len() as u64 + image.told(), 40, "{step}");
    }
}

#[test]
fn an_old_database_that_had_come_to_no_harm_is_there_until_the_new_one_takes_over() {
    let all = letters(20);
    let node = Node::with(&all);
    node.leave_behind(&letter(41, b"last".to_vec()));
    for image in node.ended_in_between() {
        let db = image.draft().join("db");
        let length = fs::metadata(&db).unwrap().len();
        fs::write(db, vec![0; length as usize]).unwrap();
        assert_eq!(image.held()[..20], all);
        assert_eq!(image.told(), 0);
        assert!(!image.folder.path().join("state.old").exists());
    }
}

#[test]
fn books_that_were_on_stable_storage_count_though_newer_ones_may_not_have_been() {
    let all = letters(10);
    let node = Node::with(&all);
    let key = join(BOOKS, &["a", "one"]);
    node.run_with_books(1..=1, true);
    let store = Store::open(&node.state()).unwrap();
    let old = store.get(&key).unwrap().unwrap();
    drop(store);
    node.run_with_books(2..=5, false);
    node.change_values(|harm| {
        harm.insert(key, old);
        harm.remove([letter_key(&all[0].key).as_slice(), &[0, 0]].concat());
    });
    assert_eq!(node.held(), all);
    assert_eq!(node.delivered(), Some(4));
}

/// It is of a start that ended half-way, and whose database was another one.
#[test]
fn what_was_to_be_the_file_beside_it_goes_with_its_database() {
    let all = letters(20);
    let node = Node::with(&all);
    node.leave_behind(&letter(41, b"last".to_vec()));
    let next = node.folder.path().join("buffer/letters.next");
    LetterJournal::begin_at(next, u64::MAX >> 1, &Held::default()).unwrap();
    for (step, image) in node.ended_at_each_step().into_iter().enumerate() {
        assert_eq!(image.held()[..20], all, "{step}");
    }
}

/// The database is whole.
#[test]
fn a_bad_line_of_the_file_beside_it_and_a_kill_tell_no_loss() {
    let all = letters(7);
    let node = Node::with(&all[..6]);
    let mut state = node.open().unwrap();
    state.count_start().unwrap();
    state.remove_letters(&[all[2].key.clone(), all[3].key.clone()]).unwrap();
    state.flush().unwrap();
    state.put_letters(&all[6..]).unwrap();
    state.flush().unwrap();
    node.end(state, false);
    node.leave_behind(&letter(41, b"last".to_vec()));
    let named = node.folder.path().join("buffer/letters");
    let text = fs::read_to_string(&named).unwrap();
    assert!(text.contains(" - one a 3 4"), "{text}");
    fs::write(&named, text.replace(" - one a 3 4", " - one a 3 5")).unwrap();
    assert_eq!(sequences(&node.held()), BTreeSet::from([1, 2, 5, 6, 7, 41]));
    assert_eq!(node.told(), 0);
    assert!(!node.quarantine().exists());
}

/// Its disk is not mounted.
#[test]
fn a_database_behind_a_link_that_leads_nowhere_is_waited_for() {
    let all = letters(10);
    let node = Node::with(&all);
    let away = tempfile::tempdir().unwrap();
    let (there, gone) = (away.path().join("there"), away.path().join("gone"));
    fs::rename(node.state(), &there).unwrap();
    std::os::unix::fs::symlink(&there, node.state()).unwrap();
    fs::rename(&there, &gone).unwrap();
    assert!(matches!(node.open(), Err(BufferError::Io { action: "look for", .. })));
    fs::rename(&gone, &there).unwrap();
    assert_eq!(node.held(), all);
    assert_eq!(node.told(), 0);
}

#[test]
fn a_database_whose_letters_have_no_frames_is_of_another_format_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("buffer")).unwrap();
    let store = Store::open(&folder.path().join("state")).unwrap();
    store.insert(b"meta\0start", &1_u64.to_be_bytes()).unwrap();
    store.flush().unwrap();
    drop(store);
    let refused = open(folder.path(), QUOTA, &|| ()).unwrap_err();
    assert!(matches!(refused, BufferError::Format { format: 2, .. }), "{refused}");
    assert!(folder.path().join("state").exists());
}
