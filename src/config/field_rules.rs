//! Which settings of a field fit together: what means something for some types only, and values of
//! the right type.

use serde_json::Value;

use super::report::Problems;
use super::section::Section;
use super::settings::FieldType;

/// Reports every contradiction of one field whose type is known.
pub fn check(section: &Section, kind: FieldType, problems: &mut Problems) {
    options_fit(section, kind, problems);
    range_fits(section, kind, problems);
    required_fits(section, problems);
    values_fit(section, kind, problems);
    device_id_fits(section, kind, problems);
}

fn is_integer(kind: FieldType) -> bool {
    matches!(kind, FieldType::Int2 | FieldType::Int4 | FieldType::Int8)
}

fn is_numeric(kind: FieldType) -> bool {
    is_integer(kind) || kind == FieldType::Float8
}

/// The settings that mean something for a number that was sent, and for nothing else.
const CONVERSIONS: [&str; 8] = [
    "round",
    "scale",
    "offset",
    "min",
    "max",
    "out_of_range",
    "boolean_as_number",
    "text_as_number",
];

/// What stands in the place of a value that was sent has no use for what is done to one.
fn without_effect(section: &Section) -> Option<(&'static str, Vec<&'static str>)> {
    let beside = [
        ("constant", [&CONVERSIONS[..], &["default", "values"]]),
        ("arrival", [&TIMESTAMP_ONLY, &["default", "values"]]),
        ("flags", [&[], &["default", "values"]]),
        ("values", [&CONVERSIONS, &[]]),
    ];
    let (by, names) = beside.into_iter().find(|(by, _)| section.has(by))?;
    Some((by, names.concat().into_iter().filter(|name| section.has(name)).collect()))
}

/// The settings that mean something for some types only.
const NUMERIC_ONLY: [&str; 8] = [
    "record_type",
    "min",
    "max",
    "out_of_range",
    "scale",
    "offset",
    "boolean_as_number",
    "text_as_number",
];
const TIMESTAMP_ONLY: [&str; 3] =
    ["timestamp_format", "timestamp_age_max_seconds", "timestamp_skew_max_seconds"];

fn options_fit(section: &Section, kind: FieldType, problems: &mut Problems) {
    let (by, idle) = without_effect(section).unwrap_or_default();
    for name in &idle {
        problems.error(section.at(name), format!("has no effect with {by}"));
    }
    let mut only = |names: &[&'static str], fits: bool, what: &str| {
        let told = |name: &&'static str| fits || !section.has(name) || idle.contains(name);
        for name in names.iter().copied().filter(|name| !told(name)) {
            problems.error(section.at(name), format!("only for {what}"));
        }
    };
    only(&NUMERIC_ONLY, is_numeric(kind), "int2, int4, int8 and float8");
    only(&["round"], is_integer(kind), "int2, int4 and int8");
    only(&TIMESTAMP_ONLY, kind == FieldType::Timestamp, "timestamp");
    only(&["bit"], section.has("path"), "a value with a path");
    if section.has("bit") && section.has("values") {
        problems.error(section.at("values"), "bit and values exclude each other");
    }
    let read = section.has("text_as_number") || section.has("values");
    if section.has("topic_level") && is_numeric(kind) && !read {
        let rule = "a topic level is text; add text_as_number = true";
        problems.error(section.at("topic_level"), rule);
    }
}

fn range_fits(section: &Section, kind: FieldType, problems: &mut Problems) {
    let (min, max) = (section.optional_number("min"), section.optional_number("max"));
    if let (Some(min), Some(max)) = (min, max)
        && min > max
    {
        problems.error(section.at("min"), format!("must not be above max = {max}"));
    }
    if kind == FieldType::Float8 && section.has("out_of_range") && min.is_none() && max.is_none() {
        problems.error(section.at("out_of_range"), "a float8 has no range without min or max");
    }
    if section.optional_number("scale") == Some(0.0) {
        problems.error(section.at("scale"), "must not be 0: every value would be the offset");
    }
}

fn required_fits(section: &Section, problems: &mut Problems) {
    if !section.boolean("required") {
        return;
    }
    if section.text("out_of_range") == "null" {
        problems.error(section.at("out_of_range"), "must not be \"null\": the field is required");
    }
    if section.has("flags") {
        let rule = "flags are null when there are none, so they cannot be required";
        problems.error(section.at("required"), rule);
    }
    if section.has("default") {
        problems.warn(section.at("required"), "never missing, for it has a default");
    }
}

/// Constants, defaults and mapped values must be values of the type.
fn values_fit(section: &Section, kind: FieldType, problems: &mut Problems) {
    for name in ["constant", "default"] {
        if let Some(value) = section.scalar(name)
            && let Err(rule) = value_fits(&value, kind)
        {
            problems.error(section.at(name), rule);
        }
    }
    for (key, value) in section.scalar_map("values").unwrap_or_default() {
        if let Err(rule) = value_fits(&value, kind) {
            problems.error(section.at("values"), format!("{key}: {rule}"));
        }
    }
}

fn value_fits(value: &Value, kind: FieldType) -> Result<(), String> {
    let range = match kind {
        FieldType::Int2 => i64::from(i16::MIN)..=i64::from(i16::MAX),
        FieldType::Int4 => i64::from(i32::MIN)..=i64::from(i32::MAX),
        _ => i64::MIN..=i64::MAX,
    };
    let (fits, name) = match kind {
        FieldType::Boolean => (value.is_boolean(), "boolean"),
        FieldType::Text => (value.is_string(), "text"),
        FieldType::Float8 => (value.is_number(), "number"),
        FieldType::Timestamp => (value.is_string() || value.is_number(), "timestamp"),
        _ => match value.as_i64() {
            Some(number) if !range.contains(&number) => {
                return Err(format!(
                    "{number} does not fit the type: {} to {}",
                    range.start(),
                    range.end()
                ));
            }
            found => (found.is_some(), "integer"),
        },
    };
    if fits { Ok(()) } else { Err(format!("{value} is no {name}, as the type asks for")) }
}

fn device_id_fits(section: &Section, kind: FieldType, problems: &mut Problems) {
    if section.boolean("device_id")
        && section.optional_text("type").is_some()
        && kind != FieldType::Text
    {
        problems.error(section.at("type"), "a device id is text");
    }
    if section.boolean("device_id") && section.has("default") {
        problems.error(section.at("default"), "a device id is never invented");
    }
}
