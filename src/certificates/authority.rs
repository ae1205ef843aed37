//! An authority: what it takes to sign.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls_pki_types::ServerName;
use time::OffsetDateTime;

use super::CertificateError;
use crate::domain::Secret;

/// A device whose clock is late must not refuse a certificate made just now.
const CLOCK_SLACK: Duration = Duration::from_secs(86_400);

/// PEM texts.
pub struct Signed {
    pub certificate: String,
    pub key: Secret,
}

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Server,
    Client,
}

/// A certificate with its key that signs others.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub certificate: String,
}

impl Authority {
    pub fn make(days: u32) -> Result<(Self, Secret), CertificateError> {
        let key = KeyPair::generate()?;
        let mut parameters = parameters("telemetry authority", &[], days)?;
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = parameters.self_signed(&key)?.pem();
        let secret = Secret::new(key.serialize_pem());
        let issuer = Issuer::new(parameters, key);
        Ok((Authority { issuer, certificate }, secret))
    }

    pub fn load(certificate: String, key: &Secret) -> Result<Self, CertificateError> {
        let key = KeyPair::from_pem(key.expose())?;
        Ok(Authority { issuer: Issuer::from_ca_cert_pem(&certificate, key)?, certificate })
    }

    /// With a new key.
    pub fn sign(
        &self,
        purpose: Purpose,
        common_name: &str,
        names: &[String],
        days: u32,
    ) -> Result<Signed, CertificateError> {
        let key = KeyPair::generate()?;
        let mut parameters = parameters(common_name, names, days)?;
        parameters.use_authority_key_identifier_extension = true;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![match purpose {
            Purpose::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Purpose::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let certificate = parameters.signed_by(&key, &self.issuer)?.pem();
        Ok(Signed { certificate, key: Secret::new(key.serialize_pem()) })
    }
}

fn parameters(
    common_name: &str,
    names: &[String],
    days: u32,
) -> Result<CertificateParams, CertificateError> {
    for name in names {
        let checked = name.strip_prefix("*.").unwrap_or(name);
        ServerName::try_from(checked).map_err(|_| CertificateError::Name { name: name.clone() })?;
    }
    let mut parameters = CertificateParams::new(names)?;
    parameters.distinguished_name.push(DnType::CommonName, common_name);
    let now = OffsetDateTime::from_unix_timestamp(jiff::Timestamp::now().as_second())
        .map_err(|_| rcgen::Error::Time)?;
    parameters.not_before = now - CLOCK_SLACK;
    parameters.not_after = now + Duration::from_secs(u64::from(days) * 86_400);
    Ok(parameters)
}
