//! What can go wrong at PostgreSQL, and what it means for the rows waiting there.

use std::error::Error as _;
use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::domain::ErrorClass;

/// An error of one call to a database. Its text holds the server's message and hint, never a value of ours that is
/// secret.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error("{doing}: {}", describe(source))]
    Postgres { doing: &'static str, source: tokio_postgres::Error },
    /// There is no session: the server refused it, or was not reached.
    #[error("connect to {target}: {}{}", describe(source), remedy(source))]
    Refused { target: String, source: tokio_postgres::Error },
    #[error(
        "connect to {target}: no answer within {} s; check that the host is up and reached, and that its name is resolved here",
        limit.as_secs_f32()
    )]
    ConnectTimedOut { target: String, limit: Duration },
    #[error("{doing}: no answer within {} s", limit.as_secs_f32())]
    TimedOut { doing: &'static str, limit: Duration },
    #[error("no connection free within {} s: raise connections_max or look for a writer that hangs", limit.as_secs_f32())]
    PoolTimedOut { limit: Duration },
    /// Fewer than `connections_max` are to be had, and others of this node use them.
    #[error("no connection free within {} s, and the server gives no further one: {cause}", limit.as_secs_f32())]
    NoFurther { limit: Duration, cause: std::sync::Arc<DatabaseError> },
    /// The breaker is open: nothing was tried.
    #[error("the database failed too often and is left alone: next trial in {:.0} s", retry_in.as_secs_f32().ceil())]
    Resting { retry_in: Duration },
    /// No connection could be made; the last attempt says why.
    #[error("{cause}")]
    Unreachable { cause: std::sync::Arc<DatabaseError> },
    #[error(transparent)]
    Tls(#[from] crate::tls::TlsError),
    #[error("{problem}; {remedy}")]
    Standing { problem: String, remedy: String },
    /// The cursor row was not where this writer left it.
    #[error(
        "another node writes {stream} → {sink} of log {log}: stop one of the two; this one has stopped writing"
    )]
    Fenced { stream: String, sink: String, log: String },
    /// The compare-and-set on the cursor row touched nothing: who moved it is found out by reading it.
    #[error("the cursor row is not where this writer left it")]
    CursorMoved,
    /// Every statement succeeded, and nothing of it is there.
    #[error("the server rolled back what it was told to commit; it is sent again")]
    RolledBack,
    /// Made of rows of a batch; the next smaller one tells whose fault it is.
    #[error("{doing}: this program panicked, which is a mistake in it")]
    Panicked { doing: &'static str },
    /// A refusal that may be the plan's fault: the table is another than the one that was planned for.
    #[error("the table may have changed; it is looked at again")]
    PlanInDoubt,
}

impl DatabaseError {
    pub fn class(&self) -> ErrorClass {
        match self {
            DatabaseError::Postgres { source, .. } => class_of(source),
            DatabaseError::Refused { source, .. } => class_of_refusal(source),
            DatabaseError::Unreachable { cause } => cause.class(),
            DatabaseError::ConnectTimedOut { .. }
            | DatabaseError::TimedOut { .. }
            | DatabaseError::PoolTimedOut { .. }
            | DatabaseError::NoFurther { .. }
            | DatabaseError::Resting { .. }
            | DatabaseError::CursorMoved
            | DatabaseError::RolledBack
            | DatabaseError::PlanInDoubt => ErrorClass::Transient,
            DatabaseError::Tls(_)
            | DatabaseError::Standing { .. }
            | DatabaseError::Fenced { .. } => ErrorClass::Standing,
            DatabaseError::Panicked { .. } => ErrorClass::Data,
        }
    }

