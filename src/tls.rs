//! TLS for whatever the node connects to and whoever connects to it: one provider, one way to read the files, errors that name the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::ResolvesServerCert;
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};

use crate::config::TlsSettings;
use crate::domain::Presented;

/// A file that TLS needs and cannot use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {what} {}: {problem}; give a readable PEM file", path.display())]
    File { what: &'static str, path: PathBuf, problem: String },
    #[error("{} contains no certificate in PEM form", path.display())]
    Empty { path: PathBuf },
    #[error("client certificate {} and key {} do not fit: {problem}", certificate.display(), key.display())]
    Client { certificate: PathBuf, key: PathBuf, problem: String },
    #[error("certificate {} and key {} do not fit: {problem}", certificate.display(), key.display())]
    Server { certificate: PathBuf, key: PathBuf, problem: String },
    #[error("no TLS version is usable: {0}")]
    Provider(String),
    #[error(
        "server_name {name:?} is no host name that TLS can check; give one the certificate carries"
    )]
    ServerName { name: String },
}

/// Reads the files anew at each call, so that renewed certificates count from the next connection on.
pub fn client_config(settings: &TlsSettings) -> Result<Arc<ClientConfig>, TlsError> {
    let roots = match &settings.ca_file {
        Some(path) => private_roots(path)?,
        None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
    };
    // The provider is named here because two TLS libraries in one process leave no default.
    let provider = Arc::new(ring::default_provider());
    let ordinary = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| TlsError::Provider(error.to_string()))?;
    let name = settings.server_name.as_deref().map(server_name).transpose()?;
    let verifier = Remembering { ordinary, name, presented: settings.presented.clone() };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Provider(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let config = match &settings.client_certificate {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates("client certificate", certificate)?;
            let private = private_key("client key", key)?;
            builder.with_client_auth_cert(chain, private).map_err(|error| TlsError::Client {
                certificate: certificate.clone(),
                key: key.clone(),
                problem: error.to_string(),
            })?
        }
    };
    Ok(Arc::new(config))
}

fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    let owned = ServerName::try_from(name.to_owned());
    owned.map_err(|_| TlsError::ServerName { name: name.to_owned() })
}

/// Judges a certificate as rustls does, and keeps it for whoever watches over its end.
#[derive(Debug)]
struct Remembering {
    ordinary: Arc<WebPkiServerVerifier>,
    /// Counts instead of the host: not every client library can be told another name than it connects to.
    name: Option<ServerName<'static>>,
    presented: Presented,
}

impl ServerCertVerifier for Remembering {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.ordinary.verify_server_cert(
            end_entity,
            intermediates,
            self.name.as_ref().unwrap_or(server_name),
            ocsp_response,
            now,
        )?;
        self.presented.keep(end_entity);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.ordinary.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.ordinary.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.ordinary.supported_verify_schemes()
    }
}

/// A listener that asks `resolver` for its certificate at each handshake.
pub fn server_config(resolver: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, TlsError> {
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Provider(error.to_string()))?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    Ok(config)
}

/// A server's certificate with its key, known to belong together.
pub fn certified_key(certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = certificates("certificate", certificate)?;
    let private = private_key("key", key)?;
    CertifiedKey::from_der(chain, private, &ring::default_provider()).map_err(|error| {
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        TlsError::Server { certificate, key, problem: error.to_string() }
    })
}

fn private_key(what: &'static str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::File {
        what,
        path: path.to_owned(),
        problem: error.to_string(),
    })
}

fn private_roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("authority", path)? {
        roots.add(certificate).map_err(|error| TlsError::File {
            what: "authority",
            path: path.to_owned(),
            problem: error.to_string(),
        })?;
    }
    Ok(roots)
}

/// Every certificate of a PEM file; at least one.
pub fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unreadable = |error: rustls_pki_types::pem::Error| TlsError::File {
        what,
        path: path.to_owned(),
        problem: error.to_string(),
    };
    let found = CertificateDer::pem_file_iter(path)
        .map_err(unreadable)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(unreadable)?;
    if found.is_empty() { Err(TlsError::Empty { path: path.to_owned() }) } else { Ok(found) }
}
