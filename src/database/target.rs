//! The way out of a table writer: a batch becomes transactions, whatever the server says to single rows of it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::batch::{Batch, Segment};
use super::cursor::{Cursor, Tally};
use super::error::{DatabaseError, postgres};
use super::refusal::{Refused, set_aside};
use super::source::Plan;
use super::steps::{Steps, Taken};
use super::table_sink::TableSink;
use super::transaction::{self, Move};
use super::waiting::Waiting;
use crate::buffer::{Buffer, BufferError};
use crate::crash::{crash_point, part_point};
use crate::domain::{Arrival, Books, DeadLetter, Delivered, ErrorClass, Sequence};
use crate::observe::SinkView;
use crate::part::Progress;

/// Latencies observed per batch at most: enough for quantiles, at a bounded price.
const LATENCY_SAMPLES: usize = 64;

/// Rows on each of which the fold panicked, without one between that went in: more are no fault of theirs.
const PANICS_IN_A_ROW_MAX: u32 = 100;

/// Why a batch could not be delivered.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    Buffer(#[from] BufferError),
}

/// Delivers batches, one at a time.
pub struct Target {
    sink: TableSink,
    buffer: Buffer,
    view: Arc<SinkView>,
    progress: Arc<Progress>,
    plan: Arc<Plan>,
    cursor: Cursor,
    begin: String,
    /// Rows were written by this plan: the table may have changed since it was checked.
    plan_is_old: bool,
    /// As the cursor row last said.
    pub books: Books,
    /// Where a transaction of unknown outcome would have moved the cursor.
    pub uncertain: Vec<Sequence>,
    /// Rows set aside for a panic since the last one that went in.
    pub panics_in_a_row: u32,
}

impl Target {
    pub fn new(
        sink: &TableSink,
        buffer: Buffer,
        progress: Arc<Progress>,
        plan: Arc<Plan>,
        books: Books,
    ) -> Target {
        Target {
            view: sink.view(),
            cursor: sink.cursor(),
            begin: transaction::begin(&sink.database),
            sink: sink.clone(),
            buffer,
            progress,
            plan,
            plan_is_old: false,
            books,
            uncertain: Vec::new(),
            panics_in_a_row: 0,
        }
    }

    /// Delivers the batch: in one transaction, or in several around the rows that the server refuses, which become dead
    /// letters. After an error the cursor row says how much of it was taken.
    pub async fn deliver(&mut self, mut batch: Batch) -> Result<(), Trouble> {
        part_point(|| format!("part_writer_{}", self.sink.stream.name)).await;
        let started = Instant::now();
        let encoded = std::mem::take(&mut batch.encoded).freeze();
        let rows = batch.rows.len();
        let mut waiting = match &*self.plan {
            Plan::Append(_) => Waiting::of_time_series(rows),
            Plan::Latest(_) => Waiting::whole(rows),
        };
        self.copy_at_once(&mut batch, &encoded, &mut waiting).await?;
        let mut partitions_made = false;
        while !waiting.is_empty() {
            let refused = self.write_in_steps(&mut batch, &encoded, &mut waiting).await?;
            let Some(Refused { rows, error }) = refused else { continue };
            if !error.is_missing_partition() {
                self.blame_the_row(&error)?;
                set_aside(&self.sink, &mut batch, rows.start, &error)?;
                waiting.leave_cursor();
            } else if std::mem::replace(&mut partitions_made, true) {
                return Err(no_partition(&error).into());
            } else {
                self.make_partitions(&batch).await?;
            }
        }
        self.plan_is_old = true;
        self.finished(&batch, started).await
    }

    /// The common case of a time series: one segment, no savepoint, and nothing to wait for between begin and commit.
    async fn copy_at_once(
        &mut self,
        batch: &mut Batch,
        encoded: &Bytes,
        waiting: &mut Waiting,
    ) -> Result<(), Trouble> {
        let Plan::Append(plan) = &*self.plan else { return Ok(()) };
        let Some(only) = waiting.only().map(|rows| batch.segment(rows)) else { return Ok(()) };
        self.keep_letters(batch).await?;
        let cursor = self.move_behind(batch, std::slice::from_ref(&only));
        let rows = encoded.slice(batch.encoded_range(&only.rows));
        let (to, tally) = (cursor.to, cursor.tally);
        let run = transaction::run(&self.sink.pool, &self.sink.database, async |client| {
            plan.write(client, &self.begin, rows, cursor).await
        });
        match self.progress.waiting(run).await {
            Ok(books) => {
                waiting.taken();
                self.confirmed(batch, &[only], books, tally);
            }
            // Refused again in the steps, which know what to do.
            Err(error) if error.is_missing_partition() => {}
            Err(error) if error.class() == ErrorClass::Data => {
                waiting.refused(error.line_of_copy(&self.sink.table.table));
            }
            Err(error) => return Err(self.failed(error, Some(to))),
        }
        Ok(())
    }

