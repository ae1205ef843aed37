//! The state of a stopped node, in place: the state directory stays locked while a command works on it.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use super::recovery::{self, take_lock};
use super::state::{self, Owner, State};
use super::{BufferError, inspect, letter_journal, salvage};
use crate::domain::LogIdentity;
use crate::observe::Board;

/// The open state database of a stopped node. No record is looked at: what is in the log stays as it is.
pub struct StoppedState {
    state: State,
    identity: LogIdentity,
    thread: JoinHandle<()>,
    folder: PathBuf,
    /// Free again only when the database is closed.
    _lock: File,
}

impl StoppedState {
    /// `Locked` while the node runs: it takes orders itself.
    pub fn open(state_dir: &Path, board: Arc<Board>) -> Result<Self, BufferError> {
        let folder = state_dir.join("state");
        if !folder.is_dir() {
            let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(BufferError::io("find a state database: there is no", &folder, missing));
        }
        let lock = take_lock(state_dir)?;
        let identity = inspect::identity(&state_dir.join("buffer"))?.identity;
        let mut store = salvage::open_sound(state_dir)?;
        recovery::check_shims(&mut store)?;
        hand_over(&folder)?;
        let owner = Arc::new(Command { board, failure: OnceLock::new() });
        let (state, commands) = State::new(owner.clone());
        let thread = thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || state::run(&*owner, store, commands))
            .map_err(|error| BufferError::io("start a thread for", &folder, error))?;
        Ok(StoppedState { state, identity, thread, folder, _lock: lock })
    }

    pub fn state(&self) -> State {
        self.state.clone()
    }

    /// Of the log that the node wrote.
    pub fn identity(&self) -> LogIdentity {
        self.identity
    }

    /// What was answered is on stable storage already.
    pub async fn close(self) -> Result<(), BufferError> {
        self.state.close().await;
        // The command was the last it had to do.
        let _ = self.thread.join();
        hand_over(&self.folder)
    }
}

/// Files that root made, in the folder and the journal beside it, belong to whom the folder belongs: the node must be able to
/// open them.
fn hand_over(folder: &Path) -> Result<(), BufferError> {
    let io = |error| BufferError::io("hand over to the node's user", folder, error);
    let owner = fs::metadata(folder).map_err(io)?;
    let entries = fs::read_dir(folder).map_err(io)?.map(|entry| entry.map(|entry| entry.path()));
    let journal = folder.with_file_name("buffer").join(letter_journal::NAME);
    for path in entries.chain([Ok(journal)]) {
        let path = path.map_err(io)?;
        if fs::metadata(&path).map_err(io)?.uid() != owner.uid() {
            chown(&path, Some(owner.uid()), Some(owner.gid())).map_err(io)?;
        }
    }
    Ok(())
}

/// The command that works on it.
struct Command {
    board: Arc<Board>,
    failure: OnceLock<String>,
}

impl Owner for Command {
    fn board(&self) -> &Board {
        &self.board
    }

    fn stopped(&self) -> Option<BufferError> {
        self.failure.get().map(|reason| BufferError::Stopped { reason: reason.clone() })
    }

    fn fail(&self, error: &BufferError) {
        // The first is the cause of the others.
        let _ = self.failure.set(error.to_string());
    }
}
