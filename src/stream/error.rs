//! Why a stream is not receiving, each cause told apart, each text saying what to do.

use std::io;
use std::time::Duration;

use tokio_rustls::rustls::{CertificateError, Error as RustlsError};

use super::codec::Refusal;
use crate::buffer::BufferError;
use crate::domain::ErrorClass;
use crate::observe::DisconnectReason;
use crate::tls::TlsError;

/// What ended a connection, or kept it from coming about. `broker` is `host:port`.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error(
        "cannot resolve {host}: {problem}; check the broker's host and this machine's resolver"
    )]
    Dns { host: String, problem: String },
    #[error(
        "{broker} refused the connection; check that the broker runs, listens on this port and is not firewalled"
    )]
    ConnectionRefused { broker: String },
    #[error("{broker} did not answer within {} s ({doing}); check the network and the broker's load", limit.as_secs_f32())]
    TimedOut { doing: &'static str, broker: String, limit: Duration },
    #[error("connection to {broker} lost: {problem}; it is opened again by itself")]
    Network { broker: String, problem: String },
    #[error(
        "{broker} closed the connection without a word; when it happens again and again, look into the broker's log and for another client named {client_id:?}"
    )]
    Closed { broker: String, client_id: String },
    #[error(
        "no sign of life from {broker} for {} s; it is connected again by itself, check the network when this repeats",
        silence.as_secs_f32()
    )]
    Keepalive { broker: String, silence: Duration },

    #[error(transparent)]
    TlsFiles(#[from] TlsError),
    #[error("the certificate of {broker} comes from an authority unknown here; set tls.ca_file")]
    TlsUnknownAuthority { broker: String },
    #[error(
        "the certificate of {broker} is not for {name:?}; set tls.server_name or the broker's host to a name it carries"
    )]
    TlsWrongName { broker: String, name: String },
    #[error(
        "the certificate of {broker} is not valid now ({problem}); renew it or correct the clock"
    )]
    TlsExpired { broker: String, problem: String },
    #[error(
        "the certificate of {broker} is not usable ({problem}); give the broker one that is made for a TLS server"
    )]
    TlsUnusable { broker: String, problem: String },
    /// A broker that does not speak TLS does this, and so does whatever stands before one that is away.
    #[error(
        "{broker} closed the connection during the TLS handshake; it is tried again by itself, when this repeats check that the broker runs and that this port speaks TLS"
    )]
    TlsClosed { broker: String },
    #[error(
        "{broker} does not seem to speak TLS on this port; use its TLS port (in clear text anybody on the way could read the password)"
    )]
    TlsPlainServer { broker: String },
    #[error(
        "the TLS handshake with {broker} failed ({problem}); check the client certificate and the TLS versions both sides allow"
    )]
    TlsRefused { broker: String, problem: String },
    #[error("{name:?} is no host name that TLS can check; set tls.server_name")]
    TlsServerName { name: String },

    #[error("{broker} refused user {user:?}: user name or password is wrong")]
    BadCredentials { broker: String, user: String },
    #[error(
        "{broker} does not let client {client_id:?} in (not authorized); check user, password and the broker's access list"
    )]
    NotAuthorized { broker: String, client_id: String },
    #[error(
        "{broker} is unavailable or busy and lets nobody in; it is tried again by itself, look into the broker's load and limits when this repeats"
    )]
    Unavailable { broker: String },
    #[error("{broker} refused the connection ({}); {}", refusal.0, refusal.1)]
    Refused { broker: String, refusal: (String, &'static str) },
    #[error(
        "another client connected to {broker} as {client_id:?} and took the session over; give each node its own name, or stop the other one"
    )]
    TakenOver { broker: String, client_id: String },
    /// Some brokers (Mosquitto 2.0 among them) end the older connection without a word.
    #[error(
        "{broker} closed the connection right after subscribing, again and again: most likely another client connects as {client_id:?} (give each node its own name, or stop the other one); if not, the broker's log says why"
    )]
    ProbablyTakenOver { broker: String, client_id: String },
    #[error("{broker} ended the connection: {reason}")]
    Disconnected { broker: String, reason: String },
    #[error("{broker} refused the subscription to {filter:?} ({reason}); {remedy}")]
    SubscriptionRefused { broker: String, filter: String, reason: String, remedy: &'static str },
    #[error("{broker} broke the MQTT protocol: {problem}; check the broker's version and port")]
    Protocol { broker: String, problem: String },

    #[error(transparent)]
    Buffer(#[from] BufferError),
    #[error("the buffer stopped before messages were durable; see its own error")]
    BufferGone,
}

impl StreamError {
    /// The buffer's errors end the part; all others end one connection.
    pub fn ends_part(&self) -> bool {
        matches!(self, StreamError::Buffer(_) | StreamError::BufferGone)
    }

    /// Whether waiting mends it.
    pub fn class(&self) -> ErrorClass {
        match self {
            StreamError::Dns { .. }
            | StreamError::ConnectionRefused { .. }
            | StreamError::TimedOut { .. }
            | StreamError::Network { .. }
            | StreamError::Closed { .. }
            | StreamError::Keepalive { .. }
            | StreamError::TlsClosed { .. }
            | StreamError::Unavailable { .. }
            | StreamError::Disconnected { .. } => ErrorClass::Transient,
            _ => ErrorClass::Standing,
        }
    }

    /// The label of the disconnect counter.
    pub fn reason(&self) -> DisconnectReason {
        match self {
            StreamError::Keepalive { .. } => DisconnectReason::Keepalive,
            StreamError::TlsFiles(_)
            | StreamError::TlsUnknownAuthority { .. }
            | StreamError::TlsWrongName { .. }
            | StreamError::TlsExpired { .. }
            | StreamError::TlsUnusable { .. }
            | StreamError::TlsClosed { .. }
            | StreamError::TlsPlainServer { .. }
            | StreamError::TlsRefused { .. }
            | StreamError::TlsServerName { .. } => DisconnectReason::Tls,
            StreamError::BadCredentials { .. }
            | StreamError::NotAuthorized { .. }
            | StreamError::Unavailable { .. }
            | StreamError::Refused { .. }
            | StreamError::SubscriptionRefused { .. } => DisconnectReason::Refused,
            StreamError::TakenOver { .. } | StreamError::ProbablyTakenOver { .. } => {
                DisconnectReason::Takeover
            }
            StreamError::Protocol { .. } => DisconnectReason::Protocol,
            StreamError::Buffer(_) | StreamError::BufferGone => DisconnectReason::Stop,
            _ => DisconnectReason::Network,
        }
    }

    /// False when the broker answers well and only this stream has trouble with it.
    pub fn is_of_broker(&self) -> bool {
        !matches!(
            self,
            StreamError::TakenOver { .. }
                | StreamError::ProbablyTakenOver { .. }
                | StreamError::SubscriptionRefused { .. }
                | StreamError::Buffer(_)
                | StreamError::BufferGone
        )
    }

    /// A name for "the same trouble as before": repeats are not logged.
    pub fn kind(&self) -> std::mem::Discriminant<StreamError> {
        std::mem::discriminant(self)
    }

    /// What a CONNACK with a refusal means.
    pub fn refused(refusal: Refusal, broker: &str, client_id: &str, user: Option<&str>) -> Self {
        let broker = broker.to_owned();
        let (text, remedy) = match refusal {
            Refusal::BadCredentials => {
                let user = user.unwrap_or_default().to_owned();
                return StreamError::BadCredentials { broker, user };
            }
            Refusal::NotAuthorized => {
                return StreamError::NotAuthorized { broker, client_id: client_id.to_owned() };
            }
            Refusal::Unavailable => return StreamError::Unavailable { broker },
            Refusal::Version => {
                ("protocol version".to_owned(), "set the broker's version to the one it speaks")
            }
            Refusal::ClientId => {
                (format!("client id {client_id:?}"), "give the stream another client_id")
            }
            Refusal::Banned => ("banned".to_owned(), "lift the ban at the broker"),
            Refusal::Quota => ("quota exceeded".to_owned(), "raise the broker's limits"),
            Refusal::Moved => ("use another server".to_owned(), "change the broker's host"),
            Refusal::Other(code) => {
                (format!("reason code {code:#04x}"), "look into the broker's log")
            }
        };
        StreamError::Refused { broker, refusal: (text, remedy) }
    }

    /// What an I/O error of a running connection means. Since TLS 1.3 a server refuses a client's certificate only
    /// after the client's side of the handshake is done: the alert meets the first read.
    pub fn network(broker: &str, error: &io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<RustlsError>());
        if let Some(RustlsError::AlertReceived(alert)) = tls {
            let problem = RustlsError::AlertReceived(*alert).to_string();
            return StreamError::TlsRefused { broker: broker.to_owned(), problem };
        }
        StreamError::Network { broker: broker.to_owned(), problem: error.to_string() }
    }

    /// What an I/O error of `connect` means.
    pub fn connecting(broker: &str, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => {
                StreamError::ConnectionRefused { broker: broker.to_owned() }
            }
            _ => StreamError::network(broker, error),
        }
    }

    /// What an I/O error of the TLS handshake means.
    pub fn handshake(broker: &str, name: &str, error: &io::Error) -> Self {
        let broker = broker.to_owned();
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<RustlsError>());
        match tls {
            Some(RustlsError::InvalidCertificate(problem)) => certificate(broker, name, problem),
            Some(RustlsError::InvalidMessage(_)) => StreamError::TlsPlainServer { broker },
            Some(other) => StreamError::TlsRefused { broker, problem: other.to_string() },
            None => match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    StreamError::TlsClosed { broker }
                }
                _ => StreamError::network(&broker, error),
            },
        }
    }
}

fn certificate(broker: String, name: &str, problem: &CertificateError) -> StreamError {
    use CertificateError as Bad;
    match problem {
        // A bad signature: an authority of the right name with another key, as after making it anew.
        Bad::UnknownIssuer | Bad::BadSignature => StreamError::TlsUnknownAuthority { broker },
        Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
            StreamError::TlsWrongName { broker, name: name.to_owned() }
        }
        Bad::Expired
        | Bad::ExpiredContext { .. }
        | Bad::NotValidYet
        | Bad::NotValidYetContext { .. } => {
            StreamError::TlsExpired { broker, problem: problem.to_string() }
        }
        other => StreamError::TlsUnusable { broker, problem: other.to_string() },
    }
}
