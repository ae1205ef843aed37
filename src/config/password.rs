//! A password and where it comes from. Whoever logs in asks for it anew, so that a corrected file counts from the next
//! attempt on.

use std::io;
use std::path::{Path, PathBuf};

use crate::domain::Secret;

/// What a log-in needs; never shown.
#[derive(Debug, Clone)]
pub struct Password {
    at_start: Secret,
    /// None for what cannot change while the process lives: an environment variable.
    file: Option<PathBuf>,
}

impl Password {
    pub(super) fn in_file(file: PathBuf, at_start: Secret) -> Self {
        Password { at_start, file: Some(file) }
    }

    /// Where it may change while the process lives.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// As its file has it now; as it was at the start when the file cannot be read, or is empty (being replaced).
    pub fn current(&self) -> Secret {
        let text = self.file.as_deref().and_then(|file| read(file).ok());
        let text = text.filter(|text| !text.is_empty());
        text.map_or_else(|| self.at_start.clone(), Secret::new)
    }
}

impl From<Secret> for Password {
    fn from(at_start: Secret) -> Self {
        Password { at_start, file: None }
    }
}

/// The text of a secret file without the newline an editor leaves.
pub(super) fn read(file: &Path) -> io::Result<String> {
    let text = std::fs::read_to_string(file)?;
    let line = text.strip_suffix('\n').map(|line| line.trim_end_matches('\r'));
    Ok(line.map(str::to_owned).unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_corrected_file_counts_and_a_lost_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        let password = Password::in_file(file.clone(), Secret::new("old".to_owned()));
        assert_eq!(password.current().expose(), "old");
        for text in ["new\n", "new\r\n", "new"] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(password.current().expose(), "new");
        }
        std::fs::write(&file, "").unwrap();
        assert_eq!(password.current().expose(), "old");
        assert!(!format!("{password:?}").contains("old"));
    }
}
