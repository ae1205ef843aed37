//! The files of a migrations folder, as they lie there.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::error::MigrateError;

/// A migration is SQL for people to read; more than this is data.
const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// One `.sql` file, not yet judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Without the folder.
    pub name: String,
    pub bytes: Vec<u8>,
}

impl SourceFile {
    /// SHA-256 of the bytes, as hexadecimal digits.
    pub fn checksum(&self) -> String {
        hex::encode(Sha256::digest(&self.bytes))
    }
}

/// Every `.sql` file of the folder, by name. Other files may lie there.
pub fn read_folder(folder: &Path) -> Result<Vec<SourceFile>, MigrateError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| MigrateError::Unreadable { path, source }
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed(folder))? {
        let entry = entry.map_err(failed(folder))?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') || !name.ends_with(".sql") {
            continue;
        }
        let size = std::fs::metadata(&path).map_err(failed(&path))?.len();
        if size > FILE_BYTES_MAX {
            return Err(MigrateError::TooLarge { path, limit: FILE_BYTES_MAX });
        }
        let bytes = std::fs::read(&path).map_err(failed(&path))?;
        files.push(SourceFile { name, bytes });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

/// The number a further file of the folder would take: `0001` for an empty or missing one.
pub fn next_number(folder: Option<&Path>) -> i32 {
    let files = folder.and_then(|folder| read_folder(folder).ok()).unwrap_or_default();
    files.iter().filter_map(|file| number(&file.name)).max().unwrap_or(0) + 1
}

/// The number of `0001_what_it_makes.sql`; `None` when the name has another form.
pub(super) fn number(file_name: &str) -> Option<i32> {
    let (digits, words) = file_name.strip_suffix(".sql")?.split_once('_')?;
    let plain = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_');
    let fits = digits.len() == 4
        && digits.bytes().all(|b| b.is_ascii_digit())
        && !words.is_empty()
        && words.bytes().all(plain);
    if fits { digits.parse().ok().filter(|number| *number > 0) } else { None }
}

/// What a file's header says of it: the `-- key: value` lines before the first line of SQL.
pub(super) fn header<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .take_while(|line| line.trim().is_empty() || line.trim_start().starts_with("--"))
        .filter_map(|line| line.trim_start().trim_start_matches('-').trim_start().split_once(':'))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_needs_the_whole_form() {
        assert_eq!(number("0012_add_column.sql"), Some(12));
        for bad in [
            "1_a.sql",
            "0000_a.sql",
            "0001.sql",
            "0001_.sql",
            "0001_A.sql",
            "0001_a.down.sql",
            "0001-a.sql",
        ] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_header_ends_where_the_sql_begins() {
        let text = "\n-- database: telemetry\n-- transaction: none\nSELECT 1;\n-- late: x\n";
        assert_eq!(header(text, "database"), Some("telemetry"));
        assert_eq!(header(text, "transaction"), Some("none"));
        assert_eq!(header(text, "late"), None);
    }

    #[test]
    fn a_folder_is_read_in_order_and_other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["0002_b.sql", "0001_a.sql", "README.md", ".hidden.sql"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let names: Vec<_> =
            read_folder(folder.path()).unwrap().into_iter().map(|f| f.name).collect();
        assert_eq!(names, ["0001_a.sql", "0002_b.sql"]);
        assert_eq!(next_number(Some(folder.path())), 3);
        assert_eq!(next_number(None), 1);
        let missing = read_folder(&folder.path().join("gone")).unwrap_err();
        assert!(missing.to_string().contains("gone"), "{missing}");
    }
}
