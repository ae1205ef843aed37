//! Questions and orders to a running node, over its HTTP listener or its control socket.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// A question must be answered by then.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// An order (a replay of a page of dead letters) may take this long.
const ORDER_TIMEOUT: Duration = Duration::from_secs(600);

/// `GET path` over TCP.
pub async fn ask(address: SocketAddr, path: &str) -> anyhow::Result<serde_json::Value> {
    let stream = timeout(QUESTION_TIMEOUT, TcpStream::connect(address))
        .await
        .context("no answer")?
        .with_context(|| format!("the node does not answer on {address}: is it running?"))?;
    let (_, body) = timeout(QUESTION_TIMEOUT, exchange(stream, Method::GET, path, Bytes::new()))
        .await
        .context("no answer")??;
    Ok(body)
}

/// Why an order could not be given.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Nothing listens: the node is not running.
    #[error("the node is not running ({0})")]
    NotRunning(std::io::Error),
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// `POST path` (or `GET`, without a body) on the control socket.
pub async fn order(
    socket: &Path,
    path: &str,
    body: Option<&impl serde::Serialize>,
) -> Result<serde_json::Value, OrderError> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => {
            return Err(OrderError::NotRunning(error));
        }
        Err(error) => {
            let text =
                format!("cannot open {}: run as the node's user or as root", socket.display());
            return Err(anyhow::Error::new(error).context(text).into());
        }
    };
    let (method, bytes) = match body {
        None => (Method::GET, Bytes::new()),
        Some(body) => (Method::POST, serde_json::to_vec(body).context("encode the order")?.into()),
    };
    let answer = timeout(ORDER_TIMEOUT, exchange(stream, method, path, bytes))
        .await
        .context("the node did not answer in time")?;
    let (status, body) = answer?;
    if !status.is_success() {
        let why = body.get("error").and_then(|error| error.as_str()).unwrap_or("no reason given");
        return Err(anyhow::anyhow!("{why}").into());
    }
    Ok(body)
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    method: Method,
    path: &str,
    body: Bytes,
) -> anyhow::Result<(StatusCode, serde_json::Value)> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("speak HTTP")?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "telemetry")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .context("make the request")?;
    let response = sender.send_request(request).await.context("ask the node")?;
    let status = response.status();
    let bytes = response.into_body().collect().await.context("read the answer")?.to_bytes();
    driver.abort();
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok((status, value)),
        Err(_) if status.is_success() => bail!("the node's answer is no JSON"),
        Err(_) => Ok((status, serde_json::json!({ "error": status.to_string() }))),
    }
}
