//! The frame of every transaction of a writer: begin, work, cursor, commit.
//!
//! Statements that need no answer of an earlier one are sent together. An error anywhere aborts the transaction on the
//! server, and a COMMIT that follows it is answered without an error by a rollback: so success means that *every* part
//! succeeded, never that the commit did, and that what was written is seen behind it.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;

use super::catalog::Shape;
use super::cursor::{Cursor, Tally};
use super::error::{DatabaseError, postgres};
use super::pool::Pool;
use crate::config::DatabaseSettings;
use crate::crash::crash_point;
use crate::domain::{Books, ErrorClass, Sequence};

/// The server's own limit ends a statement first, with an answer; this is added for a server that no longer answers.
pub const ANSWER_MARGIN: Duration = Duration::from_secs(1);

/// What takes the time, in the words of its error.
pub const WRITE: &str = "write a batch";

/// Starts a transaction whose statements are bounded on the server too. `SET LOCAL` ends with the transaction, so the
/// node may stand behind a transaction pooler.
pub fn begin(settings: &DatabaseSettings) -> String {
    let millis = settings.statement_timeout.as_millis().max(1);
    format!("BEGIN; SET LOCAL statement_timeout = {millis}")
}

/// Where the cursor goes with this transaction.
#[derive(Debug, Clone, Copy)]
pub struct Move<'a> {
    pub cursor: &'a Cursor,
    pub from: Sequence,
    pub to: Sequence,
    pub tally: Tally,
    /// The cursor stays unless the table still has it.
    pub shape: Option<&'a Shape>,
}

impl Move<'_> {
    /// The cursor, the commit and a look at what it left, sent together.
    pub async fn commit(self, client: &Client) -> Result<Books, DatabaseError> {
        crash_point("crash_cursor");
        let (moved, committed, left) = tokio::join!(
            self.cursor.advance(client, self),
            client.batch_execute("COMMIT"),
            self.cursor.read(client),
        );
        let books = moved?;
        committed.map_err(postgres("commit"))?;
        // What is taken for committed may be dropped from the buffer, and the answer to COMMIT does not say which it was.
        if left?.is_none_or(|left| left.cursor < self.to) {
            return Err(DatabaseError::RolledBack);
        }
        crash_point("crash_committed");
        Ok(books)
    }
}

/// Runs one transaction on a connection of the pool, bounded in time. The connection goes back only after a success,
/// or after a refusal that the server answered in full.
pub async fn run<T>(
    pool: &Pool,
    settings: &DatabaseSettings,
    work: impl AsyncFnOnce(&Client) -> Result<T, DatabaseError>,
) -> Result<T, DatabaseError> {
    let mut lease = pool.get().await?;
    crash_point("crash_begin");
    let limit = settings.statement_timeout + ANSWER_MARGIN;
    let timed_out = DatabaseError::TimedOut { doing: WRITE, limit };
    let result = timeout(limit, work(&lease)).await.unwrap_or(Err(timed_out));
    lease.learned(&result);
    match &result {
        Ok(_) => lease.give_back(),
        Err(error) if error.class() == ErrorClass::Data => {
            // Bad data comes in numbers: a new connection for each halving would be slow. The rollback is answered
            // after everything that was sent before it.
            let rolled_back = timeout(limit, lease.batch_execute("ROLLBACK")).await;
            if matches!(rolled_back, Ok(Ok(()))) {
                lease.give_back();
            }
        }
        Err(_) => {}
    }
    result
}
