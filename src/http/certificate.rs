//! The certificate of the HTTPS listener: read again at the first handshake after its files were replaced.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;

use crate::config::CertificateFiles;
use crate::private_file::Stamp;
use crate::tls::{self, TlsError};

/// Settings of the listener; the files must be usable now.
pub fn server_config(files: &CertificateFiles) -> Result<ServerConfig, TlsError> {
    let stamps = stamps(files);
    let key = Arc::new(tls::certified_key(&files.certificate, &files.key)?);
    let resolver = Renewing { files: files.clone(), current: Mutex::new(Current { stamps, key }) };
    tls::server_config(Arc::new(resolver))
}

type Stamps = [Option<Stamp>; 2];

#[derive(Debug)]
struct Renewing {
    files: CertificateFiles,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    stamps: Stamps,
    key: Arc<CertifiedKey>,
}

fn stamps(files: &CertificateFiles) -> Stamps {
    let stamp = |path: &PathBuf| Stamp::of(path).unwrap_or(None);
    [stamp(&files.certificate), stamp(&files.key)]
}

impl ResolvesServerCert for Renewing {
    /// Between the two renames of a renewal the files do not fit: the old pair goes on until they do.
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stamps(&self.files);
        if found != current.stamps {
            current.stamps = found;
            match tls::certified_key(&self.files.certificate, &self.files.key) {
                Ok(key) => {
                    current.key = Arc::new(key);
                    tracing::info!(
                        event = "http_certificate_renewed",
                        "the new certificate counts"
                    );
                }
                Err(error) => tracing::warn!(event = "http_certificate_unusable", %error,
                    "the old certificate goes on"),
            }
        }
        Some(current.key.clone())
    }
}
