//! The small second database: books, dead letters, notes. One OS thread owns it; commands that wait share a sync.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use super::state_store::StateStore;
use super::{BufferError, threads};
use crate::crash::crash_point;
use crate::domain::{
    Arrival, Books, DeadLetter, DeadLetterKey, Reason, Runbook, SinkName, StreamName,
};
use crate::observe::Board;

/// Commands that may wait; whoever comes then waits to be let in.
const COMMANDS_MAX: usize = 256;

/// Payloads of dead letters in memory for one question.
const PAGE_BYTES: usize = 4 << 20;

/// Commands that share one sync.
const GROUP_MAX: usize = 64;

/// Does its work on the store and returns what answers the caller once the group is synced.
type Job = Box<dyn FnOnce(&mut StateStore) -> Outcome + Send>;

struct Outcome {
    wrote: bool,
    /// The store itself failed: nothing after it can be believed.
    fatal: Option<BufferError>,
    /// Called with what the sync said; dropped when the buffer stops instead.
    answer: Box<dyn FnOnce()>,
}

enum Command {
    Run(Job),
    Close,
}

/// Whose state it is: of an open buffer, or of a stopped node that a command works on.
pub(super) trait Owner: Send + Sync {
    fn board(&self) -> &Board;

    /// Why nothing works any more, if so.
    fn stopped(&self) -> Option<BufferError>;

    /// The first disk error ends everything: after it no later success can be believed.
    fn fail(&self, error: &BufferError);
}

/// The small second database: books (with the Kafka cursors), dead letters, presence, retained-message fingerprints.
/// Calls go to its own thread; what answers `Ok` is on stable storage.
#[derive(Clone)]
pub struct State {
    owner: Arc<dyn Owner>,
    commands: mpsc::Sender<Command>,
    /// Changes when letters were stored.
    letters_kept: watch::Sender<()>,
}

/// The thread's end of the queue.
pub(super) struct Commands(mpsc::Receiver<Command>);

/// Which dead letters: every field given must match.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct DeadLetterFilter {
    pub stream: Option<StreamName>,
    pub sink: Option<SinkName>,
    pub reason: Option<Reason>,
    /// Dead at or after.
    pub since: Option<Arrival>,
    /// Dead before.
    pub until: Option<Arrival>,
}

impl DeadLetterFilter {
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        self.stream.as_ref().is_none_or(|stream| *stream == letter.key.stream)
            && self.sink.as_ref().is_none_or(|sink| *sink == letter.key.sink)
            && self.reason.is_none_or(|reason| reason == letter.reason)
            && self.since.is_none_or(|since| letter.dead_at >= since)
            && self.until.is_none_or(|until| letter.dead_at < until)
    }
}

impl State {
    pub(super) fn new(owner: Arc<dyn Owner>) -> (Self, Commands) {
        let (commands, queue) = mpsc::channel(COMMANDS_MAX);
        (State { owner, commands, letters_kept: watch::Sender::new(()) }, Commands(queue))
    }

    fn gone(&self) -> BufferError {
        let ended = || BufferError::Stopped { reason: "its state thread has ended".to_owned() };
        self.owner.stopped().unwrap_or_else(ended)
    }

