//! The cursor row: where a sink stands and its books, moved in the transaction of the rows.
//!
//! The move is the last statement before COMMIT and compares with the position the writer believes in. When the row is
//! elsewhere the statement *fails* (it divides by the number of rows it touched) instead of merely touching nothing, so
//! COMMIT may be sent without waiting for its answer: after a failure the server turns it into a rollback. That makes
//! the cursor row the detector of doubles and the fence against a second writer in one round trip.

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::bookkeeping;
use super::error::{DatabaseError, postgres};
use super::fold::Folded;
use super::transaction::Move;
use crate::domain::{Books, LogIdentity, NodeName, Sequence, SinkName, StreamName};

/// A value and its type.
type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// Which cursor row, and the statements on it.
#[derive(Debug, Clone)]
pub struct Cursor {
    pub node: String,
    pub log: String,
    pub stream: String,
    pub sink: String,
    select: String,
    insert: String,
    advance: String,
    amend: String,
}

/// What one transaction adds to the books. Signed, because a replay takes a dead letter back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub delivered: i64,
    pub filtered: i64,
    pub incomplete: i64,
    pub dead_lettered: i64,
    pub lost: i64,
    pub unchanged: i64,
    pub stale: i64,
}

impl Tally {
    fn counts(&self) -> [i64; 7] {
        [
            self.delivered,
            self.filtered,
            self.incomplete,
            self.dead_lettered,
            self.lost,
            self.unchanged,
            self.stale,
        ]
    }

    /// With what latest state made of the rows.
    pub fn with(self, folded: Folded) -> Tally {
        let Folded { unchanged, stale } = folded;
        Tally { unchanged: unchanged as i64, stale: stale as i64, ..self }
    }

    /// What happened between two states of the books.
    pub fn between(before: &Books, after: &Books) -> Tally {
        let grown = |after: u64, before: u64| after as i64 - before as i64;
        Tally {
            delivered: grown(after.delivered, before.delivered),
            filtered: grown(after.filtered, before.filtered),
            incomplete: grown(after.incomplete, before.incomplete),
            dead_lettered: grown(after.dead_lettered, before.dead_lettered),
            lost: grown(after.lost, before.lost),
            unchanged: grown(after.unchanged, before.unchanged),
            stale: grown(after.stale, before.stale),
        }
    }
}

const BOOKS: &str =
    "sequence, base, delivered, filtered, incomplete, dead_lettered, lost, unchanged, stale";
const ADDED: &str = "delivered = delivered + $7, filtered = filtered + $8, incomplete = incomplete + $9, \
                     dead_lettered = dead_lettered + $10, lost = lost + $11, unchanged = unchanged + $12, \
                     stale = stale + $13, updated_at = now()";
const OF_THIS_SINK: &str = "node = $1 AND log = $2 AND stream = $3 AND sink = $4";

/// The rows before it hold a lock that keeps the types as they were when these rows were read.
const OF_THIS_SHAPE: &str = "($14::text IS NULL OR $15::oid[] = (\
    SELECT array_agg(a.atttypid ORDER BY a.attnum) FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = to_regclass($14) AND a.attnum > 0 AND NOT a.attisdropped))";

impl Cursor {
    pub fn new(
        schema: &str,
        node: &NodeName,
        log: LogIdentity,
        stream: &StreamName,
        sink: &SinkName,
    ) -> Cursor {
        let table = bookkeeping::cursors(schema);
        Cursor {
            node: node.to_string(),
            log: log.to_string(),
            stream: stream.to_string(),
            sink: sink.to_string(),
            select: format!("SELECT {BOOKS} FROM {table} WHERE {OF_THIS_SINK}"),
            insert: format!(
                "INSERT INTO {table} (node, log, stream, sink, {BOOKS}) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) ON CONFLICT DO NOTHING"
            ),
            advance: fenced(&format!(
                "UPDATE {table} SET sequence = $6, {ADDED} WHERE {OF_THIS_SINK} AND sequence = $5 AND {OF_THIS_SHAPE} \
                 RETURNING {BOOKS}"
            )),
            // For a replay: the letter's record ($5) must have been passed; the position stays.
            amend: fenced(&format!(
                "UPDATE {table} SET {ADDED} WHERE {OF_THIS_SINK} AND sequence >= $5 AND $6::bigint = $5 \
                 RETURNING {BOOKS}"
            )),
        }
    }

