//! Opening the state database, so that no dead letter is lost that its file still holds.
//!
//! sled writes when it opens a database: what it takes for the torn end of a crash it overwrites or cuts off, and finds
//! less than the file held. So where the bytes of the file show letters (`raw_state.rs`), sled opens a copy first. Only when
//! it finds every letter there that the file holds is the database itself opened. Otherwise a new one is made of what sled
//! finds in the copy, if it opens that, and of the letters that are missing, and takes the place of the other, which goes to
//! the quarantine as it was found.
//!
//! The copy stands beside it as `state.trial`, the new one as `state.draft`. Until the renames nothing of the database has
//! changed: a start that finds both begins anew, one that finds the draft alone goes on with it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::log::set_aside;
use super::raw_state::{RawLetter, RawState};
use super::recovery::patiently;
use super::state_store::StateStore;
use super::state_value::Names;
use super::store::Store;
use super::{BufferError, counted, disk, generation};
use crate::domain::{DeadLetter, Runbook};

/// A full store must not keep a letter from being saved.
const NO_QUOTA: u64 = u64::MAX;

/// Letters put back with one batch.
const BATCH_LETTERS: usize = 256;
const BATCH_BYTES: usize = 4 << 20;

/// The folders concerned.
struct Places {
    folder: PathBuf,
    trial: PathBuf,
    draft: PathBuf,
    buffer: PathBuf,
}

impl Places {
    fn of(state_dir: &Path) -> Self {
        Places {
            folder: state_dir.join("state"),
            trial: state_dir.join("state.trial"),
            draft: state_dir.join("state.draft"),
            buffer: state_dir.join("buffer"),
        }
    }
}

/// What a look at the database found.
enum Found {
    /// As it is, it can be opened.
    Sound,
    /// Sled opened the copy; letters are missing in it.
    Incomplete(Box<StateStore>, Gaps),
    /// Sled cannot open it.
    Damaged(BufferError),
}

/// What a database lacks.
#[derive(Default)]
struct Gaps {
    /// By sink: the version up to which a letter that is not there was removed.
    known: BTreeMap<Names, u64>,
    /// Some of it was on stable storage.
    harmed: bool,
}

/// Opens the state database of a node, makes it where there is none; one in which letters are missing is mended, one that
/// cannot be opened is set aside.
pub(super) fn open(
    state_dir: &Path,
    quarantine: &Path,
    dead_letter_quota_bytes: u64,
) -> Result<StateStore, BufferError> {
    let places = Places::of(state_dir);
    let (mut state, lost) = open_or_mend(&places, quarantine, dead_letter_quota_bytes)?;
    tell_lost(lost);
    state.keep_counted(&places.buffer)?;
    Ok(state)
}

/// With how many letters are lost, at least; ones that were removed before may have taken their place.
fn open_or_mend(
    places: &Places,
    quarantine: &Path,
    dead_letter_quota_bytes: u64,
) -> Result<(StateStore, u64), BufferError> {
    let counted = counted::read(&places.buffer)?;
    let has_log = !generation::list(&places.buffer)?.is_empty();
    remove(&places.trial)?;
    if places.folder.exists() {
        remove(&places.draft)?;
    } else if places.draft.exists() {
        disk::rename(&places.draft, &places.folder)?;
    } else {
        make(&places.draft)?;
        disk::rename(&places.draft, &places.folder)?;
        if has_log {
            tell_missing(&places.folder);
        }
        let lost = counted.values().map(|(_, letters)| letters).sum();
        return Ok((open_in_place(&places.folder, dead_letter_quota_bytes)?, lost));
    }
    let raw = patiently(|| RawState::search(&places.folder, &counted))?;
    let found = patiently_look(places, &raw)?;
    let error = match found {
        Found::Sound => {
            match patiently(|| open_in_place(&places.folder, dead_letter_quota_bytes)) {
                Err(error) if error.is_damage() => error,
                opened => return Ok((opened?, 0)),
            }
        }
        Found::Incomplete(trial, gaps) => {
            let mut draft = rewrite(&trial, &places.draft)?;
            let told = fill(&mut draft, &raw, &gaps)?;
            drop((trial, draft));
            remove(&places.trial)?;
            swap(places, quarantine, &told, None)?;
            return Ok((open_in_place(&places.folder, dead_letter_quota_bytes)?, told.missing));
        }
        Found::Damaged(error) => error,
    };
    remove(&places.trial)?;
    let mut draft = make(&places.draft)?;
    for (key, value) in raw.books() {
        draft.insert(key, value)?;
    }
    let told = fill(&mut draft, &raw, &Gaps { harmed: true, ..Gaps::default() })?;
    drop(draft);
    swap(places, quarantine, &told, Some(error))?;
    Ok((open_in_place(&places.folder, dead_letter_quota_bytes)?, told.missing))
}

