//! The way in of a table writer: blocks from the buffer, mapped and converted into the next batch.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::append::AppendPlan;
use super::batch::{Batch, Special};
use super::latest::LatestPlan;
use super::pace::Pace;
use super::table_sink::TableSink;
use crate::buffer::{Block, BufferError, Reader};
use crate::domain::{Arrival, Durable, Reason, Record, Runbook, Sequence, Stage};
use crate::mapping::{Fault, Outcome, RowMapper};

/// Blocks mapped between two chances for the connection to move: some 0.2 ms of work.
const BLOCKS_PER_TURN: usize = 4;
/// What one read of the buffer asks for.
const READ_BYTES: usize = 512 * 1024;

/// How the table takes rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Plan {
    Append(AppendPlan),
    Latest(LatestPlan),
}

/// Fills batches.
pub struct Source {
    reader: Reader,
    durable: watch::Receiver<Durable>,
    mapper: RowMapper,
    plan: Arc<Plan>,
    blocks: VecDeque<Block>,
    limits: Limits,
    sink: TableSink,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    records: usize,
    bytes: usize,
}

impl Limits {
    fn of(sink: &TableSink, pace: Pace) -> Limits {
        let table = &sink.table;
        Limits { records: pace.of(table.batch_rows_max), bytes: pace.of(table.batch_bytes_max) }
    }
}

impl Source {
    pub fn new(
        sink: &TableSink,
        reader: Reader,
        mapper: RowMapper,
        plan: Arc<Plan>,
        pace: Pace,
    ) -> Source {
        Source {
            durable: reader.durable(),
            reader,
            mapper,
            plan,
            blocks: VecDeque::new(),
            limits: Limits::of(sink, pace),
            sink: sink.clone(),
        }
    }

    /// For the batches from here on.
    pub fn keep_pace(&mut self, pace: Pace) {
        self.limits = Limits::of(&self.sink, pace);
    }

    /// Everything durable is in the batch.
    pub fn caught_up(&self, batch: &Batch) -> bool {
        self.durable.borrow().0 <= batch.last
    }

    pub fn is_full(&self, batch: &Batch) -> bool {
        batch.records >= self.limits.records || batch.payload_bytes >= self.limits.bytes
    }

    /// Returns when there is something behind the batch's end.
    pub async fn news(&mut self, batch: &Batch) -> Result<(), BufferError> {
        let last = batch.last;
        match self.durable.wait_for(|durable| durable.0 > last).await {
            Ok(_) => Ok(()),
            Err(_) => Err(BufferError::Stopped { reason: "its writer has ended".to_owned() }),
        }
    }

    /// Adds what comes until the batch is full; never returns before that. Dropping the future loses nothing.
    pub async fn fill(&mut self, batch: &mut Batch) -> Result<(), BufferError> {
        loop {
            self.catch_up(batch).await?;
            if self.is_full(batch) {
                return Ok(());
            }
            self.news(batch).await?;
        }
    }

