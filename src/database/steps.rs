//! One transaction, segment by segment: each stands behind a savepoint, so that a refusal takes only its own with it, and a
//! row refused alone is looked into before anybody can change the table.

use std::ops::Range;

use bytes::Bytes;
use tokio_postgres::Client;

use super::append::Copying;
use super::batch::{Batch, Segment};
use super::error::{DatabaseError, postgres};
use super::fold::Folded;
use super::latest::LatestPlan;
use super::refusal::{Refused, set_aside};
use super::savepoints::Savepoints;
use super::source::Plan;
use super::sql::qualified;
use super::table_sink::TableSink;
use super::upserts::{self, Written};
use super::waiting::Waiting;
use crate::crash::crash_point;

/// Writes what it can of a batch into a transaction that someone else ends.
pub struct Steps<'a> {
    pub sink: &'a TableSink,
    pub plan: &'a Plan,
    /// What is refused alone is a dead letter of it, which is kept before the transaction ends.
    pub batch: &'a mut Batch,
    /// The rows of a time series.
    pub encoded: &'a Bytes,
    pub waiting: &'a mut Waiting,
    pub taken: Taken,
}

/// What went in, or is passed as a dead letter, to be committed.
#[derive(Debug, Default)]
pub struct Taken {
    pub segments: Vec<Segment>,
    /// What latest state made of them.
    pub folded: Folded,
}

/// How rows go into the table.
enum Way<'a> {
    Append(Copying),
    Latest(&'a LatestPlan),
}

impl<'a> Steps<'a> {
    /// Begins the transaction and takes rows out of `waiting`, until some go in by themselves where that is due, or do not go
    /// in for what no smaller part would mend and no dead letter may.
    pub async fn run(
        &mut self,
        client: &Client,
        begin: &str,
    ) -> Result<Option<Refused>, DatabaseError> {
        let way = self.begin(client, begin).await?;
        let savepoints = Savepoints::of(client);
        let mut looked = false;
        while !savepoints.are_spent() {
            let Some(rows) = self.waiting.next() else { break };
            let write = self.write(client, &way, &savepoints, &rows);
            let refused = match savepoints.attempt("segment", write).await? {
                Ok(Written { folded, refused }) => {
                    self.waiting.taken();
                    self.taken.folded += folded;
                    refused
                }
                Err(error) if error.is_missing_partition() => {
                    return Ok(Some(Refused { rows, error }));
                }
                Err(error) => {
                    if self.waiting.refused(error.line_of_copy(&self.sink.table.table)) {
                        continue;
                    }
                    if matches!(error, DatabaseError::Panicked { .. }) {
                        return Ok(Some(Refused { rows, error }));
                    }
                    self.waiting.passed();
                    vec![(rows.start, error)]
                }
            };
            if !refused.is_empty() && !std::mem::replace(&mut looked, true) {
                self.look(client).await?;
            }
            self.pass(rows, refused)?;
            if self.waiting.is_one_by_one() {
                break;
            }
        }
        Ok(None)
    }

    /// All of these went in, but for those that are refused.
    fn pass(
        &mut self,
        rows: Range<usize>,
        refused: Vec<(usize, DatabaseError)>,
    ) -> Result<(), DatabaseError> {
        let mut start = rows.start;
        for (row, error) in refused {
            set_aside(self.sink, self.batch, row, &error)?;
            if start < row {
                self.taken.segments.push(self.batch.segment(start..row));
            }
            start = row + 1;
        }
        self.taken.segments.push(self.batch.segment(start..rows.end));
        Ok(())
    }

    /// Until the transaction ends nobody alters the table.
    async fn begin(&self, client: &Client, begin: &str) -> Result<Way<'a>, DatabaseError> {
        let table = qualified(&self.sink.database.schema, &self.sink.table.table);
        let lock = format!("LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE");
        let begin = format!("{begin}; {lock}");
        let prepare = async {
            match self.plan {
                Plan::Append(plan) => Ok(Way::Append(plan.prepare(client).await?)),
                Plan::Latest(plan) => Ok(Way::Latest(plan)),
            }
        };
        let (begun, way) = tokio::join!(client.batch_execute(&begin), prepare);
        begun.map_err(postgres("begin"))?;
        way
    }

    async fn write(
        &self,
        client: &Client,
        way: &Way<'_>,
        savepoints: &Savepoints<'_>,
        rows: &Range<usize>,
    ) -> Result<Written, DatabaseError> {
        match way {
            Way::Append(copying) => {
                let encoded = self.encoded.slice(self.batch.encoded_range(rows));
                copying.copy(client, encoded).await?;
                Ok(Written { folded: Folded::default(), refused: Vec::new() })
            }
            Way::Latest(plan) => {
                let messages = &self.batch.messages[rows.clone()];
                let mut written = upserts::write(plan, client, savepoints, messages).await?;
                crash_point("crash_latest_written");
                written.refused.iter_mut().for_each(|(row, _)| *row += rows.start);
                Ok(written)
            }
        }
    }

    /// The table may have been altered since it was planned for, and then every row would be refused. What is refused only at
    /// the commit needs no such look: the cursor's move has compared the table's shape.
    async fn look(&self, client: &Client) -> Result<(), DatabaseError> {
        let plan = self.sink.plan(client, &self.sink.mapper()?).await?;
        if plan == *self.plan { Ok(()) } else { Err(DatabaseError::PlanInDoubt) }
    }
}
