//! Why a database is not at its version.

use std::path::PathBuf;

use tokio_postgres::error::{DbError, Severity};

use crate::database::DatabaseError;
use crate::domain::ErrorClass;

use super::plan::Refusal;

/// What a file's own statements are run as.
pub(super) const APPLY: &str = "apply";

/// Nothing of a failed file stays, unless the text says so. Its text tells what to mend.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error("{}: {source}; correct `migrations_dir` or the file's permissions", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{}: larger than {limit} bytes; a migration holds SQL, not data", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("nothing was applied: {}", listed(refusals))]
    Refused { refusals: Vec<Refusal> },
    #[error("{file}{}: {source}; {}", at(*line), outlook(source))]
    File { file: String, line: Option<usize>, source: DatabaseError },
    #[error(
        "{file}{}: {source}; it ran without a transaction, so look what it left (e.g. an invalid index), undo that and correct the file; `telemetry migrate apply` tries it again as it is",
        at(*line)
    )]
    FileWithoutTransaction {
        file: String,
        /// Of the file that ran.
        checksum: String,
        line: Option<usize>,
        source: Box<DatabaseError>,
    },
    #[error(
        "{file}: ends its transaction itself; take BEGIN, COMMIT and ROLLBACK out of it, and look what it has left in the database"
    )]
    EndsItsTransaction { file: String, checksum: String },
    #[error(
        "{file}{}: {source}; by then it had ended its transaction itself: take BEGIN, COMMIT and ROLLBACK out of it, and look what it has left in the database",
        at(*line)
    )]
    FailedAfterItsCommit {
        file: String,
        checksum: String,
        line: Option<usize>,
        source: Box<DatabaseError>,
    },
    /// The same file as before; the text is that of its failure.
    #[error("{failure}")]
    NotRepeated { failure: String },
    #[error("another node or `telemetry migrate` has held the migration lock for {} s{holder}", waited.as_secs())]
    Locked { waited: std::time::Duration, holder: String },
    #[error("interrupted; {left} files are not applied: run it again")]
    Interrupted { left: usize },
}

impl MigrateError {
    /// `Transient`: the database is away or busy. Everything else waits for a person, and is tried again slowly,
    /// but for what is [left](Self::left_by).
    pub fn class(&self) -> ErrorClass {
        match self {
            MigrateError::Database(source) if source.class() == ErrorClass::Transient => {
                ErrorClass::Transient
            }
            MigrateError::File { source, .. } if passes(source) => ErrorClass::Transient,
            MigrateError::Locked { .. } | MigrateError::Interrupted { .. } => ErrorClass::Transient,
            MigrateError::Database(_)
            | MigrateError::File { .. }
            | MigrateError::FileWithoutTransaction { .. }
            | MigrateError::Unreadable { .. }
            | MigrateError::TooLarge { .. }
            | MigrateError::Refused { .. }
            | MigrateError::EndsItsTransaction { .. }
            | MigrateError::FailedAfterItsCommit { .. }
            | MigrateError::NotRepeated { .. } => ErrorClass::Standing,
        }
    }

    /// The breaker is open: nothing was tried, so nothing is news.
    pub fn is_resting(&self) -> bool {
        matches!(self, MigrateError::Database(DatabaseError::Resting { .. }))
    }

    /// The checksum of a file that may have left something: run again as it is, it would do some of its work twice, or take
    /// what it left for what it makes (`CREATE INDEX … IF NOT EXISTS` an invalid one).
    pub fn left_by(&self) -> Option<&str> {
        match self {
            MigrateError::FileWithoutTransaction { checksum, .. }
            | MigrateError::EndsItsTransaction { checksum, .. }
            | MigrateError::FailedAfterItsCommit { checksum, .. } => Some(checksum),
            _ => None,
        }
    }

    /// No session was to be had, or it was lost, as opposed to: a file was refused or took too long, or the lock is held
    /// elsewhere.
    pub fn is_connection_trouble(&self) -> bool {
        match self {
            MigrateError::Database(source) => ends_session(source),
            MigrateError::File { source, .. } => loses_session(source),
            MigrateError::FileWithoutTransaction { source, .. } => loses_session(source),
            _ => false,
        }
    }
}

/// The same file may succeed later, as it is: others were in its way, or the server was read-only after a failover. One
/// that takes longer than it is given does not: waiting for it in silence would be waiting for ever.
fn passes(source: &DatabaseError) -> bool {
    let not_the_files_doing = source
        .sqlstate()
        .is_some_and(|code| matches!(code, "55P03" | "25006") || code.starts_with("40"));
    not_the_files_doing || loses_session(source)
}

fn loses_session(source: &DatabaseError) -> bool {
    ends_session(source) && !was_given_up_on(source)
}

/// The server's limit is for each statement, this one for all of a file. A server that froze looks the same; the next
/// attempt tells, as it gets no session.
fn was_given_up_on(source: &DatabaseError) -> bool {
    matches!(source, DatabaseError::TimedOut { doing: APPLY, .. })
}

/// What becomes of a file that was in a transaction. A COMMIT that was not answered may have been carried out.
fn outlook(source: &DatabaseError) -> &'static str {
    if was_given_up_on(source) {
        "its session is closed, upon which the server rolls it back; correct the file or raise `query_timeout_seconds`"
    } else if ends_session(source) {
        "the session ended in it, another attempt may succeed"
    } else if passes(source) {
        "rolled back, another attempt may succeed"
    } else if source.sqlstate() == Some("57014") {
        "rolled back, correct the file or raise `query_timeout_seconds`"
    } else {
        "rolled back, correct the file"
    }
}

/// Nothing more can be asked in the session. What a function does may fail with any code, with those of a lost connection
/// too (`dblink`): whether the session goes on is only known from the severity, where the server answered at all.
pub(super) fn ends_session(error: &DatabaseError) -> bool {
    let severity = match error {
        DatabaseError::Postgres { source, .. } => {
            source.as_db_error().and_then(DbError::parsed_severity)
        }
        _ => None,
    };
    match severity {
        Some(severity) => matches!(severity, Severity::Fatal | Severity::Panic),
        None => error.is_connection_trouble(),
    }
}

fn listed(refusals: &[Refusal]) -> String {
    refusals.iter().map(Refusal::to_string).collect::<Vec<_>>().join("; ")
}

fn at(line: Option<usize>) -> String {
    line.map(|line| format!(", line {line}")).unwrap_or_default()
}
