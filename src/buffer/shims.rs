//! The system calls by which sled reads, writes and syncs. sled takes their failures for less than they are: it ends a write
//! with `sync_file_range`, which flushes neither file metadata nor the drive's cache (after a simulated power cut more than
//! half of such databases did not open); it takes a read that fails while it opens a database for the torn end of a crash,
//! and writes over what stands behind it; and of a write or sync that fails on one of its own threads it may tell no one, so
//! that who waits for it waits for ever.
//!
//! This module defines the symbols in our own binary, and the linker gives them precedence over libc's: each sync is an
//! `fdatasync`, and what a drive refuses ends the process, whose next start reads what there is. Because nothing but the
//! linker promises that, every start checks it ([`not_live`]).
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{BufferError, disk};
use crate::crash::crash_point;
use crate::domain::Runbook;

/// As systemd sees it: the node is started again.
const EXIT_FAILED: i32 = 1;

static READS: AtomicU64 = AtomicU64::new(0);
static WRITES: AtomicU64 = AtomicU64::new(0);
static SYNCS: AtomicU64 = AtomicU64::new(0);
static OPENINGS: AtomicUsize = AtomicUsize::new(0);

/// The function of which libc's own was used, if so, once sled has read, written and synced.
pub(super) fn not_live() -> Option<&'static str> {
    let functions = [("pread64", &READS), ("pwrite64", &WRITES), ("sync_file_range", &SYNCS)];
    let unused = functions.into_iter().find(|(_, calls)| calls.load(Ordering::Relaxed) == 0)?;
    Some(unused.0)
}

/// While it is there, sled opens a database, and a read may not fail: elsewhere it is an error like any other.
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

/// Takes the place of libc's function of this name. A drive that fails to read is asked again.
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
    READS.fetch_add(1, Ordering::Relaxed);
    let place = libc::iovec { iov_base: buffer, iov_len: bytes };
    for _ in 0..disk::READS_MAX {
        // SAFETY: the caller's promise; one piece, read as the call that this one replaces would.
        let result = unsafe { libc::preadv64(fd, &raw const place, 1, offset) };
        let failed = result < 0 && io::Error::last_os_error().raw_os_error() == Some(disk::EIO);
        if !failed || OPENINGS.load(Ordering::SeqCst) == 0 {
            return result;
        }
    }
    end("read", fd)
}

/// Takes the place of libc's function of this name.
///
/// # Safety
/// As the system call: `buffer` holds `bytes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(
    fd: i32,
    buffer: *const libc::c_void,
    bytes: usize,
    offset: libc::off64_t,
) -> isize {
    WRITES.fetch_add(1, Ordering::Relaxed);
    let piece = libc::iovec { iov_base: buffer.cast_mut(), iov_len: bytes };
    // SAFETY: the caller's promise; one piece, which this call only reads.
    let result = unsafe { libc::pwritev64(fd, &raw const piece, 1, offset) };
    if result < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        end("write", fd);
    }
    result
}

/// Takes the place of libc's function of this name. The range and the flags are ignored: the whole file is synced,
/// with its size.
///
/// # Safety
/// Takes any descriptor, as the system call does; touches no memory of the caller.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sync_file_range(fd: i32, _offset: i64, _bytes: i64, _flags: u32) -> i32 {
    SYNCS.fetch_add(1, Ordering::Relaxed);
    crash_point("crash_written");
    // SAFETY: a plain system call on a descriptor the caller owns.
    if unsafe { libc::fdatasync(fd) } < 0 {
        end("sync", fd);
    }
    crash_point("crash_synced");
    0
}

/// Of the call that has just failed.
fn end(action: &'static str, fd: i32) -> ! {
    let refused = io::Error::last_os_error();
    let path =
        fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_else(|_| PathBuf::from("its files"));
    end_over(&BufferError::io(action, &path, refused))
}

/// Nothing is written from here on, also not by what would run at an orderly exit.
pub(super) fn end_over(error: &BufferError) -> ! {
    let text = "the disk refused what the buffer needs: the process ends";
    if tracing::dispatcher::has_been_set() {
        tracing::error!(
            event = "buffer_failed",
            runbook = Runbook::NodeRestarting.page(),
            error = %error,
            "{text}"
        );
    } else {
        eprintln!("{text}: {error}");
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(EXIT_FAILED) }
}
