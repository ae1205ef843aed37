//! A disk of the node's own: a file system in a file. A power cut shuts the file system down while the node writes, as
//! the kernel's own tests of its file systems do: from that instant nothing reaches the file, not even the journal, and
//! every call fails. What is there when it is mounted again is what had been made durable.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::wait::until;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;

/// Between the end of the last process that had files open and a file system that nobody uses.
const UNUSED_WITHIN: Duration = Duration::from_secs(10);
/// A file system keeps some of what it calls free for itself.
const FILL_STEP_BYTES: u64 = 1 << 20;
const FILL_STEPS_MAX: u64 = 64;

/// What the node's state is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        }
    }

    /// Room for the log, the state store and the ballast; mkfs.xfs makes nothing below 300 MB.
    fn image_bytes(self) -> u64 {
        match self {
            FileSystem::Ext4 => 192 << 20,
            FileSystem::Xfs => 320 << 20,
        }
    }

    fn make(self, image: &str) -> Result<()> {
        let force = match self {
            FileSystem::Ext4 => "-F",
            FileSystem::Xfs => "-f",
        };
        run(&format!("mkfs.{}", self.name()), &["-q", force, image]).map(drop)
    }
}

/// Mounted as long as the value lives.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
}

impl Disk {
    /// In this folder. Needs root and loop devices.
    ///
    /// # Errors
    /// When the system does not allow it.
    pub fn open(folder: &Path, filesystem: FileSystem) -> Result<Self> {
        let disk = Disk { folder: folder.to_owned() };
        std::fs::create_dir_all(disk.mount_point()).context("make the mount point")?;
        let image = std::fs::File::create(disk.image()).context("make the image")?;
        image.set_len(filesystem.image_bytes()).context("size the image")?;
        filesystem.make(&text(&disk.image()))?;
        disk.mount()?;
        Ok(disk)
    }

    /// What an earlier run left mounted.
    pub fn clear(folder: &Path) {
        // Mostly there is nothing.
        let _ = run("umount", &["-l", &text(&folder.join("mounted"))]);
    }

    pub fn mount_point(&self) -> PathBuf {
        self.folder.join("mounted")
    }

    fn image(&self) -> PathBuf {
        self.folder.join("image")
    }

    /// Without a page cache of its own the file holds what the file system has written, and nothing else.
    fn mount(&self) -> Result<()> {
        let image = text(&self.image());
        let device = run("losetup", &["--find", "--show", "--direct-io=on", &image])?;
        let mounted = run("mount", &[&device, &text(&self.mount_point())]);
        // In use it goes with the mount.
        run("losetup", &["--detach", &device])?;
        mounted.map(drop)
    }

    /// The power goes, whatever runs.
    ///
    /// # Errors
    /// When the kernel does not do it.
    pub fn lose_power(&self) -> Result<()> {
        run("xfs_io", &["-x", "-c", "shutdown", &text(&self.mount_point())]).map(drop)
    }

    /// The power is back, and every process that had files open is dead.
    ///
    /// # Errors
    /// When the file system cannot be mounted.
    pub fn restore_power(&self) -> Result<()> {
        until(UNUSED_WITHIN, "the file system given up", || {
            Ok(run("umount", &[&text(&self.mount_point())]).is_ok().then_some(()))
        })?;
        self.mount()?;
        // Its removal may not have reached the disk before the power went.
        drop(self.filling());
        Ok(())
    }

    fn filling(&self) -> Filling {
        Filling(self.mount_point().join("filling"))
    }

    /// Takes all space but so many bytes, until the answer is dropped.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    pub fn fill(&self, left: u64) -> Result<Filling> {
        let filling = self.filling();
        let free = run("stat", &["-f", "-c", "%a %S", &text(&self.mount_point())])?;
        let numbers: Vec<u64> =
            free.split(' ').map(str::parse).collect::<Result<_, _>>().context("free space")?;
        let bytes = numbers.iter().product::<u64>().saturating_sub(left).max(1);
        let mut attempt = Ok(String::new());
        for step in 0..FILL_STEPS_MAX {
            let bytes = bytes.saturating_sub(step * FILL_STEP_BYTES).max(1).to_string();
            attempt = run("fallocate", &["-l", &bytes, &text(&filling.0)]);
            if attempt.is_ok() {
                break;
            }
        }
        attempt?;
        Ok(filling)
    }

    /// Nothing is written to it, and no write returns, until the answer is dropped.
    ///
    /// # Errors
    /// When the file system cannot be frozen.
    pub fn freeze(&self) -> Result<Frozen> {
        let frozen = Frozen(self.mount_point());
        run("fsfreeze", &["--freeze", &text(&frozen.0)])?;
        Ok(frozen)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Disk::clear(&self.folder);
    }
}

/// A file system that stands still.
pub struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = run("fsfreeze", &["--unfreeze", &text(&self.0)]);
    }
}

/// A file that takes up space.
pub struct Filling(PathBuf);

impl Drop for Filling {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Its output, trimmed.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("{program} {}: {}", arguments.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