    /// Adds what is durable already, until the batch is full. Dropping the future loses nothing.
    pub async fn catch_up(&mut self, batch: &mut Batch) -> Result<(), BufferError> {
        while !self.is_full(batch) {
            if self.blocks.is_empty() {
                if self.caught_up(batch) {
                    return Ok(());
                }
                self.read(batch).await?;
            }
            self.map_some(batch);
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    async fn read(&mut self, batch: &mut Batch) -> Result<(), BufferError> {
        let chunk = self.reader.read(batch.last, READ_BYTES).await?;
        self.blocks.extend(chunk.blocks);
        if let Some(lost) = chunk.lost {
            tracing::error!(
                event = "records_lost",
                runbook = Runbook::DataLost.page(),
                stream = %self.sink.stream.name,
                sink = %self.sink.table.sink,
                sequences = %lost,
                "the log lost records before this sink had them"
            );
            let count = lost.last.since(batch.last);
            batch.take_lost(lost.last, count);
        }
        Ok(())
    }

    fn map_some(&mut self, batch: &mut Batch) {
        for _ in 0..BLOCKS_PER_TURN {
            let Some(block) = self.blocks.front().cloned() else { return };
            for record in block.records_after(batch.last) {
                if self.is_full(batch) {
                    // The rest of this block belongs to the next batch.
                    batch.blocks.push(block.clone());
                    return;
                }
                batch.take(&record);
                self.map_one(&record, batch);
            }
            self.blocks.pop_front();
            batch.blocks.push(block);
        }
    }

    fn map_one(&mut self, record: &Record<'_>, batch: &mut Batch) {
        match map(&mut self.mapper, &self.plan, record, batch) {
            Mapped::Row => batch.mark_row(record),
            Mapped::Filtered => batch.mark(Special::Filtered(record.sequence)),
            Mapped::Incomplete => batch.mark(Special::Incomplete(record.sequence)),
            Mapped::Dead(fault) => {
                if fault.reason == Reason::Panicked
                    && let Ok(fresh) = self.sink.mapper()
                {
                    self.mapper = fresh;
                }
                batch.mark(Special::Dead(record.sequence));
                let (stream, sink) = (&self.sink.stream.name, &self.sink.table.sink);
                batch.letters.push(fault.into_letter(stream, sink, record, None));
            }
        }
    }

    /// Ends the filling of a batch and hands it over; the next one begins behind it.
    pub fn close(&mut self, batch: &mut Batch) -> Batch {
        let next = Batch::behind(batch.last);
        let mut closed = std::mem::replace(batch, next);
        closed.observed = self.mapper.observed();
        closed
    }

    /// Arrival of the first record behind a position, for the display of a sink that is in trouble.
    pub async fn first_after(reader: &mut Reader, position: Sequence) -> Option<Arrival> {
        let chunk = reader.read(position, 1).await.ok()?;
        chunk.blocks.iter().find_map(|block| Some(block.records_after(position).next()?.arrival))
    }
}

/// What the mapping and the table made of one record; a row is already in the batch.
pub enum Mapped {
    Row,
    Filtered,
    Incomplete,
    Dead(Fault),
}

/// Maps a record into the batch's rows. A panic is the record's fault: the batch is then as before, and the mapper is to
/// be replaced.
pub fn map(mapper: &mut RowMapper, plan: &Plan, record: &Record<'_>, batch: &mut Batch) -> Mapped {
    let (encoded, messages) = (batch.encoded.len(), batch.messages.len());
    catch_unwind(AssertUnwindSafe(|| map_or_panic(mapper, plan, record, batch))).unwrap_or_else(
        |_| {
            batch.encoded.truncate(encoded);
            batch.messages.truncate(messages);
            Mapped::Dead(Fault {
                stage: Stage::Map,
                reason: Reason::Panicked,
                field: None,
                detail: "the mapping panicked on this message".to_owned(),
            })
        },
    )
}

fn map_or_panic(
    mapper: &mut RowMapper,
    plan: &Plan,
    record: &Record<'_>,
    batch: &mut Batch,
) -> Mapped {
    fail::fail_point!(&format!("map_row_{}", record.topic));
    let values = match mapper.map(record) {
        Outcome::Mapped(values) => values,
        Outcome::Filtered => return Mapped::Filtered,
        Outcome::Incomplete => return Mapped::Incomplete,
        Outcome::Dead(fault) => return Mapped::Dead(fault),
    };
    match plan {
        Plan::Append(plan) => match plan.encode(values, record.arrival, &mut batch.encoded) {
            Ok(()) => Mapped::Row,
            Err(fault) => Mapped::Dead(fault),
        },
        Plan::Latest(plan) => match plan.message(values, record) {
            Ok(Some(message)) => {
                batch.messages.push(message);
                Mapped::Row
            }
            Ok(None) => Mapped::Filtered,
            Err(fault) => Mapped::Dead(fault),
        },
    }
}

/// How long a batch may still wait for company; `None` when it has waited enough.
pub fn linger_left(batch: &Batch, linger: std::time::Duration) -> Option<std::time::Duration> {
    let waited = Instant::now().saturating_duration_since(batch.opened?);
    linger.checked_sub(waited).filter(|left| !left.is_zero())
}
