//! Carries a plan out: one connection, one lock, one transaction per file.

use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_postgres::error::ErrorPosition;
use tokio_postgres::types::ToSql;

use super::error::{APPLY, MigrateError};
use super::plan::{Applied, Migration, Plan, plan};
use super::source::read_folder;
use crate::breaker::Resting;
use crate::config::DatabaseSettings;
use crate::database::maintenance::{prepare_session, quoted};
use crate::database::{DatabaseError, bookkeeping, connect, postgres};
use crate::observe::DependencyView;

/// Between two looks at a lock someone else holds.
const LOCK_POLL: Duration = Duration::from_millis(200);

const LEDGER_SQL: &str = "CREATE TABLE IF NOT EXISTS schema_migrations (\
    version integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL, \
    applied_at timestamptz NOT NULL DEFAULT now(), duration_ms integer NOT NULL)";

/// How files and ledger stand to each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    pub applied: Vec<Applied>,
    pub plan: Plan,
}

/// A connection of the migrator's own. Dropping it ends the server's session and with that its lock, so that the lock
/// is let go on every path, a cancelled one included.
pub struct Session {
    client: Client,
    database: String,
    settings: DatabaseSettings,
}

impl Session {
    /// Connects; `database` is the name in the configuration, which files must name too.
    pub async fn open(database: &str, settings: &DatabaseSettings) -> Result<Self, MigrateError> {
        let settings = settings.as_migrator();
        let client = connect(&settings).await?;
        let session = Session { client, database: database.to_owned(), settings };
        session
            .bounded("prepare the session", prepare_session(&session.client, &session.settings))
            .await?;
        Ok(session)
    }

