//! Opening the state database, so that no dead letter is lost that its file still holds.
//!
//! sled writes when it opens a database: what it takes for the torn end of a crash it overwrites or cuts off, and finds
//! less than the file held. So where there are letters, or should be (`evidence.rs`), sled opens a copy first. Only when it
//! finds every one of them there is the database itself opened. Otherwise a new one is made of what sled finds in the copy, if
//! it opens that, and of the letters that are missing, and takes the place of the other, which goes to the quarantine as it
//! was found. What is nowhere any more is lost, and told (`lost_letters.rs`).
//!
//! The copy stands beside it as `state.trial`, the new one as `state.draft`. Until the renames nothing of the database has
//! changed: a start that finds both database and draft begins anew, one that finds no database goes on with the draft.

use std::io;
use std::path::{Path, PathBuf};

use super::evidence::{Evidence, Filled, Gaps};
use super::fates::ranges;
use super::held::Held;
use super::letter_journal::LetterJournal;
use super::log::set_aside;
use super::recovery::patiently;
use super::state_store::StateStore;
use super::store::Store;
use super::{BufferError, disk, generation, lost_letters};
use crate::domain::Runbook;

/// A full store must not keep a letter from being saved.
const NO_QUOTA: u64 = u64::MAX;

/// The folders concerned.
struct Places<'s> {
    folder: PathBuf,
    trial: PathBuf,
    draft: PathBuf,
    buffer: PathBuf,
    quarantine: PathBuf,
    /// Called when a step is done: on a slow disk one that reads or writes all of the database takes a while.
    step: &'s dyn Fn(),
}

impl<'s> Places<'s> {
    fn of(state_dir: &Path, step: &'s dyn Fn()) -> Self {
        let buffer = state_dir.join("buffer");
        Places {
            folder: state_dir.join("state"),
            trial: state_dir.join("state.trial"),
            draft: state_dir.join("state.draft"),
            quarantine: buffer.join("quarantine"),
            buffer,
            step,
        }
    }

    fn gather(&self) -> Result<Evidence, BufferError> {
        let evidence = Evidence::gather(&self.folder, &self.buffer)?;
        (self.step)();
        Ok(evidence)
    }
}

/// What a look at the database found.
enum Found {
    /// As it is, it can be opened; with the letters in it.
    Sound(Held),
    /// Sled opened the copy; letters are missing in it.
    Incomplete(Box<StateStore>, Gaps),
    /// Sled cannot open it.
    Damaged(BufferError),
    /// For the copy.
    NoRoom,
}

/// Opens the state database of a node, makes it where there is none; one in which letters are missing is mended, one that
/// cannot be opened is set aside.
pub(super) fn open(
    state_dir: &Path,
    dead_letter_quota_bytes: u64,
    step: &dyn Fn(),
) -> Result<StateStore, BufferError> {
    let places = &Places::of(state_dir, step);
    let open = || open_in_place(&places.folder, dead_letter_quota_bytes);
    remove(&places.trial)?;
    if places.folder.exists() {
        remove(&places.draft)?;
    } else if places.draft.exists() {
        disk::rename(&places.draft, &places.folder)?;
    } else {
        let evidence = places.gather()?;
        make(&places.draft)?;
        disk::rename(&places.draft, &places.folder)?;
        (places.step)();
        return begin_anew(places, &evidence, open()?);
    }
    let evidence = places.gather()?;
    let take = || patiently(|| take_as_it_is(places, &evidence, open()?));
    let error = match patiently_look(places, &evidence)? {
        Found::Sound(held) => match patiently(|| read_through(open()?)) {
            Err(error) if error.is_damage() => error,
            opened => return begin_journal(places, &evidence, opened?, &held),
        },
        Found::NoRoom => match take() {
            Err(error) if error.is_damage() => error,
            taken => return taken,
        },
        Found::Incomplete(trial, gaps) => {
            let mended = mend(places, &evidence, &trial, &gaps);
            drop(trial);
            remove(&places.trial)?;
            match finished(places, mended) {
                // What is missing was never answered for: its records are in the log.
                Err(BufferError::DiskFull { .. }) if !gaps.harmed => match take() {
                    Err(error) if error.is_damage() => error,
                    taken => return taken,
                },
                Err(error) if error.is_damage() => error,
                mended => {
                    let filled = mended?;
                    swap(places, &filled, gaps.harmed, None)?;
                    return begin_journal(places, &evidence, open()?, &filled.held);
                }
            }
        }
        Found::Damaged(error) => error,
    };
    remove(&places.trial)?;
    let filled = finished(places, make_of_bytes(places, &evidence))?;
    swap(places, &filled, true, Some(error))?;
    begin_journal(places, &evidence, open()?, &filled.held)
}

