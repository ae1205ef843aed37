//! `docs/configuration.md`, from the description the reader uses.

use std::fmt::Write as _;

use super::ROOT;
use super::schema::{Absent, Group, Kind, Setting};

/// The reference of every setting as Markdown.
pub fn markdown() -> String {
    let mut page = String::from(include_str!("docs_intro.md"));
    for setting in ROOT.settings {
        group(&mut page, setting, &[]);
    }
    page
}

fn group(page: &mut String, setting: &Setting, path: &[String]) {
    let (group, path) = match setting.kind {
        Kind::Section(inner) => (inner, [path, &[setting.name.to_owned()]].concat()),
        Kind::Sections(inner, _) => {
            let placeholder = format!("<{}>", placeholder(setting.name));
            (inner, [path, &[setting.name.to_owned(), placeholder]].concat())
        }
        _ => return,
    };
    let written = write!(page, "\n## `[{}]`\n\n{}", path.join("."), group.doc);
    let optional = match setting.absent {
        Absent::Nothing(otherwise) => format!(" Without this table: {otherwise}."),
        _ => String::new(),
    };
    let rows: String = leaves(group).map(row).collect();
    let head = "| setting | value | when left out | meaning |\n|---|---|---|---|\n";
    let table = write!(page, "{optional}\n\n{head}{rows}");
    debug_assert!(written.is_ok() && table.is_ok(), "a String takes every write");
    for inner in group.settings {
        self::group(page, inner, &path);
    }
}

/// What stands for the name of a table.
fn placeholder(tables: &str) -> &str {
    tables.strip_suffix('s').unwrap_or(tables)
}

fn leaves(group: &'static Group) -> impl Iterator<Item = &'static Setting> {
    let is_leaf =
        |setting: &&Setting| !matches!(setting.kind, Kind::Section(_) | Kind::Sections(..));
    group.settings.iter().filter(is_leaf)
}

fn row(setting: &Setting) -> String {
    let absent = match setting.absent {
        Absent::Required => "**required**".to_owned(),
        Absent::Nothing(otherwise) => otherwise.to_owned(),
        Absent::Default(value) => format!("`{value}`"),
        Absent::Empty => String::new(),
    };
    format!("| `{}` | {} | {absent} | {} |\n", setting.name, value(&setting.kind), setting.doc)
}

fn value(kind: &Kind) -> String {
    match kind {
        Kind::Name => "name".into(),
        Kind::Identifier => "SQL name".into(),
        Kind::Path | Kind::SecretFile => "file or folder".into(),
        Kind::Address => "address:port".into(),
        Kind::JsonPath => "path".into(),
        Kind::JsonPaths => "list of paths".into(),
        Kind::Integer(min, max) => format!("integer, {min} to {max}"),
        Kind::Number => "number".into(),
        Kind::Boolean => "`true`, `false`".into(),
        Kind::Choice(choices) => {
            choices.iter().map(|choice| format!("`\"{choice}\"`")).collect::<Vec<_>>().join(", ")
        }
        Kind::Texts => "list of texts".into(),
        Kind::Scalar => "text, number or boolean".into(),
        Kind::Scalars => "list of texts, numbers, booleans".into(),
        Kind::TextMap => "table of texts".into(),
        Kind::ScalarMap => "table of values".into(),
        _ => "text".into(),
    }
}
