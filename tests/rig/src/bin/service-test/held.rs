//! Threads of the node held from outside, as a debugger holds them: the others of the process go on.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::{Daemon, until};

use crate::world::World;

const HELD_WITHIN: Duration = Duration::from_secs(10);
/// Longer than anything here waits.
const HOLD: &str = "inject=all:delay_enter=600s";

/// Dropping it lets them go on.
pub struct Held {
    _tracer: Daemon,
    pub names: Vec<String>,
}

/// Holds the threads of a unit's main process whose names `pick` takes, each at its next call.
pub fn hold(world: &World, unit: &str, log: &Path, pick: impl Fn(&str) -> bool) -> Result<Held> {
    let process = world.main_process(unit)?;
    let mut threads = threads(process)?;
    threads.retain(|(_, name)| pick(name));
    ensure!(!threads.is_empty(), "no thread has such a name");
    let mut words = vec!["-qq", "-e", HOLD].into_iter().map(str::to_owned).collect::<Vec<_>>();
    words.extend(threads.iter().flat_map(|(id, _)| ["-p".to_owned(), id.to_string()]));
    let mut tracer = Daemon::new("strace", "strace", log).arguments(words);
    tracer.start()?;
    tracer.wait_ready(HELD_WITHIN, || {
        let held = |id: &u32| {
            let stat = std::fs::read_to_string(format!("/proc/{process}/task/{id}/stat"));
            stat.is_ok_and(|stat| {
                stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('t'))
            })
        };
        Ok(threads.iter().all(|(id, _)| held(id)))
    })?;
    Ok(Held { _tracer: tracer, names: threads.into_iter().map(|(_, name)| name).collect() })
}

/// Their ids, seen from outside, and names.
fn threads(process: u32) -> Result<Vec<(u32, String)>> {
    let folder = format!("/proc/{process}/task");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("read {folder}"))?;
    let mut threads = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("read {folder}"))?;
        // It may have ended meanwhile.
        let Ok(name) = std::fs::read_to_string(entry.path().join("comm")) else { continue };
        let id = entry.file_name().to_string_lossy().parse().context("a thread's id")?;
        threads.push((id, name.trim_end().to_owned()));
    }
    Ok(threads)
}

/// Waits until each of these parts has been counted as stalled and lives again. One may stall once more: over a connection
/// that is lent to it, and served by the thread that hangs.
pub fn wait_replaced(port: u16, parts: &[&str], within: Duration) -> Result<()> {
    until(within, "what hung is made anew", || {
        let Ok(answer) = rig::get(port, "/parts") else { return Ok(None) };
        let told = answer.json()?;
        let anew = |part: &&str| {
            told[*part]["stalls"].as_u64() >= Some(1) && told[*part]["state"] == "running"
        };
        Ok(parts.iter().all(anew).then_some(()))
    })
}
