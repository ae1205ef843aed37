//! What is to be done, decided from the files and the ledger alone.

use std::collections::BTreeMap;

use super::source::{SourceFile, header, number};

/// A row of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub version: i32,
    /// The file's name when it was applied.
    pub name: String,
    pub checksum: String,
}

/// A file that may be applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    pub version: i32,
    pub name: String,
    pub checksum: String,
    /// False with the header `-- transaction: none`: one statement that cannot run inside a transaction.
    pub in_transaction: bool,
    pub sql: String,
}

/// The ledger agrees with the files; `pending` is what comes next, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    pub pending: Vec<Migration>,
}

/// A reason to apply nothing. Its text names the file and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{file}: not a migration's name; rename it to NNNN_words.sql, e.g. 0001_energy.sql")]
    BadName { file: String },
    #[error("{file}: not UTF-8; save it as UTF-8")]
    NotUtf8 { file: String },
    #[error("{file}: names no database; begin it with the line `-- database: {database}`")]
    NoDatabase { file: String, database: String },
    #[error(
        "{file}: is for database {named}, this is {database}; move it to the folder of {named} or correct its header"
    )]
    OtherDatabase { file: String, named: String, database: String },
    #[error("{file}: `-- transaction: {value}` means nothing; write `none` or leave the line out")]
    BadTransaction { file: String, value: String },
    #[error("number {version:04} is used by {}; renumber all but the one that was applied", files.join(" and "))]
    NumberTwice { version: i32, files: Vec<String> },
    #[error(
        "{file}: number {missing:04} before it is missing; numbers run from 0001 without a gap: renumber, or bring the file back"
    )]
    Gap { missing: i32, file: String },
    #[error(
        "{file}: was changed after it was applied; restore it and put the change into a new file"
    )]
    Edited { file: String },
    #[error(
        "{file}: number {version:04} was applied as {applied}; give this file a new number and bring {applied} back, or give each database a schema of its own"
    )]
    Replaced { file: String, version: i32, applied: String },
    #[error("{name}: was applied and is not in the folder; bring it back")]
    Missing { name: String },
    #[error(
        "{file}: comes before {newest:04}, which is applied already; give it the next free number"
    )]
    OutOfOrder { file: String, newest: i32 },
}

/// Compares the files with the ledger of `database`. All refusals at once: nothing is applied while there is one.
pub fn plan(
    database: &str,
    files: &[SourceFile],
    applied: &[Applied],
) -> Result<Plan, Vec<Refusal>> {
    let mut refusals = Vec::new();
    let mut migrations: BTreeMap<i32, Vec<Migration>> = BTreeMap::new();
    for file in files {
        match read(database, file) {
            Ok(migration) => migrations.entry(migration.version).or_default().push(migration),
            Err(refusal) => refusals.push(refusal),
        }
    }
    refuse_repeated_numbers(&migrations, &mut refusals);
    // A file refused above still holds its number: one mistake, one refusal.
    let taken: Vec<i32> = files.iter().filter_map(|file| number(&file.name)).collect();
    refuse_gaps(&migrations, applied, &taken, &mut refusals);
    refuse_disagreement(&migrations, applied, &taken, &mut refusals);
    if refusals.is_empty() {
        let is_applied = |version: &i32| applied.iter().any(|row| row.version == *version);
        let pending = migrations.into_iter().filter(|(version, _)| !is_applied(version));
        Ok(Plan { pending: pending.flat_map(|(_, migrations)| migrations).collect() })
    } else {
        Err(refusals)
    }
}