    /// The five-character code, where the server gave one.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            DatabaseError::Postgres { source, .. } | DatabaseError::Refused { source, .. } => {
                source.code().map(SqlState::code)
            }
            DatabaseError::Unreachable { cause } => cause.sqlstate(),
            _ => None,
        }
    }

    /// The column the server blames, where it says so.
    pub fn column(&self) -> Option<&str> {
        match self {
            DatabaseError::Postgres { source, .. } => source.as_db_error()?.column(),
            _ => None,
        }
    }

    /// The row of a COPY into `table` at which the server stopped, counted from 1, where it says so.
    pub fn line_of_copy(&self, table: &str) -> Option<usize> {
        match self {
            DatabaseError::Postgres { source, .. } => {
                line_of_copy(table, source.as_db_error()?.where_()?)
            }
            _ => None,
        }
    }

    /// The database could not be talked to, as opposed to: it answered with a refusal of this one statement, or with values
    /// of another type. A statement that the server itself ended for its time (57014) says nothing of the others: a table
    /// may be locked.
    pub fn is_connection_trouble(&self) -> bool {
        match self {
            DatabaseError::Unreachable { .. }
            | DatabaseError::Refused { .. }
            | DatabaseError::ConnectTimedOut { .. }
            | DatabaseError::TimedOut { .. }
            | DatabaseError::Tls(_) => true,
            DatabaseError::Postgres { source, .. } => match source.code() {
                Some(code) => {
                    *code != SqlState::QUERY_CANCELED
                        && matches!(code.code().get(..2), Some("08" | "57" | "28"))
                }
                None => !is_about_values(source),
            },
            _ => false,
        }
    }

    /// A transaction was cut off, here or by the server: a smaller one may be quick enough.
    pub fn ran_out_of_time(&self) -> bool {
        match self {
            DatabaseError::TimedOut { doing, .. } => *doing == super::transaction::WRITE,
            DatabaseError::Postgres { source, .. } => {
                source.code() == Some(&SqlState::QUERY_CANCELED)
            }
            _ => false,
        }
    }

    /// The transaction may have been committed all the same: only the cursor row knows.
    pub fn leaves_outcome_unknown(&self) -> bool {
        let never_sent = matches!(
            self,
            DatabaseError::CursorMoved
                | DatabaseError::RolledBack
                | DatabaseError::Resting { .. }
                | DatabaseError::Unreachable { .. }
                | DatabaseError::Refused { .. }
                | DatabaseError::ConnectTimedOut { .. }
        );
        !never_sent && self.class() == ErrorClass::Transient
    }

    /// The server refused a statement, and would not have if the table were what it was.
    pub fn may_be_due_to_the_plan(&self) -> bool {
        matches!(self, DatabaseError::Postgres { .. })
            && self.class() == ErrorClass::Standing
            && !self.is_connection_trouble()
    }

    /// The server has looked at nothing but the row it refuses: it would refuse it whatever the others are.
    pub fn is_about_one_row(&self) -> bool {
        let code = self.sqlstate().unwrap_or_default();
        let says = code.starts_with("22") || ["23502", "23514", "54000"].contains(&code);
        says && !self.is_missing_partition()
    }

    /// A row lies in no partition: ours to mend by making it, not bad data. A trigger may raise the same code, and names
    /// neither constraint nor table.
    pub fn is_missing_partition(&self) -> bool {
        match self {
            DatabaseError::Postgres { source, .. } => source.as_db_error().is_some_and(|db| {
                *db.code() == SqlState::CHECK_VIOLATION
                    && db.constraint().is_none()
                    && db.table().is_some()
            }),
            _ => false,
        }
    }
}

/// For `map_err`: what was being done when it failed.
pub fn postgres(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> DatabaseError {
    move |source| DatabaseError::Postgres { doing, source }
}

/// For `map_err` of a connection attempt: says where to.
pub fn refused(
    target: impl FnOnce() -> String,
) -> impl FnOnce(tokio_postgres::Error) -> DatabaseError {
    move |source| DatabaseError::Refused { target: target(), source }
}

/// What a person does about a refused session; nothing where the server's own words are enough.
fn remedy(error: &tokio_postgres::Error) -> &'static str {
    match error.code().map_or("", SqlState::code) {
        "28P01" => "; set the right password for this user, here (`password_…`) or on the server",
        "28000" => "; let this user in: CREATE ROLE, ALTER ROLE … LOGIN, or a line in pg_hba.conf",
        "3D000" => "; create the database, or correct `dbname`",
        "42501" => "; GRANT CONNECT ON DATABASE to this user",
        "53300" => {
            "; other clients hold all of its connections: end some, or raise its max_connections"
        }
        "" => remedy_without_code(error),
        _ => "",
    }
}

/// The library's words are all there is: its kinds of errors are private.
fn remedy_without_code(error: &tokio_postgres::Error) -> &'static str {
    let text = describe(error);
    if text.contains("does not support TLS") {
        "; set `ssl = on` at the server: without TLS rows and password travel in clear text"
    } else if text.contains("password missing") {
        "; it asks for one: set `password_file`, `password_credential` or `password_env`"
    } else if text.contains("certificate not valid for name") {
        "; set `server_name` in the database's tls table to a name it carries"
    } else if text.contains("certificate expired") || text.contains("certificate not valid yet") {
        "; renew it at the server, or set the clock of this host"
    } else if text.contains("peer certificate") {
        "; set `ca_file` in the database's tls table to the authority that signed it"
    } else if text.contains("authentication") {
        "; let it ask this user for a password by scram-sha-256 (pg_hba.conf)"
    } else if text.contains("unexpected message") {
        "; look whether it is PostgreSQL that listens there"
    } else {
        ""
    }
}

