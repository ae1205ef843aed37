//! A disk of the node's own: an ext4 file system in a file. What the node did not make durable is not in the file, so a
//! copy of it is what a power cut leaves.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Room for the log, the state store and the ballast.
const IMAGE_BYTES: u64 = 192 << 20;

/// Mounted as long as the value lives.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    cuts: u32,
}

impl Disk {
    /// In this folder. Needs root and loop devices.
    ///
    /// # Errors
    /// When the system does not allow it.
    pub fn open(folder: &Path) -> Result<Self> {
        let disk = Disk { folder: folder.to_owned(), cuts: 0 };
        std::fs::create_dir_all(disk.mount_point()).context("make the mount point")?;
        let image = std::fs::File::create(disk.image()).context("make the image")?;
        image.set_len(IMAGE_BYTES).context("size the image")?;
        run("mkfs.ext4", &["-q", "-F", &text(&disk.image())])?;
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
        self.folder.join(format!("image-{}", self.cuts))
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

    /// The power goes: the processes are dead already, and what is not in the file is lost.
    ///
    /// # Errors
    /// When the copy cannot be made or mounted.
    pub fn cut(&mut self) -> Result<()> {
        let before = self.image();
        self.cuts += 1;
        run("cp", &["--sparse=always", &text(&before), &text(&self.image())])?;
        run("umount", &["-l", &text(&self.mount_point())])?;
        std::fs::remove_file(before).context("remove the old image")?;
        self.mount()
    }

    /// Takes all space but so many bytes, until the answer is dropped.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    pub fn fill(&self, left: u64) -> Result<Filling> {
        let filling = Filling(self.mount_point().join("filling"));
        let free = run("stat", &["-f", "-c", "%a %S", &text(&self.mount_point())])?;
        let numbers: Vec<u64> =
            free.split(' ').map(str::parse).collect::<Result<_, _>>().context("free space")?;
        let bytes = numbers.iter().product::<u64>().saturating_sub(left);
        run("fallocate", &["-l", &bytes.max(1).to_string(), &text(&filling.0)])?;
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
