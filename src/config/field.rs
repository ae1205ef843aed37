//! `[streams.<name>.fields.<field>]`: where a value comes from and what becomes of it.

use serde_json::Value;

use super::field_rules;
use super::report::Problems;
use super::schema::*;
use super::section::Section;
use super::settings::*;

pub static FIELD: Group = Group {
    doc: "One value: its source, its type, its rules. The key is its name in the Kafka \
             record and, unless renamed, its column. Exactly one of `path`, `topic_level`, \
             `constant`, `arrival`, `flags` says where it comes from.",
    settings: &[
        optional(
            "path",
            Kind::JsonPath,
            "another source",
            "The member of the JSON payload, an RFC 9535 singular path without the leading \
             `$.`: `a.b`, `list[0]`, `params['temperature:0'].tC`.",
        ),
        optional(
            "aliases",
            Kind::JsonPaths,
            "no other path",
            "Further paths, tried in order when `path` is missing.",
        ),
        optional(
            "topic_level",
            Kind::Integer(1, 128),
            "another source",
            "A level of the topic, 1 = first. An empty level counts as missing.",
        ),
        optional("constant", Kind::Scalar, "another source", "The same value in every message."),
        optional(
            "arrival",
            Kind::Boolean,
            "another source",
            "`true`: the time the message arrived.",
        ),
        optional(
            "flags",
            Kind::Boolean,
            "another source",
            "`true`: the quality flags of the message, joined by commas; null when there are none.",
        ),
        optional(
            "type",
            Kind::Choice(&["int2", "int4", "int8", "float8", "boolean", "text", "timestamp"]),
            "follows from bit, constant, topic_level, arrival, flags; required with a path",
            "As PostgreSQL calls it. The width of an integer is its range in tables: what does not \
             fit is a dead letter there. The record takes what fits 64 bits.",
        ),
        flag(
            "device_id",
            false,
            "This value is the device id: the key in Kafka. Missing or empty is a dead \
             letter; one field of each stream has it.",
        ),
        flag("tag", false, "Shown under `tags` of the record instead of `fields`."),
        flag(
            "required",
            false,
            "Missing or null makes the message incomplete for each table with this column; \
             the record is still made.",
        ),
        optional(
            "round",
            Kind::Choice(&["floor", "nearest", "reject"]),
            "\"reject\"",
            "A fraction for an integer: down, to the nearest (half away from zero), or a \
             dead letter.",
        ),
        optional(
            "record_type",
            Kind::Choice(&["int2", "int4", "int8", "float8"]),
            "the same as type",
            "The record's own type where it differs; `float8` keeps the value as sent, unrounded. Of \
             an integer only that it is one counts, not its width.",
        ),
        optional("min", Kind::Number, "the type's limit", "Least value, after scale and offset."),
        optional(
            "max",
            Kind::Number,
            "the type's limit",
            "Greatest value, after scale and offset.",
        ),
        optional(
            "out_of_range",
            Kind::Choice(&["dead_letter", "null", "clamp", "flag"]),
            "\"dead_letter\"",
            "What a value outside becomes. `flag` keeps it and sets the flag `out_of_range`.",
        ),
        optional("default", Kind::Scalar, "null", "Used when the value is missing or null."),
        number("scale", 1.0, "value = raw × scale + offset, before rounding."),
        number("offset", 0.0, "See `scale`."),
        optional(
            "bit",
            Kind::Integer(0, 62),
            "the whole value",
            "This bit of an integer, 0 = lowest, as a boolean.",
        ),
        optional(
            "values",
            Kind::ScalarMap,
            "as sent",
            "Value sent → value kept, e.g. `{ ON = true, OFF = false }`. Anything else is a \
             dead letter, never a guess.",
        ),
        flag("boolean_as_number", false, "A numeric field takes `true` as 1 and `false` as 0."),
        flag("text_as_number", false, "A numeric field takes the text \"237\" as 237."),
        optional(
            "timestamp_format",
            Kind::Choice(&["auto", "rfc3339", "epoch_seconds", "epoch_ms", "epoch_us"]),
            "\"auto\"",
            "`auto`: RFC 3339 or ISO without zone (UTC); a number is seconds, milliseconds \
             or microseconds, whichever falls into the window.",
        ),
        optional(
            "timestamp_age_max_seconds",
            Kind::Integer(1, 100 * YEAR_SECONDS),
            "604800, 7 days",
            "A device time further before arrival is replaced by the arrival time and \
             flagged `device_time_invalid`.",
        ),
        optional(
            "timestamp_skew_max_seconds",
            Kind::Integer(0, YEAR_SECONDS),
            "300",
            "The same for a device time after arrival.",
        ),
    ],
    refused: &[
        ("optional", "a field is optional unless required = true"),
        ("column", "columns are renamed in the table: columns = { field = \"column\" }"),
    ],
};

const TYPES: [(&str, FieldType); 7] = [
    ("int2", FieldType::Int2),
    ("int4", FieldType::Int4),
    ("int8", FieldType::Int8),
    ("float8", FieldType::Float8),
    ("boolean", FieldType::Boolean),
    ("text", FieldType::Text),
    ("timestamp", FieldType::Timestamp),
];

/// Defaults that do nothing: not worth a line per field in the effective configuration.
const WITHOUT_EFFECT: [&str; 7] =
    ["device_id", "tag", "required", "scale", "offset", "boolean_as_number", "text_as_number"];

const SOURCES: [&str; 5] = ["path", "topic_level", "constant", "arrival", "flags"];

