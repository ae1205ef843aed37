//! What the node says of itself at `/streams`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::node::Node;

/// The whole answer; members that a test does not look at are left out.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Streams {
    pub streams: Vec<StreamState>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct StreamState {
    pub name: String,
    #[serde(default)]
    pub status: StreamStatus,
    #[serde(default)]
    pub sinks: Vec<SinkState>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct StreamStatus {
    pub subscribed: bool,
    /// The last durable record: the count of all that were received.
    pub sequence: u64,
    pub trouble: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct SinkState {
    pub sink: String,
    /// What the cursor passed and no book accounts for.
    #[serde(default)]
    pub difference: Option<i64>,
    #[serde(default)]
    pub status: SinkStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SinkStatus {
    pub kind: String,
    pub state: String,
    pub trouble: Option<String>,
    pub books: Option<Books>,
    /// Microseconds since 1970.
    pub newest_delivered: Option<i64>,
    /// That wait for a person.
    pub dead_letters: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Books {
    pub cursor: u64,
    pub base: u64,
    pub delivered: u64,
    pub filtered: u64,
    pub incomplete: u64,
    pub dead_lettered: u64,
    pub lost: u64,
}

impl Streams {
    /// Asks the node.
    ///
    /// # Errors
    /// When it does not answer, or not in this form.
    pub fn of(node: &Node) -> Result<Self> {
        let answer = node.get("/streams")?;
        serde_json::from_str(&answer.body)
            .with_context(|| format!("/streams ({}): {}", answer.status, answer.body))
    }

    pub fn stream(&self, name: &str) -> Option<&StreamState> {
        self.streams.iter().find(|stream| stream.name == name)
    }

    /// A node that lists no stream has not subscribed to all of them.
    pub fn all_subscribed(&self) -> bool {
        !self.streams.is_empty() && self.streams.iter().all(|stream| stream.status.subscribed)
    }

    /// Whether each of these is listed, and so; what the node leaves out is not so.
    pub fn each(&self, names: &[String], is_so: impl Fn(&StreamState) -> bool) -> bool {
        !names.is_empty() && names.iter().all(|name| self.stream(name).is_some_and(&is_so))
    }
}

impl StreamState {
    pub fn is_drained(&self) -> bool {
        !self.sinks.is_empty() && self.sinks.iter().all(|sink| self.pending(sink) == Some(0))
    }

    /// Records the sink has not dealt with; unknown before it has read its cursor.
    pub fn pending(&self, sink: &SinkState) -> Option<u64> {
        let books = sink.status.books?;
        Some(self.status.sequence.saturating_sub(books.cursor))
    }

    pub fn sink(&self, name: &str) -> Option<&SinkState> {
        self.sinks.iter().find(|sink| sink.sink == name)
    }
}

impl SinkState {
    pub fn books(&self) -> Books {
        self.status.books.unwrap_or_default()
    }

    pub fn is_kafka(&self) -> bool {
        self.status.kind == "kafka"
    }

    /// Seconds since the newest record that was delivered had arrived.
    pub fn age_seconds(&self) -> Option<f64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        Some((now.as_micros() as f64 / 1e6 - self.status.newest_delivered? as f64 / 1e6).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_node_leaves_out_is_not_so() {
        let listed = |names: &[&str]| {
            let state = |name: &&str| StreamState { name: name.to_string(), ..Default::default() };
            Streams { streams: names.iter().map(state).collect() }
        };
        let wanted = ["a".to_owned(), "b".to_owned()];
        assert!(listed(&["a", "b"]).each(&wanted, |_| true));
        assert!(!listed(&["a", "b"]).each(&wanted, |stream| stream.name == "a"));
        assert!(!listed(&["a"]).each(&wanted, |_| true));
        assert!(!listed(&["a"]).each(&[], |_| true));
        assert!(!listed(&[]).all_subscribed());
        assert!(!StreamState::default().is_drained());
    }
}
