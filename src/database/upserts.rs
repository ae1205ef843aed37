//! Messages into a latest-state table, within a transaction that someone else ends.
//!
//! A refused row is found among the folded ones, of which there is one for each key, and then its message among those of
//! the key: nothing of the others is read, folded or written twice. That takes keys for independent of each other, so it
//! is done only where the server has looked at nothing but the row.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio_postgres::Client;

use super::error::DatabaseError;
use super::fold::{Folded, Message, Row, Rows, fold, folded};
use super::halves::Halves;
use super::latest::LatestPlan;
use super::savepoints::Savepoints;

/// Keys of one statement at most: parameters and locks stay small.
const KEYS_PER_STATEMENT: usize = 1000;
/// Rows of one upsert: up to as many are written in vain when one of them is refused.
const ROWS_PER_UPSERT: usize = 250;
/// Of more rows come larger ones: each has a savepoint.
const UPSERTS_MAX: usize = 20;

/// What became of messages.
#[derive(Debug)]
pub struct Written {
    /// Of those that went in.
    pub folded: Folded,
    /// Which of them were refused alone, in order, and what the server said.
    pub refused: Vec<(usize, DatabaseError)>,
}

/// Writes messages.
///
/// # Errors
/// Of the class of data when some are refused and it is not known which: the caller undoes it all.
pub async fn write(
    plan: &LatestPlan,
    client: &Client,
    savepoints: &Savepoints<'_>,
    messages: &[Message],
) -> Result<Written, DatabaseError> {
    let mut rows = read(plan, client, messages).await?;
    fold_or_blame(plan, &mut rows, messages)?;
    let upserts = Upserts { plan, client, savepoints, messages };
    let mut refused = Vec::new();
    for key in upserts.all(&rows).await? {
        let row = upserts.one_key(&key, &mut refused).await?;
        rows.insert(key, row);
    }
    refused.sort_by_key(|(message, _)| *message);
    let seen: Vec<(&String, &Row)> = rows.iter().filter(|(_, row)| row.seen_moved).collect();
    for rows in seen.chunks(KEYS_PER_STATEMENT) {
        plan.upsert_seen(client, rows).await?;
    }
    Ok(Written { folded: folded(&rows), refused })
}

async fn read(
    plan: &LatestPlan,
    client: &Client,
    messages: &[Message],
) -> Result<Rows, DatabaseError> {
    let mut keys: Vec<&str> = messages.iter().map(|message| message.key.as_str()).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut rows = Rows::new();
    for keys in keys.chunks(KEYS_PER_STATEMENT) {
        plan.read(client, keys, &mut rows).await?;
    }
    Ok(rows)
}

/// A panic is the fault of a row, and of the smallest batch that still has it, of which the target bounds how many in a row
/// it believes; unless it comes without any row too: then it is nobody's, and ends the writer.
fn fold_or_blame<'m>(
    plan: &LatestPlan,
    rows: &mut Rows,
    messages: impl IntoIterator<Item = &'m Message>,
) -> Result<(), DatabaseError> {
    catch_unwind(AssertUnwindSafe(|| fold(rows, &plan.fixed, messages))).map_err(|_| {
        fold(&mut Rows::new(), &plan.fixed, []);
        DatabaseError::Panicked { doing: "fold the latest rows" }
    })
}

struct Upserts<'a> {
    plan: &'a LatestPlan,
    client: &'a Client,
    savepoints: &'a Savepoints<'a>,
    messages: &'a [Message],
}

impl Upserts<'_> {
    /// Writes what has changed; the keys of rows that are refused alone.
    async fn all(&self, rows: &Rows) -> Result<Vec<String>, DatabaseError> {
        let changed = rows.iter().filter(|(_, row)| row.updated_at.is_some());
        let (keys, rows): (Vec<&String>, Vec<&Row>) = changed.unzip();
        let size = ROWS_PER_UPSERT.max(rows.len().div_ceil(UPSERTS_MAX));
        let mut refused = Vec::new();
        for start in (0..rows.len()).step_by(size) {
            let chunk = start..rows.len().min(start + size);
            if self.put(&rows[chunk.clone()]).await?.is_err() {
                let found = narrow(chunk, async |part| self.put(&rows[part]).await).await?;
                refused.extend(found.into_iter().map(|(row, _)| keys[row].clone()));
            }
        }
        Ok(refused)
    }

    /// Writes the messages of a key whose row was refused as they came; what its row is then.
    async fn one_key(
        &self,
        key: &str,
        refused: &mut Vec<(usize, DatabaseError)>,
    ) -> Result<Row, DatabaseError> {
        let all = self.messages.iter().enumerate();
        let (places, messages): (Vec<usize>, Vec<&Message>) =
            all.filter(|(_, message)| message.key == key).unzip();
        let mut rows = Rows::from([(key.to_owned(), Row::default())]);
        self.plan.read(self.client, &[key], &mut rows).await?;
        let found = narrow(0..messages.len(), async |part| {
            let mut tried = rows.clone();
            tried.values_mut().for_each(|row| row.updated_at = None);
            fold_or_blame(self.plan, &mut tried, messages[part].iter().copied())?;
            let changed: Vec<&Row> =
                tried.values().filter(|row| row.updated_at.is_some()).collect();
            let done = if changed.is_empty() { Ok(()) } else { self.put(&changed).await? };
            if done.is_ok() {
                rows = tried;
            }
            Ok(done)
        });
        refused.extend(found.await?.into_iter().map(|(at, error)| (places[at], error)));
        Ok(rows.remove(key).unwrap_or_default())
    }

    /// `Ok(Err(_))` when it is one of these rows that is refused, whatever becomes of the others.
    async fn put(&self, rows: &[&Row]) -> Result<Result<(), DatabaseError>, DatabaseError> {
        let upsert = self.plan.upsert(self.client, rows);
        match self.savepoints.attempt("rows", upsert).await? {
            Err(error) if self.messages.len() == 1 || !error.is_about_one_row() => Err(error),
            done => Ok(done),
        }
    }
}

/// Those of refused items that are refused alone; the others went in.
async fn narrow(
    items: Range<usize>,
    mut put: impl AsyncFnMut(Range<usize>) -> Result<Result<(), DatabaseError>, DatabaseError>,
) -> Result<Vec<(usize, DatabaseError)>, DatabaseError> {
    let (mut halves, mut found) = (Halves::of_refused(items), Vec::new());
    while let Some(part) = halves.next() {
        match put(part.clone()).await? {
            Ok(()) => halves.taken(),
            Err(_) if halves.split() => {}
            Err(error) => {
                found.push((part.start, error));
                halves.passed();
            }
        }
    }
    Ok(found)
}
