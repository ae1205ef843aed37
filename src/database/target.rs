//! The way out of a table writer: a batch becomes transactions, whatever the server says to single rows of it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio_postgres::Client;

use super::batch::{Batch, Segment};
use super::blame::Blame;
use super::cursor::{Cursor, Tally};
use super::error::{DatabaseError, postgres};
use super::source::Plan;
use super::sql::qualified;
use super::table_sink::TableSink;
use super::transaction::{self, Move};
use crate::buffer::{Buffer, BufferError};
use crate::crash::{crash_point, part_point};
use crate::domain::{Arrival, Books, DeadLetter, Delivered, ErrorClass, Reason, Sequence, Stage};
use crate::mapping::Fault;
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

/// What is known of the table while rows are written.
#[derive(Debug, Clone, Copy)]
enum Table {
    /// It was as planned when the writer last looked.
    AsPlanned,
    /// It is as planned, and nobody can change it.
    Locked,
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

    /// Delivers the batch: whole, or in parts around the rows that the server refuses, which become dead letters.
    /// After an error the cursor row says how much of it was taken.
    pub async fn deliver(&mut self, mut batch: Batch) -> Result<(), Trouble> {
        part_point(|| format!("part_writer_{}", self.sink.stream.name)).await;
        let started = Instant::now();
        // Before the cursor passes them: a crash may repeat a letter under its own key, never lose it.
        self.store(batch.letters.clone()).await?;
        let encoded = std::mem::take(&mut batch.encoded).freeze();
        let mut waiting = vec![batch.whole()];
        let mut partitions_made = false;
        let mut blame = Blame::default();
        while let Some(segment) = waiting.pop() {
            match self.write(&batch, &encoded, &segment, Table::AsPlanned).await {
                Ok((books, tally)) => {
                    blame.taken(&segment.rows);
                    self.confirmed(&batch, &segment, books, tally);
                }
                Err(error) if error.is_missing_partition() => {
                    if std::mem::replace(&mut partitions_made, true) {
                        return Err(no_partition(&error).into());
                    }
                    self.make_partitions(&batch, &segment).await?;
                    waiting.push(segment);
                }
                Err(error) if self.plan_is_old && error.may_be_due_to_the_plan() => {
                    return Err(DatabaseError::PlanInDoubt.into());
                }
                Err(error) if error.class() == ErrorClass::Data => {
                    let line = error.line_of_copy(&self.sink.table.table);
                    let suspect = blame.refused(&segment.rows, line);
                    match batch.parts(&segment, suspect) {
                        Some(parts) => waiting.extend(parts.into_iter().rev()),
                        None => {
                            let rest = self.judge(&mut batch, &encoded, segment, error).await?;
                            waiting.extend(rest);
                        }
                    }
                }
                Err(error) => return Err(self.failed(error, &segment)),
            }
        }
        self.plan_is_old = true;
        self.finished(&batch, started).await
    }

    async fn write(
        &self,
        batch: &Batch,
        encoded: &Bytes,
        segment: &Segment,
        table: Table,
    ) -> Result<(Books, Tally), DatabaseError> {
        let from = self.books.cursor;
        let tally = batch.tally(segment, from);
        let shape = match &*self.plan {
            Plan::Append(plan) if !segment.rows.is_empty() => Some(&plan.shape),
            _ => None,
        };
        let cursor = Move { cursor: &self.cursor, from, to: segment.to, tally, shape };
        let run = transaction::run(&self.sink.pool, &self.sink.database, async |client| {
            let begin = match table {
                Table::AsPlanned => self.begin.as_str(),
                Table::Locked => {
                    self.begin_locked(client).await?;
                    ""
                }
            };
            match &*self.plan {
                Plan::Append(plan) => {
                    let rows = encoded.slice(batch.encoded_range(&segment.rows));
                    Ok((plan.write(client, begin, rows, cursor).await?, tally))
                }
                Plan::Latest(plan) => {
                    client.batch_execute(begin).await.map_err(postgres("begin"))?;
                    let messages = &batch.messages[segment.rows.clone()];
                    let folded = plan.write(client, messages).await?;
                    crash_point("crash_latest_written");
                    let tally = Tally {
                        unchanged: folded.unchanged as i64,
                        stale: folded.stale as i64,
                        ..tally
                    };
                    Ok((Move { tally, ..cursor }.commit(client).await?, tally))
                }
            }
        });
        self.progress.waiting(run).await
    }

    /// Until this transaction ends the table stays as it is, and that is as planned.
    async fn begin_locked(&self, client: &Client) -> Result<(), DatabaseError> {
        let table = qualified(&self.sink.database.schema, &self.sink.table.table);
        let begin = format!("{}; LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE", self.begin);
        client.batch_execute(&begin).await.map_err(postgres("lock the table"))?;
        let plan = self.sink.plan(client, &self.sink.mapper()?).await?;
        if plan == *self.plan { Ok(()) } else { Err(DatabaseError::PlanInDoubt) }
    }

