//! Orders to a stopped node's state, in place: the state directory stays locked meanwhile.

use std::path::Path;

use super::BufferError;
use super::recovery::take_lock;
use super::state_store::StateStore;
use super::store::Store;
use crate::domain::DeadLetterKey;

/// Removes dead letters for good. `Locked` while the node runs: it takes such orders itself.
pub fn remove_dead_letters(state_dir: &Path, keys: &[DeadLetterKey]) -> Result<(), BufferError> {
    let _lock = take_lock(state_dir)?;
    let store = Store::open(&state_dir.join("state"))?;
    let mut state = StateStore::new(store, u64::MAX)?;
    state.remove_letters(keys)?;
    state.store.flush()
}
