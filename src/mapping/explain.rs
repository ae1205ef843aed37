//! For `telemetry check --explain`: what each rule made of one message.

use std::fmt;

use serde::Serialize;
use serde_json::value::RawValue;

use super::convert::{Converted, Flags};
use super::plan::Plan;
use super::rule::{Source, type_name};
use super::{Column, MappingError, Outcome, RecordMapper, RowMapper, Value, cut};
use crate::config::StreamSettings;
use crate::domain::Record;

/// What became of one message in every use of its stream.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    pub stream: String,
    pub topic: String,
    /// The Kafka record first, then the tables.
    pub uses: Vec<UseExplanation>,
}

/// One use: the record or a table.
#[derive(Debug, Clone, Serialize)]
pub struct UseExplanation {
    /// Name of the sink.
    pub sink: String,
    /// `mapped`, `filtered`, `incomplete` or `dead`.
    pub verdict: &'static str,
    /// Of a dead letter: why.
    pub detail: Option<String>,
    pub fields: Vec<FieldTrace>,
    /// The record's JSON, for the Kafka use.
    pub record: Option<Box<RawValue>>,
    /// Column and value, for a table.
    pub row: Option<Vec<(String, String)>>,
}

/// One field of one use.
#[derive(Debug, Clone, Serialize)]
pub struct FieldTrace {
    pub field: String,
    /// Where the rule looks: `payload`, `topic level 2`, …
    pub source: String,
    /// As it came, cut; none when missing or null.
    pub raw: Option<String>,
    /// After conversion; none when the rule refused it.
    pub value: Option<String>,
    /// What is worth knowing: type, default, refusal.
    pub note: String,
}

/// Explains one message for every use of the stream.
pub fn explain(
    stream: &StreamSettings,
    record: &Record<'_>,
) -> Result<Explanation, Vec<MappingError>> {
    let mut problems = Vec::new();
    let mut uses = Vec::new();
    match RecordMapper::compile(stream) {
        Ok(mapper) => uses.push(explain_record(mapper, record)),
        Err(found) => problems.extend(found),
    }
    for (sink, table) in &stream.tables {
        match RowMapper::compile(stream, table) {
            Ok(mapper) => uses.push(explain_row(sink.as_str(), mapper, record)),
            Err(found) => problems.extend(found),
        }
    }
    if problems.is_empty() {
        let (stream, topic) = (stream.name.to_string(), record.topic.to_owned());
        return Ok(Explanation { stream, topic, uses });
    }
    let mut distinct: Vec<MappingError> = Vec::new();
    for problem in problems {
        if !distinct.contains(&problem) {
            distinct.push(problem);
        }
    }
    Err(distinct)
}

fn explain_record(mut mapper: RecordMapper, record: &Record<'_>) -> UseExplanation {
    let (mut json, mut key) = (Vec::new(), Vec::new());
    let outcome = mapper.map(record, &mut json, &mut key);
    let (verdict, detail) = verdict(&outcome);
    UseExplanation {
        sink: "kafka".to_owned(),
        verdict,
        detail,
        fields: mapper.trace(record),
        record: serde_json::from_slice(&json).ok(),
        row: None,
    }
}

fn explain_row(sink: &str, mut mapper: RowMapper, record: &Record<'_>) -> UseExplanation {
    let columns: Vec<Column> = mapper.columns().to_vec();
    let outcome = mapper.map(record);
    let (verdict, detail) = verdict(&outcome);
    let row = match outcome {
        Outcome::Mapped(values) => {
            let names = columns.into_iter().map(|column| column.name);
            Some(names.zip(values.iter().map(shown)).collect())
        }
        _ => None,
    };
    let fields = mapper.trace(record);
    UseExplanation { sink: sink.to_owned(), verdict, detail, fields, record: None, row }
}

fn verdict<T>(outcome: &Outcome<T>) -> (&'static str, Option<String>) {
    match outcome {
        Outcome::Mapped(_) => ("mapped", None),
        Outcome::Filtered => ("filtered", None),
        Outcome::Incomplete => ("incomplete", None),
        Outcome::Dead(fault) => {
            ("dead", Some(format!("{}: {}", fault.reason.code(), fault.detail)))
        }
    }
}

