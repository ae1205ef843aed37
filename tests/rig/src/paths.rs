//! Where things are kept.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the source tree.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("the crate lies two folders below the root").to_path_buf()
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => repository().join(folder),
        None => repository().join("target"),
    }
}

/// A server's folder: a given one that stays, or a fresh one that goes with the value.
#[derive(Debug)]
pub enum Folder {
    Given(PathBuf),
    Temporary(tempfile::TempDir),
}

impl Folder {
    /// The given folder, created when missing, or a temporary one.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn new(given: Option<PathBuf>, name: &str) -> Result<Self> {
        let folder = match given {
            Some(path) => {
                std::fs::create_dir_all(&path)
                    .with_context(|| format!("create {}", path.display()))?;
                Folder::Given(path)
            }
            None => Folder::Temporary(
                tempfile::Builder::new()
                    .prefix(&format!("telemetry-{name}-"))
                    .tempdir()
                    .context("create a temporary folder")?,
            ),
        };
        // A server that gives up root must still get in.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))
            .with_context(|| format!("open {} to its server", folder.path().display()))?;
        Ok(folder)
    }

    pub fn path(&self) -> &Path {
        match self {
            Folder::Given(path) => path,
            Folder::Temporary(folder) => folder.path(),
        }
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}
