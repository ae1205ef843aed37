//! A dead letter's second chance: through the current mapping, at its original arrival time, exactly once.
//!
//! A ledger row in the same transaction makes it once, however often and by whomever it is asked for. The writer of the
//! sink goes on meanwhile: both only add to the counts of the cursor row, and only the writer moves its position.

use bytes::BytesMut;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::batch::Batch;
use super::bookkeeping;
use super::cursor::Tally;
use super::error::{DatabaseError, postgres};
use super::refusal::fault;
use super::savepoints::Savepoints;
use super::source::{Mapped, Plan, map};
use super::table_sink::TableSink;
use super::target::no_partition;
use super::transaction;
use super::upserts;
use crate::crash::crash_point;
use crate::domain::{Books, DeadLetter, ErrorClass, Sequence};
use crate::mapping::Fault;

/// The node's own tables are made by its migrator.
const UNDEFINED_TABLE: &str = "42P01";

/// What became of a replayed letter. The letter itself is the caller's to remove, in the first two cases: in every other
/// it stays, and so do the books.
#[derive(Debug, Clone, PartialEq)]
pub enum ReplayOutcome {
    Delivered,
    /// Delivered by an earlier replay: nothing was written again.
    AlreadyReplayed,
    /// The current mapping's filter excludes it.
    Filtered,
    /// The current mapping misses a required field in it.
    Incomplete,
    /// It fails still, for this reason.
    StillDead(Fault),
    /// The sink has not yet passed this record: its writer will settle it.
    NotPassed,
}

/// Replays one letter of this sink.
pub async fn replay(sink: &TableSink, letter: &DeadLetter) -> Result<ReplayOutcome, DatabaseError> {
    let mut partitions_made = false;
    loop {
        match attempt(sink, letter).await {
            Err(error) if error.is_missing_partition() => {
                if std::mem::replace(&mut partitions_made, true) {
                    return Err(no_partition(&error));
                }
                sink.make_partitions(vec![letter.arrival.as_micros()]).await?;
            }
            Err(DatabaseError::CursorMoved) => return Ok(ReplayOutcome::NotPassed),
            Err(error) if error.class() == ErrorClass::Data => {
                return Ok(ReplayOutcome::StillDead(fault(&error)));
            }
            Err(error) if error.sqlstate() == Some(UNDEFINED_TABLE) => {
                return Err(DatabaseError::Standing {
                    problem: error.to_string(),
                    remedy: "apply the migrations: `telemetry migrate apply`".to_owned(),
                });
            }
            other => return other,
        }
    }
}

async fn attempt(sink: &TableSink, letter: &DeadLetter) -> Result<ReplayOutcome, DatabaseError> {
    let mut mapper = sink.mapper()?;
    let replayed = transaction::run(&sink.pool, &sink.database, async |client| {
        let plan = sink.plan(client, &mapper).await?;
        let mut batch = Batch::behind(Sequence::ZERO);
        let mapped = map(&mut mapper, &plan, &letter.record(), &mut batch);
        let (outcome, tally) = match mapped {
            Mapped::Row => (ReplayOutcome::Delivered, Tally { delivered: 1, ..BACK }),
            // Entered as replayed it would be lost to the next replay, under a mapping that takes it.
            Mapped::Filtered => return Ok((ReplayOutcome::Filtered, None)),
            Mapped::Incomplete => return Ok((ReplayOutcome::Incomplete, None)),
            Mapped::Dead(fault) => return Ok((ReplayOutcome::StillDead(fault), None)),
        };
        match write(sink, client, letter, &plan, batch, tally).await? {
            Some(books) => Ok((outcome, Some(books))),
            None => Ok((ReplayOutcome::AlreadyReplayed, None)),
        }
    })
    .await?;
    let (outcome, books) = replayed;
    if let Some(books) = books {
        let view = sink.view();
        view.meters.replayed_messages.inc();
        view.update(|status| status.books = Some(books.or_later(status.books)));
    }
    Ok(outcome)
}

/// The letter leaves the dead ones.
const BACK: Tally = Tally {
    delivered: 0,
    filtered: 0,
    incomplete: 0,
    dead_lettered: -1,
    lost: 0,
    unchanged: 0,
    stale: 0,
};

/// One transaction; `None` when the ledger says it happened before.
async fn write(
    sink: &TableSink,
    client: &Client,
    letter: &DeadLetter,
    plan: &Plan,
    batch: Batch,
    tally: Tally,
) -> Result<Option<Books>, DatabaseError> {
    let cursor = sink.cursor();
    let begin = transaction::begin(&sink.database);
    client.batch_execute(&begin).await.map_err(postgres("begin"))?;
    let ledger = bookkeeping::replayed(&sink.database.schema);
    let enter = format!(
        "INSERT INTO {ledger} (log, stream, sink, sequence) VALUES ($1, $2, $3, $4) \
         ON CONFLICT DO NOTHING RETURNING 1"
    );
    let entry = format!(
        "SELECT 1 FROM {ledger} WHERE log = $1 AND stream = $2 AND sink = $3 AND sequence = $4"
    );
    let sequence = letter.key.sequence.0 as i64;
    let of_letter = [
        (&cursor.log as _, Type::TEXT),
        (&cursor.stream as _, Type::TEXT),
        (&cursor.sink as _, Type::TEXT),
        (&sequence as _, Type::INT8),
    ];
    let entered =
        client.query_typed(&enter, &of_letter).await.map_err(postgres("enter a replay"))?;
    if entered.is_empty() {
        client.batch_execute("ROLLBACK").await.map_err(postgres("roll back"))?;
        return Ok(None);
    }
    let tally = match plan {
        Plan::Append(plan) if tally.delivered > 0 => {
            let rows: BytesMut = batch.encoded;
            plan.prepare(client).await?.copy(client, rows.freeze()).await?;
            tally
        }
        Plan::Latest(plan) if tally.delivered > 0 => {
            let savepoints = Savepoints::of(client);
            tally.with(upserts::write(plan, client, &savepoints, &batch.messages).await?.folded)
        }
        _ => tally,
    };
    let books = cursor.amend(client, letter.key.sequence, tally).await?;
    crash_point("crash_replay_written");
    client.batch_execute("COMMIT").await.map_err(postgres("commit"))?;
    // The letter is removed for it, and the answer to COMMIT does not say whether it was a rollback.
    let kept = client.query_typed(&entry, &of_letter).await.map_err(postgres("find a replay"))?;
    if kept.is_empty() {
        return Err(DatabaseError::RolledBack);
    }
    crash_point("crash_replayed");
    Ok(Some(books))
}