    /// The row, if there is one.
    pub async fn read(&self, client: &Client) -> Result<Option<Books>, DatabaseError> {
        let names = [
            (&self.node as _, Type::TEXT),
            (&self.log as _, Type::TEXT),
            (&self.stream as _, Type::TEXT),
            (&self.sink as _, Type::TEXT),
        ];
        let rows =
            client.query_typed(&self.select, &names).await.map_err(postgres("read the cursor"))?;
        rows.first().map(|row| books(row, 0)).transpose()
    }

    /// Makes the row unless another has just made it.
    pub async fn create(&self, client: &Client, books: &Books) -> Result<(), DatabaseError> {
        let mut counts = vec![books.cursor.0 as i64, books.base.0 as i64];
        counts.extend(Tally::between(&Books::default(), books).counts());
        self.run(client, &self.insert, &counts, &[])
            .await
            .map(drop)
            .map_err(postgres("make the cursor"))
    }

    /// Moves the cursor and adds to the books: the last statement of a transaction.
    pub async fn advance(&self, client: &Client, step: Move<'_>) -> Result<Books, DatabaseError> {
        let table = step.shape.map(|shape| shape.table.as_str());
        let types = step.shape.map(|shape| shape.types.as_slice());
        let shape = [(&table as _, Type::TEXT), (&types as _, Type::OID_ARRAY)];
        let counts = counts(step.from, step.to, step.tally);
        moved(self.run(client, &self.advance, &counts, &shape).await)
    }

    /// Adds to the books where the cursor has passed `record`: the last statement of a replay.
    pub async fn amend(
        &self,
        client: &Client,
        record: Sequence,
        tally: Tally,
    ) -> Result<Books, DatabaseError> {
        moved(self.run(client, &self.amend, &counts(record, record, tally), &[]).await)
    }

    async fn run(
        &self,
        client: &Client,
        statement: &str,
        counts: &[i64],
        more: &[Parameter<'_>],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        let names = [&self.node, &self.log, &self.stream, &self.sink];
        let names = names.map(|name| (name as &(dyn ToSql + Sync), Type::TEXT));
        let counts = counts.iter().map(|count| (count as _, Type::INT8));
        let parameters: Vec<Parameter<'_>> =
            names.into_iter().chain(counts).chain(more.iter().cloned()).collect();
        client.query_typed(statement, &parameters).await
    }
}

fn counts(from: Sequence, to: Sequence, tally: Tally) -> Vec<i64> {
    [from.0 as i64, to.0 as i64].into_iter().chain(tally.counts()).collect()
}

/// What the fenced statement said.
fn moved(answer: Result<Vec<Row>, tokio_postgres::Error>) -> Result<Books, DatabaseError> {
    match answer {
        Ok(rows) => match rows.first() {
            Some(row) => books(row, 1),
            None => Err(DatabaseError::CursorMoved),
        },
        Err(error) if error.code() == Some(&SqlState::DIVISION_BY_ZERO) => {
            Err(DatabaseError::CursorMoved)
        }
        Err(error) => Err(postgres("move the cursor")(error)),
    }
}

/// Makes an UPDATE that touches no row an error (22012) of the transaction.
fn fenced(update: &str) -> String {
    format!(
        "WITH moved AS ({update}) \
         SELECT 1 / (SELECT count(*) FROM moved)::int, moved.* FROM (VALUES (1)) AS one LEFT JOIN moved ON true"
    )
}

fn books(row: &Row, at: usize) -> Result<Books, DatabaseError> {
    let count = |index: usize| {
        row.try_get::<_, i64>(at + index)
            .map(|count| u64::try_from(count).unwrap_or(0))
            .map_err(postgres("read the cursor"))
    };
    Ok(Books {
        cursor: Sequence(count(0)?),
        base: Sequence(count(1)?),
        delivered: count(2)?,
        filtered: count(3)?,
        incomplete: count(4)?,
        dead_lettered: count(5)?,
        lost: count(6)?,
        unchanged: count(7)?,
        stale: count(8)?,
    })
}
