//! Debian 12 with a really booted systemd, in `systemd-nspawn`: a fresh machine at every boot, in the network namespace
//! of the caller.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

use crate::command::succeeded;
use crate::daemon::Daemon;
use crate::paths::target;
use crate::wait::until;

const SUITE: &str = "bookworm";
const MIRROR: &str = "http://deb.debian.org/debian";
/// A bare server with what the node's package depends on, and what provisioning it over ssh takes.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,libpam-systemd,procps,iproute2,ca-certificates,libssl3,zlib1g,\
     python3,python3-apt,openssh-server";
const BOOT_WITHIN: Duration = Duration::from_secs(60);
const POWEROFF_WITHIN: Duration = Duration::from_secs(60);
/// Nothing asked of the machine takes longer; a stop of the node may wait for its drain.
const COMMAND_WITHIN: Duration = Duration::from_secs(150);
const CGROUPS: [&str; 3] = ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"];

/// A running machine. Dropping it switches the power off.
#[derive(Debug)]
pub struct Container {
    nspawn: Daemon,
    /// The machine's first process, seen from outside.
    leader: u32,
    cgroup: String,
}

impl Container {
    /// The file system every machine begins with, in Cargo's target folder; built by debootstrap the first time.
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn base() -> Result<PathBuf> {
        let home = target().join("service");
        std::fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
        let lock = File::create(home.join("lock")).context("open the lock of the file system")?;
        lock.lock().context("lock the file system")?;
        let mark = Sha256::digest(PACKAGES);
        let root = home.join(format!("{SUITE}-{:02x}{:02x}{:02x}", mark[0], mark[1], mark[2]));
        if !root.exists() {
            let unfinished = home.join("unfinished");
            if unfinished.exists() {
                std::fs::remove_dir_all(&unfinished).context("remove a half-made file system")?;
            }
            let mut command = Command::new("debootstrap");
            command
                .args(["--variant=minbase", &format!("--include={PACKAGES}"), SUITE])
                .arg(&unfinished)
                .arg(mirror());
            succeeded(&mut command)?;
            std::fs::rename(&unfinished, &root).context("name the finished file system")?;
        }
        Ok(root)
    }

    /// Boots a machine; `read_only` shows folders of ours inside it, as (ours, theirs).
    ///
    /// # Errors
    /// When it is not up in time; says what the machine said.
    pub fn boot(name: &str, log: &Path, read_only: &[(&Path, &str)]) -> Result<Self> {
        Self::boot_with(name, log, read_only, &[])
    }

    /// The same with further options of `systemd-nspawn`.
    ///
    /// # Errors
    /// When it is not up in time; says what the machine said.
    pub fn boot_with(
        name: &str,
        log: &Path,
        read_only: &[(&Path, &str)],
        options: &[&str],
    ) -> Result<Self> {
        let cgroup = format!("{name}-{}", std::process::id());
        let mut arguments: Vec<OsString> = ["--boot", "--console=pipe", "--volatile=overlay"]
            .into_iter()
            .chain(["--register=no", "--link-journal=no", "--settings=no", "--resolv-conf=off"])
            .map(Into::into)
            .collect();
        arguments.extend(options.iter().map(Into::into));
        arguments.push(format!("--machine={name}").into());
        arguments.push(format!("--directory={}", Self::base()?.display()).into());
        for (ours, theirs) in read_only {
            arguments.push(format!("--bind-ro={}:{theirs}", ours.display()).into());
        }
        // Without a systemd outside nobody gives the machine a control group of its own.
        let nspawn = if Path::new("/run/systemd/system").exists() {
            Daemon::new("systemd-nspawn", "systemd-nspawn", log)
        } else {
            let homes = cgroup_homes().map(|home| format!("{home}/{cgroup}"));
            let homes = homes.collect::<Vec<_>>().join(" ");
            let enter = format!(
                "for home in {homes}; do mkdir $home && echo $$ >$home/cgroup.procs; done 2>/dev/null; \
                 exec systemd-nspawn --keep-unit \"$@\""
            );
            Daemon::new("systemd-nspawn", "sh", log).arguments(["-c", &enter, "systemd-nspawn"])
        };
        let mut nspawn = nspawn.arguments(arguments).stop_signal(Signal::TERM);
        nspawn.start()?;
        let mut machine = Container { nspawn, leader: 0, cgroup };
        machine.wait_booted().context("containers cannot boot on this machine")?;
        Ok(machine)
    }

