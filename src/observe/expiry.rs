//! How long certificates are still good, those the configuration names and those that brokers and databases presented:
//! looked at again and again, so that a renewal shows, told in the log when a threshold is passed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;

use super::Board;
use crate::certificates::{self, CertificateFacts};
use crate::config::{NamedCertificate, Settings};

/// Below this a renewal should be on its way.
const SOON_DAYS: i64 = 30;

/// Below this a person must act.
const VERY_SOON_DAYS: i64 = 7;

/// The first to expire of the certificates one connection needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CertificateStatus {
    /// None: the other side presented it.
    pub file: Option<PathBuf>,
    /// None: the file cannot be read.
    pub expires: Option<Timestamp>,
    pub trouble: Option<String>,
}

/// How near the end is; the later the worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nearness {
    Far,
    Soon,
    VerySoon,
    Over,
}

impl CertificateStatus {
    /// Of what the other side presented.
    pub fn presented(facts: &CertificateFacts) -> Self {
        CertificateStatus { file: None, expires: Some(facts.expires), trouble: None }
    }

    pub fn nearness(&self, now: Timestamp) -> Nearness {
        let Some(expires) = self.expires else { return Nearness::Over };
        let seconds = expires.as_second() - now.as_second();
        match seconds.div_euclid(86_400) {
            _ if seconds <= 0 => Nearness::Over,
            days if days < VERY_SOON_DAYS => Nearness::VerySoon,
            days if days < SOON_DAYS => Nearness::Soon,
            _ => Nearness::Far,
        }
    }

    /// For people.
    pub fn story(&self, peer: &str, now: Timestamp) -> String {
        let (whose, renew) = match &self.file {
            Some(file) => (file.display().to_string(), "`telemetry certs renew` signs it anew"),
            None => ("as it presented it".to_owned(), "renew it there"),
        };
        match (self.expires, &self.trouble) {
            (Some(at), _) if self.nearness(now) == Nearness::Over => {
                format!("a certificate of {peer} expired at {at:.0} ({whose}): {renew}")
            }
            (Some(at), _) => {
                let days = (at.as_second() - now.as_second()).div_euclid(86_400);
                format!("a certificate of {peer} expires in {days} days ({whose}): {renew}")
            }
            (None, trouble) => {
                format!("a certificate of {peer}: {}", trouble.as_deref().unwrap_or("unreadable"))
            }
        }
    }
}

/// Reads them all, once.
pub fn read_certificates(files: &[NamedCertificate]) -> BTreeMap<String, CertificateStatus> {
    let mut found: BTreeMap<String, CertificateStatus> = BTreeMap::new();
    for named in files {
        let status = status(named);
        keep_first(&mut found, &named.peer, status);
    }
    found
}

fn keep_first(
    found: &mut BTreeMap<String, CertificateStatus>,
    peer: &str,
    status: CertificateStatus,
) {
    if found.get(peer).is_none_or(|known| status.expires < known.expires) {
        found.insert(peer.to_owned(), status);
    }
}

/// Of a chain the first counts, which is the leaf; of a list of authorities the last to expire, for one of them is
/// enough.
fn status(named: &NamedCertificate) -> CertificateStatus {
    let file = Some(named.path.clone());
    match certificates::read(&named.path) {
        Ok(found) => {
            let expires = found.iter().map(|facts| facts.expires);
            let expires =
                if named.authority { expires.max() } else { found.first().map(|f| f.expires) };
            CertificateStatus { file, expires, trouble: None }
        }
        Err(error) => CertificateStatus { file, expires: None, trouble: Some(error.to_string()) },
    }
}

/// What the other sides presented, by peer. What a handshake took can be parsed.
pub fn presented_certificates(settings: &Settings) -> BTreeMap<String, CertificateFacts> {
    let presented = settings.presented_certificates().into_iter();
    presented.filter_map(|(peer, der)| Some((peer, certificates::parse(&der).ok()?))).collect()
}

/// Looks at those of whatever is configured at the moment.
pub struct CertificateWatch {
    settings: watch::Receiver<Arc<Settings>>,
    board: Arc<Board>,
    told: BTreeMap<String, Nearness>,
}

impl CertificateWatch {
    pub fn new(settings: watch::Receiver<Arc<Settings>>, board: Arc<Board>) -> Self {
        CertificateWatch { settings, board, told: BTreeMap::new() }
    }

    /// Shows what it finds, and tells what has passed a threshold since the last look.
    pub async fn look(&mut self) {
        let current = self.settings.borrow_and_update().clone();
        let files = current.certificate_files();
        // Small files, but a file system may hang.
        let reading = tokio::task::spawn_blocking(move || read_certificates(&files));
        let mut found = match reading.await {
            Ok(found) => found,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => return,
        };
        let presented = presented_certificates(&current);
        for (peer, facts) in &presented {
            keep_first(&mut found, peer, CertificateStatus::presented(facts));
        }
        self.told.retain(|peer, _| found.contains_key(peer));
        tell(&found, &mut self.told);
        self.board.set_certificates(found, presented);
    }

    /// Returns when another configuration is in force.
    pub async fn reloaded(&mut self) {
        if self.settings.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

/// Each threshold once.
fn tell(found: &BTreeMap<String, CertificateStatus>, told: &mut BTreeMap<String, Nearness>) {
    let now = Timestamp::now();
    for (peer, status) in found {
        let nearness = status.nearness(now);
        let before = told.insert(peer.clone(), nearness).unwrap_or(Nearness::Far);
        if nearness > before {
            let story = status.story(peer, now);
            tracing::warn!(event = "certificate_expires", peer, "{story}");
        } else if nearness < before {
            tracing::info!(event = "certificate_renewed", peer, "the certificate is good again");
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::ToSpan as _;

    use super::*;

    #[test]
    fn the_end_is_far_soon_very_soon_or_past() {
        let now = Timestamp::now();
        let at = |hours: i64| CertificateStatus {
            file: Some("x.crt".into()),
            expires: Some(now + hours.hours()),
            trouble: None,
        };
        assert_eq!(at(31 * 24).nearness(now), Nearness::Far);
        assert_eq!(at(29 * 24).nearness(now), Nearness::Soon);
        assert_eq!(at(6 * 24).nearness(now), Nearness::VerySoon);
        assert_eq!(at(-1).nearness(now), Nearness::Over);
        assert!(at(-1).story("mqtt:home", now).contains("expired"));
        assert!(at(50).story("mqtt:home", now).contains("in 2 days"));
    }
}
