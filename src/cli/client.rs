//! Questions and orders to a running node, over its HTTP listener or its control socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::TlsSettings;
use crate::domain::Secret;
use crate::tls;

/// A question must be answered by then.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// An order (a replay of a page of dead letters) may take this long.
const ORDER_TIMEOUT: Duration = Duration::from_secs(600);

/// A node's TCP listener, as the asker reaches it.
#[derive(Debug)]
pub struct Listener {
    /// `host:port`.
    pub address: String,
    pub token: Option<Secret>,
    /// HTTPS: the authority, and the name on the certificate.
    pub tls: Option<TlsSettings>,
}

/// `GET path` over TCP.
pub async fn ask(listener: &Listener, path: &str) -> anyhow::Result<serde_json::Value> {
    let question =
        Question { method: Method::GET, path, body: Bytes::new(), token: listener.token.as_ref() };
    let address = listener.address.as_str();
    let answer = timeout(QUESTION_TIMEOUT, async {
        let stream = TcpStream::connect(address)
            .await
            .with_context(|| format!("the node does not answer on {address}: is it running?"))?;
        match &listener.tls {
            None => exchange(stream, question).await,
            Some(tls) => exchange(secured(stream, address, tls).await?, question).await,
        }
    });
    let (status, body) = answer.await.context("no answer")??;
    if !status.is_success() && status != StatusCode::SERVICE_UNAVAILABLE {
        bail!("{address} answers {status}: {}", reason(&body));
    }
    Ok(body)
}

async fn secured(
    stream: TcpStream,
    address: &str,
    settings: &TlsSettings,
) -> anyhow::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = settings.server_name.clone().unwrap_or_else(|| host.to_owned());
    let name = ServerName::try_from(name).context("the name on the certificate")?;
    let connector = TlsConnector::from(tls::client_config(settings)?);
    connector.connect(name, stream).await.with_context(|| format!("no TLS with {address}"))
}

fn reason(body: &serde_json::Value) -> &str {
    body.get("error").and_then(|error| error.as_str()).unwrap_or("no reason given")
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
    let (method, bytes, limit) = match body {
        None => (Method::GET, Bytes::new(), QUESTION_TIMEOUT),
        Some(body) => {
            let bytes = serde_json::to_vec(body).context("encode the order")?;
            (Method::POST, bytes.into(), ORDER_TIMEOUT)
        }
    };
    let question = Question { method, path, body: bytes, token: None };
    let answer = timeout(limit, exchange(stream, question))
        .await
        .context("the node did not answer in time")?;
    let (status, body) = answer?;
    if !status.is_success() {
        return Err(anyhow::anyhow!("{}", reason(&body)).into());
    }
    Ok(body)
}

/// `/metrics` on the control socket, and the process that answers.
pub async fn metrics(socket: &Path) -> anyhow::Result<(String, Option<i32>)> {
    let stream = UnixStream::connect(socket).await.context("open the control socket")?;
    let process = stream.peer_cred().ok().and_then(|peer| peer.pid());
    let question =
        Question { method: Method::GET, path: "/metrics", body: Bytes::new(), token: None };
    let answer = timeout(QUESTION_TIMEOUT, send(stream, question)).await.context("no answer")?;
    let (_, bytes) = answer?;
    Ok((String::from_utf8_lossy(&bytes).into_owned(), process))
}

struct Question<'a> {
    method: Method,
    path: &'a str,
    body: Bytes,
    token: Option<&'a Secret>,
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    question: Question<'_>,
) -> anyhow::Result<(StatusCode, serde_json::Value)> {
    let (status, bytes) = send(stream, question).await?;
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok((status, value)),
        Err(_) if status.is_success() => bail!("the node's answer is no JSON"),
        Err(_) => Ok((status, serde_json::json!({ "error": status.to_string() }))),
    }
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    question: Question<'_>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("speak HTTP")?;
    let driver = tokio::spawn(connection);
    let mut request = Request::builder()
        .method(question.method)
        .uri(question.path)
        .header("host", "telemetry")
        .header("content-type", "application/json");
    if let Some(token) = question.token {
        request = request.header("authorization", format!("Bearer {}", token.expose()));
    }
    let request = request.body(Full::new(question.body)).context("make the request")?;
    let response = sender.send_request(request).await.context("ask the node")?;
    let status = response.status();
    let bytes = response.into_body().collect().await.context("read the answer")?.to_bytes();
    driver.abort();
    Ok((status, bytes))
}
