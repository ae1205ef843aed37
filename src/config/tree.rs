//! TOML as a tree that remembers where everything stands, and the files it is put together from.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use indexmap::map::Entry as Slot;
use serde::Serialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::report::{At, Problems};

/// Where something stands, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// Main file first, then `conf.d` in its order.
    #[serde(skip)]
    order: usize,
    #[serde(skip)]
    offset: usize,
    #[serde(serialize_with = "as_text")]
    pub file: Arc<str>,
    pub line: usize,
    pub column: usize,
}

fn as_text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

impl Place {
    /// `file:line`, as the effective configuration names its origins.
    pub fn line_of_file(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// A value with its place.
#[derive(Debug, Clone)]
pub struct Node {
    pub raw: Raw,
    pub place: Place,
}

#[derive(Debug, Clone)]
pub enum Raw {
    Text(String),
    /// Wider than any setting, so that a number too large is told by the setting's own limits.
    Integer(i128),
    Number(f64),
    Boolean(bool),
    Datetime(String),
    List(Vec<Node>),
    Table(Table),
}

/// In the order of the file.
pub type Table = IndexMap<String, Member>;

#[derive(Debug, Clone)]
pub struct Member {
    /// Where the key stands.
    pub key: Place,
    pub node: Node,
}

impl Raw {
    pub fn kind(&self) -> &'static str {
        match self {
            Raw::Text(_) => "a text",
            Raw::Integer(_) => "an integer",
            Raw::Number(_) => "a number with a fraction",
            Raw::Boolean(_) => "a boolean",
            Raw::Datetime(_) => "a date or time",
            Raw::List(_) => "a list",
            Raw::Table(_) => "a table",
        }
    }
}

/// As it would be written in a file.
impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Raw::Text(text) => write!(f, "{text:?}"),
            Raw::Integer(number) => write!(f, "{number}"),
            Raw::Number(number) => write!(f, "{number:?}"),
            Raw::Boolean(flag) => write!(f, "{flag}"),
            Raw::Datetime(text) => write!(f, "{text}"),
            Raw::List(items) => {
                let items: Vec<_> = items.iter().map(|item| item.raw.to_string()).collect();
                write!(f, "[{}]", items.join(", "))
            }
            Raw::Table(table) => {
                let members: Vec<_> = table
                    .iter()
                    .map(|(key, member)| format!("{key} = {}", member.node.raw))
                    .collect();
                write!(f, "{{ {} }}", members.join(", "))
            }
        }
    }
}

/// Folder beside the main file whose `*.toml` files are merged into it, in the order of their
/// names.
const FRAGMENTS: &str = "conf.d";

/// Reads the main file and its fragments and merges them. Whatever cannot be read or parsed becomes
/// a problem.
pub fn read_files(main: &Path, problems: &mut Problems) -> Table {
    let mut files = vec![main.to_owned()];
    files.extend(fragments(main, problems));
    let mut merged = Table::new();
    for (order, path) in files.iter().enumerate() {
        let table = read_file(path, order, problems);
        merge(&mut merged, table, &mut Vec::new(), problems);
    }
    merged
}

fn fragments(main: &Path, problems: &mut Problems) -> Vec<PathBuf> {
    let folder = main.parent().unwrap_or(Path::new("")).join(FRAGMENTS);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            problems.error(At::default(), format!("cannot read {}: {error}", folder.display()));
            return Vec::new();
        }
    };
    toml_files(&folder, entries.map(|entry| entry.map(|entry| entry.path())), problems)
}

/// What the folder does not give up is a problem: a fragment left out would change the node without a word.
fn toml_files(
    folder: &Path,
    paths: impl Iterator<Item = std::io::Result<PathBuf>>,
    problems: &mut Problems,
) -> Vec<PathBuf> {
    let mut unread = |error: std::io::Error| {
        problems.error(At::default(), format!("cannot read all of {}: {error}", folder.display()));
    };
    let mut found: Vec<PathBuf> = paths
        .filter_map(|path| path.map_err(&mut unread).ok())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    found.sort();
    found
}

fn read_file(path: &Path, order: usize, problems: &mut Problems) -> Table {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            problems.error(At::default(), format!("cannot read {}: {error}", path.display()));
            return Table::new();
        }
    };
    parse(&text, path.display().to_string().into(), order, problems)
}

