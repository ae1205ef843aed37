//! Rows that the server does not take, and the dead letters they become.

use std::ops::Range;

use super::batch::Batch;
use super::error::DatabaseError;
use super::table_sink::TableSink;
use crate::domain::{ErrorClass, Reason, Stage};
use crate::mapping::Fault;

/// What does not go in, and why.
#[derive(Debug)]
pub struct Refused {
    pub rows: Range<usize>,
    pub error: DatabaseError,
}

/// What the server said to a single row, or that there was no way to tell it.
pub fn fault(error: &DatabaseError) -> Fault {
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

/// Makes a row a dead letter of its batch, which is kept before the cursor passes it.
pub fn set_aside(
    sink: &TableSink,
    batch: &mut Batch,
    row: usize,
    error: &DatabaseError,
) -> Result<(), DatabaseError> {
    sink.view().meters.error(ErrorClass::Data).inc();
    let gone = |what: String| DatabaseError::Standing {
        problem: format!("{what} was refused and is no longer at hand: {error}"),
        remedy: "restart this writer".to_owned(),
    };
    let mark = batch.rows.get(row).ok_or_else(|| gone(format!("row {row} of a batch")))?;
    let sequence = mark.sequence;
    let letter = batch.with_record(sequence, |record| {
        let sqlstate = error.sqlstate().map(str::to_owned);
        fault(error).into_letter(&sink.stream.name, &sink.table.sink, record, sqlstate)
    });
    batch.set_aside(letter.ok_or_else(|| gone(format!("record {sequence}")))?);
    Ok(())
}
