//! Orders: parts and dead letters.

use std::sync::Arc;

use actix::Recipient;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

use crate::buffer::{BufferError, DeadLetterFilter, State};
use crate::domain::{Changes, CorrelationId, DeadLetter, DeadLetterKey};
use crate::observe::Board;
use crate::part::{OrderPart, PartOrder};

/// Dead letters one request may list or replay.
const PAGE_MAX: usize = 1000;

/// Of a corrected payload, in the log.
const AUDIT_CHARACTERS_MAX: usize = 1024;

/// Delivers one dead letter again through the current mapping; answers what became of it.
pub type Replay =
    Arc<dyn Fn(DeadLetter) -> LocalBoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Takes the changed configuration, or only compares it with the one in force.
pub type Reload = Arc<
    dyn Fn(bool, CorrelationId) -> LocalBoxFuture<'static, Result<Changes, String>> + Send + Sync,
>;

/// What orders need.
#[derive(Clone)]
pub struct ControlState {
    pub supervisor: Recipient<OrderPart>,
    pub letters: State,
    pub board: Arc<Board>,
    pub replay: Replay,
    pub reload: Reload,
}

pub fn routes(config: &mut web::ServiceConfig) {
    config
        .route("/parts", web::get().to(parts))
        .route("/parts/{name:.*}/{order}", web::post().to(order_part))
        .route("/reload", web::post().to(reload))
        .route("/dlq/list", web::post().to(list))
        .route("/dlq/replay", web::post().to(replay))
        .route("/dlq/purge", web::post().to(purge));
}

async fn parts(board: web::Data<Board>) -> HttpResponse {
    HttpResponse::Ok().json(board.parts())
}

async fn order_part(
    state: web::Data<ControlState>,
    correlation_id: web::ReqData<CorrelationId>,
    path: web::Path<(String, String)>,
) -> HttpResponse {
    let (name, order) = path.into_inner();
    let order = match order.as_str() {
        "restart" => PartOrder::Restart,
        "pause" => PartOrder::Pause,
        "resume" => PartOrder::Resume,
        other => return refused(format!("no order {other:?}: restart, pause, resume")),
    };
    let correlation_id = correlation_id.into_inner();
    match state.supervisor.send(OrderPart { name: name.clone(), order, correlation_id }).await {
        Ok(true) => HttpResponse::Ok().json(serde_json::json!({ "part": name, "order": order })),
        Ok(false) => HttpResponse::NotFound()
            .json(serde_json::json!({ "error": format!("no part that takes this order is called {name:?}") })),
        Err(_) => HttpResponse::ServiceUnavailable()
            .json(serde_json::json!({ "error": "the node is stopping" })),
    }
}

/// How to reload.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReloadRequest {
    /// Only tell what would change.
    pub compare: bool,
}

async fn reload(
    state: web::Data<ControlState>,
    correlation_id: web::ReqData<CorrelationId>,
    request: web::Json<ReloadRequest>,
) -> HttpResponse {
    match (state.reload)(request.compare, correlation_id.into_inner()).await {
        Ok(changes) => HttpResponse::Ok().json(changes),
        Err(error) => {
            HttpResponse::UnprocessableEntity().json(serde_json::json!({ "error": error }))
        }
    }
}

fn refused(error: String) -> HttpResponse {
    HttpResponse::BadRequest().json(serde_json::json!({ "error": error }))
}

fn broken(error: &BufferError) -> HttpResponse {
    HttpResponse::InternalServerError().json(serde_json::json!({ "error": error.to_string() }))
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

/// Who is at the other end of the control socket, as the system says.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    pub uid: u32,
}

impl Peer {
    /// For the log. Whose token an order over TCP bore is told by the guard.
    fn of(request: &HttpRequest) -> String {
        let peer = request.conn_data::<Peer>();
        peer.map_or_else(
            || "a token: see http_order".to_owned(),
            |peer| format!("uid {}", peer.uid),
        )
    }
}

/// What became of one letter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReplayResult {
    pub key: DeadLetterKey,
    /// `None`: delivered and removed from the dead letters.
    pub error: Option<String>,
}

async fn select(
    state: &ControlState,
    request: &ReplayRequest,
) -> Result<Vec<DeadLetter>, BufferError> {
    let limit = request.limit.unwrap_or(PAGE_MAX).min(PAGE_MAX);
    if request.keys.is_empty() {
        return state
            .letters
            .dead_letters(request.filter.clone(), request.after.clone(), limit)
            .await;
    }
    let mut found = Vec::new();
    for key in request.keys.iter().take(limit) {
        found.extend(find(state, request, key).await?);
    }
    Ok(found)
}

