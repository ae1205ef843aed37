//! The id that ties a request to the lines in the log it causes, and to whatever its sender keeps of it.

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage as _};

use crate::domain::CorrelationId;

/// Taken from a request that brings one, and told in every answer.
const HEADER: HeaderName = HeaderName::from_static("x-correlation-id");

/// The outermost middleware of both listeners; handlers find the id as `web::ReqData<CorrelationId>`.
pub async fn correlate(
    request: ServiceRequest,
    next: Next<impl MessageBody>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    fail::fail_point!("http_request");
    let brought = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
    let id = brought.and_then(CorrelationId::parse).unwrap_or_else(CorrelationId::new);
    // Nothing a header may not hold passes `parse`.
    let told = HeaderValue::from_str(id.as_str()).ok();
    request.extensions_mut().insert(id);
    let mut response = next.call(request).await?;
    if let Some(told) = told {
        response.headers_mut().insert(HEADER, told);
    }
    Ok(response)
}
