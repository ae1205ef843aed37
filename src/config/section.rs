//! A table of the file, checked against its description: unknown keys, types, ranges, choices. What
//! is wrong is reported and then treated as absent, so that the rest is checked too.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use indexmap::IndexMap;

use super::report::{At, Problems, did_you_mean};
use super::schema::{Absent, Group, KeyRule, Kind, Literal, Setting};
use super::tree::{Member, Node, Place, Raw, Table};
use super::{leaf, tree};
use crate::domain::StreamName;

/// A checked table.
#[derive(Debug)]
pub struct Section {
    pub path: String,
    pub place: Option<Place>,
    pub group: &'static Group,
    entries: IndexMap<&'static str, Entry>,
    /// Values that follow from others when the file does not say, as they would be written.
    derived: RefCell<BTreeMap<&'static str, String>>,
    /// Settings that mean nothing beside the others of this table.
    moot: RefCell<Vec<&'static str>>,
}

#[derive(Debug)]
enum Entry {
    Leaf(Node),
    One(Section),
    Many(IndexMap<String, Section>),
    /// Written, wrong and reported.
    Faulty(Node),
}

/// The place in the file a table is read from.
struct Origin {
    path: String,
    place: Option<Place>,
}

impl Section {
    pub fn root(group: &'static Group, table: Table, problems: &mut Problems) -> Section {
        Section::read(group, Origin { path: String::new(), place: None }, table, problems)
    }

    fn read(
        group: &'static Group,
        origin: Origin,
        mut table: Table,
        problems: &mut Problems,
    ) -> Section {
        let mut section = Section {
            path: origin.path,
            place: origin.place,
            group,
            entries: IndexMap::new(),
            derived: RefCell::default(),
            moot: RefCell::default(),
        };
        for setting in group.settings {
            let member = table.shift_remove(setting.name);
            if let Some(entry) = section.entry(setting, member, problems) {
                section.entries.insert(setting.name, entry);
            }
        }
        for (key, member) in table {
            section.unknown(&key, &member, problems);
        }
        section
    }

    fn entry(
        &self,
        setting: &'static Setting,
        member: Option<Member>,
        problems: &mut Problems,
    ) -> Option<Entry> {
        let path = self.path_of(setting.name);
        let Some(member) = member else {
            return self.absent(setting, path, problems);
        };
        let place = Some(member.key.clone());
        match (setting.kind, member.node.raw) {
            (Kind::Section(group), Raw::Table(table)) => {
                Some(Entry::One(Section::read(group, Origin { path, place }, table, problems)))
            }
            (Kind::Sections(group, rule), Raw::Table(table)) => {
                Some(Entry::Many(named(group, rule, &path, table, problems)))
            }
            (Kind::Section(_) | Kind::Sections(..), raw) => {
                let value = Some(raw.to_string());
                problems.error(
                    At { place, path: path.clone(), value },
                    format!("must be a table, [{path}], not {}", raw.kind()),
                );
                None
            }
            (_, raw) => {
                let node = Node { raw, place: member.node.place };
                let Err(wrong) = leaf::check(&setting.kind, &node) else {
                    return Some(Entry::Leaf(node));
                };
                let at = At { place: Some(node.place.clone()), path, value: shown(setting, &node) };
                problems.error_with(at, wrong.rule, wrong.hint);
                Some(Entry::Faulty(node))
            }
        }
    }

    fn absent(
        &self,
        setting: &'static Setting,
        path: String,
        problems: &mut Problems,
    ) -> Option<Entry> {
        let origin = Origin { path, place: self.place.clone() };
        match (setting.absent, setting.kind) {
            (Absent::Required, _) => {
                let at = At { place: origin.place, path: origin.path, value: None };
                problems.error_with(at, "missing; it is required", Some(setting.doc.into()));
                None
            }
            (Absent::Empty, Kind::Section(group)) => {
                Some(Entry::One(Section::read(group, origin, Table::new(), problems)))
            }
            _ => None,
        }
    }

