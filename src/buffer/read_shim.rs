//! Keeps from sled what it takes for the torn end of a crash: a read that fails. While it opens a database it writes over
//! what stands behind the place where it could not read, so it may not go on from there. This module defines the symbol by
//! which files are read in our own binary, as `sync_shim.rs` does for syncs, and every start checks it.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::disk;
use crate::domain::Runbook;

/// As systemd sees it: the node is started again.
const EXIT_FAILED: i32 = 1;

static CALLS: AtomicU64 = AtomicU64::new(0);
static OPENINGS: AtomicUsize = AtomicUsize::new(0);

/// How often a file was read through this module since the process began.
pub(super) fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// While it is there, sled opens a database: a drive that fails to read is asked again, and one that goes on so ends the
/// process. The next start reads all there is before it lets sled open it, and deals with what cannot be read.
pub(super) struct Opening(());

impl Opening {
    pub(super) fn begin() -> Self {
        OPENINGS.fetch_add(1, Ordering::SeqCst);
        Opening(())
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        OPENINGS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Takes the place of libc's function of this name.
///
/// # Safety
/// As the system call: `buffer` has room for `bytes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread64(
    fd: i32,
    buffer: *mut libc::c_void,
    bytes: usize,
    offset: libc::off64_t,
) -> isize {
    CALLS.fetch_add(1, Ordering::Relaxed);
    let place = libc::iovec { iov_base: buffer, iov_len: bytes };
    for attempt in 1.. {
        // SAFETY: the caller's promise; one piece, read as the call that this one replaces would.
        let result = unsafe { libc::preadv64(fd, &place, 1, offset) };
        let failed = result < 0 && io::Error::last_os_error().raw_os_error() == Some(disk::EIO);
        if !failed || OPENINGS.load(Ordering::SeqCst) == 0 {
            return result;
        }
        if attempt == disk::READS_MAX {
            break;
        }
    }
    tracing::error!(
        event = "buffer_failed",
        runbook = Runbook::NodeRestarting.page(),
        offset,
        "the drive cannot read what is needed to open a database: the node ends and is started afresh"
    );
    // SAFETY: ends the process. Nothing is written from here on, also not by what would run at an orderly exit.
    unsafe { libc::_exit(EXIT_FAILED) }
}
