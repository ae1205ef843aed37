//! `docs/configuration.md`, from the description the reader uses.

use super::ROOT;
use super::schema::{
    Absent, DAY_SECONDS, GIB, Group, HOUR_MS, KIB, Kind, Literal, MIB, Setting, TIB,
};

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
    let optional = match setting.absent {
        Absent::Nothing(otherwise) => format!(" Without this table: {otherwise}."),
        _ => String::new(),
    };
    page.push_str(&format!("\n## `[{}]`\n\n{}{optional}\n", path.join("."), group.doc));
    let rows: String = leaves(group).map(row).collect();
    if !rows.is_empty() {
        page.push_str("\n| setting | value | when left out | meaning |\n|---|---|---|---|\n");
        page.push_str(&rows);
    }
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
        Absent::Default(Literal::Integer(number)) => match rounded(setting.name, number) {
            Some(rounded) => format!("`{number}` ({rounded})"),
            None => format!("`{number}`"),
        },
        Absent::Default(value) => format!("`{value}`"),
        Absent::Empty => String::new(),
    };
    format!("| `{}` | {} | {absent} | {} |\n", setting.name, value(setting), setting.doc)
}

fn value(setting: &Setting) -> String {
    match &setting.kind {
        Kind::Name => "name".into(),
        Kind::Identifier => "SQL name".into(),
        Kind::IdentifierOrNone => "SQL name or `\"\"`".into(),
        Kind::Path | Kind::SecretFile => "file or folder".into(),
        Kind::Address => "address:port".into(),
        Kind::JsonPath => "path".into(),
        Kind::JsonPaths => "list of paths".into(),
        Kind::Integer(min, max) => {
            let amount = |number| rounded(setting.name, number).unwrap_or(number.to_string());
            format!("integer, {} to {}", amount(*min), amount(*max))
        }
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

/// A whole number of a larger unit, where the setting's unit has one: `64 MiB`, `7 days`.
fn rounded(name: &str, number: i64) -> Option<String> {
    const BYTES: [(i64, &str); 4] = [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")];
    const SECONDS: [(i64, &str); 3] = [(DAY_SECONDS, "days"), (3600, "h"), (60, "min")];
    const MILLISECONDS: [(i64, &str); 3] = [(HOUR_MS, "h"), (60_000, "min"), (1000, "s")];
    let units: &[(i64, &str)] = match name {
        _ if name.contains("_bytes") => &BYTES,
        _ if name.ends_with("_seconds") => &SECONDS,
        _ if name.ends_with("_ms") => &MILLISECONDS,
        _ => return None,
    };
    let (size, unit) = units.iter().find(|(size, _)| number >= *size && number % size == 0)?;
    Some(match (number / size, *unit) {
        (1, "days") => "1 day".to_owned(),
        (count, unit) => format!("{count} {unit}"),
    })
}
