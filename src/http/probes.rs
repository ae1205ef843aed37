//! Questions. Nothing here touches a broker, a database or the disk.

use actix_web::{HttpMessage as _, HttpRequest, HttpResponse, web};
use serde::Serialize;

use super::guard::Caller;
use crate::certificates::CertificateFacts;
use crate::domain::{SinkName, StreamName};
use crate::observe::health::{Health, judge};
use crate::observe::{
    Board, BufferStatus, DependencyStatus, NodeStatus, PartStatus, Silence, SinkStatus,
    StreamStatus,
};

/// `/ping` and `/ready` are the paths older probes ask for.
pub fn routes(config: &mut web::ServiceConfig) {
    config
        .route("/health/live", web::get().to(live))
        .route("/ping", web::get().to(live))
        .route("/health/ready", web::get().to(ready))
        .route("/ready", web::get().to(ready))
        .route("/health", web::get().to(health))
        .route("/metrics", web::get().to(metrics))
        .route("/streams", web::get().to(streams));
}

/// The process answers: nothing else is asked.
async fn live() -> HttpResponse {
    HttpResponse::Ok().json(serde_json::json!({ "status": "live" }))
}

/// The reasons name streams and servers, which is nobody's business who came without a token.
async fn ready(request: HttpRequest, board: web::Data<Board>) -> HttpResponse {
    let health = judge(&board);
    let mut response =
        if health.ready { HttpResponse::Ok() } else { HttpResponse::ServiceUnavailable() };
    let mut body = serde_json::json!({ "ready": health.ready });
    if request.extensions().get::<Caller>() != Some(&Caller::Anonymous) {
        body["because"] = health.because.into();
    }
    response.json(body)
}

/// `/health`: the verdict, then everything it was made from.
#[derive(Serialize)]
struct Detail {
    #[serde(flatten)]
    health: Health,
    node: NodeStatus,
    buffer: BufferStatus,
    dependencies: std::collections::BTreeMap<String, DependencyStatus>,
    parts: std::collections::BTreeMap<String, PartStatus>,
    streams: Vec<StreamLine>,
    /// What brokers and databases showed when the node connected, by peer.
    presented_certificates: std::collections::BTreeMap<String, CertificateFacts>,
}

/// One stream with its sinks, as `/streams`, `/health` and `telemetry status` show it.
#[derive(Serialize)]
pub struct StreamLine {
    name: StreamName,
    /// Seconds since the last message; none before the first.
    data_age_seconds: Option<f64>,
    /// Longer without a message than the configuration allows.
    silence: Option<Silence>,
    status: StreamStatus,
    sinks: Vec<SinkLine>,
}

#[derive(Serialize)]
struct SinkLine {
    sink: SinkName,
    pending: Option<u64>,
    /// Received minus delivered, pending, dead-lettered, filtered: 0 when the books balance.
    difference: Option<i64>,
    status: SinkStatus,
}

fn stream_lines(board: &Board) -> Vec<StreamLine> {
    let now = crate::domain::Arrival::now();
    let line = |(name, view): (StreamName, std::sync::Arc<crate::observe::StreamView>)| {
        let status = view.status();
        let sinks = board.sinks_of(&name).into_iter().map(|(sink, view)| {
            let sink_status = view.status();
            SinkLine {
                sink,
                pending: sink_status.books.map(|books| status.sequence.since(books.cursor)),
                difference: sink_status.books.map(|books| books.difference()),
                status: sink_status,
            }
        });
        let sinks = sinks.collect();
        let age =
            status.last_message.map(|at| (now.as_micros() - at.as_micros()).max(0) as f64 / 1e6);
        StreamLine { name, data_age_seconds: age, silence: status.silence(), status, sinks }
    };
    board.streams().into_iter().map(line).collect()
}

async fn health(board: web::Data<Board>) -> HttpResponse {
    let detail = Detail {
        health: judge(&board),
        node: board.node(),
        buffer: board.buffer(),
        dependencies: board.dependencies().into_iter().collect(),
        parts: board.parts(),
        streams: stream_lines(&board),
        presented_certificates: board.presented_certificates(),
    };
    HttpResponse::Ok().json(detail)
}

async fn metrics(board: web::Data<Board>) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("application/openmetrics-text; version=1.0.0; charset=utf-8")
        .body(board.render_metrics())
}

async fn streams(board: web::Data<Board>) -> HttpResponse {
    HttpResponse::Ok().json(serde_json::json!({ "streams": stream_lines(&board) }))
}