/// From now on the file `letters` has what is in the database, and versions are newer than all before.
fn begin_journal(
    places: &Places,
    evidence: &Evidence,
    mut state: StateStore,
    held: &Held,
) -> Result<StateStore, BufferError> {
    // What a killed process wrote is read from memory, and not on stable storage for that.
    disk::sync_files(&places.folder)?;
    state.go_on_after(evidence.newest());
    (places.step)();
    state.keep_journal(&places.buffer, held)?;
    Ok(state)
}

fn read_through(state: StateStore) -> Result<StateStore, BufferError> {
    state.read_through()?;
    Ok(state)
}

/// Makes the draft of what sled finds in the copy, and of what is missing there.
fn mend(
    places: &Places,
    evidence: &Evidence,
    trial: &StateStore,
    gaps: &Gaps,
) -> Result<Filled, BufferError> {
    let mut draft = rewrite(trial, &places.draft)?;
    (places.step)();
    let filled = evidence.fill(&mut draft, gaps)?;
    (places.step)();
    Ok(filled)
}

/// Makes the draft of what the bytes tell, without sled.
fn make_of_bytes(places: &Places, evidence: &Evidence) -> Result<Filled, BufferError> {
    let mut draft = make(&places.draft)?;
    let filled = evidence.fill(&mut draft, &Gaps::default())?;
    (places.step)();
    Ok(filled)
}

/// A draft that was not finished takes no room.
fn finished(places: &Places, filled: Result<Filled, BufferError>) -> Result<Filled, BufferError> {
    if filled.is_err() {
        remove(&places.draft)?;
    }
    filled
}

/// What sled does not find is told, and comes back at a start with more room, where sled has not written over it. Nothing
/// changes in the database before `letters` names it: what is written there hides the gaps.
fn take_as_it_is(
    places: &Places,
    evidence: &Evidence,
    state: StateStore,
) -> Result<StateStore, BufferError> {
    let state = read_through(state)?;
    let mut held = state.held()?;
    let Some(gaps) = evidence.gaps(&state, &held)? else {
        return begin_journal(places, evidence, state, &held);
    };
    let hidden = evidence.hidden(&state, &gaps)?;
    if !hidden.is_empty() {
        tracing::error!(
            event = "dead_letters_hidden",
            runbook = Runbook::DataLost.page(),
            letters = hidden.len(),
            folder = %places.folder.display(),
            "dead letters stand in the bytes of the database and are not found in it: free twice the space of its folder, \
             and start the node again, which then puts them back"
        );
    }
    held.leave_out(&gaps.returned);
    held.hide(ranges(&hidden));
    let lost = evidence.lost(&held, &gaps, evidence.expected(&state)?);
    lost_letters::add(&places.buffer, &places.quarantine, lost)?;
    (places.step)();
    let mut state = begin_journal(places, evidence, state, &held)?;
    (places.step)();
    state.remove_letters(&gaps.returned)?;
    state.recount()?;
    state.flush()?;
    Ok(state)
}

/// Opens that of a stopped node, to work on it: one that is harmed is left to the node.
pub(super) fn open_sound(state_dir: &Path) -> Result<StateStore, BufferError> {
    let places = Places::of(state_dir, &|| ());
    let evidence = places.gather()?;
    let found = look(&places, &evidence);
    remove(&places.trial)?;
    let held = match found? {
        Found::Sound(held) => held,
        Found::Damaged(error) => return Err(error),
        Found::NoRoom => return Err(BufferError::DiskFull { path: places.trial }),
        Found::Incomplete(..) => {
            let reason = "dead letters are missing in it: start the node, which puts back what the disk still holds";
            return Err(BufferError::Store { path: places.folder, reason: reason.to_owned() });
        }
    };
    let state = open_in_place(&places.folder, NO_QUOTA)?;
    begin_journal(&places, &evidence, state, &held)
}

