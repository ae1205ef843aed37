//! A throw-away authority and what it signed: never stored beside the source.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use time::OffsetDateTime;

const DAY: Duration = Duration::from_secs(86_400);

/// PEM texts: an authority, a server certificate for `localhost` and 127.0.0.1, and a client certificate.
#[derive(Debug, Clone)]
pub struct Certificates {
    pub authority: String,
    pub server_certificate: String,
    pub server_key: String,
    pub client_certificate: String,
    pub client_key: String,
}

/// The same as files.
#[derive(Debug, Clone)]
pub struct CertificateFiles {
    pub authority: PathBuf,
    pub server_certificate: PathBuf,
    pub server_key: PathBuf,
    pub client_certificate: PathBuf,
    pub client_key: PathBuf,
}

impl Certificates {
    /// For `localhost` and 127.0.0.1.
    ///
    /// # Errors
    /// When a certificate cannot be made.
    pub fn generate() -> Result<Self> {
        Self::generate_for(&["localhost", "127.0.0.1"])
    }

    /// For the given names and addresses; a wrong name makes a certificate that must be refused.
    ///
    /// # Errors
    /// When a name is not one.
    pub fn generate_for(names: &[&str]) -> Result<Self> {
        Self::make(names, None)
    }

    /// For `localhost` and 127.0.0.1; the server's was good for the year 2020 only.
    ///
    /// # Errors
    /// When a certificate cannot be made.
    pub fn generate_expired() -> Result<Self> {
        let year = (date_time_ymd(2020, 1, 1), date_time_ymd(2020, 12, 31));
        Self::make(&["localhost", "127.0.0.1"], Some(year))
    }

    /// For `localhost` and 127.0.0.1; the server's is good for so many days yet, the authority's for long.
    ///
    /// # Errors
    /// When a certificate cannot be made.
    pub fn generate_for_days(days: u32) -> Result<Self> {
        let end = OffsetDateTime::from(SystemTime::now() + DAY * days);
        Self::make(&["localhost", "127.0.0.1"], Some((date_time_ymd(2020, 1, 1), end)))
    }

    fn make(
        names: &[&str],
        server_validity: Option<(OffsetDateTime, OffsetDateTime)>,
    ) -> Result<Self> {
        let authority_key = KeyPair::generate().context("make the authority's key")?;
        let mut authority = named(Vec::new(), "telemetry rig authority")?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let authority_pem =
            authority.self_signed(&authority_key).context("sign the authority")?.pem();
        let issuer = Issuer::new(authority, authority_key);

        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let mut server = named(names, "telemetry rig server")?;
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        if let Some((begin, end)) = server_validity {
            (server.not_before, server.not_after) = (begin, end);
        }
        let server_key = KeyPair::generate().context("make the server's key")?;
        let server = server.signed_by(&server_key, &issuer).context("sign the server")?;

        let mut client = named(Vec::new(), "telemetry rig client")?;
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let client_key = KeyPair::generate().context("make the client's key")?;
        let client = client.signed_by(&client_key, &issuer).context("sign the client")?;

        Ok(Self {
            authority: authority_pem,
            server_certificate: server.pem(),
            server_key: server_key.serialize_pem(),
            client_certificate: client.pem(),
            client_key: client_key.serialize_pem(),
        })
    }

    /// Writes them into a folder, which is created.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<CertificateFiles> {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let put = |name: &str, text: &str| {
            let file = folder.join(name);
            std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
            anyhow::Ok(file)
        };
        Ok(CertificateFiles {
            authority: put("ca.crt", &self.authority)?,
            server_certificate: put("server.crt", &self.server_certificate)?,
            server_key: put("server.key", &self.server_key)?,
            client_certificate: put("client.crt", &self.client_certificate)?,
            client_key: put("client.key", &self.client_key)?,
        })
    }
}

fn named(names: Vec<String>, common_name: &str) -> Result<CertificateParams> {
    let mut parameters = CertificateParams::new(names).context("name a certificate")?;
    parameters.distinguished_name.push(DnType::CommonName, common_name);
    Ok(parameters)
}