fn class_of(error: &tokio_postgres::Error) -> ErrorClass {
    match error.code() {
        Some(code) => class_of_code(code.code()),
        None if wraps_tls(error) => ErrorClass::Standing,
        None => ErrorClass::Transient,
    }
}

fn class_of_refusal(error: &tokio_postgres::Error) -> ErrorClass {
    error.code().map_or_else(|| class_of(error), |code| class_of_refusal_code(code.code()))
}

/// Whatever a trigger at the log-in says: no row was sent.
fn class_of_refusal_code(code: &str) -> ErrorClass {
    match class_of_code(code) {
        ErrorClass::Data => ErrorClass::Standing,
        class => class,
    }
}

fn class_of_code(code: &str) -> ErrorClass {
    match (code, code.get(..2).unwrap_or_default()) {
        // Read-only after a failover: a new connection leads to the new primary.
        ("25006", _) | (_, "08" | "40" | "55" | "57") => ErrorClass::Transient,
        ("54000" | "P0001", _) | (_, "22" | "23") => ErrorClass::Data,
        _ => ErrorClass::Standing,
    }
}

/// From «COPY readings, line 2501, column power», which is in the server's language; a trigger's own lines may stand before.
fn line_of_copy(table: &str, context: &str) -> Option<usize> {
    let mut lines = context.lines();
    let copy = lines.find_map(|line| line.strip_prefix("COPY ")?.strip_prefix(table))?;
    let number = copy.trim_start_matches(|char: char| !char.is_ascii_digit());
    let digits = number.bytes().take_while(u8::is_ascii_digit).count();
    number[..digits].parse().ok()
}

/// What stands behind an error, outermost first.
fn causes(
    error: &tokio_postgres::Error,
) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |&cause| cause.source())
}

fn wraps_tls(error: &tokio_postgres::Error) -> bool {
    causes(error).any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>();
        let inner = io.and_then(std::io::Error::get_ref);
        cause.is::<tokio_rustls::rustls::Error>()
            || inner.is_some_and(|inner| inner.is::<tokio_rustls::rustls::Error>())
    })
}

/// A value came that does not fit, or would not have gone: a column has another type than when it was looked at.
fn is_about_values(error: &tokio_postgres::Error) -> bool {
    let text = error.to_string();
    ["error deserializing column", "error serializing parameter"]
        .iter()
        .any(|begin| text.starts_with(begin))
}

/// tokio-postgres prints only "db error": the message is in the source chain.
fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        let mut text = format!("{} (SQLSTATE {})", db.message(), db.code().code());
        for extra in [db.detail(), db.hint()].into_iter().flatten() {
            text.push_str("; ");
            text.push_str(extra);
        }
        return text;
    }
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_copy_is_read_in_any_language() {
        for (context, line) in [
            ("COPY t 5, line 2501, column \"power 7\"", Some(2501)),
            ("COPY t 5, Zeile 12", Some(12)),
            ("PL/pgSQL function f() line 3 at RAISE\nCOPY t 5, line 9: \"1\"", Some(9)),
            ("COPY t 5", None),
            ("COPY t 5, line 99999999999999999999999999", None),
            ("SQL statement \"COPY\"", None),
            ("", None),
        ] {
            assert_eq!(line_of_copy("t 5", context), line, "{context}");
        }
    }

    #[test]
    fn an_sqlstate_says_whether_to_wait_to_set_aside_or_to_ask_a_person() {
        let of = |class| move |code: &&str| class_of_code(code) == class;
        let transient = ["08006", "40001", "40P01", "55P03", "55000", "57P01", "57014", "25006"];
        let data = ["22001", "22003", "22P02", "23502", "23505", "23514", "54000", "P0001"];
        let standing = [
            "42P01", "42501", "3D000", "3F000", "28P01", "53100", "53300", "0P000", "25P02",
            "XX000", "",
        ];
        assert!(transient.iter().all(of(ErrorClass::Transient)));
        assert!(data.iter().all(of(ErrorClass::Data)));
        assert!(standing.iter().all(of(ErrorClass::Standing)));
    }

    #[test]
    fn a_refused_session_is_no_rows_fault() {
        for code in ["P0001", "22023", "23505", "28P01", "3D000"] {
            assert_eq!(class_of_refusal_code(code), ErrorClass::Standing, "{code}");
        }
        for code in ["55000", "57P03", "08006"] {
            assert_eq!(class_of_refusal_code(code), ErrorClass::Transient, "{code}");
        }
    }
}
