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
    let current = Mutex::new(Current { stamps, key, trouble: None });
    tls::server_config(Arc::new(Renewing { files: files.clone(), current }))
}

type Stamps = [Option<Stamp>; 2];

#[derive(Debug)]
struct Renewing {
    files: CertificateFiles,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    /// Of the files that `key` was read from, never of ones that could not be used: what mends those (an owner, rights)
    /// leaves their stamps as they are.
    stamps: Stamps,
    key: Arc<CertifiedKey>,
    /// Why newer files cannot be used, as it was told last.
    trouble: Option<String>,
}

fn stamps(files: &CertificateFiles) -> Stamps {
    let stamp = |path: &PathBuf| Stamp::of(path).unwrap_or(None);
    [stamp(&files.certificate), stamp(&files.key)]
}

impl Renewing {
    /// Between the two renames of a renewal the files do not fit: the old pair goes on until they do.
    fn key(&self) -> Arc<CertifiedKey> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the content: what is replaced in between is read once more.
        let found = stamps(&self.files);
        if found == current.stamps {
            current.trouble = None;
            return current.key.clone();
        }
        match tls::certified_key(&self.files.certificate, &self.files.key) {
            Ok(key) => {
                *current = Current { stamps: found, key: Arc::new(key), trouble: None };
                tracing::info!(event = "http_certificate_renewed", "the new certificate counts");
            }
            Err(error) => {
                let trouble = Some(error.to_string());
                if current.trouble != trouble {
                    tracing::warn!(event = "http_certificate_unusable", %error, "the old certificate goes on");
                }
                current.trouble = trouble;
            }
        }
        current.key.clone()
    }
}

impl ResolvesServerCert for Renewing {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rig::Certificates;

    use super::*;

    /// A key handed to its owner late has the stamp it had before.
    #[test]
    fn a_renewed_certificate_counts_once_it_can_be_read_though_it_looks_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let first = Certificates::generate().unwrap().write(folder.path()).unwrap();
        let files =
            CertificateFiles { certificate: first.server_certificate, key: first.server_key };
        let key = Arc::new(tls::certified_key(&files.certificate, &files.key).unwrap());
        let current = Current { stamps: stamps(&files), key: key.clone(), trouble: None };
        let renewing = Renewing { files: files.clone(), current: Mutex::new(current) };
        let trouble = || renewing.current.lock().unwrap().trouble.clone();

        let second = Certificates::generate().unwrap();
        std::fs::write(&files.certificate, &second.server_certificate).unwrap();
        let changed = std::fs::metadata(&files.certificate).unwrap().modified().unwrap();
        let fill = |text: &str| {
            std::fs::write(&files.key, text).unwrap();
            File::options().write(true).open(&files.key).unwrap().set_modified(changed).unwrap();
            stamps(&files)
        };
        let unreadable = fill(&" ".repeat(second.server_key.len()));
        assert_eq!(renewing.key().cert, key.cert, "the old one goes on");
        assert!(trouble().is_some_and(|text| text.contains("cannot read key")), "{:?}", trouble());
        assert_eq!(fill(&second.server_key), unreadable);
        assert_ne!(renewing.key().cert, key.cert, "the new one counts");
        assert_eq!(trouble(), None);
    }
}