fn read(database: &str, file: &SourceFile) -> Result<Migration, Refusal> {
    let name = || file.name.clone();
    let version = number(&file.name).ok_or_else(|| Refusal::BadName { file: name() })?;
    let sql = std::str::from_utf8(&file.bytes).map_err(|_| Refusal::NotUtf8 { file: name() })?;
    match header(sql, "database") {
        None => return Err(Refusal::NoDatabase { file: name(), database: database.to_owned() }),
        Some(named) if named != database => {
            let named = named.to_owned();
            return Err(Refusal::OtherDatabase {
                file: name(),
                named,
                database: database.to_owned(),
            });
        }
        Some(_) => {}
    }
    let in_transaction = match header(sql, "transaction") {
        None => true,
        Some("none") => false,
        Some(other) => {
            return Err(Refusal::BadTransaction { file: name(), value: other.to_owned() });
        }
    };
    let checksum = file.checksum();
    Ok(Migration { version, name: name(), checksum, in_transaction, sql: sql.to_owned() })
}

fn refuse_repeated_numbers(
    migrations: &BTreeMap<i32, Vec<Migration>>,
    refusals: &mut Vec<Refusal>,
) {
    for (version, same) in migrations.iter().filter(|(_, same)| same.len() > 1) {
        let files = same.iter().map(|migration| migration.name.clone()).collect();
        refusals.push(Refusal::NumberTwice { version: *version, files });
    }
}

fn refuse_gaps(
    migrations: &BTreeMap<i32, Vec<Migration>>,
    applied: &[Applied],
    taken: &[i32],
    refusals: &mut Vec<Refusal>,
) {
    let mut expected = 1;
    for (version, same) in migrations {
        // An applied file that is gone is refused as missing, not as a gap.
        while expected < *version
            && (taken.contains(&expected) || applied.iter().any(|row| row.version == expected))
        {
            expected += 1;
        }
        if expected < *version {
            refusals.push(Refusal::Gap { missing: expected, file: same[0].name.clone() });
        }
        expected = version + 1;
    }
}

