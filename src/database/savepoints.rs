//! What one transaction tries and may take back.

use std::cell::Cell;

use tokio_postgres::Client;

use super::error::{DatabaseError, postgres};
use crate::domain::ErrorClass;

/// Of one transaction at most. A session of PostgreSQL remembers 64 subtransactions; of more than that everyone who reads the
/// table has to ask the disk.
const SAVEPOINTS_MAX: usize = 48;

/// The savepoints of one open transaction.
pub struct Savepoints<'c> {
    client: &'c Client,
    set: Cell<usize>,
}

impl<'c> Savepoints<'c> {
    pub fn of(client: &'c Client) -> Savepoints<'c> {
        Savepoints { client, set: Cell::new(0) }
    }

    /// What is refused from here on fails what is around it.
    pub fn are_spent(&self) -> bool {
        self.set.get() >= SAVEPOINTS_MAX
    }

    /// Does this behind a savepoint, which is sent along with it. `Ok(Err(_))` is what the server says to the rows: then
    /// nothing of it was done, and the transaction goes on.
    ///
    /// # Errors
    /// When the transaction has failed, or all that is done behind an outer savepoint: also of the class of data, once they
    /// are spent.
    pub async fn attempt<T>(
        &self,
        name: &str,
        work: impl Future<Output = Result<T, DatabaseError>>,
    ) -> Result<Result<T, DatabaseError>, DatabaseError> {
        if self.are_spent() {
            return work.await.map(Ok);
        }
        self.set.set(self.set.get() + 1);
        let save = format!("SAVEPOINT {name}");
        let (saved, done) = tokio::join!(self.client.batch_execute(&save), work);
        saved.map_err(postgres("set a savepoint"))?;
        match done {
            Err(error) if error.class() == ErrorClass::Data => {
                let undo = format!("ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}");
                self.client.batch_execute(&undo).await.map_err(postgres("roll back"))?;
                Ok(Err(error))
            }
            Err(error) => Err(error),
            Ok(done) => Ok(Ok(done)),
        }
    }
}
