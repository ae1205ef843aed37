//! `telemetry check`: every mistake of a configuration in one report; the tool to write mappings
//! with.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::Exit;
use crate::config::{self, Loaded, Problem, Report, StreamSettings, Warnings};
use crate::domain::{Arrival, DeliveryFlags, Record, Sequence, StreamName};
use crate::mapping::{self, MappingError, RecordMapper, RowMapper};
use crate::{kafka, tls};

#[derive(Debug, clap::Args)]
pub struct CheckArguments {
    /// The configuration; conf.d/*.toml beside it counts too
    #[arg(long, value_name = "FILE", default_value = "/etc/telemetry/telemetry.toml")]
    pub config: PathBuf,
    /// Print every value that counts and where it came from, secrets masked
    #[arg(long, conflicts_with = "explain")]
    pub effective: bool,
    /// Read one message from standard input and show what the stream's mapping makes of it
    #[arg(long, value_name = "STREAM")]
    pub explain: Option<String>,
    /// Topic of the explained message [default: the stream's filter, when it has no wildcard]
    #[arg(long, requires = "explain")]
    pub topic: Option<String>,
    /// Show what a reload would change in the running node
    #[arg(long, conflicts_with_all = ["effective", "explain"])]
    pub diff: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print docs/configuration.md
    #[arg(long, hide = true)]
    pub print_docs: bool,
    /// Print docs/telemetry.schema.json
    #[arg(long, hide = true)]
    pub print_schema: bool,
}

/// Runs the command and answers the exit code.
pub fn check(arguments: &CheckArguments) -> anyhow::Result<Exit> {
    if arguments.print_docs {
        print!("{}", config::markdown());
        return Ok(Exit::Fine);
    }
    if arguments.print_schema {
        println!("{:#}", config::json_schema());
        return Ok(Exit::Fine);
    }
    Ok(match load(&arguments.config) {
        Ok(loaded) if arguments.diff => diff(&loaded, arguments)?,
        Ok(loaded) => match &arguments.explain {
            Some(stream) => explain(&loaded, stream, arguments),
            None => passed(&loaded, arguments),
        },
        Err(report) => {
            if arguments.json {
                print_json(&json!({ "ok": false, "report": report }));
            } else {
                eprint!("{report}");
            }
            Exit::Configuration
        }
    })
}

/// Configuration, mappings, the listener's certificate and what librdkafka takes, checked together.
///
/// # Errors
/// Every mistake in one report.
pub fn load(path: &Path) -> Result<Loaded, Report> {
    let loaded = config::load(path, &|name| std::env::var(name).ok())?;
    let problems = loaded
        .settings
        .streams
        .values()
        .flat_map(|stream| mapping_problems(&loaded, stream))
        .chain(certificate_problem(&loaded))
        .chain(cluster_problems(&loaded))
        .collect::<Vec<_>>();
    if problems.is_empty() { Ok(loaded) } else { Err(loaded.report(problems)) }
}

fn mapping_problems(loaded: &Loaded, stream: &StreamSettings) -> Vec<Problem> {
    let mut errors = RecordMapper::compile(stream).err().unwrap_or_default();
    for table in stream.tables.values() {
        errors.extend(RowMapper::compile(stream, table).err().unwrap_or_default());
    }
    let mut problems: Vec<Problem> = Vec::new();
    for error in errors {
        let problem = mapping_problem(loaded, stream, error);
        // Record and rows share fields, so each use names the same mistake again.
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
    problems
}

/// A listener that cannot answer anyone is a mistake of the configuration, not of the moment.
fn certificate_problem(loaded: &Loaded) -> Option<Problem> {
    let files = loaded.settings.http.certificate.as_ref()?;
    let error = tls::certified_key(&files.certificate, &files.key).err()?;
    let path = "http.tls".to_owned();
    let place = loaded.place_of(&path).cloned();
    Some(Problem { place, path, value: None, rule: error.to_string(), hint: None })
}

/// What librdkafka refuses would hold a cluster's sinks for ever.
fn cluster_problems(loaded: &Loaded) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (name, cluster) in &loaded.settings.clusters {
        for refused in kafka::refused_settings(cluster) {
            let whole = format!("clusters.{name}");
            let properties = format!("{whole}.properties");
            let path = if cluster.properties.is_empty() { whole } else { properties };
            let place = loaded.place_of(&path).cloned();
            let rule = format!("librdkafka refuses it: {refused}");
            problems.push(Problem { place, path, value: None, rule, hint: None });
        }
    }
    problems
}

