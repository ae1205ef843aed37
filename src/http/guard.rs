//! Who may ask what on the TCP listener, how often, and how large. The control socket needs none of it: the file system
//! lets only the node's own user and root open it.

use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use actix_web::body::MessageBody;
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage as _, HttpResponse, web};
use tokio::time::timeout;

use super::limiter::Limiter;
use super::routes::{Access, Scope, access};
use super::tokens::{Granted, TokenFile, Verifier};
use crate::config::HttpSettings;
use crate::domain::CorrelationId;
use crate::observe::{HttpMeters, HttpRefusal, Seldom};

/// A body must be there by then.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Whom a handler answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Unknown, and reachable from elsewhere: told as little as possible.
    Anonymous,
    Known,
}

/// What the guard knows between requests.
#[derive(Debug)]
pub struct Guard {
    guarded: bool,
    verifier: Verifier,
    limiter: Limiter,
    meters: HttpMeters,
    told: Seldom,
}

/// Why a request is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    Because(HttpRefusal),
    TooOften { again_after: Duration },
}

impl Guard {
    pub fn new(settings: &HttpSettings, state_dir: &Path, meters: HttpMeters) -> Self {
        Guard {
            guarded: settings.guarded,
            verifier: Verifier::new(TokenFile::of(state_dir)),
            limiter: Limiter::new(settings.requests_per_minute_max),
            meters,
            told: Seldom::default(),
        }
    }

    fn admit(&self, request: &ServiceRequest) -> Result<Caller, Refused> {
        let presented = bearer(request);
        let granted = presented.and_then(|text| self.verifier.verify(text));
        // A peer without an address is counted with all its like.
        let address = request.peer_addr().map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |a| a.ip());
        if self.guarded || presented.is_some() {
            let id = granted.as_ref().map(|granted| granted.id.as_str());
            let taken = self.limiter.take(address, id, Instant::now());
            taken.map_err(|again_after| Refused::TooOften { again_after })?;
        }
        let pattern = request.match_pattern();
        match access(request.method().as_str(), pattern.as_deref()) {
            Access::Anyone if self.guarded && granted.is_none() => Ok(Caller::Anonymous),
            Access::Anyone => Ok(Caller::Known),
            Access::Token(Scope::Read) if !self.guarded => Ok(Caller::Known),
            Access::Token(needed) => self.allowed(request, needed, presented.is_some(), granted),
        }
    }

    fn allowed(
        &self,
        request: &ServiceRequest,
        needed: Scope,
        presented: bool,
        granted: Option<Granted>,
    ) -> Result<Caller, Refused> {
        let Some(granted) = granted else {
            let because = if presented { HttpRefusal::WrongToken } else { HttpRefusal::NoToken };
            return Err(Refused::Because(because));
        };
        if granted.scope < needed {
            return Err(Refused::Because(HttpRefusal::Scope));
        }
        if needed == Scope::Operate {
            let extensions = request.extensions();
            let correlation_id = extensions.get::<CorrelationId>().map(CorrelationId::as_str);
            tracing::info!(event = "http_order", correlation_id, token = granted.id, method = %request.method(),
                path = request.path(), "an order over HTTP");
        }
        Ok(Caller::Known)
    }

    /// Counted each time, told at most once a minute: whoever knocks must not fill the log.
    fn tell(&self, request: &ServiceRequest, because: HttpRefusal) {
        self.meters.refused(because).inc();
        let Some(requests) = self.told.due() else { return };
        let peer = request.peer_addr().map(|address| address.ip().to_string());
        tracing::warn!(
            event = "http_refused",
            reason = because.code(),
            peer,
            requests,
            "requests were refused; this line comes at most once a minute"
        );
    }
}

/// The middleware in front of every route of the TCP listener.
pub async fn guard(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let Some(guard) = request.app_data::<web::Data<Guard>>().cloned() else {
        // Without its guard nothing is answered.
        return Ok(request.into_response(HttpResponse::InternalServerError().finish()));
    };
    match guard.admit(&request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
        }
        Err(refused) => {
            guard.tell(&request, refused.reason());
            return Ok(request.into_response(refused.response()).map_into_boxed_body());
        }
    }
    if let Err(response) = read_body(&mut request).await {
        return Ok(request.into_response(response).map_into_boxed_body());
    }
    let mut response = next.call(request).await?.map_into_boxed_body();
    harden(response.headers_mut());
    Ok(response)
}

/// The whole body before the handler begins, so that one deadline and one bound hold for all.
async fn read_body(request: &mut ServiceRequest) -> Result<(), HttpResponse> {
    match timeout(BODY_TIMEOUT, request.extract::<web::Bytes>()).await {
        Ok(Ok(bytes)) => {
            request.set_payload(Payload::from(bytes));
            Ok(())
        }
        Ok(Err(error)) => Err(error.error_response()),
        Err(_) => Err(HttpResponse::RequestTimeout()
            .force_close()
            .json(serde_json::json!({ "error": "the body did not come in time" }))),
    }
}

fn bearer(request: &ServiceRequest) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn harden(headers: &mut header::HeaderMap) {
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

impl Refused {
    fn reason(self) -> HttpRefusal {
        match self {
            Refused::Because(reason) => reason,
            Refused::TooOften { .. } => HttpRefusal::Rate,
        }
    }

    fn response(self) -> HttpResponse {
        let (status, error) = match self.reason() {
            HttpRefusal::NoToken => {
                (StatusCode::UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN")
            }
            HttpRefusal::WrongToken => {
                (StatusCode::UNAUTHORIZED, "this token is unknown, expired or revoked")
            }
            HttpRefusal::Scope => {
                (StatusCode::FORBIDDEN, "this token may only read; an order needs scope operate")
            }
            HttpRefusal::Rate => (StatusCode::TOO_MANY_REQUESTS, "too many requests"),
        };
        let mut response = HttpResponse::build(status);
        let mut body = serde_json::json!({ "error": error });
        if let Refused::TooOften { again_after } = self {
            let seconds = again_after.as_secs_f64().ceil();
            response.insert_header((header::RETRY_AFTER, seconds.to_string()));
            body["retry_after_seconds"] = seconds.into();
        }
        if status == StatusCode::UNAUTHORIZED {
            response.insert_header((header::WWW_AUTHENTICATE, "Bearer"));
        }
        let mut response = response.json(body);
        harden(response.headers_mut());
        response
    }
}
