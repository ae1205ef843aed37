//! The janitor: one OS thread that drops generations nobody needs, closes what was sealed, and watches the disk.

use std::time::{Duration, Instant};

use super::log::{Log, lock, set_aside};
use super::{BufferError, disk, threads};
use crate::crash::crash_point;
use crate::domain::Runbook;

/// How often the board gets sizes.
const ROUND: Duration = Duration::from_secs(1);

/// Shares of the quota, in percent, that are worth a warning, once each until it falls below again.
const WARNINGS: [u64; 2] = [80, 95];

/// Until the buffer closes or fails.
pub(super) fn run(log: &Log) {
    let mut warned = 0;
    let mut shown: Option<Instant> = None;
    while log.stopped().is_none() {
        threads::set_work_waiting(true);
        fail::fail_point!("buffer_janitor");
        if let Err(error) = tidy(log) {
            return log.fail(&error);
        }
        if shown.is_none_or(|at| at.elapsed() >= ROUND) {
            shown = Some(Instant::now());
            if let Err(error) = log.reached.sync() {
                return log.fail(&error);
            }
            show(log, &mut warned);
        }
        threads::set_work_waiting(false);
        log.news.wait(ROUND);
    }
}

fn tidy(log: &Log) -> Result<(), BufferError> {
    {
        let mut handles = log.handles();
        let retired = std::mem::take(&mut lock(&log.index).retired);
        drop(retired);
        handles.close_idle();
    }
    loop {
        let dropped = {
            let mut index = lock(&log.index);
            let Some(number) = index.droppable() else { return Ok(()) };
            index.generations.remove(&number).map(|entry| (number, entry))
        };
        let Some((number, entry)) = dropped else { return Ok(()) };
        // Noted first: a crash in between leaves a folder whose records nobody misses.
        log.save_marks(|marks| {
            marks.dropped.extend(
                entry.contents.ranges.iter().map(|(name, range)| (name.clone(), range.last)),
            );
        })?;
        crash_point("crash_drop_noted");
        log.handles().forget(number);
        if entry.contents.harmed {
            let lost = BufferError::corrupt(&entry.folder, "some of its records are lost");
            set_aside(&entry.folder, &log.quarantine_folder(), &lost)?;
            lock(&log.index).quarantined += 1;
        } else {
            disk::remove_folder(&entry.folder)?;
        }
        crash_point("crash_dropped");
        tracing::debug!(event = "generation_dropped", generation = number, bytes = entry.bytes);
        log.space.ring();
        threads::beat();
    }
}

fn show(log: &Log, warned: &mut u64) {
    let (bytes, generations) = {
        let index = lock(&log.index);
        (index.bytes(), index.generations.len() as u64)
    };
    let space = disk::space(&log.folder).ok();
    log.board.update_buffer(|status| {
        status.bytes = bytes;
        status.generations = generations;
        status.free_bytes = space.map_or(status.free_bytes, |space| space.free_bytes);
        status.filesystem_bytes = space.map_or(status.filesystem_bytes, |space| space.total_bytes);
    });
    warn(log, bytes, warned);
    let settings = &log.settings;
    if let Err(error) =
        disk::restore_ballast(&log.ballast(), settings.ballast_bytes, settings.free_bytes_min)
    {
        tracing::debug!(event = "ballast_not_written", error = %error);
    }
}

fn warn(log: &Log, bytes: u64, warned: &mut u64) {
    let percent = bytes.saturating_mul(100) / log.settings.quota_bytes.max(1);
    let reached = WARNINGS.into_iter().filter(|limit| percent >= *limit).max().unwrap_or(0);
    if reached > *warned {
        tracing::warn!(
            event = "buffer_filling",
            runbook = Runbook::BufferFull.page(),
            bytes,
            quota_bytes = log.settings.quota_bytes,
            percent,
            "the buffer fills: a sink is away or too slow; at 100 % nothing is acknowledged any more"
        );
    }
    *warned = reached;
}
