//! The Kafka record: `ts`, `tags`, `fields`, always with the same members in the same order.

use std::borrow::Cow;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::clock::write_rfc3339;
use super::convert::{Converted, Flags};
use super::plan::{Plan, Stop};
use super::rule::{Problems, Source, Use};
use super::{Fault, MappingError, Observed, Outcome, explain::FieldTrace};
use crate::config::StreamSettings;
use crate::domain::{Record, Stage};

/// A number as sent is repeated byte for byte up to this length; beyond it, as the double it is.
const RAW_NUMBER_BYTES_MAX: usize = 32;

/// Makes Kafka records of one stream. Owns its scratch memory: one per sink, not shared.
#[derive(Debug)]
pub struct RecordMapper {
    plan: Plan,
    /// In the order they are written: tags, then fields.
    members: Vec<Written>,
    /// What stands behind the last member's value.
    tail: Vec<u8>,
    raw_root: bool,
}

/// One member, its name already JSON.
#[derive(Debug)]
struct Written {
    /// What stands before the value: the bracket or comma, the name, the colon.
    lead: Vec<u8>,
    rule: usize,
    is_flags: bool,
}

impl RecordMapper {
    /// Compiles the mapping of the stream; the error lists every problem at once.
    pub fn compile(stream: &StreamSettings) -> Result<Self, Vec<MappingError>> {
        let mut problems = Problems::default();
        let mut plan = Plan::compile(&stream.mapping, Use::Record, &mut problems);
        plan.restrict_require_any(|_| false);
        if !problems.0.is_empty() {
            return Err(problems.0);
        }
        let (members, tail) = members(stream, &plan);
        let raw_root = stream.kafka.as_ref().is_some_and(|kafka| kafka.raw_root);
        Ok(RecordMapper { plan, members, tail, raw_root })
    }

    /// Writes the JSON record to `json` and the device id to `key` (both cleared first).
    pub fn map(
        &mut self,
        record: &Record<'_>,
        json: &mut Vec<u8>,
        key: &mut Vec<u8>,
    ) -> Outcome<()> {
        json.clear();
        key.clear();
        match self.write(record, json, key) {
            Ok(flags) => {
                self.plan.count(flags);
                Outcome::Mapped(())
            }
            Err(stop) => {
                json.clear();
                key.clear();
                stop.into()
            }
        }
    }

    fn write(
        &mut self,
        record: &Record<'_>,
        json: &mut Vec<u8>,
        key: &mut Vec<u8>,
    ) -> Result<Flags, Stop> {
        let message = self.plan.admit(record)?;
        key.extend_from_slice(message.device_id.as_bytes());
        json.extend_from_slice(b"{\"ts\":\"");
        write_rfc3339(record.arrival.0, json);
        json.push(b'"');
        let mut flags = Flags::default();
        let mut flags_at = Vec::new();
        for member in &self.members {
            json.extend_from_slice(&member.lead);
            if member.is_flags {
                flags_at.push(json.len());
                continue;
            }
            let value = self.plan.value(member.rule, &message, &mut flags).map_err(|refusal| {
                let field = Some(self.plan.rules[member.rule].name.clone());
                let (reason, detail) = (refusal.reason, refusal.detail);
                Stop::Dead(Fault { stage: Stage::Map, reason, field, detail })
            })?;
            write_value(&value, json);
        }
        // From the last to the first, so that the places before stay where they are.
        for at in flags_at.into_iter().rev() {
            let mut value = Vec::new();
            write_value(&Plan::flags_value(flags), &mut value);
            json.splice(at..at, value);
        }
        json.extend_from_slice(&self.tail);
        if self.raw_root {
            merge_source(message.text, json);
        }
        json.push(b'}');
        Ok(flags)
    }

    /// What the mapper saw beside its values since the last call.
    pub fn observed(&mut self) -> Observed {
        self.plan.observed()
    }

    /// What each rule makes of the message; empty when it cannot be read or does not count.
    pub(super) fn trace(&mut self, record: &Record<'_>) -> Vec<FieldTrace> {
        let rules: Vec<usize> = self.members.iter().map(|member| member.rule).collect();
        FieldTrace::all(&mut self.plan, record, &rules)
    }
}

/// The members and what follows them.
fn members(stream: &StreamSettings, plan: &Plan) -> (Vec<Written>, Vec<u8>) {
    let is_tag = |index: &usize| stream.mapping.fields[*index].tag;
    let (tags, fields): (Vec<usize>, Vec<usize>) = (0..plan.rules.len()).partition(is_tag);
    let mut members = Vec::new();
    let groups: [(&str, &str, Vec<usize>); 2] =
        [(",\"tags\":{", ",", tags), ("},\"fields\":{", ",", fields)];
    let mut opening = String::new();
    for (open, comma, indexes) in groups {
        opening.push_str(open);
        for index in indexes {
            let name = serde_json::Value::String(plan.rules[index].name.clone());
            let lead = format!("{opening}{name}:").into_bytes();
            let is_flags = matches!(plan.rules[index].source, Source::Flags);
            members.push(Written { lead, rule: index, is_flags });
            opening = comma.to_owned();
        }
        if opening == comma {
            opening.clear();
        }
    }
    opening.push('}');
    (members, opening.into_bytes())
}

/// Appends the value as JSON.
fn write_value(value: &Converted<'_>, out: &mut Vec<u8>) {
    match value {
        Converted::Null => out.extend_from_slice(b"null"),
        Converted::Bool(true) => out.extend_from_slice(b"true"),
        Converted::Bool(false) => out.extend_from_slice(b"false"),
        Converted::Int(value) => {
            out.extend_from_slice(itoa::Buffer::new().format(*value).as_bytes());
        }
        Converted::Float { raw: Some(raw), .. } if raw.len() <= RAW_NUMBER_BYTES_MAX => {
            out.extend_from_slice(raw.as_bytes());
        }
        Converted::Float { value, .. } => {
            // A declared boolean, a scaled or a default value: 1 is written 1, not 1.0.
            let mut buffer = ryu::Buffer::new();
            let text = buffer.format_finite(*value);
            out.extend_from_slice(text.strip_suffix(".0").unwrap_or(text).as_bytes());
        }
        Converted::Text { raw: Some(raw), .. } => out.extend_from_slice(raw.as_bytes()),
        Converted::Text { value, .. } => write_text(value, out),
        Converted::Timestamp(micros) => {
            out.push(b'"');
            write_rfc3339(*micros, out);
            out.push(b'"');
        }
    }
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    // Writing a string into memory does not fail.
    let _ = serde_json::to_writer(out, text);
}

/// Appends the members of the source document for readers of the older shape; of a name twice the last one counts.
fn merge_source(source: &str, out: &mut Vec<u8>) {
    let mut json = serde_json::Deserializer::from_str(source);
    // The source was read once already, so it is an object.
    let Ok(members) = json.deserialize_map(TopLevel) else {
        return;
    };
    for (at, (name, raw)) in members.iter().enumerate() {
        let taken = matches!(&**name, "ts" | "tags" | "fields");
        if taken || members[at + 1..].iter().any(|(later, _)| later == name) {
            continue;
        }
        out.push(b',');
        write_text(name, out);
        out.push(b':');
        out.extend_from_slice(raw.get().as_bytes());
    }
}

/// The members of the outermost object, in order.
struct TopLevel;

impl<'de> Visitor<'de> for TopLevel {
    type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(members)
    }
}