    /// One transaction, as far as it goes: what it does not take, and what is neither split nor a dead letter, is given back.
    async fn write_in_steps(
        &mut self,
        batch: &mut Batch,
        encoded: &Bytes,
        waiting: &mut Waiting,
    ) -> Result<Option<Refused>, Trouble> {
        let (sink, plan, taken) = (&self.sink, &*self.plan, Taken::default());
        let mut steps =
            Steps { sink, plan, batch: &mut *batch, encoded, waiting: &mut *waiting, taken };
        let (mut refused, mut to, mut unkept) = (None, None, None);
        let run = transaction::run(&sink.pool, &sink.database, async |client| {
            refused = steps.run(client, &self.begin).await?;
            unkept = self.keep_letters(steps.batch).await.err();
            if steps.taken.segments.is_empty() || unkept.is_some() {
                client.batch_execute("ROLLBACK").await.map_err(postgres("roll back"))?;
                return Ok(None);
            }
            let mut cursor = self.move_behind(steps.batch, &steps.taken.segments);
            cursor.tally = cursor.tally.with(steps.taken.folded);
            to = Some(cursor.to);
            let books = cursor.commit(client).await?;
            Ok(Some((books, cursor.tally)))
        });
        let result = self.progress.waiting(run).await;
        let taken = steps.taken;
        if let Some(unkept) = unkept {
            return Err(unkept.into());
        }
        match result {
            Ok(committed) => {
                if let Some((books, tally)) = committed {
                    self.confirmed(batch, &taken.segments, books, tally);
                }
                Ok(refused)
            }
            Err(error) if error.class() == ErrorClass::Data && to.is_some() => {
                Ok(refused_at_commit(waiting, taken.segments, error)?)
            }
            Err(error) => Err(self.failed(error, to)),
        }
    }