    async fn call<T: Send + 'static>(
        &self,
        wrote: bool,
        work: impl FnOnce(&mut StateStore) -> Result<T, BufferError> + Send + 'static,
    ) -> Result<T, BufferError> {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move |store| {
            let (result, fatal) = match work(store) {
                // A bound that was reached, and nothing was written.
                Err(error @ BufferError::DeadLettersFull { .. }) => (Err(error), None),
                Err(error) => {
                    let stopped = BufferError::Stopped { reason: error.to_string() };
                    (Err(stopped), Some(error))
                }
                Ok(value) => (Ok(value), None),
            };
            Outcome { wrote, fatal, answer: Box::new(move || drop(sender.send(result))) }
        });
        self.commands.send(Command::Run(job)).await.map_err(|_| self.gone())?;
        receiver.await.unwrap_or_else(|_| Err(self.gone()))
    }

    /// The saved books of a sink. For a table sink a lower bound: its truth is the cursor row in the database.
    pub async fn books(
        &self,
        stream: &StreamName,
        sink: &SinkName,
    ) -> Result<Option<Books>, BufferError> {
        let (stream, sink) = (stream.clone(), sink.clone());
        self.call(false, move |store| store.books(&stream, &sink)).await
    }

    /// Saves books, synced before it answers.
    pub async fn save_books(
        &self,
        stream: &StreamName,
        sink: &SinkName,
        books: Books,
    ) -> Result<(), BufferError> {
        let (stream, sink) = (stream.clone(), sink.clone());
        self.call(true, move |store| store.save_books(&stream, &sink, &books)).await
    }

    /// Stores dead letters, synced before it answers; one that is already there (same key) is replaced, so a repeated
    /// batch doubles nothing. `DeadLettersFull` when the quota would be passed: nothing of the batch is stored then.
    pub async fn put_dead_letters(&self, letters: Vec<DeadLetter>) -> Result<(), BufferError> {
        self.call(true, move |store| store.put_letters(&letters)).await?;
        self.letters_kept.send_replace(());
        Ok(())
    }

    /// By key order, after `after`, at most `limit`, and no more once their payloads have 4 MiB together: whoever wants
    /// all asks again, after the last one, until there is none.
    pub async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: Option<DeadLetterKey>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, BufferError> {
        self.call(false, move |store| {
            store.letters(after.as_ref(), limit, PAGE_BYTES, |letter| filter.matches(letter))
        })
        .await
    }

    pub async fn dead_letter(
        &self,
        key: &DeadLetterKey,
    ) -> Result<Option<DeadLetter>, BufferError> {
        let key = key.clone();
        self.call(false, move |store| store.letter(&key)).await
    }

    pub async fn remove_dead_letters(&self, keys: Vec<DeadLetterKey>) -> Result<(), BufferError> {
        self.call(true, move |store| store.remove_letters(&keys)).await
    }

    /// Removes a letter that was delivered after all, and counts it for the sink's books in the same step; for sinks whose
    /// books are kept here. False when it had left before: then nothing is counted.
    pub async fn remove_replayed(&self, key: &DeadLetterKey) -> Result<bool, BufferError> {
        let key = key.clone();
        self.call(true, move |store| store.remove_replayed(&key)).await
    }

    /// How many letters of a sink left through [`State::remove_replayed`]: its saved books do not know of them.
    pub async fn replayed(&self, stream: &StreamName, sink: &SinkName) -> Result<u64, BufferError> {
        let (stream, sink) = (stream.clone(), sink.clone());
        self.call(false, move |store| store.replayed(&stream, &sink)).await
    }

    /// From now on every new dead letter waits until it is copied to each of these Kafka clusters, or leaves.
    pub async fn copy_dead_letters_to(&self, clusters: Vec<String>) -> Result<(), BufferError> {
        self.call(true, move |store| store.copy_letters_to(&clusters)).await
    }

    /// Letters that wait to be copied to this cluster, in key order: at most `limit`, and no more once their payloads have
    /// `bytes_max` together.
    pub async fn dead_letters_to_copy(
        &self,
        cluster: &str,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Vec<DeadLetter>, BufferError> {
        let cluster = cluster.to_owned();
        self.call(true, move |store| store.letters_to_copy(&cluster, limit, bytes_max)).await
    }

    /// The cluster has confirmed these copies.
    pub async fn dead_letters_copied(
        &self,
        cluster: &str,
        keys: Vec<DeadLetterKey>,
    ) -> Result<(), BufferError> {
        let cluster = cluster.to_owned();
        self.call(true, move |store| store.copied(&cluster, &keys)).await
    }

    /// Changes whenever letters were stored.
    pub fn dead_letters_kept(&self) -> watch::Receiver<()> {
        self.letters_kept.subscribe()
    }

    /// The sink's view shows from now on how many it has. Only the state's thread writes this number: of two changes at
    /// once the later one stands.
    pub async fn show_dead_letters(
        &self,
        stream: &StreamName,
        sink: &SinkName,
    ) -> Result<(), BufferError> {
        let (stream, sink) = (stream.clone(), sink.clone());
        self.call(false, move |store| {
            let letters = store.count(&sink, &stream)?.letters;
            store.counted.insert((sink, stream), letters);
            Ok(())
        })
        .await
    }

    /// A small durable value of a part's own, e.g. a stream's fingerprints of retained messages. Key: `<part>/<what>`.
    pub async fn put_note(&self, key: &str, value: Vec<u8>) -> Result<(), BufferError> {
        let key = key.to_owned();
        self.call(true, move |store| store.put_note(&key, &value)).await
    }

    pub async fn note(&self, key: &str) -> Result<Option<Vec<u8>>, BufferError> {
        let key = key.to_owned();
        self.call(false, move |store| store.note(&key)).await
    }

    pub(super) async fn close(&self) {
        let _ = self.commands.send(Command::Close).await;
    }
}

