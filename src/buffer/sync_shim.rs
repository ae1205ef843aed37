//! Makes sled's flush durable. sled ends a write with `sync_file_range`, which flushes neither file metadata nor the
//! drive's cache: after a simulated power cut more than half of such databases did not open. This module defines the
//! symbol in our own binary, so that sled's own ordering holds: each of its syncs is an `fdatasync`.
//!
//! The linker gives our definition precedence over libc's. Because nothing but the linker promises that, every start
//! checks it ([`super::Buffer::open`] refuses to run unless [`calls`] grew with a flush).
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::crash::crash_point;

static CALLS: AtomicU64 = AtomicU64::new(0);

/// How often sled has synced through this module since the process began.
pub(super) fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// Takes the place of libc's function of this name. The range and the flags are ignored: the whole file is synced,
/// with its size.
///
/// # Safety
/// Takes any descriptor, as the system call does; touches no memory of the caller.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sync_file_range(fd: i32, _offset: i64, _bytes: i64, _flags: u32) -> i32 {
    CALLS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: a plain system call on a descriptor the caller owns.
    let result = unsafe { libc::fdatasync(fd) };
    crash_point("crash_synced");
    result
}