    /// As [`Session::open`], unless the breaker of the database is open; it is told how it went.
    pub async fn open_if_let(
        database: &str,
        settings: &DatabaseSettings,
        view: &DependencyView,
    ) -> Result<Self, MigrateError> {
        let permit = view.breaker().pass();
        let permit = permit.map_err(|Resting { retry_in }| DatabaseError::Resting { retry_in })?;
        let session = Session::open(database, settings).await;
        match &session {
            Err(error) if error.is_connection_trouble() => permit.failed(),
            _ => permit.succeeded(),
        }
        session
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Compares the files with the ledger; changes nothing.
    pub async fn standing(&self) -> Result<Standing, MigrateError> {
        let files = match &self.settings.migrations_dir {
            Some(folder) => read_folder(folder)?,
            None => return Ok(Standing { applied: self.applied().await?, plan: Plan::default() }),
        };
        let applied = self.applied().await?;
        let plan = plan(&self.database, &files, &applied)
            .map_err(|refusals| MigrateError::Refused { refusals })?;
        Ok(Standing { applied, plan })
    }

    /// Applies what is pending, under the lock, and answers with what was applied. The node's own tables come first.
    ///
    /// # Errors
    /// The first file that fails ends it: that file is rolled back, those before it stay.
    pub async fn apply(&self) -> Result<Vec<Migration>, MigrateError> {
        self.apply_unless(&|| false).await
    }

    /// As [`Session::apply`]; asks before it waits for the lock and before each file whether it is to stop.
    ///
    /// # Errors
    /// `Interrupted` when it was told to stop before everything was applied.
    pub async fn apply_unless(
        &self,
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<Migration>, MigrateError> {
        self.lock(stop).await?;
        let result = self.apply_locked(stop).await;
        let unlocked = self.unlock().await;
        let done = result?;
        unlocked?;
        Ok(done)
    }

    async fn apply_locked(&self, stop: &dyn Fn() -> bool) -> Result<Vec<Migration>, MigrateError> {
        self.make_own_tables().await?;
        let pending = self.standing().await?.plan.pending;
        for (done, migration) in pending.iter().enumerate() {
            if stop() {
                return Err(MigrateError::Interrupted { left: pending.len() - done });
            }
            let started = Instant::now();
            if migration.in_transaction {
                self.run_in_transaction(migration).await?;
            } else {
                self.run_alone(migration).await?;
            }
            self.bounded("prepare the session", prepare_session(&self.client, &self.settings))
                .await?;
            tracing::info!(
                event = "migration_applied",
                database = self.database,
                file = migration.name,
                duration_ms = started.elapsed().as_millis() as u64,
                "a migration was applied"
            );
        }
        Ok(pending)
    }

    /// Schema, ledger and the node's bookkeeping.
    async fn make_own_tables(&self) -> Result<(), MigrateError> {
        let schema = &self.settings.schema;
        // Asked first: IF NOT EXISTS needs the right to create even when there is nothing to create.
        let there = "SELECT FROM pg_namespace WHERE nspname = $1";
        let look = async {
            let found = self.client.query_opt(there, &[schema]).await;
            found.map_err(postgres("look for the schema"))
        };
        if self.bounded("look for the schema", look).await?.is_none() {
            self.execute(
                "create the schema",
                &format!("CREATE SCHEMA IF NOT EXISTS {}", quoted(schema)),
            )
            .await?;
        }
        self.execute("create the ledger schema_migrations", LEDGER_SQL).await?;
        self.execute("create the node's own tables", &bookkeeping::statements(schema).join("; "))
            .await?;
        let seen = bookkeeping::latest_seen(schema);
        let look = async {
            let found = self.client.query_opt(bookkeeping::IS_WHOLE, &[&seen]).await;
            found.map_err(postgres("look at the node's own tables"))
        };
        match self.bounded("look at the node's own tables", look).await? {
            Some(_) => Ok(()),
            None => {
                self.execute("alter the node's own tables", &bookkeeping::addition(schema)).await
            }
        }
    }

    async fn run_in_transaction(&self, migration: &Migration) -> Result<(), MigrateError> {
        let started = Instant::now();
        self.execute("begin", "BEGIN").await?;
        let begun = self.transaction().await?;
        let result = self.run_between(migration, &begun, started).await;
        let end = if result.is_ok() { "COMMIT" } else { "ROLLBACK" };
        let ended = self.execute("end the transaction", end).await;
        match result {
            // Not while the session does not answer: that would be one more wait.
            Err(error) if ended.is_ok() => {
                return Err(self.unless_committed(&begun, migration, error).await);
            }
            result => result?,
        }
        // What is deferred fails only now.
        ended.map_err(|error| in_file(migration, error))?;
        self.confirm(migration).await
    }

    /// The file, and its row in the ledger, inside the transaction that was begun.
    async fn run_between(
        &self,
        migration: &Migration,
        begun: &str,
        started: Instant,
    ) -> Result<(), MigrateError> {
        self.execute(APPLY, &migration.sql).await.map_err(|error| in_file(migration, error))?;
        if self.transaction().await? != begun {
            return Err(MigrateError::EndsItsTransaction {
                file: migration.name.clone(),
                checksum: migration.checksum.clone(),
            });
        }
        self.record(migration, started).await
    }

    /// ROLLBACK succeeds where the file itself has committed before it failed, too: only the server knows what became of
    /// the transaction it was begun in.
    async fn unless_committed(
        &self,
        begun: &str,
        migration: &Migration,
        error: MigrateError,
    ) -> MigrateError {
        match error {
            MigrateError::File { file, line, source } if self.is_committed(begun).await => {
                let (checksum, source) = (migration.checksum.clone(), source.into());
                MigrateError::FailedAfterItsCommit { file, checksum, line, source }
            }
            error => error,
        }
    }

    async fn is_committed(&self, transaction: &str) -> bool {
        let sql = "SELECT pg_xact_status($1::text::xid8)";
        let ask = async {
            let row = self.client.query_one(sql, &[&transaction]).await;
            row.map_err(postgres("ask what became of the transaction"))
        };
        let answer = self.bounded("ask what became of the transaction", ask).await;
        answer.is_ok_and(|row| row.get::<_, Option<&str>>(0) == Some("committed"))
    }

    async fn run_alone(&self, migration: &Migration) -> Result<(), MigrateError> {
        let started = Instant::now();
        self.execute(APPLY, &migration.sql).await.map_err(|error| in_file(migration, error))?;
        // Without its row it would run once more.
        self.record(migration, started).await.map_err(|error| in_file(migration, error))
    }

    async fn record(&self, migration: &Migration, started: Instant) -> Result<(), MigrateError> {
        let ledger = format!(
            "INSERT INTO {}.schema_migrations (version, name, checksum, duration_ms) \
             VALUES ($1, $2, $3, $4)",
            quoted(&self.settings.schema)
        );
        let duration_ms = i32::try_from(started.elapsed().as_millis()).unwrap_or(i32::MAX);
        let write = async {
            let values: [&(dyn ToSql + Sync); 4] =
                [&migration.version, &migration.name, &migration.checksum, &duration_ms];
            self.client.execute(&ledger, &values).await.map_err(postgres("write the ledger"))
        };
        self.bounded("write the ledger", write).await.map(drop)
    }

    /// COMMIT may answer Ok after a rollback: only the ledger tells.
    async fn confirm(&self, migration: &Migration) -> Result<(), MigrateError> {
        let applied = self.applied().await?;
        if applied.iter().any(|row| row.checksum == migration.checksum) {
            return Ok(());
        }
        let source = DatabaseError::Standing {
            problem: "the transaction was rolled back".to_owned(),
            remedy: "the server's log says why".to_owned(),
        };
        Err(MigrateError::File { file: migration.name.clone(), line: None, source })
    }

    /// Tells one transaction from the next.
    async fn transaction(&self) -> Result<String, MigrateError> {
        let row = self.client.query_one("SELECT pg_current_xact_id()::text", &[]);
        let asked = async { row.await.map_err(postgres("ask for the transaction")) };
        Ok(self.bounded("ask for the transaction", asked).await?.get(0))
    }

    async fn applied(&self) -> Result<Vec<Applied>, MigrateError> {
        let ledger = format!("{}.schema_migrations", quoted(&self.settings.schema));
        let read = async {
            let there = "SELECT to_regclass($1::text) IS NOT NULL";
            let there = self.client.query_one(there, &[&ledger]).await?;
            if !there.get::<_, bool>(0) {
                return Ok(Vec::new());
            }
            let rows = format!("SELECT version, name, checksum FROM {ledger} ORDER BY version");
            self.client.query(&rows, &[]).await
        };
        let read = async { read.await.map_err(postgres("read the ledger")) };
        let rows = self.bounded("read the ledger", read).await?;
        let applied = |row: &tokio_postgres::Row| Applied {
            version: row.get(0),
            name: row.get(1),
            checksum: row.get(2),
        };
        Ok(rows.iter().map(applied).collect())
    }

    /// Polls instead of waiting inside the server, so that whoever runs this can be told to stop.
    async fn lock(&self, stop: &dyn Fn() -> bool) -> Result<(), MigrateError> {
        let started = Instant::now();
        let key = self.lock_key();
        let sql = "SELECT pg_try_advisory_lock(hashtextextended($1, 0))";
        loop {
            let try_lock = async {
                self.client.query_one(sql, &[&key]).await.map_err(postgres("take the lock"))
            };
            if self.bounded("take the lock", try_lock).await?.get(0) {
                return Ok(());
            }
            if started.elapsed() >= self.settings.query_timeout {
                let holder = self.lock_holder(&key).await.unwrap_or_default();
                return Err(MigrateError::Locked { waited: started.elapsed(), holder });
            }
            if stop() {
                let left = self.standing().await?.plan.pending.len();
                return Err(MigrateError::Interrupted { left });
            }
            sleep(LOCK_POLL).await;
        }
    }

    async fn unlock(&self) -> Result<(), MigrateError> {
        let sql = "SELECT pg_advisory_unlock(hashtextextended($1, 0))";
        let key = self.lock_key();
        let unlock =
            async { self.client.query_one(sql, &[&key]).await.map_err(postgres("free the lock")) };
        self.bounded("free the lock", unlock).await.map(drop)
    }

    /// Old and new stacks side by side use schemas of their own, and so locks of their own.
    fn lock_key(&self) -> String {
        format!("telemetry migrations of {}", self.settings.schema)
    }

    /// Whom to look for, in brackets.
    async fn lock_holder(&self, key: &str) -> Option<String> {
        let sql = "SELECT format(' (process %s of %s at %s)', pid, application_name, \
                          coalesce(client_addr::text, 'a local socket')) \
                   FROM pg_locks JOIN pg_stat_activity USING (pid) \
                   WHERE locktype = 'advisory' AND granted AND pg_locks.database = \
                         (SELECT oid FROM pg_database WHERE datname = current_database()) \
                     AND (classid::bigint << 32 | objid::bigint) = hashtextextended($1, 0) LIMIT 1";
        let row = self.client.query_opt(sql, &[&key]).await.ok()??;
        row.get(0)
    }

    async fn execute(&self, doing: &'static str, sql: &str) -> Result<(), MigrateError> {
        let run = async { self.client.batch_execute(sql).await.map_err(postgres(doing)) };
        self.bounded(doing, run).await
    }

    /// The server ends a statement after `query_timeout`; a server that does not answer at all is given up on.
    async fn bounded<T>(
        &self,
        doing: &'static str,
        step: impl Future<Output = Result<T, DatabaseError>>,
    ) -> Result<T, MigrateError> {
        let limit = self.settings.query_timeout + self.settings.statement_timeout;
        match timeout(limit, step).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(DatabaseError::TimedOut { doing, limit }.into()),
        }
    }
}

fn in_file(migration: &Migration, error: MigrateError) -> MigrateError {
    let MigrateError::Database(source) = error else { return error };
    let (file, line) = (migration.name.clone(), line_of(&migration.sql, &source));
    if migration.in_transaction {
        MigrateError::File { file, line, source }
    } else {
        let checksum = migration.checksum.clone();
        MigrateError::FileWithoutTransaction { file, checksum, line, source: source.into() }
    }
}

/// The server counts characters from 1.
fn line_of(sql: &str, error: &DatabaseError) -> Option<usize> {
    let DatabaseError::Postgres { source, .. } = error else { return None };
    let Some(ErrorPosition::Original(position)) = source.as_db_error()?.position() else {
        return None;
    };
    let before = sql.chars().take((*position as usize).saturating_sub(1));
    Some(before.filter(|c| *c == '\n').count() + 1)
}