    /// The cursor goes to the end of these segments.
    fn move_behind(&self, batch: &Batch, segments: &[Segment]) -> Move<'_> {
        let from = self.books.cursor;
        let to = segments.last().map_or(from, |segment| segment.to);
        let shape = match &*self.plan {
            Plan::Append(plan) if segments.iter().any(|segment| !segment.rows.is_empty()) => {
                Some(&plan.shape)
            }
            _ => None,
        };
        Move { cursor: &self.cursor, from, to, tally: batch.tally(segments, from), shape }
    }

    /// A transaction failed that would have moved the cursor `to`, had it been committed.
    fn failed(&mut self, error: DatabaseError, to: Option<Sequence>) -> Trouble {
        if self.plan_is_old && error.may_be_due_to_the_plan() {
            return DatabaseError::PlanInDoubt.into();
        }
        if error.leaves_outcome_unknown() {
            self.uncertain.extend(to);
        }
        error.into()
    }

    /// A panic is the row's fault, unless it comes with every row: that would turn the whole stream into dead letters.
    fn blame_the_row(&mut self, error: &DatabaseError) -> Result<(), DatabaseError> {
        if !matches!(error, DatabaseError::Panicked { .. }) {
            return Ok(());
        }
        if self.panics_in_a_row >= PANICS_IN_A_ROW_MAX {
            return Err(DatabaseError::Standing {
                problem: format!(
                    "{error}: {PANICS_IN_A_ROW_MAX} rows in a row were set aside for it"
                ),
                remedy: "install a version without it, then replay the dead letters; a restart of \
                         this writer tries as many again"
                    .to_owned(),
            });
        }
        self.panics_in_a_row += 1;
        Ok(())
    }

    /// Before the cursor passes them: a crash may repeat a letter under its own key, never lose it.
    async fn keep_letters(&self, batch: &mut Batch) -> Result<(), BufferError> {
        let new = &batch.letters[batch.letters_kept..];
        if new.is_empty() {
            return Ok(());
        }
        self.buffer.state().put_dead_letters(new.to_vec()).await?;
        batch.letters_kept = batch.letters.len();
        crash_point("crash_letters_kept");
        Ok(())
    }

    async fn make_partitions(&self, batch: &Batch) -> Result<(), DatabaseError> {
        let arrivals = batch.rows.iter().map(|row| row.arrival.as_micros()).collect();
        self.progress.waiting(self.sink.make_partitions(arrivals)).await
    }

    /// The segments of a transaction are committed: from here on nothing of them comes again.
    fn confirmed(&mut self, batch: &Batch, segments: &[Segment], books: Books, tally: Tally) {
        let Some(last) = segments.last() else { return };
        let before = std::mem::replace(&mut self.books, books).cursor;
        self.uncertain.clear();
        self.progress.beat();
        let stream = &self.sink.stream.name;
        self.buffer.delivered(stream, &self.sink.table.sink, Delivered(books.cursor));
        crash_point("crash_confirmed");
        count(&self.view, tally);
        let passed = |letter: &&DeadLetter| {
            let at = letter.key.sequence;
            before < at && at <= last.to
        };
        for letter in batch.letters.iter().filter(passed) {
            self.view.set_aside(letter);
        }
        let rows = || segments.iter().flat_map(|segment| &batch.rows[segment.rows.clone()]);
        let newest = rows().last();
        if newest.is_some() {
            self.panics_in_a_row = 0;
        }
        let now = Arrival::now();
        for row in rows().step_by(rows().count().div_ceil(LATENCY_SAMPLES).max(1)) {
            let waited = now.as_micros().saturating_sub(row.arrival.as_micros()).max(0);
            self.view.meters.end_to_end_duration.observe(waited as f64 / 1e6);
        }
        self.view.update(|status| {
            status.books = Some(books.or_later(status.books));
            status.last_success = Some(now);
            if let Some(row) = newest {
                status.newest_delivered = Some(row.arrival);
            }
        });
    }

    async fn finished(&self, batch: &Batch, started: Instant) -> Result<(), Trouble> {
        let meters = &self.view.meters;
        meters.batch_duration.observe(started.elapsed().as_secs_f64());
        meters.batch_messages.observe(batch.records as f64);
        let seen = &batch.observed;
        meters.flagged_device_time_invalid.inc_by(seen.device_time_invalid);
        meters.flagged_out_of_range.inc_by(seen.out_of_range);
        let stream = &self.sink.stream.name;
        self.sink.board.stream(stream).unmapped_seen(&self.sink.table.sink, &seen.unmapped);
        Ok(())
    }
}

/// All rows of a transaction went in, and then it was refused: each part gets one of its own, and is halved if it had. The
/// only row of one is to blame.
fn refused_at_commit(
    waiting: &mut Waiting,
    segments: Vec<Segment>,
    error: DatabaseError,
) -> Result<Option<Refused>, DatabaseError> {
    let was_alone = segments.len() == 1 && waiting.is_one_by_one();
    waiting.refused_together(segments.into_iter().map(|segment| segment.rows));
    let Some(rows) = waiting.next().filter(|_| was_alone) else { return Ok(None) };
    if rows.is_empty() {
        return Err(DatabaseError::Standing {
            problem: format!("the database refuses the cursor of this sink: {error}"),
            remedy: "look for a trigger or a constraint on telemetry_cursors".to_owned(),
        });
    }
    let is_one_row = !waiting.refused(None);
    Ok(is_one_row.then_some(Refused { rows, error }))
}

/// Adds to the counters of this process what a committed transaction added to the books.
pub fn count(view: &SinkView, tally: Tally) {
    let meters = &view.meters;
    for (counter, count) in [
        (&meters.delivered_messages, tally.delivered),
        (&meters.filtered_messages, tally.filtered),
        (&meters.incomplete_messages, tally.incomplete),
        (&meters.dead_lettered_messages, tally.dead_lettered),
        (&meters.unchanged_messages, tally.unchanged),
        (&meters.stale_messages, tally.stale),
    ] {
        counter.inc_by(u64::try_from(count).unwrap_or(0));
    }
}

/// Making the partition worked and the row still has no place.
pub fn no_partition(error: &DatabaseError) -> DatabaseError {
    DatabaseError::Standing {
        problem: format!("no partition takes these rows: {error}"),
        remedy: "look at the table's partitions: their key should be the time column".to_owned(),
    }
}
