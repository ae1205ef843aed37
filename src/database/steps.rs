//! One transaction, segment by segment: each stands behind a savepoint, so that a refusal takes only its own with it, and a
//! row refused alone is looked into before anybody can change the table.

use bytes::Bytes;
use tokio_postgres::Client;

use super::append::Copying;
use super::batch::{Batch, Segment};
use super::error::{DatabaseError, postgres};
use super::fold::Folded;
use super::latest::LatestPlan;
use super::source::Plan;
use super::sql::qualified;
use super::table_sink::TableSink;
use super::waiting::Waiting;
use crate::crash::crash_point;
use crate::domain::ErrorClass;

/// Savepoints of one transaction at most. A session of PostgreSQL remembers 64 subtransactions; of more than that everyone
/// who reads the table has to ask the disk.
const SAVEPOINTS_MAX: usize = 32;

/// Writes what it can of a batch into a transaction that someone else ends.
pub struct Steps<'a> {
    pub sink: &'a TableSink,
    pub plan: &'a Plan,
    pub batch: &'a Batch,
    /// The rows of a time series.
    pub encoded: &'a Bytes,
}

/// What went in, to be committed.
#[derive(Debug, Default)]
pub struct Taken {
    pub segments: Vec<Segment>,
    /// What latest state made of them.
    pub folded: Folded,
}

/// What does not go in, and what the server says to it: a single row, or segments without their partition.
#[derive(Debug)]
pub struct Refused {
    pub segment: Segment,
    pub error: DatabaseError,
}

/// How rows go into the table.
enum Way<'a> {
    Append(Copying),
    Latest(&'a LatestPlan),
}

impl Steps<'_> {
    /// Begins the transaction and takes segments out of `waiting` until one of them does not go in and cannot be split.
    pub async fn run(
        &self,
        client: &Client,
        begin: &str,
        waiting: &mut Waiting,
        taken: &mut Taken,
    ) -> Result<Option<Refused>, DatabaseError> {
        let way = self.begin(client, begin).await?;
        let most = if waiting.is_one_by_one() { 1 } else { SAVEPOINTS_MAX };
        for step in 0..most {
            let Some(segment) = waiting.take_first() else { break };
            match self.put_in(client, &way, &segment, step > 0).await {
                Ok(folded) => {
                    waiting.taken(&segment.rows);
                    taken.folded += folded;
                    taken.segments.push(segment);
                }
                Err(error) if error.class() == ErrorClass::Data => {
                    let undo = client.batch_execute("ROLLBACK TO SAVEPOINT segment").await;
                    undo.map_err(postgres("roll back"))?;
                    if error.is_missing_partition() {
                        return Ok(Some(Refused { segment, error }));
                    }
                    let line = error.line_of_copy(&self.sink.table.table);
                    if let Err(segment) = waiting.split(self.batch, segment, line) {
                        self.look(client).await?;
                        return Ok(Some(Refused { segment, error }));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Until the transaction ends nobody alters the table.
    async fn begin(&self, client: &Client, begin: &str) -> Result<Way<'_>, DatabaseError> {
        let table = qualified(&self.sink.database.schema, &self.sink.table.table);
        let lock = format!("LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE");
        let begin = format!("{begin}; {lock}; SAVEPOINT segment");
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

    async fn put_in(
        &self,
        client: &Client,
        way: &Way<'_>,
        segment: &Segment,
        savepoint: bool,
    ) -> Result<Folded, DatabaseError> {
        let save = async {
            if savepoint { client.batch_execute("SAVEPOINT segment").await } else { Ok(()) }
        };
        let write = async {
            match way {
                Way::Append(copying) => {
                    let rows = self.encoded.slice(self.batch.encoded_range(&segment.rows));
                    copying.copy(client, rows).await.map(|()| Folded::default())
                }
                Way::Latest(plan) => {
                    let folded =
                        plan.write(client, &self.batch.messages[segment.rows.clone()]).await;
                    crash_point("crash_latest_written");
                    folded
                }
            }
        };
        let (saved, written) = tokio::join!(save, write);
        saved.map_err(postgres("set a savepoint"))?;
        written
    }

    /// The table may have been altered since it was planned for, and then every row would be refused. What is refused only at
    /// the commit needs no such look: the cursor's move has compared the table's shape.
    async fn look(&self, client: &Client) -> Result<(), DatabaseError> {
        let plan = self.sink.plan(client, &self.sink.mapper()?).await?;
        if plan == *self.plan { Ok(()) } else { Err(DatabaseError::PlanInDoubt) }
    }
}
