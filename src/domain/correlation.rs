//! What ties the lines of one story in the log together: an outage from its first line to its last, an order with all it
//! causes.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use uuid::Uuid;

/// The field `correlation_id` of a log line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct CorrelationId(String);

impl CorrelationId {
    /// Of an id made here; short, for people type it.
    const CHARACTERS: usize = 12;
    /// Of one made elsewhere.
    const CHARACTERS_MAX: usize = 64;

    /// A new one.
    #[allow(clippy::new_without_default, reason = "no two are alike: there is no default")]
    pub fn new() -> Self {
        let mut text = Uuid::new_v4().simple().to_string();
        text.truncate(Self::CHARACTERS);
        CorrelationId(text)
    }

    /// One made by somebody else. `None` unless it is short and plain enough for a log.
    pub fn parse(text: &str) -> Option<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
        let fits = !text.is_empty() && text.len() <= Self::CHARACTERS_MAX;
        (fits && text.chars().all(plain)).then(|| CorrelationId(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Something that is wrong from one moment to another: an outage, a hold, a silence. Whoever tells of it asks here for
/// its id.
#[derive(Debug, Default)]
pub struct Incident(Mutex<Option<CorrelationId>>);

impl Incident {
    /// The id of what goes on; it begins with the first who asks.
    pub fn id(&self) -> CorrelationId {
        self.lock().get_or_insert_with(CorrelationId::new).clone()
    }

    /// The id of what goes on, if anything does.
    pub fn current(&self) -> Option<CorrelationId> {
        self.lock().clone()
    }

    /// It is over. `None` when nothing went on.
    pub fn end(&self) -> Option<CorrelationId> {
        self.lock().take()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<CorrelationId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incident_has_one_id_and_the_next_another() {
        let incident = Incident::default();
        assert_eq!(incident.current(), None);
        let first = incident.id();
        assert_eq!(incident.id(), first);
        assert_eq!(incident.end(), Some(first.clone()));
        assert_eq!(incident.end(), None);
        assert_ne!(incident.id(), first);
    }

    #[test]
    fn what_others_send_is_taken_only_when_plain() {
        assert_eq!(CorrelationId::parse("a1-B2_c.3:4").unwrap().as_str(), "a1-B2_c.3:4");
        for text in ["", "a b", "a\nb", "ü", &"x".repeat(65)] {
            assert_eq!(CorrelationId::parse(text), None, "{text:?}");
        }
    }
}
