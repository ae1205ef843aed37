//! As much HTTP as a test needs to look at the node.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.body))
    }
}

/// Asks for a path of the server on this port of 127.0.0.1.
///
/// # Errors
/// When there is no answer in time.
pub fn get(port: u16, path: &str) -> Result<Response> {
    request(port, "GET", path, "")
}

/// # Errors
/// When there is no answer in time.
pub fn request(port: u16, method: &str, path: &str, body: &str) -> Result<Response> {
    request_as(port, None, method, path, body)
}

/// With a bearer token.
///
/// # Errors
/// When there is no answer in time.
pub fn request_as(
    port: u16,
    token: Option<&str>,
    method: &str,
    path: &str,
    body: &str,
) -> Result<Response> {
    let authorization =
        token.map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
    let address = (Ipv4Addr::LOCALHOST, port).into();
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_WITHIN)
        .with_context(|| format!("connect to port {port}"))?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.set_write_timeout(Some(ANSWER_WITHIN))?;
    // HTTP/1.0: the server ends the connection after the answer and never sends it in chunks.
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n{authorization}\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).with_context(|| format!("{method} {path}: read the answer"))?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").context("an answer without a head")?;
    let status = head.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    Ok(Response {
        status: status.with_context(|| format!("no status in {head}"))?,
        head: head.to_owned(),
        body: body.to_owned(),
    })
}