/// The state thread: until it is told to close or the disk fails. What it does not answer is answered `Stopped`.
pub(super) fn run(owner: &dyn Owner, mut store: StateStore, commands: Commands) {
    let Commands(mut queue) = commands;
    let mut closing = false;
    let mut warned = 0;
    while !closing {
        let Some(first) = queue.blocking_recv() else { return };
        threads::set_work_waiting(true);
        fail::fail_point!("buffer_state");
        let mut outcomes = Vec::new();
        let mut next = Some(first);
        while let Some(command) = next.take() {
            match command {
                Command::Close => closing = true,
                Command::Run(job) => outcomes.push(job(&mut store)),
            }
            threads::beat();
            if !closing && outcomes.len() < GROUP_MAX {
                next = queue.try_recv().ok();
            }
        }
        if let Err(error) = settle(&mut store, outcomes, |store| show(owner.board(), store)) {
            return owner.fail(&error);
        }
        warn(&store, &mut warned);
        threads::set_work_waiting(false);
    }
    // What was answered is on stable storage, whatever becomes of this.
    let _ = store.close();
}

/// Once per level reached, until it falls below again.
fn warn(store: &StateStore, warned: &mut u64) {
    let (bytes, quota_bytes) = (store.dead_letter_bytes, store.dead_letter_quota_bytes);
    let reached = store.level();
    if reached > *warned {
        tracing::warn!(
            event = "dead_letters_filling",
            runbook = Runbook::DeadLetterStoreFull.page(),
            bytes,
            quota_bytes,
            percent = reached,
            "the store of dead letters fills: replay, export or purge them; when it is full the sinks concerned hold"
        );
    }
    *warned = reached;
}

fn show(board: &Board, store: &mut StateStore) {
    board.update_buffer(|status| {
        status.dead_letter_bytes = store.dead_letter_bytes;
        status.dead_letter_copies_waiting.clone_from(&store.copies_waiting);
    });
    for ((sink, stream), letters) in std::mem::take(&mut store.counted) {
        board.show_dead_letters(&stream, &sink, letters);
    }
}

/// Whoever is answered finds shown what was done.
fn settle(
    store: &mut StateStore,
    mut outcomes: Vec<Outcome>,
    show: impl FnOnce(&mut StateStore),
) -> Result<(), BufferError> {
    // Behind a batch that failed nobody may be told, here or by a sync, that anything is on stable storage.
    if let Some(failed) = outcomes.iter_mut().find_map(|outcome| outcome.fatal.take()) {
        return Err(failed);
    }
    if outcomes.iter().any(|outcome| outcome.wrote) {
        crash_point("crash_state_written");
        store.flush()?;
        crash_point("crash_state_flushed");
    }
    show(store);
    outcomes.into_iter().for_each(|outcome| (outcome.answer)());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::store::Store;
    use super::*;

    #[test]
    fn behind_a_batch_that_failed_nothing_is_synced_or_answered() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let mut state = StateStore::create(store, u64::MAX).unwrap();
        state.flush().unwrap();
        let outcome =
            |fatal| Outcome { wrote: true, fatal, answer: Box::new(|| panic!("it was answered")) };
        let failed = BufferError::corrupt(folder.path(), "a page is gone");
        let before = state.newest();
        let outcomes = vec![outcome(None), outcome(Some(failed))];
        let settled = settle(&mut state, outcomes, |_| panic!("it was shown"));
        assert!(matches!(settled, Err(BufferError::Corrupt { .. })));
        assert_eq!(state.newest(), before, "each sync has a version of its own");
    }
}
