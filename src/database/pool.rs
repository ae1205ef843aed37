//! One pool per database, shared by every writer, so that all of them together never hold more than `connections_max`
//! connections. The migrator's session is beside them, and while partitions are made so is that of its role.
//!
//! A connection is lent dirty: unless the borrower says that its transaction has ended and every answer was read, the
//! connection is closed instead of going back. The next borrower can therefore never inherit a running statement, an
//! open transaction or a server that no longer answers.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_postgres::Client;

use super::connect::connect;
use super::error::DatabaseError;
use crate::breaker::{Permit, Resting};
use crate::config::DatabaseSettings;
use crate::observe::DependencyView;

/// A connection that nobody used for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(300);
/// A connection is renewed after so long: certificates, passwords and a changed address take effect.
const LIFETIME_MAX: Duration = Duration::from_secs(3600);

/// Cheap to clone; every clone is the same pool.
#[derive(Clone)]
pub struct Pool {
    connections: bb8::Pool<Manager>,
    failures: Failures,
    limit: Duration,
    dependency: Arc<DependencyView>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("state", &self.connections.state()).finish()
    }
}

impl Pool {
    /// Connects nothing yet: the database may be away. What is learned from the connections is told to `dependency`.
    pub fn new(settings: &DatabaseSettings, dependency: Arc<DependencyView>) -> Pool {
        let failures = Failures::default();
        let connections = bb8::Pool::builder()
            .max_size(settings.connections_max.max(1))
            .min_idle(0)
            .connection_timeout(settings.pool_timeout.max(Duration::from_millis(1)))
            .idle_timeout(IDLE_MAX)
            .max_lifetime(LIFETIME_MAX)
            // Who borrows retries with a back-off of its own; a second one here would only hide the cause.
            .retry_connection(false)
            // A check would cost a round trip per batch; a dead connection fails its first statement just as clearly.
            .test_on_check_out(false)
            .error_sink(Box::new(failures.clone()))
            .build_unchecked(Manager {
                settings: Arc::new(settings.clone()),
                failures: failures.clone(),
            });
        Pool { connections, failures, limit: settings.pool_timeout, dependency }
    }

    /// A connection for one transaction, unless the breaker is open. Waits at most `pool_timeout`; a failed attempt to
    /// connect ends the wait with its cause.
    pub async fn get(&self) -> Result<Lease, DatabaseError> {
        let permit = self.dependency.breaker().pass();
        let permit = permit.map_err(|Resting { retry_in }| DatabaseError::Resting { retry_in })?;
        match self.connection().await {
            Ok(lent) => {
                let dependency = self.dependency.clone();
                Ok(Lease { lent, permit: Some(permit), dependency })
            }
            Err(error) => {
                if error.is_connection_trouble() {
                    permit.failed();
                }
                Err(error)
            }
        }
    }

    async fn connection(&self) -> Result<Lent, DatabaseError> {
        loop {
            let mut in_vain = None;
            let failed = self.failures.notified.notified();
            let lent = tokio::select! {
                biased;
                lent = self.connections.get_owned() => lent,
                () = failed => match self.connections.state().connections {
                    0 => return Err(self.unreachable()),
                    // No further connection is to be had, but those there are will be given back.
                    _ => {
                        in_vain = self.failures.last();
                        self.connections.get_owned().await
                    }
                },
            };
            match lent {
                // The server hung up while the connection lay idle.
                Ok(mut lent) if lent.client.is_closed() => lent.clean = false,
                Ok(mut lent) => {
                    lent.clean = false;
                    return Ok(lent);
                }
                Err(bb8::RunError::User(error)) => return Err(error),
                Err(bb8::RunError::TimedOut) => return Err(self.timed_out(in_vain)),
            }
        }
    }

    /// The server is not to blame for the wait while it serves others of us, unless one more was tried `in_vain` meanwhile.
    fn timed_out(&self, in_vain: Option<Arc<DatabaseError>>) -> DatabaseError {
        let limit = self.limit;
        match (self.connections.state().connections, in_vain) {
            (0, _) => self.unreachable(),
            (_, Some(cause)) => DatabaseError::NoFurther { limit, cause },
            (_, None) => DatabaseError::PoolTimedOut { limit },
        }
    }

    fn unreachable(&self) -> DatabaseError {
        let cause = self.failures.last().unwrap_or_else(|| {
            // An attempt may take longer than anybody waits here.
            let doing = "connect to the database";
            Arc::new(DatabaseError::TimedOut { doing, limit: self.limit })
        });
        DatabaseError::Unreachable { cause }
    }
}

type Lent = bb8::PooledConnection<'static, Manager>;

/// A lent connection. Dropping it closes the connection; [`Lease::give_back`] returns it to the pool.
pub struct Lease {
    lent: Lent,
    permit: Option<Permit>,
    dependency: Arc<DependencyView>,
}

impl Lease {
    /// Tells the breaker how the call ended. Dropped without, the call counts for nothing.
    pub fn learned<T>(&mut self, result: &Result<T, DatabaseError>) {
        let Some(permit) = self.permit.take() else { return };
        match result {
            Err(error) if error.is_connection_trouble() => permit.failed(),
            _ => {
                permit.succeeded();
                self.dependency.reachable();
            }
        }
    }

    /// Only after the last statement was answered and no transaction is open.
    pub fn give_back(mut self) {
        self.lent.clean = true;
    }
}

impl Deref for Lease {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.lent.client
    }
}

struct Connection {
    client: Client,
    clean: bool,
}

struct Manager {
    settings: Arc<DatabaseSettings>,
    failures: Failures,
}

impl bb8::ManageConnection for Manager {
    type Connection = Connection;
    type Error = DatabaseError;

    async fn connect(&self) -> Result<Connection, DatabaseError> {
        let client = connect(&self.settings).await?;
        self.failures.forget();
        Ok(Connection { client, clean: true })
    }

    /// Not asked: there is no test on check-out.
    async fn is_valid(&self, _: &mut Connection) -> Result<(), DatabaseError> {
        Ok(())
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        !connection.clean || connection.client.is_closed()
    }
}

/// The last failed attempt to connect since one succeeded, kept so that whoever waits for a connection learns the cause.
#[derive(Debug, Clone, Default)]
struct Failures {
    last: Arc<Mutex<Option<Arc<DatabaseError>>>>,
    notified: Arc<Notify>,
}

impl Failures {
    fn last(&self) -> Option<Arc<DatabaseError>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn forget(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl bb8::ErrorSink<DatabaseError> for Failures {
    fn sink(&self, error: DatabaseError) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(error));
        self.notified.notify_waiters();
    }

    fn boxed_clone(&self) -> Box<dyn bb8::ErrorSink<DatabaseError>> {
        Box::new(self.clone())
    }
}
