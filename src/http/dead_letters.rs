//! Dead letters: which, again, or gone. The same for an order over HTTP and for a command at a stopped node.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

use crate::buffer::{BufferError, DeadLetterFilter, State};
use crate::domain::{CorrelationId, DeadLetter, DeadLetterKey};

/// Dead letters one request may list or replay.
const PAGE_MAX: usize = 1000;

/// Of a corrected payload, in the log.
const AUDIT_CHARACTERS_MAX: usize = 1024;

/// Delivers one dead letter again through the current mapping; answers what became of it.
pub type Replay =
    Arc<dyn Fn(DeadLetter) -> LocalBoxFuture<'static, Result<(), ReplayError>> + Send + Sync>;

/// Why a letter was not delivered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// For a reason of its own: the next may fare better.
    #[error("{0}")]
    Letter(String),
    /// Its sink takes nothing at the moment: the next would wait as long, for the same answer.
    #[error("{0}")]
    Sink(String),
}

/// Which dead letters; all when empty.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplayRequest {
    pub filter: DeadLetterFilter,
    /// Only these; the filter still applies.
    pub keys: Vec<DeadLetterKey>,
    /// List: begin after this one.
    pub after: Option<DeadLetterKey>,
    /// At most this many, 1000 at most.
    pub limit: Option<usize>,
    /// Replay: a person's correction of the one letter in `keys`.
    pub payload: Option<String>,
}

/// What became of one letter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReplayResult {
    pub key: DeadLetterKey,
    /// `None`: delivered and removed from the dead letters.
    pub error: Option<String>,
    /// The sink takes nothing at the moment: its other letters were not tried and have no result.
    #[serde(default)]
    pub sink_failed: bool,
}

/// Who gave an order, for the log.
#[derive(Debug, Clone)]
pub struct Orderer {
    pub by: String,
    pub correlation_id: CorrelationId,
}

/// What is done about dead letters.
#[derive(Clone)]
pub struct DeadLetters {
    pub state: State,
    pub replay: Replay,
}

impl DeadLetters {
    /// A page of them.
    pub async fn list(&self, request: &ReplayRequest) -> Result<Vec<DeadLetter>, BufferError> {
        let limit = request.limit.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        if request.keys.is_empty() {
            let (filter, after) = (request.filter.clone(), request.after.clone());
            return self.state.dead_letters(filter, after, limit).await;
        }
        let mut found = Vec::new();
        for key in request.keys.iter().take(limit) {
            found.extend(self.find(request, key).await?);
        }
        Ok(found)
    }

    /// The same, without their payloads: what is done to each is done one after the other.
    async fn keys(&self, request: &ReplayRequest) -> Result<Vec<DeadLetterKey>, BufferError> {
        if request.keys.is_empty() {
            let letters = self.list(request).await?;
            return Ok(letters.into_iter().map(|letter| letter.key).collect());
        }
        let limit = request.limit.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        Ok(request.keys.iter().take(limit).cloned().collect())
    }

    /// None when it is gone, or the filter leaves it out.
    async fn find(
        &self,
        request: &ReplayRequest,
        key: &DeadLetterKey,
    ) -> Result<Option<DeadLetter>, BufferError> {
        let letter = self.state.dead_letter(key).await?;
        Ok(letter.filter(|letter| request.filter.matches(letter)))
    }

    /// One after the other, in key order, so the records of one device keep their order. A letter is removed only after
    /// its sink has it; killed between the two, the next replay finds it delivered and only removes it. A sink that
    /// fails itself is asked once.
    pub async fn replay(
        &self,
        request: &ReplayRequest,
        orderer: &Orderer,
    ) -> Result<Vec<ReplayResult>, BufferError> {
        let mut results = Vec::new();
        let mut failed_sinks = HashSet::new();
        for key in self.keys(request).await? {
            let sink = (key.stream.clone(), key.sink.clone());
            if failed_sinks.contains(&sink) {
                continue;
            }
            let Some(mut letter) = self.find(request, &key).await? else { continue };
            if let Some(payload) = &request.payload {
                letter.payload = payload.clone().into_bytes();
            }
            let outcome = (self.replay)(letter).await;
            let sink_failed = matches!(outcome, Err(ReplayError::Sink(_)));
            if sink_failed {
                failed_sinks.insert(sink);
            }
            let error = match outcome {
                Err(error) => Some(error.to_string()),
                Ok(()) => {
                    let removed = self.state.remove_dead_letters(vec![key.clone()]).await;
                    removed.err().map(|error| error.to_string())
                }
            };
            results.push(ReplayResult { key, error, sink_failed });
        }
        tell(request, &results, orderer);
        Ok(results)
    }

    /// For good; how many.
    pub async fn purge(
        &self,
        request: &ReplayRequest,
        orderer: &Orderer,
    ) -> Result<usize, BufferError> {
        let mut keys = Vec::new();
        for key in self.keys(request).await? {
            if self.find(request, &key).await?.is_some() {
                keys.push(key);
            }
        }
        self.state.remove_dead_letters(keys.clone()).await?;
        tracing::warn!(
            event = "dead_letters_purged",
            correlation_id = %orderer.correlation_id,
            by = orderer.by,
            first = keys.first().map(ToString::to_string),
            purged = keys.len(),
            "dead letters were purged by a person"
        );
        Ok(keys.len())
    }
}

fn tell(request: &ReplayRequest, results: &[ReplayResult], orderer: &Orderer) {
    let Orderer { by, correlation_id } = orderer;
    let delivered = results.iter().filter(|result| result.error.is_none()).count();
    match (&request.payload, results.first()) {
        (Some(payload), Some(result)) => tracing::info!(
            event = "dead_letter_fixed",
            %correlation_id,
            by,
            letter = %result.key,
            payload = cut(payload),
            error = result.error,
            "a dead letter was corrected by a person and replayed"
        ),
        _ => tracing::info!(
            event = "dead_letters_replayed",
            %correlation_id,
            by,
            first = results.first().map(|result| result.key.to_string()),
            delivered,
            failed = results.len() - delivered,
            "dead letters were replayed by a person"
        ),
    }
}

fn cut(payload: &str) -> &str {
    let end = payload.char_indices().nth(AUDIT_CHARACTERS_MAX).map_or(payload.len(), |(at, _)| at);
    &payload[..end]
}
