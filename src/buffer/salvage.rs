//! Opening the state database, so that no dead letter is lost that its file still holds.
//!
//! sled writes when it opens a database: what it takes for the torn end of a crash it overwrites or cuts off, and finds
//! less than the file held. So where there are letters, or should be (`evidence.rs`), or books, sled opens a copy first.
//! Only when it finds every letter there is the database itself opened. Otherwise a new one is made of what sled finds in the
//! copy, if it opens that, and of the letters that are missing, and takes the place of the other, which goes to the quarantine
//! as it was found. What is nowhere any more is lost, and told (`lost_letters.rs`).
//!
//! The copy stands beside it as `state.trial`. The new one is made as `state.made`; when it is whole, on stable storage, and
//! told what it lacks, it is `state.draft`. Then the old one goes away, what is to be `letters` (`letters.next`) becomes it,
//! and the draft the database. A start that finds a database begins anew, one that finds the draft alone goes on there.
//! Where nothing but unanswered letters was missing, the old one is `state.old` until the new one is open, and nothing was
//! written to that: a start that finds it takes it back.

use std::io;
use std::path::{Path, PathBuf};

use super::evidence::{Evidence, Filled, Gaps};
use super::fates::ranges;
use super::held::Held;
use super::letter_journal::{self, LetterJournal};
use super::log::set_aside;
use super::recovery::patiently;
use super::state_store::StateStore;
use super::store::{FILE, Store, demand_room_to_open, harmed_snapshots, is_unfinished};
use super::{BufferError, disk, generation, lost_letters};
use crate::domain::Runbook;

/// Measured: a mended one took up to 1.8 times the room of the other, one made of the bytes up to 1.65 times.
const MADE_TIMES: u64 = 2;
/// What one takes that holds next to nothing, and more.
const MADE_BYTES: u64 = 4 << 20;
/// A full store must not keep a letter from being saved.
const NO_QUOTA: u64 = u64::MAX;

/// The folders concerned.
struct Places<'s> {
    folder: PathBuf,
    trial: PathBuf,
    made: PathBuf,
    draft: PathBuf,
    next: PathBuf,
    old: PathBuf,
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
            made: state_dir.join("state.made"),
            draft: state_dir.join("state.draft"),
            next: buffer.join("letters.next"),
            old: state_dir.join("state.old"),
            quarantine: buffer.join("quarantine"),
            buffer,
            step,
        }
    }

    /// What a database made of this one takes at most.
    fn largest(&self) -> u64 {
        disk::folder_bytes(&self.folder) * MADE_TIMES + MADE_BYTES
    }

    /// A write of sled's that the disk refuses ends the process: without asking before, every start without room would end so.
    fn demand_room(&self) -> Result<(), BufferError> {
        disk::make_folder(&self.made)?;
        disk::demand_room(&self.made, self.largest())
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
    settle(places)?;
    if disk::exists(&places.folder)? {
        disk::bring_to_rest(&places.folder)?;
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
                // What cannot be written says nothing of what is there.
                Err(error) if error.is_damage() && !error.is_below(&places.made) => error,
                mended => {
                    let filled = mended?;
                    swap(places, &filled, gaps.harmed, None)?;
                    return begin_journal(places, &evidence, open()?, &filled.held);
                }
            }
        }
        Found::Damaged(error) => {
            remove(&places.trial)?;
            finished(places, places.demand_room())?;
            error
        }
    };
    // Not asked for room: when the database itself was opened, its good books may be in memory alone by now.
    let filled = finished(places, make_of_bytes(places, &evidence))?;
    swap(places, &filled, true, Some(error))?;
    begin_journal(places, &evidence, open()?, &filled.held)
}

/// There is a database, and nothing is left of an earlier start that ended half-way.
fn settle(places: &Places) -> Result<(), BufferError> {
    remove(&places.trial)?;
    remove(&places.made)?;
    if disk::exists(&places.old)? {
        remove(&places.folder)?;
        disk::rename(&places.old, &places.folder)?;
    }
    if disk::exists(&places.folder)? {
        remove(&places.draft)?;
        return disk::remove_file(&places.next);
    }
    if !disk::exists(&places.draft)? {
        make_anew(places)?;
    }
    take_draft(places)
}

/// From now on the file `letters` has what is in the database, and versions are newer than all before.
fn begin_journal(
    places: &Places,
    evidence: &Evidence,
    mut state: StateStore,
    held: &Held,
) -> Result<StateStore, BufferError> {
    // What a killed process wrote is read from memory, and not on stable storage for that.
    disk::sync(&places.folder.join(FILE))?;
    state.go_on_after(evidence.newest());
    (places.step)();
    remove(&places.old)?;
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
    places.demand_room()?;
    let mut draft = rewrite(trial, &places.made)?;
    (places.step)();
    let filled = evidence.fill(&mut draft, gaps)?;
    (places.step)();
    Ok(filled)
}

