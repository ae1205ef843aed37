//! Certificates in files: an authority of one's own that signs for the node, for servers and for devices, and what a
//! certificate says.
//!
//! ```text
//! ca.crt ca.key            the authority: devices and clients need ca.crt alone
//! server.crt server.key    for the listener of the node, a broker, a database: the names and addresses asked for
//! client.crt client.key    the node's own, for brokers that ask for one
//! devices/NAME.pem         all that one device needs: its certificate, its key, the authority
//! ```

mod authority;
mod facts;
mod shelf;

use std::path::PathBuf;

pub use facts::{CertificateFacts, parse, read};
pub use shelf::{Change, Shelf, Wish};

use crate::tls::TlsError;

/// A certificate that could not be read, made or kept.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error(transparent)]
    Read(#[from] TlsError),
    #[error("cannot {what} {}: {problem}", path.display())]
    File { what: &'static str, path: PathBuf, problem: std::io::Error },
    #[error("{} is no certificate: {problem}", path.display())]
    Parse { path: PathBuf, problem: String },
    #[error("{name:?} is neither a host name nor an address")]
    Name { name: String },
    #[error("cannot sign a certificate: {0}")]
    Sign(#[from] rcgen::Error),
    #[error("there is no authority in {}: make one with `telemetry certs init`", folder.display())]
    NoAuthority { folder: PathBuf },
}
