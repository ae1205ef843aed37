//! `MemoryMax=` in force under load. With the second version of control groups systemd sets it, and it is looked at; with the
//! first one, systemd in a container may not, and a group with the same limit is put around the process from outside.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::world::World;

const ROOT: &str = "/sys/fs/cgroup";
/// As docs/operations.md has it.
const DROP_IN: &str = "[Service]\nMemoryHigh=384M\nMemoryMax=512M\n";
const MIB: u64 = 1024 * 1024;

/// For the node's next start.
pub fn limit(world: &World) -> Result<()> {
    world.machine.write("/etc/systemd/system/telemetry.service.d/memory.conf", DROP_IN)?;
    world.machine.run(&["systemctl", "daemon-reload"]).map(drop)
}

/// Where the process was, and what it held there and is charged for there.
struct Moved {
    from: PathBuf,
    held: u64,
}

/// The limit around the node's process.
pub struct Bound {
    max: u64,
    group: PathBuf,
    version: Version,
}

enum Version {
    One {
        process: u32,
        /// When the group is ours.
        moved: Option<Moved>,
    },
    Two,
}

impl Bound {
    /// Finds it in force, or puts it into force.
    pub fn begin(world: &World) -> Result<Self> {
        let max = world.count("MemoryMax")?;
        let process = world.main_process("telemetry")?;
        if Path::new(ROOT).join("cgroup.controllers").exists() {
            let group = group_of(process, "0::", Path::new(ROOT))?;
            let found = number(&group.join("memory.max"))?;
            ensure!(found == max, "MemoryMax={max}, but {} has {found}", group.display());
            return Ok(Bound { max, group, version: Version::Two });
        }
        let home = Path::new(ROOT).join("memory");
        let theirs = group_of(process, ":memory:", &home)?;
        if number(&theirs.join("memory.limit_in_bytes"))? == max {
            let version = Version::One { process, moved: None };
            return Ok(Bound { max, group: theirs, version });
        }
        let group = home.join(format!("telemetry-memory-{}", std::process::id()));
        std::fs::create_dir(&group).with_context(|| format!("create {}", group.display()))?;
        let held = resident(process)?;
        let moved = Some(Moved { from: theirs, held });
        let bound = Bound { max, group, version: Version::One { process, moved } };
        bound.write("memory.limit_in_bytes", max.saturating_sub(held))?;
        bound.write("cgroup.procs", process.into())?;
        ensure!(group_of(process, ":memory:", &home)? == bound.group, "the process did not move");
        Ok(bound)
    }

    /// That nothing was ever killed for it, and how near it came, caches of files included.
    pub fn end(self) -> Result<String> {
        let (events, peak, held) = match &self.version {
            Version::One { moved, .. } => {
                let held = moved.as_ref().map_or(0, |moved| moved.held);
                ("memory.oom_control", "memory.max_usage_in_bytes", held)
            }
            Version::Two => ("memory.events", "memory.peak", 0),
        };
        let events = read(&self.group.join(events))?;
        let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        ensure!(killed == Some("0"), "killed for its memory:\n{events}");
        let peak = held + number(&self.group.join(peak))?;
        ensure!(peak > held && peak <= self.max, "a peak of {peak} under {}", self.max);
        Ok(format!("{} MB of MemoryMax={} MB", peak / MIB, self.max / MIB))
    }

    fn write(&self, name: &str, value: u64) -> Result<()> {
        let file = self.group.join(name);
        std::fs::write(&file, value.to_string())
            .with_context(|| format!("write {value} to {}", file.display()))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Version::One { process, moved: Some(moved) } = &self.version {
            // It may have ended.
            let _ = std::fs::write(moved.from.join("cgroup.procs"), process.to_string());
            let _ = std::fs::remove_dir(&self.group);
        }
    }
}

/// The group a process is in, by the line of its list that has this mark.
fn group_of(process: u32, mark: &str, home: &Path) -> Result<PathBuf> {
    let text = read(Path::new(&format!("/proc/{process}/cgroup")))?;
    let path = text.lines().find_map(|line| Some(line.split_once(mark)?.1));
    let path = path.with_context(|| format!("no control group for memory:\n{text}"))?;
    Ok(home.join(path.trim_start_matches('/')))
}

/// In bytes.
fn resident(process: u32) -> Result<u64> {
    let status = read(Path::new(&format!("/proc/{process}/status")))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("no VmRSS in\n{status}"))? * 1024)
}

fn number(file: &Path) -> Result<u64> {
    let text = read(file)?;
    text.trim().parse().with_context(|| format!("{}: {text}", file.display()))
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))
}
