//! Kafka's jars: fetched once by Maven, kept in Cargo's target folder, shared by everything that runs from there.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths::{repository, target};

/// The folder with the jars, filled on the first call. Concurrent callers, in this process and in others, wait.
pub(super) fn folder() -> Result<PathBuf> {
    let home = target().join("kafka");
    std::fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let lock = File::create(home.join("lock")).context("open the lock of the jars")?;
    lock.lock().context("lock the jars")?;

    let pom = repository().join("tests/rig/kafka/pom.xml");
    let wanted = std::fs::read(&pom).with_context(|| format!("read {}", pom.display()))?;
    let (libs, stamp) = (home.join("libs"), home.join("pom.xml"));
    if libs.is_dir() && std::fs::read(&stamp).is_ok_and(|present| present == wanted) {
        return Ok(libs);
    }
    if libs.exists() {
        std::fs::remove_dir_all(&libs).context("remove the old jars")?;
    }
    let mut command = Command::new("mvn");
    command
        .args(["--quiet", "--batch-mode", "--file"])
        .arg(&pom)
        .args(["dependency:copy-dependencies", "-DincludeScope=runtime"])
        .arg(format!("-DoutputDirectory={}", libs.display()))
        .stdin(Stdio::null());
    let output = command.output().context("run mvn (Debian: maven)")?;
    if !output.status.success() {
        let _ = std::fs::remove_dir_all(&libs);
        bail!(
            "{command:?} failed:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // Last: only complete jars carry the stamp.
    std::fs::write(&stamp, wanted).with_context(|| format!("write {}", stamp.display()))?;
    Ok(libs)
}
