//! From a broker's settings to a byte stream: TCP or TLS, each failure told apart.

use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::error::StreamError;
use crate::config::{BrokerSettings, TlsSettings};

/// TCP or TLS.
pub trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// `host:port`, as errors name the broker.
pub fn address(broker: &BrokerSettings) -> String {
    format!("{}:{}", broker.host, broker.port)
}

/// Connects, TLS handshake included, within the broker's connect timeout.
pub async fn dial(broker: &BrokerSettings) -> Result<Box<dyn ByteStream>, StreamError> {
    let limit = broker.connect_timeout;
    timeout(limit, open(broker)).await.unwrap_or_else(|_| {
        Err(StreamError::TimedOut { doing: "connecting", broker: address(broker), limit })
    })
}

async fn open(broker: &BrokerSettings) -> Result<Box<dyn ByteStream>, StreamError> {
    let tcp = connect_tcp(broker).await?;
    // Acknowledgements are small and must not wait for company.
    tcp.set_nodelay(true).map_err(|error| StreamError::connecting(&address(broker), &error))?;
    match &broker.tls {
        None => Ok(Box::new(tcp)),
        Some(tls) => connect_tls(broker, tls, tcp).await,
    }
}

async fn connect_tcp(broker: &BrokerSettings) -> Result<TcpStream, StreamError> {
    let unresolved = |problem: String| StreamError::Dns { host: broker.host.clone(), problem };
    let found = lookup_host((broker.host.as_str(), broker.port)).await;
    let addresses: Vec<_> = found.map_err(|error| unresolved(error.to_string()))?.collect();
    // One address that swallows everything must not use up the time of the others.
    let share = broker.connect_timeout / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
    let mut last = unresolved("no address".to_owned());
    for target in addresses {
        match timeout(share, TcpStream::connect(target)).await {
            Ok(Ok(tcp)) => return Ok(tcp),
            Ok(Err(error)) => last = StreamError::connecting(&address(broker), &error),
            Err(_) => last = timed_out(broker, share),
        }
    }
    Err(last)
}

fn timed_out(broker: &BrokerSettings, limit: Duration) -> StreamError {
    StreamError::TimedOut { doing: "connecting", broker: address(broker), limit }
}

async fn connect_tls(
    broker: &BrokerSettings,
    tls: &TlsSettings,
    tcp: TcpStream,
) -> Result<Box<dyn ByteStream>, StreamError> {
    let name = tls.server_name.as_ref().unwrap_or(&broker.host);
    let server = ServerName::try_from(name.clone())
        .map_err(|_| StreamError::TlsServerName { name: name.clone() })?;
    let connector = TlsConnector::from(crate::tls::client_config(tls)?);
    let stream = connector
        .connect(server, tcp)
        .await
        .map_err(|error| StreamError::handshake(&address(broker), name, &error))?;
    Ok(Box::new(stream))
}