/// `levels`: how many levels the stream's topics have, where that is known.
pub fn field(section: &Section, levels: Option<usize>, problems: &mut Problems) -> FieldSettings {
    let source = source(section, levels, problems);
    let field_type = field_type(section, &source, problems);
    // What depends on a wrong type cannot be judged.
    if !section.is_faulty("type") {
        field_rules::check(section, field_type, problems);
    }
    section.leave_out(&WITHOUT_EFFECT);
    let roundings =
        [("reject", Rounding::Reject), ("floor", Rounding::Floor), ("nearest", Rounding::Nearest)];
    let ranges = [
        ("dead_letter", OutOfRange::DeadLetter),
        ("null", OutOfRange::Null),
        ("clamp", OutOfRange::Clamp),
        ("flag", OutOfRange::Flag),
    ];
    FieldSettings {
        source,
        field_type,
        tag: section.boolean("tag"),
        required: section.boolean("required"),
        rounding: section.pick("round", &roundings),
        record_type: section
            .optional_text("record_type")
            .map(|_| section.pick("record_type", &TYPES)),
        min: section.optional_number("min"),
        max: section.optional_number("max"),
        out_of_range: section.pick("out_of_range", &ranges),
        default: section.scalar("default"),
        scale: section.optional_number("scale").unwrap_or(1.0),
        offset: section.optional_number("offset").unwrap_or(0.0),
        bit: section.optional_integer("bit"),
        values: section.scalar_map("values"),
        boolean_as_number: section.boolean("boolean_as_number"),
        text_as_number: section.boolean("text_as_number"),
        timestamp: timestamp(section),
    }
}

fn source(section: &Section, levels: Option<usize>, problems: &mut Problems) -> FieldSource {
    let given: Vec<_> = SOURCES.into_iter().filter(|name| section.has(name)).collect();
    match given.as_slice() {
        [] => problems
            .error(section.itself(), format!("no source: set one of {}", SOURCES.join(", "))),
        [_] => {}
        [first, second, ..] => {
            problems.error(section.at(second), format!("two sources: {first} is set already"));
        }
    }
    for name in ["arrival", "flags"] {
        if section.has(name) && !section.boolean(name) {
            problems.error(section.at(name), "must be true, or left out");
        }
    }
    if section.has("aliases") && !section.has("path") {
        problems.error(section.at("aliases"), "aliases are further paths; path is missing");
    }
    level_fits(section, levels, problems);
    match given.first().copied() {
        Some("topic_level") => FieldSource::TopicLevel(section.integer("topic_level")),
        Some("constant") => FieldSource::Constant(section.scalar("constant").unwrap_or_default()),
        Some("arrival") => FieldSource::Arrival,
        Some("flags") => FieldSource::Flags,
        _ => {
            let first = section.optional_text("path").into_iter();
            FieldSource::Paths(first.chain(section.texts("aliases")).collect())
        }
    }
}

/// A level that no topic of the stream has would be missing for ever.
pub fn level_fits(section: &Section, levels: Option<usize>, problems: &mut Problems) {
    if let (Some(level), Some(levels)) = (section.optional_integer::<usize>("topic_level"), levels)
        && level > levels
    {
        let rule = format!("the topics of this stream have {levels} levels");
        problems.error(section.at("topic_level"), rule);
    }
}

fn field_type(section: &Section, source: &FieldSource, problems: &mut Problems) -> FieldType {
    let natural = match source {
        _ if section.has("bit") => Some("boolean"),
        FieldSource::TopicLevel(_) | FieldSource::Flags => Some("text"),
        FieldSource::Arrival => Some("timestamp"),
        FieldSource::Constant(Value::String(_)) => Some("text"),
        FieldSource::Constant(Value::Bool(_)) => Some("boolean"),
        FieldSource::Constant(Value::Number(number)) if number.is_f64() => Some("float8"),
        FieldSource::Constant(_) => Some("int8"),
        FieldSource::Paths(_) => None,
    };
    if section.has("type") {
        let chosen = section.pick("type", &TYPES);
        let fixed =
            matches!(source, FieldSource::Arrival | FieldSource::Flags) || section.has("bit");
        if let Some(natural) = natural.filter(|_| fixed)
            && !section.is_faulty("type")
            && section.text("type") != natural
        {
            problems.error(section.at("type"), format!("must be {natural:?} with this source"));
        }
        return chosen;
    }
    match natural {
        Some(natural) => {
            section.derive("type", natural);
            TYPES
                .iter()
                .find(|(name, _)| *name == natural)
                .map_or(FieldType::Text, |(_, kind)| *kind)
        }
        None => {
            if section.has("path") {
                let rule = "no type: one of int2, int4, int8, float8, boolean, text, timestamp";
                problems.error(section.at("type"), rule);
            }
            FieldType::Text
        }
    }
}

fn timestamp(section: &Section) -> TimestampSettings {
    let formats = [
        ("auto", TimestampFormat::Auto),
        ("rfc3339", TimestampFormat::Rfc3339),
        ("epoch_seconds", TimestampFormat::EpochSeconds),
        ("epoch_ms", TimestampFormat::EpochMillis),
        ("epoch_us", TimestampFormat::EpochMicros),
    ];
    let age = section.optional_duration("timestamp_age_max_seconds");
    let skew = section.optional_duration("timestamp_skew_max_seconds");
    TimestampSettings {
        format: section.pick("timestamp_format", &formats),
        max_age: age.unwrap_or(std::time::Duration::from_secs(7 * 86_400)),
        max_skew: skew.unwrap_or(std::time::Duration::from_secs(300)),
    }
}