/// The same, without their payloads: what is done to each is done one after the other.
async fn select_keys(
    state: &ControlState,
    request: &ReplayRequest,
) -> Result<Vec<DeadLetterKey>, BufferError> {
    if request.keys.is_empty() {
        let letters = select(state, request).await?;
        return Ok(letters.into_iter().map(|letter| letter.key).collect());
    }
    let limit = request.limit.unwrap_or(PAGE_MAX).min(PAGE_MAX);
    Ok(request.keys.iter().take(limit).cloned().collect())
}

/// None when it is gone, or the filter leaves it out.
async fn find(
    state: &ControlState,
    request: &ReplayRequest,
    key: &DeadLetterKey,
) -> Result<Option<DeadLetter>, BufferError> {
    let letter = state.letters.dead_letter(key).await?;
    Ok(letter.filter(|letter| request.filter.matches(letter)))
}

async fn list(state: web::Data<ControlState>, request: web::Json<ReplayRequest>) -> HttpResponse {
    match select(&state, &request).await {
        Ok(letters) => HttpResponse::Ok().json(letters),
        Err(error) => broken(&error),
    }
}

/// One after the other, in key order, so the records of one device keep their order. A letter is removed only after its
/// sink has it; killed between the two, the next replay finds it delivered and only removes it.
async fn replay(
    state: web::Data<ControlState>,
    correlation_id: web::ReqData<CorrelationId>,
    request: web::Json<ReplayRequest>,
    http: HttpRequest,
) -> HttpResponse {
    if request.payload.is_some() && request.keys.len() != 1 {
        return refused("a correction belongs to one letter".to_owned());
    }
    let keys = match select_keys(&state, &request).await {
        Ok(keys) => keys,
        Err(error) => return broken(&error),
    };
    let mut results = Vec::with_capacity(keys.len());
    for key in keys {
        let mut letter = match find(&state, &request, &key).await {
            Ok(Some(letter)) => letter,
            Ok(None) => continue,
            Err(error) => return broken(&error),
        };
        if let Some(payload) = &request.payload {
            letter.payload = payload.clone().into_bytes();
        }
        let error = match (state.replay)(letter).await {
            Err(error) => Some(error),
            Ok(()) => {
                let removed = state.letters.remove_dead_letters(vec![key.clone()]).await;
                removed.err().map(|error| error.to_string())
            }
        };
        results.push(ReplayResult { key, error });
    }
    let delivered = results.iter().filter(|result| result.error.is_none()).count();
    let failed = results.len() - delivered;
    let by = Peer::of(&http);
    match (&request.payload, results.first()) {
        (Some(payload), Some(result)) => tracing::info!(
            event = "dead_letter_fixed",
            correlation_id = %*correlation_id,
            by,
            letter = %result.key,
            payload = cut(payload),
            error = result.error,
            "a dead letter was corrected by a person and replayed"
        ),
        _ => tracing::info!(
            event = "dead_letters_replayed",
            correlation_id = %*correlation_id,
            by,
            first = results.first().map(|result| result.key.to_string()),
            delivered,
            failed,
            "dead letters were replayed by a person"
        ),
    }
    HttpResponse::Ok().json(results)
}

fn cut(payload: &str) -> &str {
    let end = payload.char_indices().nth(AUDIT_CHARACTERS_MAX).map_or(payload.len(), |(at, _)| at);
    &payload[..end]
}

async fn purge(
    state: web::Data<ControlState>,
    correlation_id: web::ReqData<CorrelationId>,
    request: web::Json<ReplayRequest>,
    http: HttpRequest,
) -> HttpResponse {
    let mut keys = match select_keys(&state, &request).await {
        Ok(keys) => keys,
        Err(error) => return broken(&error),
    };
    let mut there = Vec::with_capacity(keys.len());
    for key in &keys {
        match find(&state, &request, key).await {
            Ok(found) => there.push(found.is_some()),
            Err(error) => return broken(&error),
        }
    }
    let mut there = there.into_iter();
    keys.retain(|_| there.next().unwrap_or(false));
    let (purged, first) = (keys.len(), keys.first().map(ToString::to_string));
    let board = state.board.clone();
    match state.letters.remove_dead_letters(keys.clone()).await {
        Ok(()) => {
            for key in &keys {
                board.letter_left(&key.stream, &key.sink);
            }
            tracing::warn!(
                event = "dead_letters_purged",
                correlation_id = %*correlation_id,
                by = Peer::of(&http),
                first,
                purged,
                "dead letters were purged by a person"
            );
            HttpResponse::Ok().json(serde_json::json!({ "purged": purged }))
        }
        Err(error) => broken(&error),
    }
}
