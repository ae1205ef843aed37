//! A look at the drive under the buffer: how long a sync really takes, and how long the room lasts.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use super::disk;
use crate::config::BufferSettings;
use crate::domain::{Finding, Findings};

/// Enough for a median that means something, few enough for a slow card.
const SYNCS: usize = 15;

/// One block of the file system.
const SYNC_BYTES: usize = 4096;

/// No drive with a flush of its own is so quick: what was acknowledged may be in a volatile cache.
const TOO_QUICK: Duration = Duration::from_micros(20);

/// The time of one group: above it latency suffers.
const SLOW: Duration = Duration::from_millis(50);

/// The buffer outlasts an outage of this length, or is too small for comfort.
const HOURS_COMFORT: f64 = 24.0;
const HOURS_MIN: f64 = 1.0;

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;

/// How much comes in, and how much waits already.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    pub bytes_per_second: f64,
    pub buffered_bytes: u64,
}

/// `load` is known while a node runs. Writes a small file of its own and removes it.
pub fn probe(state_dir: &Path, settings: &BufferSettings, load: Option<Load>) -> Vec<Finding> {
    let mut findings = Findings::about("drive");
    if !state_dir.is_dir() {
        let figure = format!("{} does not exist yet", state_dir.display());
        findings.warn("state directory", figure, "the node makes it at its first start");
        return findings.done();
    }
    match measure(state_dir) {
        Ok(times) => told_syncs(times, &mut findings),
        Err(error) => findings.fail(
            "sync",
            format!("{}: {error}", state_dir.display()),
            "run as the node's user or as root; if you did, the drive is broken or full",
        ),
    }
    let cache = write_cache(state_dir);
    let cache = cache.as_deref().unwrap_or("the kernel does not tell of this file system");
    findings.ok("write cache", format!("{cache}; the drive must obey flushes"));
    match disk::space(state_dir) {
        Ok(space) => room(space.free_bytes, settings, load, &mut findings),
        Err(error) => findings.failed("room", &error),
    }
    findings.done()
}

/// The same call the buffer relies on, `fdatasync` after a write that makes the file longer; sorted.
fn measure(folder: &Path) -> io::Result<Vec<Duration>> {
    let path = folder.join(format!(".doctor.{}", std::process::id()));
    let measured = (|| {
        let mut file = File::options().write(true).create_new(true).open(&path)?;
        let mut times = Vec::with_capacity(SYNCS);
        for _ in 0..SYNCS {
            file.write_all(&[0x5a; SYNC_BYTES])?;
            let began = Instant::now();
            file.sync_data()?;
            times.push(began.elapsed());
        }
        times.sort();
        Ok(times)
    })();
    // It may never have come about.
    let _ = std::fs::remove_file(&path);
    measured
}

fn told_syncs(times: Vec<Duration>, findings: &mut Findings) {
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    let longest = times.last().copied().unwrap_or_default();
    let figure = format!(
        "{:.2} ms in the middle, {:.2} ms at most",
        median.as_secs_f64() * 1e3,
        longest.as_secs_f64() * 1e3
    );
    if median < TOO_QUICK {
        let remedy = "no drive is so quick: a memory file system, or a cache that answers flushes; what is acknowledged may not survive a power cut";
        findings.fail("sync", figure, remedy);
    } else if median > SLOW {
        findings.warn("sync", figure, "a quicker drive, or fewer programs that write to this one");
    } else {
        findings.ok("sync", figure);
    }
}

/// What the kernel knows of the drive under a folder: `write back` or `write through`.
fn write_cache(folder: &Path) -> Option<String> {
    let device = std::fs::metadata(folder).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let entry = Path::new("/sys/dev/block").join(format!("{major}:{minor}")).canonicalize().ok()?;
    // A partition's queue is that of the drive it is on.
    let own = std::fs::read_to_string(entry.join("queue/write_cache"));
    let text = own.or_else(|_| std::fs::read_to_string(entry.join("../queue/write_cache"))).ok()?;
    Some(text.trim().to_owned())
}

fn room(free_bytes: u64, settings: &BufferSettings, load: Option<Load>, findings: &mut Findings) {
    let buffered = load.map_or(0, |load| load.buffered_bytes);
    let quota = settings.quota_bytes.saturating_sub(buffered);
    let disk = free_bytes.saturating_sub(settings.free_bytes_min);
    let left = quota.min(disk) as f64;
    let bound = if disk < quota { "free space" } else { "quota_bytes" };
    let remedy = "raise quota_bytes, or make room on the drive";
    let figure = format!("{:.2} GiB for messages, bounded by {bound}", left / GIB);
    let rate = load.map(|load| load.bytes_per_second).filter(|rate| *rate > 0.0);
    match rate.map(|rate| left / rate / 3600.0) {
        _ if left <= 0.0 => findings.fail("room", figure, remedy),
        None => findings.ok("room", format!("{figure}; the rate is known once a node runs")),
        Some(hours) => {
            let figure = format!("{figure}: {hours:.1} h of outage at the present rate");
            if hours < HOURS_MIN {
                findings.fail("room", figure, remedy);
            } else if hours < HOURS_COMFORT {
                findings.warn("room", figure, remedy);
            } else {
                findings.ok("room", figure);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Verdict;

    fn settings() -> BufferSettings {
        BufferSettings {
            quota_bytes: 8 << 30,
            generation_bytes: 64 << 20,
            sync_linger: Duration::ZERO,
            group_messages_max: 1,
            tail_bytes_max: 1,
            dead_letter_quota_bytes: 1,
            ballast_bytes: 1,
            free_bytes_min: 1 << 30,
        }
    }

    fn room_of(free: u64, bytes_per_second: f64) -> (Verdict, String) {
        let mut findings = Findings::about("drive");
        let load = Load { bytes_per_second, buffered_bytes: 1 << 30 };
        room(free, &settings(), Some(load), &mut findings);
        let found = findings.done().remove(0);
        (found.verdict, found.figure)
    }

    #[test]
    fn room_is_what_is_left_of_the_smaller_bound_in_hours() {
        let (verdict, figure) = room_of(100 << 30, 10_000.0);
        assert_eq!(verdict, Verdict::Ok);
        assert!(figure.contains("7.00 GiB") && figure.contains("208.8 h"), "{figure}");
        let (verdict, figure) = room_of(3 << 30, 100_000.0);
        assert_eq!(verdict, Verdict::Warn);
        assert!(figure.contains("2.00 GiB") && figure.contains("free space"), "{figure}");
        assert_eq!(room_of(3 << 30, 10_000_000.0).0, Verdict::Fail);
        assert_eq!(room_of(1 << 30, 1.0).0, Verdict::Fail);
    }

    #[test]
    fn the_drive_is_measured_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let found = probe(folder.path(), &settings(), None);
        assert!(found.iter().any(|line| line.check == "sync"), "{found:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
