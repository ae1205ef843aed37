//! What a changed configuration does to a running node.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a reload did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// The file the node reads.
    pub config: PathBuf,
    pub settings: Vec<SettingChange>,
    /// Secrets, certificates and migrations whose content is new under the same name.
    pub files: Vec<PathBuf>,
    pub parts: Vec<PartChange>,
    /// Parts that go on as if nothing had happened.
    pub parts_untouched: usize,
}

/// One value of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingChange {
    /// e.g. `streams.energy.topic_filter`
    pub path: String,
    /// As it would be written in the file, secrets masked; none = it was not there.
    pub before: Option<String>,
    pub after: Option<String>,
    /// It counts from the next start on.
    pub needs_restart: bool,
}

/// A part, or a stream's lane in a part that several share (`kafka:main/energy`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartChange {
    pub part: String,
    pub fate: PartFate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartFate {
    Added,
    /// Ended in order and built anew: what is pending waits in the buffer, or with the broker.
    Renewed,
    Removed,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty() && self.files.is_empty() && self.parts.is_empty()
    }

    /// Paths of the settings that count from the next start on.
    pub fn need_restart(&self) -> Vec<&str> {
        let settings = self.settings.iter().filter(|setting| setting.needs_restart);
        settings.map(|setting| setting.path.as_str()).collect()
    }
}
