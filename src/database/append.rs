//! Time series: rows by binary COPY.

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::SinkExt as _;
use tokio_postgres::{Client, CopyInSink, Statement};

use super::catalog::{PlannedColumn, Shape};
use super::encode::{COPY_HEADER, COPY_TRAILER, Cell, convert};
use super::error::{DatabaseError, postgres};
use super::sql::quoted;
use super::transaction::Move;
use crate::crash::crash_point;
use crate::domain::{Arrival, Books, NodeName};
use crate::mapping::{Fault, Value};

/// The server works on one piece while the next is on its way.
const PIECE_BYTES: usize = 128 * 1024;

/// How a row of this table is written.
#[derive(Debug, Clone, PartialEq)]
pub struct AppendPlan {
    pub columns: Vec<PlannedColumn>,
    /// As it was when the columns were planned.
    pub shape: Shape,
    copy: String,
    time: bool,
    /// The node's name as an encoded field.
    node: Option<Bytes>,
    fields: i16,
}

impl AppendPlan {
    pub fn new(
        shape: Shape,
        columns: Vec<PlannedColumn>,
        time_column: &str,
        node_column: Option<(&str, &NodeName)>,
    ) -> AppendPlan {
        // A mapping may fill these columns by a field of its own.
        let mapped = |name: &str| columns.iter().any(|column| column.name == name);
        let time = !mapped(time_column);
        let node = node_column.filter(|(name, _)| !mapped(name));
        let mut names: Vec<String> = columns.iter().map(|column| quoted(&column.name)).collect();
        names.extend(time.then(|| quoted(time_column)));
        names.extend(node.map(|(name, _)| quoted(name)));
        let list = names.join(", ");
        let node = node.map(|(_, name)| {
            let mut field = BytesMut::new();
            Cell::Text(name.as_str().into()).put(&mut field);
            field.freeze()
        });
        AppendPlan {
            copy: format!("COPY {} ({list}) FROM STDIN (FORMAT binary)", shape.table),
            shape,
            // A table has at most 1,600 columns.
            fields: i16::try_from(names.len()).unwrap_or(i16::MAX),
            columns,
            time,
            node,
        }
    }

    /// Encodes one row behind the others; on a fault `out` is as before.
    pub fn encode(
        &self,
        values: &[Value<'_>],
        arrival: Arrival,
        out: &mut BytesMut,
    ) -> Result<(), Fault> {
        let start = out.len();
        out.put_i16(self.fields);
        for (value, column) in values.iter().zip(&self.columns) {
            match convert(value, column) {
                Ok(cell) => cell.put(out),
                Err(fault) => {
                    out.truncate(start);
                    return Err(fault);
                }
            }
        }
        if self.time {
            Cell::Timestamp(arrival.as_micros()).put(out);
        }
        if let Some(node) = &self.node {
            out.put_slice(node);
        }
        Ok(())
    }

    /// One transaction: the encoded rows, the cursor, commit.
    pub async fn write(
        &self,
        client: &Client,
        begin: &str,
        rows: Bytes,
        cursor: Move<'_>,
    ) -> Result<Books, DatabaseError> {
        if rows.is_empty() {
            let (begun, books) = tokio::join!(client.batch_execute(begin), cursor.commit(client));
            begun.map_err(postgres("begin"))?;
            return books;
        }
        let (copied, books) = {
            let (begun, copying) =
                tokio::join!(client.batch_execute(begin), client.copy_in(self.copy.as_str()));
            begun.map_err(postgres("begin"))?;
            let copying = copying.map_err(postgres("copy rows"))?;
            tokio::join!(send(copying, rows), cursor.commit(client))
        };
        copied.map_err(postgres("copy rows"))?;
        books
    }

    /// For several COPYs in one transaction.
    pub async fn prepare(&self, client: &Client) -> Result<Copying, DatabaseError> {
        client.prepare(&self.copy).await.map(Copying).map_err(postgres("copy rows"))
    }
}

/// A prepared COPY, in a transaction that someone else frames.
pub struct Copying(Statement);

impl Copying {
    /// Returns when the server has taken the rows.
    pub async fn copy(&self, client: &Client, rows: Bytes) -> Result<(), DatabaseError> {
        if rows.is_empty() {
            return Ok(());
        }
        let copying = client.copy_in(&self.0).await.map_err(postgres("copy rows"))?;
        send(copying, rows).await.map_err(postgres("copy rows"))
    }
}

/// Sends encoded rows and waits until the server took them.
async fn send(copying: CopyInSink<Bytes>, mut rows: Bytes) -> Result<(), tokio_postgres::Error> {
    let mut copying = std::pin::pin!(copying);
    copying.feed(Bytes::from_static(COPY_HEADER)).await?;
    while !rows.is_empty() {
        let piece = rows.split_to(rows.len().min(PIECE_BYTES));
        copying.feed(piece).await?;
    }
    copying.feed(Bytes::from_static(COPY_TRAILER)).await?;
    crash_point("crash_copying");
    let copied = copying.as_mut().finish().await;
    crash_point("crash_copied");
    copied.map(drop)
}
