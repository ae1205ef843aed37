//! Orders: parts and dead letters.

use std::sync::Arc;

use actix::Recipient;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

use super::dead_letters::{DeadLetters, Orderer, ReplayRequest};
use crate::buffer::BufferError;
use crate::domain::{Changes, CorrelationId};
use crate::observe::Board;
use crate::part::{OrderPart, PartOrder};

/// Takes the changed configuration, or only compares it with the one in force.
pub type Reload = Arc<
    dyn Fn(bool, CorrelationId) -> LocalBoxFuture<'static, Result<Changes, String>> + Send + Sync,
>;

/// What orders need.
#[derive(Clone)]
pub struct ControlState {
    pub supervisor: Recipient<OrderPart>,
    pub letters: DeadLetters,
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

fn orderer(http: &HttpRequest, correlation_id: web::ReqData<CorrelationId>) -> Orderer {
    Orderer { by: Peer::of(http), correlation_id: correlation_id.into_inner() }
}

async fn list(state: web::Data<ControlState>, request: web::Json<ReplayRequest>) -> HttpResponse {
    match state.letters.list(&request).await {
        Ok(letters) => HttpResponse::Ok().json(letters),
        Err(error) => broken(&error),
    }
}

async fn replay(
    state: web::Data<ControlState>,
    correlation_id: web::ReqData<CorrelationId>,
    request: web::Json<ReplayRequest>,
    http: HttpRequest,
) -> HttpResponse {
    if request.payload.is_some() && request.keys.len() != 1 {
        return refused("a correction belongs to one letter".to_owned());
    }
    match state.letters.replay(&request, &orderer(&http, correlation_id)).await {
        Ok(results) => HttpResponse::Ok().json(results),
        Err(error) => broken(&error),
    }
}

async fn purge(
    state: web::Data<ControlState>,
    correlation_id: web::ReqData<CorrelationId>,
    request: web::Json<ReplayRequest>,
    http: HttpRequest,
) -> HttpResponse {
    match state.letters.purge(&request, &orderer(&http, correlation_id)).await {
        Ok(purged) => HttpResponse::Ok().json(serde_json::json!({ "purged": purged })),
        Err(error) => broken(&error),
    }
}