/// Where there is a log, there was a database.
fn begin_anew(
    places: &Places,
    evidence: &Evidence,
    state: StateStore,
) -> Result<StateStore, BufferError> {
    if !generation::list(&places.buffer)?.is_empty() {
        tracing::error!(
            event = "state_missing",
            runbook = Runbook::DataLost.page(),
            folder = %places.folder.display(),
            "the database of books, dead letters and Kafka cursors is gone, though the log is there: a fresh one is made; \
             its dead letters are lost, and Kafka is sent again what the log holds"
        );
    }
    let nothing = Held::default();
    let lost = evidence.lost(&nothing, &Gaps::default(), evidence.expected(&state)?);
    lost_letters::add(&places.buffer, &places.quarantine, lost)?;
    begin_journal(places, evidence, state, &nothing)
}

fn open_in_place(folder: &Path, quota_bytes: u64) -> Result<StateStore, BufferError> {
    StateStore::open(Store::open(folder)?, quota_bytes)
}

fn make(folder: &Path) -> Result<StateStore, BufferError> {
    let store = Store::open(folder)?;
    let mut state = StateStore::create(store.clone(), NO_QUOTA)?;
    state.flush()?;
    store.sync_creation()?;
    Ok(state)
}

fn remove(folder: &Path) -> Result<(), BufferError> {
    if folder.exists() { disk::remove_folder(folder) } else { Ok(()) }
}

/// All that sled finds in the copy, in a new database: what is put into a harmed one may be lost when it is opened again.
fn rewrite(trial: &StateStore, draft: &Path) -> Result<StateStore, BufferError> {
    let store = Store::open(draft)?;
    trial.copy_to(&store)?;
    StateStore::open(store, NO_QUOTA)
}

fn patiently_look(places: &Places, evidence: &Evidence) -> Result<Found, BufferError> {
    let found = patiently(|| match look(places, evidence)? {
        Found::Damaged(error) => Err(error),
        found => Ok(found),
    });
    match found {
        Err(error) if error.is_damage() => Ok(Found::Damaged(error)),
        found => found,
    }
}

/// Lets sled open a copy where there are letters to lose.
fn look(places: &Places, evidence: &Evidence) -> Result<Found, BufferError> {
    if !evidence.raw.has_file() {
        return Ok(Found::Damaged(BufferError::corrupt(&places.folder, "its file is gone")));
    }
    if !evidence.has_letters() {
        return Ok(Found::Sound(Held::default()));
    }
    remove(&places.trial)?;
    let rehearsed = copy(places).and_then(|()| {
        (places.step)();
        fail::fail_point!("salvage_copied");
        let mut trial = open_in_place(&places.trial, NO_QUOTA)?;
        (places.step)();
        trial.copy_letters_to(&evidence.raw.clusters())?;
        trial.read_through()?;
        let held = trial.held()?;
        (places.step)();
        let gaps = evidence.gaps(&trial, &held)?;
        Ok((trial, held, gaps))
    });
    match rehearsed {
        Ok((trial, _, Some(gaps))) => Ok(Found::Incomplete(Box::new(trial), gaps)),
        Ok((trial, held, None)) => {
            drop(trial);
            remove(&places.trial)?;
            Ok(Found::Sound(held))
        }
        Err(BufferError::DiskFull { .. }) => {
            remove(&places.trial)?;
            Ok(Found::NoRoom)
        }
        Err(error) if error.is_damage() => Ok(Found::Damaged(error)),
        Err(error) => Err(error),
    }
}

fn copy(places: &Places) -> Result<(), BufferError> {
    let full = |error: io::Error| BufferError::io("copy", &places.folder, error);
    disk::copy_folder(&places.folder, &places.trial).map_err(full)
}