impl FieldTrace {
    pub(super) fn all(plan: &mut Plan, record: &Record<'_>, rules: &[usize]) -> Vec<FieldTrace> {
        let Ok(message) = plan.admit(record) else {
            return Vec::new();
        };
        let mut flags = Flags::default();
        let mut traces = Vec::new();
        for index in rules {
            let rule = &plan.rules[*index];
            let raw = plan.raw(&rule.source, &message).map(|raw| raw.shown());
            let (value, note) = match plan.value(*index, &message, &mut flags) {
                Err(refusal) => (None, refusal.detail),
                Ok(value) => {
                    let defaulted = raw.is_none() && rule.source.is_of_message();
                    let note = match (defaulted, &rule.default) {
                        (true, Some(_)) => "default",
                        (true, None) if rule.required => "missing, required",
                        (true, None) => "missing",
                        _ => "",
                    };
                    let kind = type_name(rule.field_type);
                    let note =
                        if note.is_empty() { kind.to_owned() } else { format!("{kind}, {note}") };
                    (Some(converted(&value)), note)
                }
            };
            let (field, source) = (rule.name.clone(), described(&rule.source));
            traces.push(FieldTrace { field, source, raw, value, note });
        }
        let flags = converted(&Plan::flags_value(flags));
        for (trace, index) in traces.iter_mut().zip(rules) {
            if matches!(plan.rules[*index].source, Source::Flags) {
                trace.value = Some(flags.clone());
            }
        }
        traces
    }
}

fn described(source: &Source) -> String {
    match source {
        Source::Slots(_) => "payload".to_owned(),
        Source::TopicLevel(level) => format!("topic level {level}"),
        Source::Constant(_) => "constant".to_owned(),
        Source::Arrival => "arrival".to_owned(),
        Source::Flags => "flags".to_owned(),
    }
}

fn converted(value: &Converted<'_>) -> String {
    match value {
        Converted::Null => "null".to_owned(),
        Converted::Bool(value) => value.to_string(),
        Converted::Int(value) => value.to_string(),
        Converted::Float { value, .. } => value.to_string(),
        Converted::Text { value, .. } => cut(value),
        Converted::Timestamp(micros) => time(*micros),
    }
}

fn shown(value: &Value<'_>) -> String {
    match value {
        Value::Null => "NULL".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::Text(text) => cut(text),
        Value::Timestamp(micros) => time(*micros),
    }
}

fn time(micros: i64) -> String {
    let mut text = Vec::new();
    super::clock::write_rfc3339(micros, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "stream {}, topic {}", self.stream, self.topic)?;
        for explained in &self.uses {
            write!(f, "\n{explained}")?;
        }
        Ok(())
    }
}

impl fmt::Display for UseExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.sink, self.verdict)?;
        match &self.detail {
            Some(detail) => writeln!(f, " ({detail})")?,
            None => writeln!(f)?,
        }
        self.write_fields(f)?;
        match &self.record {
            Some(record) => writeln!(f, "  record {record}"),
            None => Ok(()),
        }
    }
}

impl UseExplanation {
    fn write_fields(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<[&str; 5]> = self.fields.iter().map(FieldTrace::cells).collect();
        let width = |column: usize| {
            rows.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0)
        };
        let [w0, w1, w2, w3] = [width(0), width(1), width(2), width(3)];
        for [field, source, raw, value, note] in &rows {
            writeln!(f, "  {field:w0$}  {source:w1$}  {raw:>w2$}  {value:>w3$}  {note}")?;
        }
        Ok(())
    }
}

impl FieldTrace {
    fn cells(&self) -> [&str; 5] {
        [
            &self.field,
            &self.source,
            self.raw.as_deref().unwrap_or("-"),
            self.value.as_deref().unwrap_or("-"),
            &self.note,
        ]
    }
}
