//! The events of the log, read where the source tells them, against their explanations; together they are
//! `docs/logs.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use telemetry::domain::Runbook;
use telemetry::observe::events::{CHAPTERS, Event};

use super::assert_golden;

const LEVELS: [&str; 4] = ["error", "warn", "info", "debug"];

const INTRO: &str = "\
# Log events

Every line of level `info` and above has a field `event`: `journalctl -u telemetry EVENT=part_parked` finds one kind. In
the journal the names of fields are upper case (`STREAM=`, `SINK=`, `CORRELATION_ID=`). Names stay. How to read the
journal: [operations.md](operations.md#the-journal).
";

const HEAD: &str = "\
| event | level | meaning | what to do | fields | from |
|---|---|---|---|---|---|
";

/// One `tracing::…!(…)`.
struct Call {
    level: usize,
    /// Without the message: (name, value).
    fields: Vec<(String, String)>,
}

impl Call {
    fn value(&self, field: &str) -> Option<&str> {
        self.fields.iter().find(|(name, _)| name == field).map(|(_, value)| value.as_str())
    }
}

/// All the source tells of one event.
#[derive(Default)]
struct Told {
    levels: BTreeSet<usize>,
    folders: BTreeSet<String>,
    fields: Vec<String>,
    runbooks: BTreeSet<&'static str>,
}

fn calls(source: &str) -> Vec<Call> {
    let mut found = Vec::new();
    for (level, name) in LEVELS.iter().enumerate() {
        for rest in source.split(&format!("tracing::{name}!(")).skip(1) {
            found.push(Call {
                level,
                fields: arguments(rest).iter().filter_map(|a| field(a)).collect(),
            });
        }
    }
    found
}

/// What stands up to the closing bracket, split at the outer commas.
fn arguments(source: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let (mut depth, mut in_text, mut escaped) = (0, false, false);
    for c in source.chars() {
        let outer = depth == 0 && !in_text;
        match c {
            ')' if outer => break,
            '"' if !escaped => in_text = !in_text,
            '(' | '{' | '[' if !in_text => depth += 1,
            ')' | '}' | ']' if !in_text => depth -= 1,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
        match c {
            ',' if outer => found.push(String::new()),
            c => found.last_mut().expect("never empty").push(c),
        }
    }
    found
}

/// `name = value`, or a variable that is its own name (`%stream`, `self.host`); the message is no field.
fn field(argument: &str) -> Option<(String, String)> {
    let argument = argument.trim();
    if argument.is_empty()
        || argument.contains('"') && !argument.contains('=')
        || argument.starts_with("target:")
    {
        return None;
    }
    let (name, value) = argument.split_once('=').unwrap_or((argument, argument));
    let name = name.trim().trim_start_matches(['%', '?']);
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    plain.then(|| (name.to_owned(), value.trim().trim_matches('"').to_owned()))
}

/// Each source file's folder (or own name) and its text up to its tests.
fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let product = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
            let place = path.iter().nth(1).unwrap_or_default().to_string_lossy();
            found.push((place.trim_end_matches(".rs").to_owned(), product));
        }
    }
}

fn told() -> BTreeMap<String, Told> {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    // The order of fields on the page is that of the files.
    files.sort();
    let mut found: BTreeMap<String, Told> = BTreeMap::new();
    for (folder, text) in files {
        for call in calls(&text) {
            let level = LEVELS[call.level];
            let Some(event) = call.value("event") else {
                assert_eq!(level, "debug", "a line of {folder} has no event: {:?}", call.fields);
                continue;
            };
            let told = found.entry(event.to_owned()).or_default();
            told.levels.insert(call.level);
            told.folders.insert(folder.clone());
            for (name, value) in &call.fields {
                let runbook =
                    Runbook::ALL.into_iter().find(|r| *value == format!("Runbook::{r:?}.page()"));
                match name.as_str() {
                    "event" => {}
                    "runbook" => drop(told.runbooks.insert(runbook.expect("a runbook").page())),
                    name if told.fields.iter().any(|known| known == name) => {}
                    name => told.fields.push(name.to_owned()),
                }
            }
        }
    }
    found
}

fn joined(words: impl IntoIterator<Item = String>) -> String {
    words.into_iter().collect::<Vec<_>>().join(", ")
}

fn row(event: &Event, told: &Told) -> String {
    let levels = joined(told.levels.iter().map(|level| LEVELS[*level].to_owned()));
    let folders = joined(told.folders.iter().cloned());
    let fields = joined(told.fields.iter().map(|name| format!("`{name}`")));
    let runbooks = told.runbooks.iter().map(|page| format!("[{page}](runbooks/{page}.md)"));
    let remedy = [event.remedy.to_owned(), joined(runbooks)];
    let remedy: Vec<_> = remedy.into_iter().filter(|words| !words.is_empty()).collect();
    let remedy = remedy.join(": ");
    format!(
        "| `{}` | {levels} | {} | {remedy} | {fields} | {folders} |\n",
        event.name, event.meaning
    )
}

#[test]
fn every_event_is_explained_and_the_page_is_that_of_the_code() {
    let told = told();
    let explained = || CHAPTERS.iter().flat_map(|chapter| chapter.events);
    let names: BTreeSet<_> = explained().map(|event| event.name.to_owned()).collect();
    let in_source: BTreeSet<_> = told.keys().cloned().collect();
    let astray: Vec<_> = names.symmetric_difference(&in_source).collect();
    assert!(
        astray.is_empty(),
        "told in src or explained in src/observe/events.rs, not both: {astray:?}"
    );
    assert_eq!(names.len(), explained().count(), "an event is explained twice");
    let mut page = String::from(INTRO);
    for chapter in &CHAPTERS {
        write!(page, "\n## {}\n\n{HEAD}", chapter.title).unwrap();
        page.extend(chapter.events.iter().map(|event| row(event, &told[event.name])));
    }
    assert_golden(Path::new("docs/logs.md"), &page);
}

#[test]
fn every_page_of_the_runbooks_is_named_by_a_line_of_the_log() {
    let named: BTreeSet<_> = told().into_values().flat_map(|told| told.runbooks).collect();
    let pages: BTreeSet<_> = Runbook::ALL.into_iter().map(Runbook::page).collect();
    assert_eq!(named, pages);
}

#[test]
fn what_a_person_is_asked_for_says_what_to_do() {
    let told = told();
    for event in CHAPTERS.iter().flat_map(|chapter| chapter.events) {
        let serious = told[event.name].levels.iter().any(|level| *level <= 1);
        let by_a_person = event.name == "dead_letters_purged";
        assert!(
            !serious || by_a_person || !event.remedy.is_empty(),
            "{} has no remedy",
            event.name
        );
    }
}
