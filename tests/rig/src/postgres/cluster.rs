//! A cluster's files: made once by `initdb`, copied from then on, and owned by whoever runs the server.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::{PASSWORD, SUPERUSER};
use crate::certificates::Certificates;
use crate::command::succeeded;
use crate::paths::{Folder, target};

/// Who runs the server when we are root, which PostgreSQL refuses to be.
const SYSTEM_USERS: [&str; 2] = ["postgres", "nobody"];

/// A fresh cluster in `data`: a copy of the one in Cargo's target folder, which `initdb` makes the first time (a copy
/// costs a tenth of it). Concurrent callers, in this process and in others, wait.
pub(super) fn make(folder: &Folder, data: &Path) -> Result<()> {
    let home = target().join("postgres");
    std::fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let home = Folder::new(Some(home), "postgres")?;
    let lock = File::create(home.join("lock")).context("open the lock of the cluster")?;
    lock.lock().context("lock the cluster")?;

    let template = home.join(&template_name()?);
    if !template.exists() {
        let unfinished = home.join("unfinished");
        if unfinished.exists() {
            std::fs::remove_dir_all(&unfinished).context("remove a half-made cluster")?;
        }
        initialise(&home, &unfinished)?;
        std::fs::rename(&unfinished, &template).context("name the finished cluster")?;
    }
    if let Some((user, group)) = server_user()? {
        give(folder.path(), user, group)?;
    }
    let mut copy = Command::new("cp");
    copy.args(["--archive", "--reflink=auto"]).arg(&template).arg(data);
    succeeded(&mut copy).map(drop)
}

/// The server's certificate and key where PostgreSQL looks for them, its own and nobody else's to read.
pub(super) fn secure(data: &Path, certificates: &Certificates) -> Result<()> {
    let texts = [&certificates.server_certificate, &certificates.server_key];
    for (name, text) in ["server.crt", "server.key"].into_iter().zip(texts) {
        let file = data.join(name);
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600))
            .with_context(|| format!("protect {}", file.display()))?;
        if let Some((user, group)) = server_user()? {
            give(&file, user, group)?;
        }
    }
    Ok(())
}

/// One per version, user and password.
fn template_name() -> Result<String> {
    let version = Command::new(program("initdb")?).arg("--version").output();
    let version = version.context("ask initdb for its version")?.stdout;
    let user = server_user()?.map_or_else(|| rustix::process::geteuid().as_raw(), |(user, _)| user);
    let number = String::from_utf8_lossy(&version);
    let number = number.split_whitespace().nth(2).unwrap_or("unknown").to_owned();
    let password = Sha256::digest(PASSWORD);
    Ok(format!("template-{number}-{user}-{:02x}{:02x}", password[0], password[1]))
}

fn give(path: &Path, user: u32, group: u32) -> Result<()> {
    chown(path, Some(user), Some(group))
        .with_context(|| format!("give {} to the server's user", path.display()))
}

fn initialise(home: &Folder, data: &Path) -> Result<()> {
    let password = home.join("superuser-password");
    std::fs::write(&password, format!("{PASSWORD}\n")).context("write the password file")?;
    if let Some((user, group)) = server_user()? {
        give(home.path(), user, group)?;
        give(&password, user, group)?;
    }
    let mut command = Command::new("setpriv");
    command
        .args(privileges(home.path())?)
        .arg("--")
        .arg(program("initdb")?)
        .arg("-D")
        .arg(data)
        .args(["-U", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"])
        // A half-made cluster is made again, so nothing need be durable yet.
        .args(["--no-sync", "--no-instructions"])
        .arg(format!("--pwfile={}", password.display()))
        .current_dir(home.path());
    succeeded(&mut command).map(drop)
}

/// Debian keeps the server out of the search path, one folder per version; the newest wins.
pub(super) fn program(name: &str) -> Result<PathBuf> {
    let mut folders: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    folders.sort();
    let asked = Command::new("pg_config").arg("--bindir").output().ok();
    let asked = asked.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let newest = folders.into_iter().rev().map(|(_, folder)| folder);
    newest
        .chain(asked.map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("{name} not found in /usr/lib/postgresql/*/bin nor by pg_config --bindir")
        })
}

/// User and group the server runs as: `None` = as we do.
fn server_user() -> Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let users = std::fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
    let find = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut numbers = line.split(':').skip(2);
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    let found = SYSTEM_USERS.iter().find_map(|name| find(name));
    Ok(Some(found.context("run as root, but there is no user for the server to be")?))
}

/// Options of `setpriv` that give up root, but keep the way into the folder when only root may walk it.
pub(super) fn privileges(folder: &Path) -> Result<Vec<String>> {
    let Some((user, group)) = server_user()? else { return Ok(Vec::new()) };
    let mut options =
        vec![format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()];
    let folder = folder.canonicalize().context("find the server's folder")?;
    let closed = folder.ancestors().skip(1).any(|above| {
        above
            .metadata()
            .is_ok_and(|about| about.uid() != user && about.permissions().mode() & 0o001 == 0)
    });
    if closed {
        options
            .extend(["--inh-caps=+dac_override", "--ambient-caps=+dac_override"].map(Into::into));
    }
    Ok(options)
}