    fn unknown(&self, key: &str, member: &Member, problems: &mut Problems) {
        let path = self.path_of(key);
        let place = Some(member.key.clone());
        if let Some((_, reason)) = self.group.refused.iter().find(|(name, _)| *name == key) {
            return problems.error(At { place, path, value: None }, *reason);
        }
        let names = || self.group.settings.iter().map(|setting| setting.name);
        let hint = did_you_mean(key, names())
            .unwrap_or_else(|| format!("known here: {}", names().collect::<Vec<_>>().join(", ")));
        let value = (!secretive(key)).then(|| cut(member.node.raw.to_string()));
        problems.error_with(At { place, path, value }, "unknown setting", Some(hint));
    }

    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn setting(&self, name: &str) -> &'static Setting {
        let found = self.group.settings.iter().find(|setting| setting.name == name);
        found.expect("a setting is asked for by a name of its group")
    }

    /// The value or its default; none when it is absent or wrong.
    fn raw(&self, name: &'static str) -> Option<Raw> {
        let setting = self.setting(name);
        match (self.entries.get(name), setting.absent) {
            (Some(Entry::Leaf(node)), _) => Some(node.raw.clone()),
            (None, Absent::Default(literal)) => Some(match literal {
                Literal::Text(text) => Raw::Text(text.into()),
                Literal::Integer(number) => Raw::Integer(number.into()),
                Literal::Number(number) => Raw::Number(number),
                Literal::Boolean(flag) => Raw::Boolean(flag),
            }),
            _ => None,
        }
    }

    /// Written in the file, rightly or wrongly.
    pub fn has(&self, name: &'static str) -> bool {
        self.setting(name);
        self.entries.contains_key(name)
    }

    /// Written, and reported as wrong.
    pub fn is_faulty(&self, name: &'static str) -> bool {
        self.setting(name);
        matches!(self.entries.get(name), Some(Entry::Faulty(_)))
    }

    /// The setting as a problem names it; the table itself where it is not written.
    pub fn at(&self, name: &'static str) -> At {
        let path = self.path_of(name);
        match self.entries.get(name) {
            Some(Entry::Leaf(node) | Entry::Faulty(node)) => {
                let value = shown(self.setting(name), node);
                At { place: Some(node.place.clone()), path, value }
            }
            Some(Entry::One(section)) => At { place: section.place.clone(), path, value: None },
            _ => At { place: self.place.clone(), path, value: None },
        }
    }

    pub fn itself(&self) -> At {
        At { place: self.place.clone(), path: self.path.clone(), value: None }
    }

    pub fn optional_text(&self, name: &'static str) -> Option<String> {
        match self.raw(name) {
            Some(Raw::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Empty when it is wrong or missing, which is reported elsewhere.
    pub fn text(&self, name: &'static str) -> String {
        self.optional_text(name).unwrap_or_default()
    }

    pub fn optional_integer<T: TryFrom<i128>>(&self, name: &'static str) -> Option<T> {
        match self.raw(name) {
            Some(Raw::Integer(number)) => T::try_from(number).ok(),
            _ => None,
        }
    }

    /// The least allowed value when it is wrong or missing, which is reported elsewhere.
    pub fn integer<T: TryFrom<i128> + Default>(&self, name: &'static str) -> T {
        self.optional_integer(name).unwrap_or_else(|| match self.setting(name).kind {
            Kind::Integer(min, _) => T::try_from(min.into()).unwrap_or_default(),
            _ => T::default(),
        })
    }

    /// In the unit the name ends in.
    pub fn optional_duration(&self, name: &'static str) -> Option<Duration> {
        let count = self.optional_integer::<u64>(name)?;
        Some(match name.rsplit('_').next() {
            Some("ms") => Duration::from_millis(count),
            Some("days") => Duration::from_secs(count * 86_400),
            _ => Duration::from_secs(count),
        })
    }

    pub fn duration(&self, name: &'static str) -> Duration {
        self.optional_duration(name).unwrap_or_default()
    }

    pub fn optional_number(&self, name: &'static str) -> Option<f64> {
        match self.raw(name) {
            Some(Raw::Integer(number)) => Some(number as f64),
            Some(Raw::Number(number)) => Some(number),
            _ => None,
        }
    }

    pub fn boolean(&self, name: &'static str) -> bool {
        matches!(self.raw(name), Some(Raw::Boolean(true)))
    }

    pub fn texts(&self, name: &'static str) -> Vec<String> {
        match self.raw(name) {
            Some(Raw::List(items)) => items
                .into_iter()
                .filter_map(|item| match item.raw {
                    Raw::Text(text) => Some(text),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    pub fn scalar(&self, name: &'static str) -> Option<serde_json::Value> {
        self.raw(name).as_ref().and_then(leaf::json)
    }

    pub fn scalars(&self, name: &'static str) -> Option<Vec<serde_json::Value>> {
        match self.raw(name)? {
            Raw::List(items) => {
                Some(items.iter().filter_map(|item| leaf::json(&item.raw)).collect())
            }
            _ => None,
        }
    }

    /// Key → value, in the order of the file.
    pub fn scalar_map(&self, name: &'static str) -> Option<IndexMap<String, serde_json::Value>> {
        let Some(Raw::Table(table)) = self.raw(name) else { return None };
        let scalar = |(key, member): (String, Member)| Some((key, leaf::json(&member.node.raw)?));
        Some(table.into_iter().filter_map(scalar).collect())
    }

    pub fn text_map(&self, name: &'static str) -> IndexMap<String, String> {
        let Some(Raw::Table(table)) = self.raw(name) else { return IndexMap::new() };
        let text = |(key, member): (String, Member)| match member.node.raw {
            Raw::Text(text) => Some((key, text)),
            _ => None,
        };
        table.into_iter().filter_map(text).collect()
    }

    /// The member of `choices` that is written; the first when it is wrong, which is reported
    /// elsewhere.
    pub fn pick<T: Copy>(&self, name: &'static str, choices: &[(&str, T)]) -> T {
        let text = self.text(name);
        let found = choices.iter().find(|(choice, _)| *choice == text);
        found.unwrap_or(&choices[0]).1
    }

    pub fn section(&self, name: &'static str) -> Option<&Section> {
        self.setting(name);
        match self.entries.get(name) {
            Some(Entry::One(section)) => Some(section),
            _ => None,
        }
    }

    pub fn sections(&self, name: &'static str) -> impl Iterator<Item = (&String, &Section)> {
        self.setting(name);
        let many = match self.entries.get(name) {
            Some(Entry::Many(many)) => Some(many),
            _ => None,
        };
        many.into_iter().flatten()
    }

    /// Every table inside.
    pub fn children(&self) -> impl Iterator<Item = &Section> {
        self.entries.values().flat_map(|entry| match entry {
            Entry::One(section) => vec![section],
            Entry::Many(sections) => sections.values().collect(),
            Entry::Leaf(_) | Entry::Faulty(_) => Vec::new(),
        })
    }

    /// Where its own settings are written, by their paths.
    pub fn places(&self) -> impl Iterator<Item = (String, &Place)> {
        self.entries.iter().filter_map(|(name, entry)| match entry {
            Entry::Leaf(node) => Some((self.path_of(name), &node.place)),
            _ => None,
        })
    }

    /// Notes what a setting comes to that the file leaves out.
    pub fn derive(&self, name: &'static str, value: impl std::fmt::Debug) {
        self.setting(name);
        self.derived.borrow_mut().insert(name, format!("{value:?}"));
    }

    pub fn derived(&self, name: &'static str) -> Option<String> {
        self.derived.borrow().get(name).cloned()
    }

    /// Notes settings whose defaults mean nothing here.
    pub fn leave_out(&self, names: &[&'static str]) {
        self.moot.borrow_mut().extend(names);
    }

    pub fn is_moot(&self, name: &'static str) -> bool {
        self.moot.borrow().contains(&name)
    }

    /// A value as written.
    pub fn written(&self, name: &'static str) -> Option<&Node> {
        match self.entries.get(name) {
            Some(Entry::Leaf(node)) => Some(node),
            _ => None,
        }
    }
}

fn named(
    group: &'static Group,
    rule: KeyRule,
    path: &str,
    table: Table,
    problems: &mut Problems,
) -> IndexMap<String, Section> {
    let mut sections = IndexMap::new();
    for (key, member) in table {
        let path = format!("{path}.{key}");
        let place = Some(member.key.clone());
        let at = |value| At { place: place.clone(), path: path.clone(), value };
        let problem = match rule {
            KeyRule::Name => StreamName::parse(&key).err().map(|error| error.to_string()),
            KeyRule::Identifier => leaf::identifier(&key).err(),
        };
        // A table with a wrong name is checked all the same, so that its other mistakes are told
        // too.
        if let Some(problem) = problem {
            problems.error(at(None), problem);
        }
        match member.node.raw {
            Raw::Table(table) => {
                let origin = Origin { path: path.clone(), place: place.clone() };
                sections.insert(key, Section::read(group, origin, table, problems));
            }
            raw => {
                let rule = format!("must be a table, not {}", raw.kind());
                problems.error(at(Some(cut(raw.to_string()))), rule);
            }
        }
    }
    sections
}

/// Values that must not be repeated anywhere.
pub fn secretive(key: &str) -> bool {
    let key = key.to_lowercase();
    ["password", "secret", "token", "jaas", "pem", "credential"]
        .iter()
        .any(|part| key.contains(part))
}

fn shown(setting: &Setting, node: &tree::Node) -> Option<String> {
    match (setting.kind, &node.raw) {
        // A password written where the name of a file belongs must not come out again.
        (Kind::SecretFile | Kind::SecretCredential | Kind::SecretEnvironment, _) => None,
        (Kind::TextMap, Raw::Table(table)) if table.keys().any(|key| secretive(key)) => None,
        (_, raw) => Some(cut(raw.to_string())),
    }
}

fn cut(text: String) -> String {
    const SHOWN_CHARACTERS_MAX: usize = 80;
    match text.char_indices().nth(SHOWN_CHARACTERS_MAX) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
