//! What a certificate says.

use std::net::IpAddr;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::CertificateError;
use crate::tls;

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateFacts {
    pub subject: String,
    pub issuer: String,
    /// Host names and addresses it is good for.
    pub names: Vec<String>,
    pub authority: bool,
    pub not_before: Timestamp,
    pub expires: Timestamp,
}

impl CertificateFacts {
    /// Whole days; negative when it has expired.
    pub fn days_left(&self, now: Timestamp) -> i64 {
        (self.expires.as_second() - now.as_second()).div_euclid(86_400)
    }
}

/// Every certificate of a PEM file, in its order: in a chain the leaf is the first.
pub fn read(path: &Path) -> Result<Vec<CertificateFacts>, CertificateError> {
    let wrong = |problem: String| CertificateError::Parse { path: path.to_owned(), problem };
    let found = tls::certificates("certificate", path)?;
    found.iter().map(|der| parse(der).map_err(wrong)).collect()
}

/// One certificate in DER.
pub fn parse(der: &[u8]) -> Result<CertificateFacts, String> {
    let (_, certificate) =
        x509_parser::parse_x509_certificate(der).map_err(|error| error.to_string())?;
    facts(&certificate)
}

fn facts(certificate: &X509Certificate<'_>) -> Result<CertificateFacts, String> {
    let validity = certificate.validity();
    let moment = |seconds: i64| Timestamp::from_second(seconds).map_err(|error| error.to_string());
    let alternatives = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = alternatives.map(|extension| extension.value.general_names.iter());
    Ok(CertificateFacts {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        names: names.into_iter().flatten().filter_map(name).collect(),
        authority: certificate.is_ca(),
        not_before: moment(validity.not_before.timestamp())?,
        expires: moment(validity.not_after.timestamp())?,
    })
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let address = four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok()?;
            Some(address.to_string())
        }
        _ => None,
    }
}