/// Opens that of a stopped node, to work on it: one that is harmed is left to the node.
pub(super) fn open_sound(state_dir: &Path) -> Result<StateStore, BufferError> {
    let places = Places::of(state_dir);
    let raw = RawState::search(&places.folder, &counted::read(&places.buffer)?)?;
    let found = look(&places, &raw);
    remove(&places.trial)?;
    match found? {
        Found::Sound => {
            let mut state = open_in_place(&places.folder, NO_QUOTA)?;
            state.keep_counted(&places.buffer)?;
            Ok(state)
        }
        Found::Damaged(error) => Err(error),
        Found::Incomplete(..) => {
            let reason = "dead letters are missing in it: start the node, which puts back what the disk still holds";
            Err(BufferError::Store { path: places.folder, reason: reason.to_owned() })
        }
    }
}

fn tell_missing(folder: &Path) {
    tracing::error!(
        event = "state_missing",
        runbook = Runbook::DataLost.page(),
        folder = %folder.display(),
        "the database of books, dead letters and Kafka cursors is gone, though the log is there: a fresh one is made; \
         its dead letters are lost, and Kafka is sent again what the log holds"
    );
}

fn tell_lost(letters: u64) {
    if letters > 0 {
        tracing::error!(
            event = "dead_letters_lost",
            runbook = Runbook::DataLost.page(),
            letters,
            "the disk lost dead letters, at least so many"
        );
    }
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

fn patiently_look(places: &Places, raw: &RawState) -> Result<Found, BufferError> {
    let found = patiently(|| match look(places, raw)? {
        Found::Damaged(error) => Err(error),
        found => Ok(found),
    });
    match found {
        Err(error) if error.is_damage() => Ok(Found::Damaged(error)),
        found => found,
    }
}

/// Lets sled open a copy where there are letters to lose.
fn look(places: &Places, raw: &RawState) -> Result<Found, BufferError> {
    if !raw.has_file() {
        return Ok(Found::Damaged(BufferError::corrupt(&places.folder, "its file is gone")));
    }
    if !raw.has_letters() {
        return Ok(Found::Sound);
    }
    remove(&places.trial)?;
    let rehearsed = copy(places).and_then(|()| {
        let mut trial = open_in_place(&places.trial, NO_QUOTA)?;
        trial.copy_letters_to(&raw.clusters())?;
        let gaps = gaps(&trial, raw)?;
        Ok((trial, gaps))
    });
    match rehearsed {
        Ok((trial, Some(gaps))) => Ok(Found::Incomplete(Box::new(trial), gaps)),
        Ok((trial, None)) => {
            drop(trial);
            remove(&places.trial)?;
            Ok(Found::Sound)
        }
        // As it was before there were copies: sled takes what it finds.
        Err(BufferError::DiskFull { .. }) => {
            remove(&places.trial)?;
            Ok(Found::Sound)
        }
        Err(error) if error.is_damage() => Ok(Found::Damaged(error)),
        Err(error) => Err(error),
    }
}

fn copy(places: &Places) -> Result<(), BufferError> {
    let full = |error: io::Error| BufferError::io("copy", &places.folder, error);
    disk::copy_folder(&places.folder, &places.trial).map_err(full)
}

/// `None`: there is every letter that the file holds, but for those that were removed.
fn gaps(draft: &StateStore, raw: &RawState) -> Result<Option<Gaps>, BufferError> {
    let held = draft.held()?.counts;
    let mut gaps = Gaps::default();
    for (names, (version, letters)) in draft.versioned_counts()? {
        if letters == held.get(&names).copied().unwrap_or_default().letters {
            gaps.known.insert(names, version);
        } else {
            gaps.harmed = true;
        }
    }
    let behind =
        |names: &Names, version| gaps.known.get(names).is_none_or(|known| *known < version);
    gaps.harmed |= raw.counts().any(|(names, version, _)| behind(names, version));
    let mut missing = false;
    for letter in raw.letters() {
        if gaps.lack(draft, &letter)? {
            missing = true;
            gaps.harmed |= letter.version <= raw.synced();
        }
    }
    Ok((missing || gaps.harmed).then_some(gaps))
}

impl Gaps {
    fn lack(&self, draft: &StateStore, letter: &RawLetter<'_>) -> Result<bool, BufferError> {
        let names = (letter.key.sink.clone(), letter.key.stream.clone());
        let removed = self.known.get(&names).is_some_and(|known| letter.version <= *known);
        Ok(match draft.letter_version(&letter.key)? {
            Some(held) => held < letter.version,
            None => !removed,
        })
    }
}

/// What was done, to be told once it is durable.
struct Told {
    letters: u64,
    missing: u64,
    harmed: bool,
}

/// Puts back what is missing.
fn fill(draft: &mut StateStore, raw: &RawState, gaps: &Gaps) -> Result<Told, BufferError> {
    let mut expected = draft.versioned_counts()?;
    for (names, version, letters) in raw.counts() {
        let newest = expected.entry(names.clone()).or_default();
        *newest = (*newest).max((version, letters));
    }
    draft.count_start()?;
    draft.copy_letters_to(&raw.clusters())?;
    let (mut letters, mut bytes) = (Vec::<DeadLetter>::new(), 0);
    let mut saved = 0;
    for found in raw.letters() {
        if !gaps.lack(draft, &found)? {
            continue;
        }
        let Some(letter) = raw.read(&found)? else { continue };
        bytes += letter.payload.len();
        letters.push(letter);
        saved += 1;
        if letters.len() == BATCH_LETTERS || bytes > BATCH_BYTES {
            draft.put_letters(&std::mem::take(&mut letters))?;
            bytes = 0;
        }
    }
    draft.put_letters(&letters)?;
    let held = draft.recount()?;
    let lost = expected.into_iter().map(|(names, (_, letters))| {
        letters.saturating_sub(held.get(&names).copied().unwrap_or_default())
    });
    let told = Told { letters: saved, missing: lost.sum(), harmed: gaps.harmed };
    draft.flush()?;
    Ok(told)
}

/// The draft, closed, takes the place of the database.
fn swap(
    places: &Places,
    quarantine: &Path,
    told: &Told,
    error: Option<BufferError>,
) -> Result<(), BufferError> {
    // When it can be opened again sled has closed it.
    Store::open(&places.draft)?.sync_creation()?;
    disk::sync_files(&places.draft)?;
    let incomplete =
        || BufferError::corrupt(&places.folder, "sled does not find all that is in it");
    let Told { letters, harmed, .. } = *told;
    if harmed || error.is_some() {
        set_aside(&places.folder, quarantine, &error.unwrap_or_else(incomplete))?;
    } else {
        disk::remove_folder(&places.folder)?;
    }
    disk::rename(&places.draft, &places.folder)?;
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
            "dead letters were found in the bytes of the harmed database and kept; letters that were replayed or purged may \
             be among them"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::buffer::counted::Counts;
    use crate::buffer::state_value::{COUNT, Count, join};
    use crate::domain::{Arrival, DeadLetterKey, Reason, Sequence, SinkName, Stage, StreamName};

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
            Self::ended(letters, true)
        }

        /// In order, or as a kill leaves it.
        fn ended(letters: &[DeadLetter], in_order: bool) -> Self {
            let node = Node { folder: tempfile::tempdir().unwrap() };
            fs::create_dir(node.folder.path().join("buffer")).unwrap();
            let mut state = node.open().unwrap();
            state.count_start().unwrap();
            for some in letters.chunks(7) {
                state.put_letters(some).unwrap();
                state.flush().unwrap();
            }
            if in_order {
                state.close().unwrap();
                node.closed(state);
                return node;
            }
            let killed = node.folder.path().join("killed");
            disk::copy_folder(&node.state(), &killed).unwrap();
            node.closed(state);
            fs::remove_dir_all(node.state()).unwrap();
            fs::rename(killed, node.state()).unwrap();
            node
        }

        /// sled closes its files on threads of its own.
        fn closed(&self, state: StateStore) {
            drop(state);
            drop(Store::open(&self.state()).unwrap());
        }

        fn open(&self) -> Result<StateStore, BufferError> {
            open(self.folder.path(), &self.quarantine(), QUOTA)
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

        fn held(&self) -> Vec<DeadLetter> {
            self.start().0
        }

        /// The letters that are there, and how many are told to be lost.
        fn start(&self) -> (Vec<DeadLetter>, u64) {
            let places = Places::of(self.folder.path());
            let (mut state, lost) = open_or_mend(&places, &self.quarantine(), QUOTA).unwrap();
            state.keep_counted(&places.buffer).unwrap();
            let held = state.letters(None, usize::MAX, usize::MAX, |_| true).unwrap();
            let counted: u64 =
                state.counts().unwrap().iter().map(|(.., count)| count.letters).sum();
            assert_eq!(counted, held.len() as u64);
            let bytes: u64 = state.held().unwrap().counts.values().map(|count| count.bytes).sum();
            assert_eq!(state.dead_letter_bytes, bytes);
            self.closed(state);
            (held, lost)
        }
    }

    /// The letters that the bytes of the file still hold.
    fn whole(node: &Node) -> Vec<DeadLetter> {
        let raw = RawState::search(&node.state(), &Counts::new()).unwrap();
        raw.letters().map(|found| raw.read(&found).unwrap().unwrap()).collect()
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

        /// What the file holds after the harm is there after the start, and again after the next; all else is counted.
        #[test]
        fn whatever_comes_to_harm_no_letter_is_lost_that_the_file_still_holds(
            at in any::<prop::sample::Index>(),
            harm in 0..4,
            bit in 0..8_u32,
            in_order in any::<bool>(),
        ) {
            let all = letters(40);
            let node = Node::ended(&all, in_order);
            node.change(|bytes| {
                let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
                let at = at.index(used);
                match harm {
                    0 => bytes[at] ^= 1_u8 << bit,
                    1 => bytes[at / 4096 * 4096..][..4096].fill(0),
                    2 => bytes[at / 4096 * 4096..][..4096].fill(0xa5),
                    _ => bytes.truncate(at),
                }
            });
            let expected = whole(&node);
            prop_assert!(harm == 3 || expected.len() + 25 >= all.len(), "{}", expected.len());
            let (held, lost) = node.start();
            for letter in &expected {
                prop_assert!(held.contains(letter), "{}", letter.key);
            }
            prop_assert!(held.iter().all(|letter| all.contains(letter)));
            prop_assert_eq!(held.len() as u64 + lost, all.len() as u64);
            prop_assert_eq!(node.start(), (held, 0));
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
        let all = letters(20);
        let node = Node::with(&all);
        let key = join(COUNT, &["one", "a"]);
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
        let refused = open(folder.path(), &folder.path().join("quarantine"), QUOTA).unwrap_err();
        assert!(matches!(refused, BufferError::Format { format: 2, .. }), "{refused}");
        assert!(folder.path().join("state").exists());
    }
}
