//! Debian's packages that the playbooks install, fetched once: the machine itself has no way out.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rig::{succeeded, target};
use sha2::{Digest, Sha256};

/// With `python3-apt`, which a bare host has not and ansible installs first.
const PACKAGES: &str = "mosquitto mosquitto-clients nftables postgresql-15 python3-apt";

/// A folder apt can install from.
pub fn folder() -> PathBuf {
    let mark = Sha256::digest(PACKAGES);
    target().join("service").join(format!("packages-{:02x}{:02x}{:02x}", mark[0], mark[1], mark[2]))
}

/// Fetches what is missing, with everything it depends on that the bare machine has not.
///
/// # Errors
/// When a package cannot be fetched.
pub fn fetch(base: &Path) -> Result<()> {
    let done = folder();
    if done.exists() {
        return Ok(());
    }
    let unfinished = target().join("service/unfinished-packages");
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished).context("remove half-fetched packages")?;
    }
    std::fs::create_dir_all(&unfinished).context("create the packages' folder")?;
    let script = format!(
        "apt-get --quiet update && apt-get --quiet install --yes --download-only --reinstall \
         --no-install-recommends {PACKAGES}"
    );
    let mut machine = Command::new("systemd-nspawn");
    machine
        .args(["--quiet", "--keep-unit", "--register=no", "--volatile=overlay", "--settings=no"])
        .args(["--resolv-conf=replace-host", "--console=pipe"])
        .arg(format!("--directory={}", base.display()))
        .arg(format!("--bind={}:/var/cache/apt/archives", unfinished.display()))
        .args(["--", "/bin/sh", "-c", &script]);
    succeeded(&mut machine)?;
    let mut index = Command::new("dpkg-scanpackages");
    index.args(["--multiversion", "."]).current_dir(&unfinished);
    let packages = succeeded(&mut index)?;
    std::fs::write(unfinished.join("Packages"), packages).context("write the index")?;
    std::fs::rename(&unfinished, &done).context("name the finished folder")
}