/// The tree of one text; what is no TOML becomes a problem.
pub fn parse(text: &str, name: Arc<str>, order: usize, problems: &mut Problems) -> Table {
    let file = File::new(text, name, order);
    let (document, mistakes) = DeTable::parse_recoverable(text);
    for mistake in mistakes {
        let place = file.place(mistake.span().map_or(0, |span| span.start));
        let at = At { place: Some(place), path: String::new(), value: None };
        let message = mistake.message().trim_end_matches(", expected nothing");
        let hint = message.starts_with("invalid").then(|| "a text stands in quotes".to_owned());
        problems.error_with(at, format!("not TOML: {message}"), hint);
    }
    file.table(document.into_inner())
}

struct File<'t> {
    order: usize,
    name: Arc<str>,
    text: &'t str,
    /// Where each line begins: a file of thousands of lines is not counted anew for each of its values.
    lines: Vec<usize>,
}

impl<'t> File<'t> {
    fn new(text: &'t str, name: Arc<str>, order: usize) -> Self {
        let behind = text.match_indices('\n').map(|(newline, _)| newline + 1);
        File { order, name, text, lines: std::iter::once(0).chain(behind).collect() }
    }

    fn place(&self, offset: usize) -> Place {
        let line = self.lines.partition_point(|begin| *begin <= offset);
        let begin = self.lines[line.saturating_sub(1)];
        let before = self.text.get(begin..offset).unwrap_or_default();
        let column = before.chars().count() + 1;
        Place { order: self.order, offset, file: self.name.clone(), line, column }
    }

    fn table(&self, table: DeTable<'_>) -> Table {
        let mut members: Vec<(String, Member)> = table
            .into_iter()
            .map(|(key, value)| {
                let key_place = self.place(key.span().start);
                let node = self.node(value, &key_place);
                (key.into_inner().into_owned(), Member { key: key_place, node })
            })
            .collect();
        members.sort_by(|a, b| a.1.key.cmp(&b.1.key));
        members.into_iter().collect()
    }

    fn node(&self, value: Spanned<DeValue<'_>>, key: &Place) -> Node {
        let place = self.place(value.span().start);
        match value.into_inner() {
            DeValue::String(text) => Node { raw: Raw::Text(text.into_owned()), place },
            DeValue::Integer(number) => {
                let parsed = i128::from_str_radix(number.as_str(), number.radix());
                Node { raw: Raw::Integer(parsed.unwrap_or(i128::MAX)), place }
            }
            DeValue::Float(number) => {
                let parsed = number.as_str().parse().unwrap_or(f64::NAN);
                Node { raw: Raw::Number(parsed), place }
            }
            DeValue::Boolean(flag) => Node { raw: Raw::Boolean(flag), place },
            DeValue::Datetime(time) => Node { raw: Raw::Datetime(time.to_string()), place },
            DeValue::Array(items) => {
                let items = items.into_iter().map(|item| self.node(item, key)).collect();
                Node { raw: Raw::List(items), place }
            }
            DeValue::Table(table) => {
                Node { raw: Raw::Table(self.table(table)), place: key.clone() }
            }
        }
    }
}

/// Tables are joined member by member; a value given twice is refused, and a stream belongs to one
/// file whole: nobody should have to guess which of two definitions counts.
fn merge(into: &mut Table, from: Table, path: &mut Vec<String>, problems: &mut Problems) {
    for (key, member) in from {
        path.push(key.clone());
        match into.entry(key) {
            Slot::Vacant(slot) => {
                slot.insert(member);
            }
            Slot::Occupied(mut slot) => {
                let whole = path.len() == 2 && path[0] == "streams";
                let first = slot.get().key.clone();
                match (&mut slot.get_mut().node.raw, member.node.raw) {
                    (Raw::Table(old), Raw::Table(new)) if !whole => merge(old, new, path, problems),
                    _ => {
                        let at = At { place: Some(member.key), path: path.join("."), value: None };
                        problems.error(at, format!("defined twice; the first time at {first}"));
                    }
                }
            }
        }
        path.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_can_be_read_only_in_part_is_a_problem() {
        let paths = [
            Ok(PathBuf::from("conf.d/b.toml")),
            Err(std::io::Error::other("bad sector")),
            Ok(PathBuf::from("conf.d/a.toml")),
            Ok(PathBuf::from("conf.d/a.toml.dpkg-old")),
        ];
        let mut problems = Problems::default();
        let found = toml_files(Path::new("conf.d"), paths.into_iter(), &mut problems);
        assert_eq!(found, [PathBuf::from("conf.d/a.toml"), PathBuf::from("conf.d/b.toml")]);
        let (errors, _) = problems.into_sorted();
        let rules: Vec<_> = errors.iter().map(|problem| problem.rule.as_str()).collect();
        assert_eq!(rules, ["cannot read all of conf.d: bad sector"]);
    }
}
