//! Calls the SQL functions a database is configured with, e.g. roll-ups.

use std::time::SystemTime;

use tokio::time::timeout;
use tokio_postgres::Client;

use super::sql::quoted_path;
use crate::config::{DatabaseSettings, JobSettings};
use crate::database::error::{DatabaseError, postgres};

/// Calls the job's function for the last `lookback`. The server ends it after `query_timeout`; should the server not
/// answer at all, so do we, and the connection is then of no more use.
pub async fn run_job(
    client: &Client,
    settings: &DatabaseSettings,
    job: &JobSettings,
) -> Result<(), DatabaseError> {
    let to = SystemTime::now();
    let from = to.checked_sub(job.lookback).unwrap_or(SystemTime::UNIX_EPOCH);
    let sql = format!("SELECT {}($1::timestamptz, $2::timestamptz)", quoted_path(&job.function));
    let limit = settings.query_timeout + settings.statement_timeout;
    match timeout(limit, client.execute(&sql, &[&from, &to])).await {
        Ok(done) => done.map(drop).map_err(postgres("run a job")),
        Err(_) => Err(DatabaseError::TimedOut { doing: "run a job", limit }),
    }
}