    fn failed(&mut self, error: DatabaseError, segment: &Segment) -> Trouble {
        if error.leaves_outcome_unknown() {
            self.uncertain.push(segment.to);
        }
        error.into()
    }

    /// The only row of a segment was refused. The table may have been altered since it was planned for, and then every
    /// row would be refused: it is set aside only when the server refuses it again while the table is as planned. Gives
    /// the segment that moves the cursor past it.
    async fn judge(
        &mut self,
        batch: &mut Batch,
        encoded: &Bytes,
        segment: Segment,
        error: DatabaseError,
    ) -> Result<Option<Segment>, Trouble> {
        let error = if segment.rows.is_empty() {
            error
        } else {
            match self.write(batch, encoded, &segment, Table::Locked).await {
                Ok((books, tally)) => {
                    self.confirmed(batch, &segment, books, tally);
                    return Ok(None);
                }
                Err(error) if error.is_missing_partition() => {
                    return Err(no_partition(&error).into());
                }
                Err(error) if error.class() == ErrorClass::Data => error,
                Err(error) => return Err(self.failed(error, &segment)),
            }
        };
        self.blame_the_row(&error)?;
        self.bury(batch, &segment, &error).await.map(Some)
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

    /// Sets the only row of the segment aside.
    async fn bury(
        &self,
        batch: &mut Batch,
        segment: &Segment,
        error: &DatabaseError,
    ) -> Result<Segment, Trouble> {
        self.view.meters.error(ErrorClass::Data).inc();
        let Some(mark) = batch.rows.get(segment.rows.clone()).and_then(|rows| rows.first()) else {
            return Err(DatabaseError::Standing {
                problem: format!("the database refuses the cursor of this sink: {error}"),
                remedy: "look for a trigger or a constraint on telemetry_cursors".to_owned(),
            }
            .into());
        };
        let sequence = mark.sequence;
        let refused = batch.with_record(sequence, |record| {
            let sqlstate = error.sqlstate().map(str::to_owned);
            refusal(error).into_letter(
                &self.sink.stream.name,
                &self.sink.table.sink,
                record,
                sqlstate,
            )
        });
        let Some(refused) = refused else {
            return Err(DatabaseError::Standing {
                problem: format!("record {sequence} was refused and is no longer at hand: {error}"),
                remedy: "restart this writer".to_owned(),
            }
            .into());
        };
        self.store(vec![refused.clone()]).await?;
        Ok(batch.bury(segment, refused))
    }

    async fn store(&self, letters: Vec<DeadLetter>) -> Result<(), BufferError> {
        if letters.is_empty() {
            return Ok(());
        }
        self.buffer.state().put_dead_letters(letters).await?;
        crash_point("crash_letters_kept");
        Ok(())
    }

    async fn make_partitions(&self, batch: &Batch, segment: &Segment) -> Result<(), DatabaseError> {
        let rows = &batch.rows[segment.rows.clone()];
        let arrivals = rows.iter().map(|row| row.arrival.as_micros()).collect();
        self.progress.waiting(self.sink.make_partitions(arrivals)).await
    }

    /// A transaction is committed: from here on nothing of it comes again.
    fn confirmed(&mut self, batch: &Batch, segment: &Segment, books: Books, tally: Tally) {
        let before = std::mem::replace(&mut self.books, books).cursor;
        self.uncertain.clear();
        self.progress.beat();
        let stream = &self.sink.stream.name;
        self.buffer.delivered(stream, &self.sink.table.sink, Delivered(books.cursor));
        crash_point("crash_confirmed");
        count(&self.view, tally);
        let passed = |letter: &&DeadLetter| {
            let at = letter.key.sequence;
            before < at && at <= segment.to
        };
        for letter in batch.letters.iter().filter(passed) {
            self.view.set_aside(letter);
        }
        let rows = &batch.rows[segment.rows.clone()];
        if !rows.is_empty() {
            self.panics_in_a_row = 0;
        }
        let now = Arrival::now();
        for row in rows.iter().step_by(rows.len().div_ceil(LATENCY_SAMPLES).max(1)) {
            let waited = now.as_micros().saturating_sub(row.arrival.as_micros()).max(0);
            self.view.meters.end_to_end_duration.observe(waited as f64 / 1e6);
        }
        self.view.update(|status| {
            status.books = Some(books.or_later(status.books));
            status.last_success = Some(now);
            if let Some(row) = rows.last() {
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

/// What the server said to a single row, or that there was no way to tell it.
pub fn refusal(error: &DatabaseError) -> Fault {
    Fault {
        stage: Stage::Deliver,
        reason: match error {
            DatabaseError::Panicked { .. } => Reason::Panicked,
            _ => Reason::DatabaseRefused,
        },
        field: error.column().map(str::to_owned),
        detail: error.to_string(),
    }
}

/// Making the partition worked and the row still has no place.
pub fn no_partition(error: &DatabaseError) -> DatabaseError {
    DatabaseError::Standing {
        problem: format!("no partition takes these rows: {error}"),
        remedy: "look at the table's partitions: their key should be the time column".to_owned(),
    }
}