/// Makes a database of what the bytes tell, without sled.
fn make_of_bytes(places: &Places, evidence: &Evidence) -> Result<Filled, BufferError> {
    let mut draft = make(&places.made, places.step)?;
    let filled = evidence.fill(&mut draft, &Gaps::default())?;
    (places.step)();
    Ok(filled)
}

/// One that was not finished takes no room.
fn finished<T>(places: &Places, made: Result<T, BufferError>) -> Result<T, BufferError> {
    if made.is_err() {
        remove(&places.made)?;
    }
    made
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
            "dead letters stand in the bytes of the database and are not found in it: free four times the space of its \
             folder and 8 MiB, and start the node again, which then puts them back"
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

/// Makes the draft where there is no database. Where there is a log, there was one.
fn make_anew(places: &Places) -> Result<(), BufferError> {
    if !generation::list(&places.buffer)?.is_empty() {
        tracing::error!(
            event = "state_missing",
            runbook = Runbook::DataLost.page(),
            folder = %places.folder.display(),
            "the database of books, dead letters and Kafka cursors is gone, though the log is there: a fresh one is made; \
             its dead letters are lost, and Kafka is sent again what the log holds"
        );
    }
    places.demand_room()?;
    let filled = make_of_bytes(places, &places.gather()?)?;
    tell(places, &filled, true)
}

fn open_in_place(folder: &Path, quota_bytes: u64) -> Result<StateStore, BufferError> {
    StateStore::open(Store::open(folder)?, quota_bytes)
}

fn make(folder: &Path, step: &dyn Fn()) -> Result<StateStore, BufferError> {
    let store = Store::open(folder)?;
    step();
    let mut state = StateStore::create(store.clone(), NO_QUOTA)?;
    state.flush()?;
    store.sync_creation()?;
    Ok(state)
}

fn remove(folder: &Path) -> Result<(), BufferError> {
    if disk::exists(folder)? { disk::remove_folder(folder) } else { Ok(()) }
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

/// Lets sled open a copy where there is something to lose, or where it may find nothing.
fn look(places: &Places, evidence: &Evidence) -> Result<Found, BufferError> {
    if !evidence.raw.has_file() {
        return Ok(Found::Damaged(BufferError::corrupt(&places.folder, "its file is gone")));
    }
    let harmed = harmed_snapshots(&places.folder)?;
    if !evidence.has_letters_or_books() && harmed.is_empty() {
        return Ok(Found::Sound(Held::default()));
    }
    remove(&places.trial)?;
    let rehearsed = copy(places).and_then(|()| {
        demand_room_to_open(&places.trial)?;
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
            if harmed.iter().all(|snapshot| is_unfinished(snapshot)) {
                Ok(Found::NoRoom)
            } else {
                // Without it sled would find nothing, and write over all.
                Err(BufferError::DiskFull { path: places.trial.clone() })
            }
        }
        Err(error) if error.is_damage() => Ok(Found::Damaged(error)),
        Err(error) => Err(error),
    }
}

fn copy(places: &Places) -> Result<(), BufferError> {
    let full = |error: io::Error| BufferError::io("copy", &places.folder, error);
    disk::copy_folder(&places.folder, &places.trial).map_err(full)
}

/// What was made becomes the draft: on stable storage, closed, and what it has not is told. By the `letters` of a harmed one,
/// the next start would miss that, and tell of it again.
fn tell(places: &Places, filled: &Filled, harmed: bool) -> Result<(), BufferError> {
    // When it can be opened again sled has closed it.
    Store::open(&places.made)?.sync_creation()?;
    disk::sync_files(&places.made)?;
    if harmed {
        LetterJournal::begin_at(places.next.clone(), filled.version, &filled.held)?;
    }
    (places.step)();
    lost_letters::add(&places.buffer, &places.quarantine, filled.lost.clone())?;
    (places.step)();
    disk::rename(&places.made, &places.draft)?;
    (places.step)();
    Ok(())
}

/// The draft becomes the database.
fn take_draft(places: &Places) -> Result<(), BufferError> {
    if disk::exists(&places.next)? {
        disk::rename(&places.next, &places.buffer.join(letter_journal::NAME))?;
    }
    (places.step)();
    disk::rename(&places.draft, &places.folder)?;
    (places.step)();
    Ok(())
}

/// The draft takes the place of the database.
fn swap(
    places: &Places,
    filled: &Filled,
    harmed: bool,
    error: Option<BufferError>,
) -> Result<(), BufferError> {
    tell(places, filled, harmed)?;
    let incomplete =
        || BufferError::corrupt(&places.folder, "sled does not find all that is in it");
    if harmed {
        set_aside(&places.folder, &places.quarantine, &error.unwrap_or_else(incomplete))?;
    } else {
        disk::rename(&places.folder, &places.old)?;
    }
    (places.step)();
    take_draft(places)?;
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
mod tests;
