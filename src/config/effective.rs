//! The configuration as it counts: every value with where it came from, secrets masked.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::schema::{Absent, Kind, Setting};
use super::section::{Section, secretive};
use super::tree::{Node, Raw};

/// One value: `path = value   # origin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EffectiveLine {
    pub path: String,
    /// As it would be written in the file.
    pub value: String,
    /// `file:line`, `default`, `derived`, or the place a secret was read from.
    pub origin: String,
}

impl fmt::Display for EffectiveLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ORIGIN_COLUMN: usize = 72;
        let setting = format!("{} = {}", self.path, self.value);
        write!(f, "{setting:<ORIGIN_COLUMN$} # {}", self.origin)
    }
}

const MASK: &str = "\"***\"";

/// All values under a table, in the order of the description.
pub fn lines(section: &Section, folder: &Path) -> Vec<EffectiveLine> {
    let mut found = Vec::new();
    collect(section, folder, &mut found);
    found
}

fn collect(section: &Section, folder: &Path, found: &mut Vec<EffectiveLine>) {
    for setting in section.group.settings {
        match setting.kind {
            Kind::Section(_) => {
                if let Some(inner) = section.section(setting.name) {
                    collect(inner, folder, found);
                }
            }
            Kind::Sections(..) => {
                for (_, inner) in section.sections(setting.name) {
                    collect(inner, folder, found);
                }
            }
            _ => found.extend(leaf(section, setting, folder)),
        }
    }
}

fn leaf(section: &Section, setting: &'static Setting, folder: &Path) -> Vec<EffectiveLine> {
    let path = section.at(setting.name).path;
    let line = |value: String, origin: &str| {
        vec![EffectiveLine { path: path.clone(), value, origin: origin.to_owned() }]
    };
    if let Some(node) = section.written(setting.name) {
        return written(path, setting, node, folder);
    }
    match (section.derived(setting.name), setting.absent) {
        (Some(value), _) => line(value, "derived"),
        (None, Absent::Default(value)) if !section.is_moot(setting.name) => {
            line(value.to_string(), "default")
        }
        _ => Vec::new(),
    }
}

fn written(path: String, setting: &Setting, node: &Node, folder: &Path) -> Vec<EffectiveLine> {
    let origin = node.place.line_of_file();
    let secret = match setting.kind {
        Kind::SecretFile => Some(format!("file {}", resolved(&node.raw, folder))),
        Kind::SecretCredential => Some(format!("credential {}", node.raw)),
        Kind::SecretEnvironment => Some(format!("environment {}", node.raw)),
        _ => None,
    };
    let value = match (setting.kind, &node.raw) {
        (Kind::Path, raw) => resolved(raw, folder),
        (Kind::TextMap, Raw::Table(table)) => {
            let member = |(key, member): (&String, &super::tree::Member)| {
                let hidden = secretive(key);
                format!(
                    "{key:?} = {}",
                    if hidden { MASK.into() } else { member.node.raw.to_string() }
                )
            };
            format!("{{ {} }}", table.iter().map(member).collect::<Vec<_>>().join(", "))
        }
        (_, raw) => raw.to_string(),
    };
    let base = path.rsplit_once('_').map_or(path.clone(), |(base, _)| base.to_owned());
    let mut lines = vec![EffectiveLine { path, value, origin }];
    if let Some(origin) = secret {
        lines.push(EffectiveLine { path: base, value: MASK.into(), origin });
    }
    lines
}

fn resolved(raw: &Raw, folder: &Path) -> String {
    match raw {
        Raw::Text(text) => format!("{:?}", folder.join(text).display().to_string()),
        other => other.to_string(),
    }
}