fn mapping_problem(loaded: &Loaded, stream: &StreamSettings, error: MappingError) -> Problem {
    let whole = format!("streams.{}", stream.name);
    let path = format!("{whole}.fields.{}", error.field);
    let place = loaded.place_of(&path).or_else(|| loaded.place_of(&whole)).cloned();
    Problem { place, path, value: None, rule: error.problem, hint: None }
}

fn passed(loaded: &Loaded, arguments: &CheckArguments) -> Exit {
    if arguments.json {
        let mut answer = json!({ "ok": true, "warnings": loaded.warnings });
        if arguments.effective {
            answer["effective"] = json!(loaded.effective);
        }
        print_json(&answer);
        return Exit::Fine;
    }
    if arguments.effective {
        for line in &loaded.effective {
            println!("{line}");
        }
        return Exit::Fine;
    }
    if !loaded.warnings.is_empty() {
        eprintln!("{}", Warnings(&loaded.warnings));
    }
    let settings = &loaded.settings;
    let sinks: usize = settings.streams.values().map(|stream| stream.sinks().len()).sum();
    println!("{} is fine: {} streams, {sinks} sinks", loaded.file, settings.streams.len());
    Exit::Fine
}

fn diff(loaded: &Loaded, arguments: &CheckArguments) -> anyhow::Result<Exit> {
    let changes = super::reload::compare(&loaded.settings, &arguments.config)?;
    if arguments.json {
        print_json(&json!({ "ok": true, "changes": changes }));
    } else {
        super::reload::print(&changes);
    }
    Ok(Exit::Fine)
}

fn explain(loaded: &Loaded, name: &str, arguments: &CheckArguments) -> Exit {
    let streams = &loaded.settings.streams;
    let Some(stream) = StreamName::parse(name).ok().and_then(|name| streams.get(&name)) else {
        let known: Vec<_> = streams.keys().map(StreamName::as_str).collect();
        eprintln!("there is no stream {name:?}; defined: {}", known.join(", "));
        return Exit::Failed;
    };
    let filter_topic = config::only_topic(&stream.topic_filter);
    let Some(topic) = arguments.topic.as_deref().or(filter_topic) else {
        eprintln!("{:?} has wildcards; say which topic: --topic", stream.topic_filter);
        return Exit::Failed;
    };
    let mut payload = Vec::new();
    if let Err(error) = std::io::stdin().lock().read_to_end(&mut payload) {
        eprintln!("cannot read the message from standard input: {error}");
        return Exit::Failed;
    }
    // An editor ends a file with a newline; a device does not.
    let payload = payload.strip_suffix(b"\n").unwrap_or(&payload);
    match mapping::explain(stream, &message(topic, payload)) {
        Ok(explanation) => {
            if arguments.json {
                print_json(&json!(explanation));
            } else {
                print!("{explanation}");
            }
            Exit::Fine
        }
        Err(errors) => {
            errors.iter().for_each(|error| eprintln!("{error}"));
            Exit::Configuration
        }
    }
}

fn message<'a>(topic: &'a str, payload: &'a [u8]) -> Record<'a> {
    Record {
        sequence: Sequence(1),
        arrival: Arrival::now(),
        topic,
        payload,
        flags: DeliveryFlags { qos: 1, ..DeliveryFlags::default() },
        packet_id: 1,
    }
}

fn print_json(value: &serde_json::Value) {
    println!("{value:#}");
}