    fn wait_booted(&mut self) -> Result<()> {
        let nspawn = &mut self.nspawn;
        let outcome = until(BOOT_WITHIN, "the machine has booted", || {
            if let Some(status) = nspawn.exit_status()? {
                bail!("systemd-nspawn ended ({status})");
            }
            let Some(leader) = nspawn.pid().and_then(|pid| children(pid).next()) else {
                return Ok(None);
            };
            let state = enter(leader).args(["systemctl", "is-system-running"]).output();
            let state = state.context("ask the machine for its state")?.stdout;
            let up = ["running", "degraded"].contains(&String::from_utf8_lossy(&state).trim());
            Ok(up.then_some(leader))
        });
        match outcome {
            Ok(leader) => self.leader = leader,
            Err(error) => bail!("{error:#}\n{}", self.nspawn.story()),
        }
        Ok(())
    }

    /// The machine's first process: `nsenter -t` that to look from elsewhere.
    pub fn leader(&self) -> u32 {
        self.leader
    }

    /// A service's main process, seen from outside, by the number it has on the machine.
    ///
    /// # Errors
    /// When there is none.
    pub fn outside(&self, inside: u32) -> Result<u32> {
        let mut children = children(self.leader);
        let found = children.find(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            let last = numbers.and_then(|numbers| numbers.split_whitespace().next_back());
            last == Some(&inside.to_string())
        });
        found.with_context(|| format!("no service has the main process {inside}"))
    }

    /// Runs a command on the machine as root; how it ended is in the output.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn output(&self, words: &[&str]) -> Result<Output> {
        let mut command = enter(self.leader);
        command.args(words).output().with_context(|| format!("run {}", words.join(" ")))
    }

    /// Runs a command that must succeed and gives what it printed.
    ///
    /// # Errors
    /// With what it said when it fails.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let output = self.output(words)?;
        let printed = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{} ({}):\n{printed}\n{said}", words.join(" "), output.status);
        }
        Ok(printed)
    }

    /// Runs a shell script that must succeed and gives what it printed.
    ///
    /// # Errors
    /// With what it said when it fails.
    pub fn shell(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-euc", script])
    }

    /// Writes a file as root, readable by everyone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.write_with_mode(path, text, "0644")
    }

    /// # Errors
    /// When it cannot be written.
    pub fn write_with_mode(&self, path: &str, text: &str, mode: &str) -> Result<()> {
        use std::io::Write as _;
        let mut child = enter(self.leader)
            .args(["install", "-D", "-m", mode, "/dev/stdin", path])
            .stdin(Stdio::piped())
            .spawn()
            .with_context(|| format!("write {path}"))?;
        let mut input = child.stdin.take().context("the pipe to install")?;
        input.write_all(text.as_bytes()).with_context(|| format!("write {path}"))?;
        drop(input);
        let status = child.wait().with_context(|| format!("write {path}"))?;
        if !status.success() {
            bail!("write {path}: {status}");
        }
        Ok(())
    }

    /// What the machine printed while it booted.
    pub fn story(&self) -> String {
        self.nspawn.story()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.leader == 0 {
            return self.nspawn.kill();
        }
        let asked = self.output(&["systemctl", "poweroff"]);
        if asked.is_ok_and(|output| output.status.success()) {
            let _ = self.nspawn.wait(POWEROFF_WITHIN);
        }
        self.nspawn.kill();
        for home in cgroup_homes() {
            remove_groups(&Path::new(home).join(&self.cgroup));
        }
    }
}

/// Where control groups are made: both hierarchies of a machine that has the old and the new.
fn cgroup_homes() -> impl Iterator<Item = &'static str> {
    CGROUPS.into_iter().filter(|home| Path::new(home).join("cgroup.procs").exists())
}

/// Removes a control group with what is below it; one that is not empty stays and shows.
fn remove_groups(group: &Path) {
    let below = std::fs::read_dir(group).into_iter().flatten().flatten();
    for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_groups(&entry.path());
    }
    let _ = std::fs::remove_dir(group);
}

fn children(pid: u32) -> impl Iterator<Item = u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = text.unwrap_or_default();
    let numbers = children.split_whitespace().filter_map(|word| word.parse().ok());
    numbers.collect::<Vec<_>>().into_iter()
}

/// A command on the machine, which gets nothing of our environment.
fn enter(leader: u32) -> Command {
    let mut command = Command::new("timeout");
    command
        .arg(COMMAND_WITHIN.as_secs().to_string())
        .args([
            "nsenter",
            "-t",
            &leader.to_string(),
            "-m",
            "-u",
            "-i",
            "-n",
            "-p",
            "-C",
            "-r",
            "-w",
        ])
        .args([
            "--",
            "env",
            "-i",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "LC_ALL=C.UTF-8",
        ])
        .arg("DEBIAN_FRONTEND=noninteractive")
        .stdin(Stdio::null());
    command
}

/// Where this machine gets its own Debian packages from.
fn mirror() -> String {
    let asked = Command::new("apt-get")
        .args(["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"])
        .output();
    let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let line = |line: &str| Some(line.strip_prefix(SUITE)?.strip_prefix(' ')?.to_owned());
    text.ok().and_then(|text| text.lines().find_map(line)).unwrap_or_else(|| MIRROR.to_owned())
}
