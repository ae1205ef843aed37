//! How full the edges of the picture in `src/lib.rs` are, each beside its bound.

use prometheus_client::metrics::gauge::Gauge;

/// An edge that holds something; each stream or sink has its own, unless the whole node shares one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// Messages of a stream, received and not yet acknowledged.
    Unacknowledged,
    /// Batches of a stream at the buffer's writer.
    AppendQueue,
    /// Bytes in memory for sinks that keep up.
    Tail,
    /// Bytes of the log on disk.
    Log,
    /// Records of a stream at Kafka, not yet passed by the cursor.
    InFlight,
    /// Records of a table sink's next transaction.
    Batch,
}

impl Edge {
    /// The label value.
    pub fn code(self) -> &'static str {
        match self {
            Edge::Unacknowledged => "unacknowledged",
            Edge::AppendQueue => "append_queue",
            Edge::Tail => "tail",
            Edge::Log => "log",
            Edge::InFlight => "in_flight",
            Edge::Batch => "batch",
        }
    }
}

/// The depth of one edge; whoever fills and empties it holds this.
#[derive(Debug, Clone)]
pub struct EdgeMeter(pub(super) Gauge);

impl EdgeMeter {
    pub fn set(&self, depth: usize) {
        self.0.set(i64::try_from(depth).unwrap_or(i64::MAX));
    }

    /// One more, until what is returned is dropped.
    pub fn enter(&self) -> Entered {
        self.0.inc();
        Entered(self.0.clone())
    }
}

/// Something on an edge.
#[derive(Debug)]
pub struct Entered(Gauge);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.dec();
    }
}
