//! What is wrong with a configuration: every mistake in one report, each with place, value, rule
//! and hint.

use std::fmt;

use serde::Serialize;

use super::tree::Place;

/// One mistake, or one warning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Absent only when nothing in a file stands for it (an empty file that lacks a required
    /// setting).
    #[serde(flatten)]
    pub place: Option<Place>,
    /// The setting, e.g. `streams.energy.fields.power.type`.
    pub path: String,
    /// The value as written, cut when long, never a secret.
    pub value: Option<String>,
    /// What must hold.
    pub rule: String,
    /// What was probably meant, or what to do.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            writeln!(f, "{place}")?;
        }
        match &self.value {
            Some(value) => writeln!(f, "    {} = {value}", self.path)?,
            None if self.path.is_empty() => {}
            None => writeln!(f, "    {}", self.path)?,
        }
        write!(f, "    {}", self.rule)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n    hint: {hint}")?;
        }
        Ok(())
    }
}

/// A configuration that cannot be used: all its mistakes, and what is doubtful beside them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The main file, as it was asked for.
    pub file: String,
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        let mistakes = if count == 1 { "mistake" } else { "mistakes" };
        writeln!(f, "{count} {mistakes} in the configuration {}", self.file)?;
        for problem in &self.problems {
            write!(f, "\n{problem}\n")?;
        }
        if !self.warnings.is_empty() {
            write!(f, "\n{}", Warnings(&self.warnings))?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}

/// Warnings as text for people.
pub struct Warnings<'a>(pub &'a [Problem]);

impl fmt::Display for Warnings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        writeln!(f, "{count} {}", if count == 1 { "warning" } else { "warnings" })?;
        self.0.iter().try_for_each(|warning| write!(f, "\n{warning}\n"))
    }
}

/// What a problem is about.
#[derive(Debug, Clone, Default)]
pub struct At {
    pub place: Option<Place>,
    pub path: String,
    pub value: Option<String>,
}

/// Collects problems while the configuration is read and checked.
#[derive(Debug, Default)]
pub struct Problems {
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Problems {
    pub fn error(&mut self, at: At, rule: impl Into<String>) {
        self.error_with(at, rule, None);
    }

    pub fn error_with(&mut self, at: At, rule: impl Into<String>, hint: Option<String>) {
        self.errors.push(problem(at, rule.into(), hint));
    }

    pub fn warn(&mut self, at: At, rule: impl Into<String>) {
        self.warnings.push(problem(at, rule.into(), None));
    }

    pub fn any_error(&self) -> bool {
        !self.errors.is_empty()
    }

    /// Mistakes and warnings, each in the order of the files.
    pub fn into_sorted(mut self) -> (Vec<Problem>, Vec<Problem>) {
        self.errors.sort_by(|a, b| a.place.cmp(&b.place));
        self.warnings.sort_by(|a, b| a.place.cmp(&b.place));
        (self.errors, self.warnings)
    }
}

fn problem(at: At, rule: String, hint: Option<String>) -> Problem {
    Problem { place: at.place, path: at.path, value: at.value, rule, hint }
}

/// Other words for what a setting calls by one name.
const SYNONYMS: [(&str, &str); 18] = [
    ("smallint", "int2"),
    ("int16", "int2"),
    ("int32", "int4"),
    ("int64", "int8"),
    ("integer", "int4"),
    ("int", "int4"),
    ("bigint", "int8"),
    ("long", "int8"),
    ("float64", "float8"),
    ("double precision", "float8"),
    ("double", "float8"),
    ("float", "float8"),
    ("real", "float8"),
    ("bool", "boolean"),
    ("string", "text"),
    ("timestamptz", "timestamp"),
    ("ceil", "nearest"),
    ("upsert", "latest"),
];

/// The valid name that was probably meant: a hint, or none when nothing is near.
pub fn did_you_mean<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    nearest(text, names).map(|name| format!("did you mean {name:?}?"))
}

fn nearest<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let lower = text.to_lowercase();
    let synonym = SYNONYMS.iter().find(|(word, _)| *word == lower).map(|(_, name)| *name);
    names
        .map(|name| {
            let likeness = strsim::jaro_winkler(&lower, &name.to_lowercase());
            (name, if synonym == Some(name) { 2.0 } else { likeness })
        })
        .filter(|(_, likeness)| *likeness > 0.8)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_name_is_offered_and_a_far_one_is_not() {
        let names = ["keepalive_seconds", "host", "port", "int4"];
        assert_eq!(nearest("keepalive_second", names.into_iter()), Some("keepalive_seconds"));
        assert_eq!(nearest("Host", names.into_iter()), Some("host"));
        assert_eq!(nearest("integer", names.into_iter()), Some("int4"));
        assert_eq!(nearest("frequency", names.into_iter()), None);
    }
}
