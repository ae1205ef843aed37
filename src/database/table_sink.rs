//! One table sink: everything a writer or a replay needs to know, and what is compiled from it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::append::AppendPlan;
use super::catalog::{self, Expected, LiveTable};
use super::connect::connect;
use super::cursor::Cursor;
use super::error::{DatabaseError, postgres};
use super::latest::{LatestPlan, LatestTable};
use super::maintenance::ensure_partitions;
use super::pool::Pool;
use super::source::Plan;
use super::transaction::ANSWER_MARGIN;
use crate::config::{DatabaseSettings, StreamSettings, TableKind, TableSettings};
use crate::domain::{LogIdentity, NodeName};
use crate::mapping::{MappingError, RowMapper};
use crate::observe::{Board, DependencyView, SinkView};

/// Cheap to clone.
#[derive(Clone)]
pub struct TableSink {
    pub stream: Arc<StreamSettings>,
    pub table: Arc<TableSettings>,
    /// Key in `Settings::databases`.
    pub database_name: String,
    pub database: Arc<DatabaseSettings>,
    /// The one pool of this database.
    pub pool: Pool,
    /// Which log its records come from.
    pub log: LogIdentity,
    pub board: Arc<Board>,
    pub node: NodeName,
}

impl TableSink {
    pub fn view(&self) -> Arc<SinkView> {
        self.board.sink(&self.stream.name, &self.table.sink)
    }

    pub fn dependency(&self) -> Arc<DependencyView> {
        self.board.dependency(&format!("postgresql:{}", self.database_name))
    }

    pub fn cursor(&self) -> Cursor {
        Cursor::new(
            &self.database.schema,
            &self.node,
            self.log,
            &self.stream.name,
            &self.table.sink,
        )
    }

    /// The configuration's check has compiled the same mapping before: an error here is a mistake in our own wiring.
    pub fn mapper(&self) -> Result<RowMapper, DatabaseError> {
        let words = |mistakes: Vec<MappingError>| {
            let all: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            DatabaseError::Standing {
                problem: format!("the mapping of stream {}: {}", self.stream.name, all.join("; ")),
                remedy: "mend the configuration".to_owned(),
            }
        };
        RowMapper::compile(&self.stream, &self.table).map_err(words)
    }

    /// Makes the partitions that rows of these arrivals (µs since 1970) need, and none between them: one row of a clock
    /// that was wrong costs one odd partition, and never stops its batch.
    pub async fn make_partitions(&self, arrivals: Vec<i64>) -> Result<(), DatabaseError> {
        let TableKind::Append { partition, .. } = &self.table.kind else { return Ok(()) };
        let (mut lease, mut migrator) = (None, None);
        let client: &tokio_postgres::Client = if self.database.migrator.is_some() {
            migrator.insert(connect(&self.database.as_migrator()).await?)
        } else {
            lease.insert(self.pool.get().await?)
        };
        let limit = self.database.statement_timeout;
        let make = async {
            let bound = format!("SET statement_timeout = {}", limit.as_millis().max(1));
            client.batch_execute(&bound).await.map_err(postgres("bound the session"))?;
            for (from, to) in runs(arrivals, *partition) {
                ensure_partitions(client, &self.database, &self.table, from, to).await?;
            }
            Ok(())
        };
        // The session's settings have changed: the connection does not go back.
        let limit = limit + ANSWER_MARGIN;
        let doing = "make partitions";
        let result = timeout(limit, make).await;
        let result = result.unwrap_or(Err(DatabaseError::TimedOut { doing, limit }));
        if let Some(lease) = &mut lease {
            lease.learned(&result);
        }
        result
    }

    /// Checks the mapping against the live table and plans the statements.
    pub async fn plan(
        &self,
        client: &tokio_postgres::Client,
        mapper: &RowMapper,
    ) -> Result<Plan, DatabaseError> {
        let schema = &self.database.schema;
        let live = LiveTable::read(client, schema, &self.table).await?;
        let expected = Expected {
            schema,
            stream: &self.stream,
            table: &self.table,
            columns: mapper.columns(),
        };
        let columns = catalog::plan(&expected, live.as_ref())?;
        match &self.table.kind {
            TableKind::Append { time_column, node_column, .. } => {
                let node = node_column.as_deref().map(|column| (column, &self.node));
                let shape = live.map(|live| live.shape).unwrap_or_default();
                Ok(Plan::Append(AppendPlan::new(shape, columns, time_column, node)))
            }
            TableKind::Latest { key, updated_at_column, insert_only } => {
                let table = LatestTable {
                    schema,
                    table: &self.table,
                    log: self.log,
                    stream: &self.stream.name,
                    sink: &self.table.sink,
                    mapped: mapper.columns(),
                    key,
                    updated_at: updated_at_column,
                    insert_only,
                };
                LatestPlan::new(&table, columns).map(Plan::Latest).ok_or_else(|| {
                    DatabaseError::Standing {
                        problem: format!("the key of table {} is not mapped", self.table.table),
                        remedy: "map the key field in the table's columns".to_owned(),
                    }
                })
            }
        }
    }
}

/// First and last of each run of instants that are no further than `width` apart.
fn runs(mut instants: Vec<i64>, width: Duration) -> Vec<(i64, i64)> {
    let width = i64::try_from(width.as_micros()).unwrap_or(i64::MAX);
    instants.sort_unstable();
    let near = |a: &i64, b: &i64| b.saturating_sub(*a) <= width;
    let ends = |run: &[i64]| Some((*run.first()?, *run.last()?));
    instants.chunk_by(near).filter_map(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_far_from_the_others_are_runs_of_their_own() {
        let width = Duration::from_micros(10);
        assert_eq!(runs(vec![108, 1, 100, 118, 129], width), [(1, 1), (100, 118), (129, 129)]);
        assert_eq!(runs(vec![i64::MAX, i64::MIN], width).len(), 2);
        assert_eq!(runs(Vec::new(), width), []);
    }
}