/// The draft, closed, takes the place of the database.
fn swap(
    places: &Places,
    filled: &Filled,
    harmed: bool,
    error: Option<BufferError>,
) -> Result<(), BufferError> {
    // When it can be opened again sled has closed it.
    Store::open(&places.draft)?.sync_creation()?;
    disk::sync_files(&places.draft)?;
    lost_letters::add(&places.buffer, &places.quarantine, filled.lost.clone())?;
    (places.step)();
    // Now, so that a start that ends before its next step does not miss them, and tell of them, again.
    LetterJournal::begin(&places.buffer, filled.version, &filled.held)?;
    (places.step)();
    let incomplete =
        || BufferError::corrupt(&places.folder, "sled does not find all that is in it");
    if harmed {
        set_aside(&places.folder, &places.quarantine, &error.unwrap_or_else(incomplete))?;
    } else {
        disk::rename(&places.folder, &places.trial)?;
    }
    (places.step)();
    disk::rename(&places.draft, &places.folder)?;
    (places.step)();
    remove(&places.trial)?;
    let letters = filled.letters;
    if letters > 0 && !harmed {
        tracing::info!(
            event = "dead_letters_put_back",
            letters,
            "dead letters of the last second before the node was killed, which sled had not found, were put back"
        );
    } else if letters > 0 {
        tracing::warn!(
            event = "dead_letters_salvaged",
            runbook = Runbook::DataLost.page(),
            letters,
            "dead letters were found in the bytes of the harmed database and kept"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
        DeadLetter {
            key: DeadLetterKey {
                sink: SinkName::parse("one").unwrap(),
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

    struct Node {
        folder: tempfile::TempDir,
    }

    impl Node {
        /// A node that kept these in several steps, each synced.
        fn with(letters: &[DeadLetter]) -> Self {
            Self::without(letters, &BTreeSet::new(), true, true)
        }

        /// These were kept, and some of them removed: in the same run, or in the next one.
        fn without(
            all: &[DeadLetter],
            removed: &BTreeSet<u64>,
            in_order: bool,
            at_once: bool,
        ) -> Self {
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
            let store = Store::open(&node.state()).unwrap();
            let mut harm = sled::Batch::default();
            harm.insert(third, old);
            harm.remove(fifth);
            store.apply(harm).unwrap();
            store.flush().unwrap();
            drop(store);
            all.remove(2);
            (node, all)
        }

        fn copied(&self) -> Self {
            let node = Node { folder: tempfile::tempdir().unwrap() };
            disk::copy_folder(self.folder.path(), node.folder.path()).unwrap();
            node
        }

        /// What a kill at each step of a start leaves.
        fn ended_at_each_step(&self) -> Vec<Self> {
            let images = std::cell::RefCell::new(Vec::new());
            let step = || images.borrow_mut().push(self.copied());
            let state = open(self.folder.path(), QUOTA, &step).unwrap();
            self.closed(state);
            images.into_inner()
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

        fn harm(&self, at: prop::sample::Index, harm: i32, bit: u32) {
            self.change(|bytes| {
                let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
                let at = at.index(used);
                match harm {
                    0 => bytes[at] ^= 1_u8 << bit,
                    1 => bytes[at / 4096 * 4096..][..4096].fill(0),
                    2 => bytes[at / 4096 * 4096..][..4096].fill(0xa5),
                    3 => bytes.truncate(at),
                    _ => bytes.fill(0),
                }
            });
        }

        /// The letters that are there after a start.
        fn held(&self) -> Vec<DeadLetter> {
            let state = self.open().unwrap();
            let held = state.letters(None, usize::MAX, usize::MAX, |_| true).unwrap();
            let counted: u64 =
                state.counts().unwrap().iter().map(|(.., count)| count.letters).sum();
            assert_eq!(counted, held.len() as u64);
            self.closed(state);
            held
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

    #[test]
    fn a_lost_count_or_format_is_made_again() {
        for lost in [join(COUNT, &["one", "a"]), META.to_vec()] {
            let all = letters(10);
            let node = Node::with(&all);
            let store = Store::open(&node.state()).unwrap();
            let mut harm = sled::Batch::default();
            harm.remove(lost);
            store.apply(harm).unwrap();
            store.flush().unwrap();
            drop(store);
            assert_eq!(node.held(), all);
            assert_eq!(node.lost(), BTreeSet::new());
        }
    }

    /// Kafka goes on from them.
    #[test]
    fn where_a_letter_is_missing_books_that_went_back_are_put_forward_again() {
        let all = letters(10);
        let node = Node::with(&all);
        let (stream, sink) = (all[0].key.stream.clone(), all[0].key.sink.clone());
        let books = |delivered| Books { delivered, ..Books::default() };
        let run = |delivered| {
            let mut state = node.open().unwrap();
            state.count_start().unwrap();
            state.save_books(&stream, &sink, &books(delivered)).unwrap();
            state.close().unwrap();
            node.closed(state);
        };
        let key = join(BOOKS, &["a", "one"]);
        run(1);
        let store = Store::open(&node.state()).unwrap();
        let old = store.get(&key).unwrap().unwrap();
        drop(store);
        run(2);
        let store = Store::open(&node.state()).unwrap();
        let mut harm = sled::Batch::default();
        harm.insert(key, old);
        harm.remove([letter_key(&all[0].key).as_slice(), &[0, 0]].concat());
        store.apply(harm).unwrap();
        store.flush().unwrap();
        drop(store);
        assert_eq!(node.held(), all);
        let state = node.open().unwrap();
        assert_eq!(state.books(&stream, &sink).unwrap(), Some(books(2)));
        node.closed(state);
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
        let store = Store::open(&node.state()).unwrap();
        let mut lost = sled::Batch::default();
        lost.remove(START);
        if letter_lost {
            lost.remove([letter_key(&all[0].key).as_slice(), &[0, 0]].concat());
        }
        store.apply(lost).unwrap();
        store.flush().unwrap();
        drop(store);
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
            let list = lost_letters::read(&node.folder.path().join("buffer"), &node.quarantine());
            let lost: u64 = list.unwrap().iter().map(|lost| lost.letters()).sum();
            assert_eq!(lost, 40 - held.len() as u64);
            assert!(lost > 0);
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
        let harms: [(&str, Harm); 5] = [
            ("sled opens nothing", |node| {
                fs::write(node.state().join("conf"), [0xa5; 300]).unwrap()
            }),
            ("nothing is left", |node| node.change(|bytes| bytes.fill(0))),
            ("the database is gone", |node| fs::remove_dir_all(node.state()).unwrap()),
            ("a part is gone", |node| {
                node.change(|bytes| {
                    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
                    bytes[used / 8..used / 2].fill(0xa5);
                });
            }),
            ("sled does not find the last one", |node| {
                let key = letter(41, Vec::new()).key;
                let value = encode_letter(&letter(41, b"last".to_vec())).unwrap();
                let key = [letter_key(&key).as_slice(), &[0, 0]].concat();
                let state = open_in_place(&node.state(), QUOTA).unwrap();
                let last = state.framed(&key, value.len(), &value);
                node.closed(state);
                node.change(|bytes| bytes.extend_from_slice(&last));
            }),
        ];
        for (name, harm) in harms {
            let node = Node::with(&letters(20));
            harm(&node);
            let images = node.ended_at_each_step();
            let expected = (node.held(), node.lost());
            assert!(images.len() > 2, "{name}");
            for (step, image) in images.into_iter().enumerate() {
                let found = (image.held(), image.lost());
                let told = (sequences(&found.0), &found.1);
                assert!(found == expected, "{name}, {step}: {told:?}");
                let list =
                    lost_letters::read(&image.folder.path().join("buffer"), &image.quarantine());
                let told: u64 = list.unwrap().iter().map(|lost| lost.letters()).sum();
                assert_eq!(told, expected.1.len() as u64, "{name}, {step}");
            }
        }
    }

    #[test]
    fn a_salvage_that_ended_half_way_is_made_again() {
        let all = letters(40);
        let node = Node::with(&all);
        fs::write(node.state().join("conf"), [0xa5; 300]).unwrap();
        let expected = whole(&node);
        let draft = node.folder.path().join("state.draft");
        // In the middle of the copy.
        fs::create_dir(&draft).unwrap();
        fs::write(draft.join("db"), [7; 5_000]).unwrap();
        assert!(expected.iter().all(|letter| node.held().contains(letter)));
        assert!(!draft.exists());
        // Between the renames.
        drop(Store::open(&node.state()).unwrap());
        fs::rename(node.state(), &draft).unwrap();
        assert!(expected.iter().all(|letter| node.held().contains(letter)));
        assert_eq!(fs::read_dir(node.quarantine()).unwrap().count(), 1);
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
}
