//! From files to [`Settings`]: read raw, checked whole, every mistake in one report.
//!
//! [`tree`] turns the files into one tree that remembers places. [`schema`] describes every setting
//! once; [`section`] checks the tree against it, [`docs`] and [`json_schema`] print it. The files
//! named like a table ([`broker`], [`stream`], …) hold that table's description and turn the
//! checked table into its settings; [`across`] looks at the whole. Nothing stops at the first
//! mistake: what is wrong is reported and treated as absent.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::domain::NodeName;

mod access;
mod across;
mod broker;
mod cluster;
mod database;
mod docs;
mod effective;
mod field;
mod field_rules;
mod json_schema;
mod leaf;
mod node;
mod password;
mod path;
mod report;
mod schema;
mod section;
mod settings;
mod sink;
mod stream;
mod topic;
mod tree;

pub use docs::markdown;
pub use effective::EffectiveLine;
pub use json_schema::json_schema;
pub use password::Password;
pub use report::{Problem, Report, Warnings};
pub use settings::*;
pub use topic::only_topic;
pub use tree::Place;

use report::Problems;
use schema::{Group, KeyRule, section as table, sections as tables};
use section::Section;

static ROOT: Group = Group {
    doc: "The whole file.",
    settings: &[
        table("node", &node::NODE),
        table("buffer", &node::BUFFER),
        table("http", &node::HTTP),
        table("log", &node::LOG),
        table("supervision", &node::SUPERVISION),
        tables("brokers", &broker::BROKER, KeyRule::Name),
        tables("clusters", &cluster::CLUSTER, KeyRule::Name),
        tables("databases", &database::DATABASE, KeyRule::Name),
        tables("streams", &stream::STREAM, KeyRule::Name),
    ],
    refused: &[
        ("broker", "brokers are named: [brokers.<name>]"),
        ("stream", "streams are named: [streams.<name>]"),
        ("database", "databases are named: [databases.<name>]"),
        (
            "kafka",
            "Kafka clusters are [clusters.<name>], a stream's topic is [streams.<name>.kafka]",
        ),
    ],
};

/// A configuration that passed.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub settings: Settings,
    /// Doubtful, but no reason not to start.
    pub warnings: Vec<Problem>,
    /// Every value with its origin, secrets masked.
    pub effective: Vec<EffectiveLine>,
    /// The main file, as it was asked for.
    pub file: String,
    places: HashMap<String, Place>,
}

impl Loaded {
    /// Where a table or a setting of the file stands, e.g. `streams.energy.fields.power`, for
    /// problems found by later checks.
    pub fn place_of(&self, path: &str) -> Option<&Place> {
        self.places.get(path)
    }

    /// A report of problems that later checks found.
    pub fn report(&self, problems: Vec<Problem>) -> Report {
        Report { file: self.file.clone(), problems, warnings: self.warnings.clone() }
    }
}

/// What reading a configuration needs beside the file.
struct Context<'a> {
    /// Folder of the main file: relative paths begin there.
    folder: PathBuf,
    environment: &'a dyn Fn(&str) -> Option<String>,
    problems: Problems,
}

impl Context<'_> {
    fn resolve(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }
}

/// Reads `path` and the `conf.d/*.toml` beside it and checks everything. `environment` answers for
/// the environment variables, which are read nowhere else.
///
/// # Errors
/// Every mistake of the files in one report.
pub fn load(path: &Path, environment: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, Report> {
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let mut context = Context { folder, environment, problems: Problems::default() };
    let table = tree::read_files(path, &mut context.problems);
    check(path.display().to_string(), table, context)
}

/// Checks a text without a file, for the fuzzer. Files it names are looked for in a folder that is not there.
#[cfg(any(test, fuzzing))]
pub fn parse(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, Report> {
    let folder = PathBuf::from("not/there");
    let mut context = Context { folder, environment, problems: Problems::default() };
    let table = tree::parse(text, "text".into(), 0, &mut context.problems);
    check("text".to_owned(), table, context)
}

fn check(file: String, table: tree::Table, mut context: Context<'_>) -> Result<Loaded, Report> {
    if context.problems.any_error() {
        // Half a tree would only bring mistakes that are none.
        return Err(report(file, context.problems));
    }
    let root = Section::root(&ROOT, table, &mut context.problems);
    let settings = build(&root, &mut context);
    if context.problems.any_error() {
        return Err(report(file, context.problems));
    }
    let effective = effective::lines(&root, &context.folder);
    let mut places = HashMap::new();
    collect_places(&root, &mut places);
    let (problems, warnings) = context.problems.into_sorted();
    match settings {
        Some(settings) => Ok(Loaded { settings, warnings, effective, file, places }),
        None => Err(Report { file, problems, warnings }),
    }
}

/// Where the node keeps its state, whatever else is wrong with its configuration, and without a look at its secrets.
/// `None` when the files cannot be read at all.
pub fn state_dir(path: &Path) -> Option<PathBuf> {
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let mut context = Context { folder, environment: &|_| None, problems: Problems::default() };
    let table = tree::read_files(path, &mut context.problems);
    if context.problems.any_error() {
        return None;
    }
    let root = Section::root(&ROOT, table, &mut context.problems);
    Some(node::node(&root, &mut context)?.state_dir)
}

fn report(file: String, problems: Problems) -> Report {
    let (problems, warnings) = problems.into_sorted();
    Report { file, problems, warnings }
}

/// None only when a table that always counts is no table, which is reported.
fn build(root: &Section, context: &mut Context<'_>) -> Option<Settings> {
    let node = node::node(root, context);
    // The name matters for client ids alone; without it the streams are checked all the same.
    let name = match &node {
        Some(node) => node.name.clone(),
        None => NodeName::parse("node").expect("a fixed name"),
    };
    let buffer = node::buffer(root, &mut context.problems);
    let http = node::http(root, context);
    let log = node::log(root, &mut context.problems);
    let supervision = node::supervision(root, &mut context.problems);
    let brokers = each(root, "brokers", |section| broker::broker(section, context));
    let clusters = each(root, "clusters", |section| cluster::cluster(section, context));
    let databases = each(root, "databases", |section| database::database(section, context));
    let streams = root
        .sections("streams")
        .filter_map(|(key, section)| {
            stream::stream(key, section, root, &name, &mut context.problems)
        })
        .map(|stream| (stream.name.clone(), stream))
        .collect();
    let settings = Settings {
        node: node?,
        buffer: buffer?,
        http: http?,
        log: log?,
        supervision: supervision?,
        brokers,
        clusters,
        databases,
        streams,
    };
    across::check(root, &settings, &mut context.problems);
    Some(settings)
}

fn each<T>(
    root: &Section,
    name: &'static str,
    mut read: impl FnMut(&Section) -> T,
) -> indexmap::IndexMap<String, T> {
    root.sections(name).map(|(key, section)| (key.clone(), read(section))).collect()
}

fn collect_places(section: &Section, places: &mut HashMap<String, Place>) {
    if let Some(place) = &section.place {
        places.insert(section.path.clone(), place.clone());
    }
    for (path, place) in section.places() {
        places.insert(path, place.clone());
    }
    for inner in section.children() {
        collect_places(inner, places);
    }
}
