//! A JSON Schema for editors, from the description the reader uses.

use serde_json::{Map, Value, json};

use super::ROOT;
use super::schema::{Absent, Group, KeyRule, Kind, Literal, Setting};

/// The whole file as a JSON Schema (draft 2020-12).
pub fn json_schema() -> Value {
    let mut schema = group(&ROOT);
    if let Value::Object(members) = &mut schema {
        members.insert("$schema".into(), "https://json-schema.org/draft/2020-12/schema".into());
        members.insert("title".into(), "Configuration of a telemetry node".into());
    }
    schema
}

fn group(group: &Group) -> Value {
    let properties: Map<String, Value> =
        group.settings.iter().map(|entry| (entry.name.to_owned(), setting(entry))).collect();
    // conf.d may hold what a table of the main file lacks, so only whole files could demand
    // members; `check` does.
    json!({
        "type": "object",
        "description": group.doc,
        "additionalProperties": false,
        "properties": properties,
    })
}

fn setting(setting: &Setting) -> Value {
    let mut schema = kind(&setting.kind);
    if let Value::Object(members) = &mut schema {
        let doc = match setting.absent {
            Absent::Required => format!("Required. {}", setting.doc),
            Absent::Nothing(otherwise) => format!("{} When left out: {otherwise}.", setting.doc),
            Absent::Default(_) | Absent::Empty => setting.doc.to_owned(),
        };
        members.insert("description".into(), doc.into());
        if let Absent::Default(value) = setting.absent {
            members.insert("default".into(), literal(value));
        }
    }
    schema
}

fn literal(value: Literal) -> Value {
    match value {
        Literal::Text(text) => text.into(),
        Literal::Integer(number) => number.into(),
        Literal::Number(number) => number.into(),
        Literal::Boolean(flag) => flag.into(),
    }
}

fn kind(kind: &Kind) -> Value {
    let scalar = || json!({ "type": ["string", "number", "boolean"] });
    match kind {
        Kind::Name => json!({ "type": "string", "pattern": NAME_PATTERN }),
        Kind::Integer(min, max) => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Number => json!({ "type": "number" }),
        Kind::Boolean => json!({ "type": "boolean" }),
        Kind::Choice(choices) => json!({ "type": "string", "enum": choices }),
        Kind::Texts | Kind::JsonPaths => {
            json!({ "type": "array", "items": { "type": "string" }, "minItems": 1 })
        }
        Kind::Scalar => scalar(),
        Kind::Scalars => json!({ "type": "array", "items": scalar(), "minItems": 1 }),
        Kind::TextMap => {
            json!({ "type": "object", "additionalProperties": { "type": "string" } })
        }
        Kind::ScalarMap => {
            json!({ "type": "object", "additionalProperties": scalar(), "minProperties": 1 })
        }
        Kind::Section(inner) => group(inner),
        Kind::Sections(inner, rule) => {
            let mut schema = json!({ "type": "object", "additionalProperties": group(inner) });
            if *rule == KeyRule::Name {
                schema["propertyNames"] = json!({ "pattern": NAME_PATTERN });
            }
            schema
        }
        _ => json!({ "type": "string" }),
    }
}

const NAME_PATTERN: &str = "^[a-z0-9][a-z0-9_-]{0,63}$";