fn refuse_disagreement(
    migrations: &BTreeMap<i32, Vec<Migration>>,
    applied: &[Applied],
    taken: &[i32],
    refusals: &mut Vec<Refusal>,
) {
    for row in applied {
        match migrations.get(&row.version).map(Vec::as_slice) {
            None if taken.contains(&row.version) => {}
            None => refusals.push(Refusal::Missing { name: row.name.clone() }),
            Some(same) if same.iter().any(|migration| migration.checksum == row.checksum) => {}
            Some([only]) if only.name == row.name => {
                refusals.push(Refusal::Edited { file: only.name.clone() });
            }
            Some([only]) => refusals.push(Refusal::Replaced {
                file: only.name.clone(),
                version: row.version,
                applied: row.name.clone(),
            }),
            // Two files of one number are refused already.
            Some(_) => {}
        }
    }
    let Some(newest) = applied.iter().map(|row| row.version).max() else { return };
    let late = migrations
        .iter()
        .filter(|(version, _)| **version < newest)
        .filter(|(version, _)| !applied.iter().any(|row| row.version == **version));
    for migration in late.flat_map(|(_, same)| same) {
        refusals.push(Refusal::OutOfOrder { file: migration.name.clone(), newest });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &str) -> SourceFile {
        SourceFile { name: name.to_owned(), bytes: text.as_bytes().to_vec() }
    }

    fn good(name: &str) -> SourceFile {
        file(name, "-- database: telemetry\nSELECT 1;")
    }

    fn row(version: i32, source: &SourceFile) -> Applied {
        Applied { version, name: source.name.clone(), checksum: source.checksum() }
    }

    fn texts(files: &[SourceFile], applied: &[Applied]) -> Vec<String> {
        let refusals = plan("telemetry", files, applied).expect_err("refused");
        refusals.iter().map(Refusal::to_string).collect()
    }

    fn pending(files: &[SourceFile], applied: &[Applied]) -> Vec<i32> {
        let plan = plan("telemetry", files, applied).expect("no refusal");
        plan.pending.iter().map(|migration| migration.version).collect()
    }

    #[test]
    fn what_is_not_in_the_ledger_comes_next_in_order() {
        let files = [good("0002_b.sql"), good("0001_a.sql"), good("0003_c.sql")];
        assert_eq!(pending(&files, &[]), [1, 2, 3]);
        assert_eq!(pending(&files, &[row(1, &files[1])]), [2, 3]);
        let all = [row(1, &files[1]), row(2, &files[0]), row(3, &files[2])];
        assert_eq!(pending(&files, &all), [0; 0]);
        assert_eq!(pending(&[], &[]), [0; 0]);
    }

    #[test]
    fn an_exception_from_the_transaction_is_marked() {
        let text =
            "-- database: telemetry\n-- transaction: none\nCREATE INDEX CONCURRENTLY a ON b (c);";
        let plan = plan("telemetry", &[file("0001_a.sql", text)], &[]).unwrap();
        assert!(!plan.pending[0].in_transaction);
    }

    #[test]
    fn a_renamed_file_with_the_same_bytes_is_the_same_migration() {
        let applied = [row(1, &good("0001_a.sql"))];
        assert_eq!(pending(&[good("0001_better_name.sql")], &applied), [0; 0]);
    }

    #[test]
    fn every_refusal_is_told_at_once_each_with_its_remedy() {
        let files = [
            good("1_short.sql"),
            file("0001_other.sql", "-- database: homelab_settings\nSELECT 1;"),
            file("0002_none.sql", "SELECT 1;"),
            good("0003_c.sql"),
            good("0003_d.sql"),
            file("0004_maybe.sql", "-- database: telemetry\n-- transaction: maybe\n"),
            SourceFile { name: "0005_latin.sql".to_owned(), bytes: vec![0xe4] },
            good("0007_gap.sql"),
        ];
        assert_eq!(
            texts(&files, &[]),
            [
                "1_short.sql: not a migration's name; rename it to NNNN_words.sql, e.g. 0001_energy.sql",
                "0001_other.sql: is for database homelab_settings, this is telemetry; move it to the folder of \
                 homelab_settings or correct its header",
                "0002_none.sql: names no database; begin it with the line `-- database: telemetry`",
                "0004_maybe.sql: `-- transaction: maybe` means nothing; write `none` or leave the line out",
                "0005_latin.sql: not UTF-8; save it as UTF-8",
                "number 0003 is used by 0003_c.sql and 0003_d.sql; renumber all but the one that was applied",
                "0007_gap.sql: number 0006 before it is missing; numbers run from 0001 without a gap: renumber, or \
                 bring the file back",
            ]
        );
    }

    #[test]
    fn files_that_disagree_with_the_ledger_are_refused() {
        let applied = [
            row(1, &good("0001_a.sql")),
            row(2, &good("0002_b.sql")),
            row(3, &good("0003_c.sql")),
            row(5, &good("0005_e.sql")),
        ];
        let changed = "-- database: telemetry\nSELECT 2;";
        let files = [
            file("0001_a.sql", changed),
            file("0002_other.sql", changed),
            good("0004_late.sql"),
            good("0005_e.sql"),
        ];
        assert_eq!(
            texts(&files, &applied),
            [
                "0001_a.sql: was changed after it was applied; restore it and put the change into a new file",
                "0002_other.sql: number 0002 was applied as 0002_b.sql; give this file a new number and bring \
                 0002_b.sql back, or give each database a schema of its own",
                "0003_c.sql: was applied and is not in the folder; bring it back",
                "0004_late.sql: comes before 0005, which is applied already; give it the next free number",
            ]
        );
    }

    #[test]
    fn the_shipped_folders_make_a_plan() {
        for database in ["telemetry", "homelab_settings"] {
            let folder =
                std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(database);
            let files = crate::migrate::read_folder(&folder).unwrap();
            let plan = plan(database, &files, &[]).unwrap();
            assert_eq!(plan.pending.len(), files.len());
            assert!(!files.is_empty());
        }
    }
}
