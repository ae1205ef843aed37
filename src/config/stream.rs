//! `[streams.<name>]`: subscription, filter, repeats; fields and sinks have files of their own.

use indexmap::IndexMap;

use super::field::{self, FIELD};
use super::node::reference;
use super::report::Problems;
use super::schema::*;
use super::section::Section;
use super::settings::*;
use super::sink::{self, KAFKA, TABLE};
use super::topic;
use crate::domain::{NodeName, StreamName};

pub static STREAM: Group = Group {
    doc: "One MQTT subscription, its mapping and its sinks. A stream stands in one file whole.",
    settings: &[
        required("broker", Kind::Text, "Name of a `[brokers.<name>]`."),
        required("topic_filter", Kind::Text, "MQTT topic filter; `+` and `#` as usual."),
        integer(
            "qos",
            (0, 1),
            1,
            "1: the broker repeats what was not acknowledged. 0: what the broker cannot \
             hand over is lost.",
        ),
        optional(
            "client_id",
            Kind::Text,
            "`<node>-<stream>`",
            "MQTT client id. The broker keeps the session under it; two clients with one id \
             throw each other out.",
        ),
        integer(
            "payload_bytes_max",
            (1, 256 * MIB),
            256 * KIB,
            "A larger payload is a dead letter.",
        ),
        optional(
            "silent_warning_after_seconds",
            Kind::Integer(1, YEAR_SECONDS),
            "no warning",
            "Without a message for this long the stream is warned of, as long as it is subscribed.",
        ),
        optional(
            "silent_critical_after_seconds",
            Kind::Integer(1, YEAR_SECONDS),
            "never critical",
            "Without a message for this long the stream is critical, as long as it is subscribed.",
        ),
        optional_section("filter", &FILTER, "every message counts"),
        optional_section("dedupe", &DEDUPE, "equal messages without DUP are two messages"),
        optional(
            "require_any",
            Kind::Texts,
            "a message without any of its optional fields still counts",
            "Fields of which at least one must be present, else the message is incomplete for each \
             table with one of these columns; the record is still made.",
        ),
        sections("fields", &FIELD, KeyRule::Identifier),
        optional_section("kafka", &KAFKA, "nothing goes to Kafka"),
        sections("tables", &TABLE, KeyRule::Name),
    ],
    refused: &[
        ("topic", "called `topic_filter` here; the Kafka topic belongs to [streams.<name>.kafka]"),
        ("table", "tables are named: [streams.<name>.tables.<table>]"),
    ],
};

pub static FILTER: Group = Group {
    doc: "A condition on the message. What does not pass is counted as filtered: no row, \
             no record, no error. Where the value is missing, the message is incomplete with `one_of`, passes with \
             `none_of` and is filtered with `exists`.",
    settings: &[
        optional("path", Kind::JsonPath, "topic_level says where", "The member that is tested."),
        optional(
            "topic_level",
            Kind::Integer(1, 128),
            "path says where",
            "The level of the topic that is tested, 1 = first.",
        ),
        optional("one_of", Kind::Scalars, "another test", "Passes when equal to one of these."),
        optional("none_of", Kind::Scalars, "another test", "Passes when equal to none of these."),
        optional(
            "exists",
            Kind::Boolean,
            "another test",
            "`true`: passes when present and not null.",
        ),
    ],
    refused: &[("equals", "write one_of = [\"…\"]")],
};

pub static DEDUPE: Group = Group {
    doc: "Repeats that do not carry DUP: dropped and counted when equal to a recent message.",
    settings: &[
        required(
            "by",
            Kind::Choice(&["payload", "message_id"]),
            "`payload`: topic and payload, byte for byte. `message_id`: the members named below.",
        ),
        optional(
            "message_id_paths",
            Kind::JsonPaths,
            "by = \"payload\"",
            "Members that name the message.",
        ),
        integer(
            "window_seconds",
            (1, 30 * DAY_SECONDS),
            900,
            "How far back messages are compared.",
        ),
        integer(
            "window_messages",
            (1, 10_000_000),
            100_000,
            "How many messages are compared: some 32 bytes of memory each.",
        ),
    ],
    refused: &[],
};

pub fn stream(
    name: &str,
    section: &Section,
    root: &Section,
    node: &NodeName,
    problems: &mut Problems,
) -> Option<StreamSettings> {
    // A name that is none is reported and left out where tables are read.
    let stream_name = StreamName::parse(name).ok()?;
    let topic_filter = section.text("topic_filter");
    if !topic_filter.is_empty()
        && let Err(rule) = topic::check(&topic_filter)
    {
        problems.error(section.at("topic_filter"), rule);
    }
    let mapping = mapping(section, problems);
    let kafka = section.section("kafka").map(|kafka| sink::kafka(kafka, root, problems));
    let tables: IndexMap<_, _> = section
        .sections("tables")
        .filter_map(|(key, table)| sink::table(key, table, root, &mapping, problems))
        .collect();
    if kafka.is_none() && section.sections("tables").next().is_none() {
        let rule = "no sink: add [streams.<name>.kafka] or [streams.<name>.tables.<table>]";
        problems.error(section.itself(), rule.replace("<name>", name));
    }
    Some(StreamSettings {
        broker: reference(root, "brokers", section, "broker", problems),
        client_id: client_id(section, node, name, problems),
        qos: qos(section, problems),
        silent_after: silent(section, problems),
        dedupe: section.section("dedupe").map(|dedupe| dedupe_settings(dedupe, problems)),
        name: stream_name,
        topic_filter,
        mapping,
        kafka,
        tables,
    })
}

fn qos(section: &Section, problems: &mut Problems) -> u8 {
    let qos = section.integer("qos");
    if qos == 0 && section.written("qos").is_some() {
        let rule = "QoS 0: what arrives while the node is away or busy is lost";
        problems.warn(section.at("qos"), rule);
    }
    qos
}

fn client_id(section: &Section, node: &NodeName, name: &str, problems: &mut Problems) -> String {
    const BYTES_MAX: usize = 256;
    let id = section.optional_text("client_id").unwrap_or_else(|| format!("{node}-{name}"));
    if id.len() > BYTES_MAX || id.contains(char::is_control) {
        let rule = format!("must be at most {BYTES_MAX} bytes without control characters");
        problems.error(section.at("client_id"), rule);
    }
    section.derive("client_id", &id);
    id
}

fn silent(
    section: &Section,
    problems: &mut Problems,
) -> (Option<std::time::Duration>, Option<std::time::Duration>) {
    let warning = section.optional_duration("silent_warning_after_seconds");
    let critical = section.optional_duration("silent_critical_after_seconds");
    if !section.has("silent_warning_after_seconds") && !section.has("silent_critical_after_seconds")
    {
        let rule = "no silent limit: nobody hears when this stream stops; set \
             silent_warning_after_seconds or silent_critical_after_seconds";
        problems.warn(section.itself(), rule);
    }
    if let (Some(warning), Some(critical)) = (warning, critical)
        && warning > critical
    {
        let rule = "must not be above silent_critical_after_seconds";
        problems.error(section.at("silent_warning_after_seconds"), rule);
    }
    (warning, critical)
}

fn mapping(section: &Section, problems: &mut Problems) -> MappingSettings {
    let mut fields = IndexMap::new();
    let mut ids: Vec<&String> = Vec::new();
    let levels = topic::levels(&section.text("topic_filter"));
    for (key, field) in section.sections("fields") {
        fields.insert(key.clone(), field::field(field, levels, problems));
        if field.boolean("device_id") {
            ids.push(key);
        }
    }
    let path = || {
        let mut at = section.itself();
        at.path.push_str(".fields");
        at
    };
    match ids.as_slice() {
        [] if fields.is_empty() => problems.error(path(), "no mapping: the stream needs fields"),
        // Written and wrong: reported already.
        [] if section.sections("fields").any(|(_, field)| field.is_faulty("device_id")) => {}
        [] => problems.error(path(), "no device id: one field needs device_id = true"),
        [_] => {}
        [first, others @ ..] => {
            let rule = format!("two device ids: {first} has device_id = true already");
            for (_, field) in section.sections("fields").filter(|(key, _)| others.contains(key)) {
                problems.error(field.at("device_id"), rule.as_str());
            }
        }
    }
    let require_any = section.texts("require_any");
    for name in require_any.iter().filter(|name| !fields.contains_key(*name)) {
        sink::unknown_field(section.at("require_any"), name, &fields, problems);
    }
    MappingSettings {
        payload_bytes_max: section.integer("payload_bytes_max"),
        filter: section
            .section("filter")
            .and_then(|filter| filter_settings(filter, levels, problems)),
        require_any,
        device_id: ids.first().map(|id| (*id).clone()).unwrap_or_default(),
        fields,
    }
}

/// `levels`: how many levels the stream's topics have, where that is known.
fn filter_settings(
    section: &Section,
    levels: Option<usize>,
    problems: &mut Problems,
) -> Option<FilterSettings> {
    let path = section.optional_text("path");
    let level = section.optional_integer("topic_level");
    if section.has("path") == section.has("topic_level") {
        problems.error(section.itself(), "a filter needs a path or a topic_level, and not both");
    }
    let tests = ["one_of", "none_of", "exists"];
    let count = tests.into_iter().filter(|name| section.has(name)).count();
    if count != 1 {
        problems.error(section.itself(), "a filter needs one of one_of, none_of, exists");
    }
    if section.has("exists") && !section.boolean("exists") {
        let rule = "must be true; to drop messages that have the member use none_of";
        problems.error(section.at("exists"), rule);
    }
    field::level_fits(section, levels, problems);
    if section.has("topic_level") {
        topic_values_are_text(section, problems);
    }
    let test = match (section.scalars("one_of"), section.scalars("none_of")) {
        (Some(values), _) => FilterTest::OneOf(values),
        (None, Some(values)) => FilterTest::NoneOf(values),
        (None, None) => FilterTest::Exists,
    };
    let source = match (path, level) {
        (Some(path), _) => FieldSource::Paths(vec![path]),
        (None, Some(level)) => FieldSource::TopicLevel(level),
        (None, None) => return None,
    };
    Some(FilterSettings { source, test })
}

fn topic_values_are_text(section: &Section, problems: &mut Problems) {
    for name in ["one_of", "none_of"] {
        let values = section.scalars(name).unwrap_or_default();
        for value in values.iter().filter(|value| !value.is_string()) {
            let rule = format!("a topic level is text, never {value}; write \"{value}\"");
            problems.error(section.at(name), rule);
        }
    }
}

fn dedupe_settings(section: &Section, problems: &mut Problems) -> DedupeSettings {
    let by_id = section.text("by") == "message_id";
    if by_id != section.has("message_id_paths") && section.has("by") {
        let rule = "message_id_paths belongs to by = \"message_id\", and is required there";
        problems.error(section.itself(), rule);
    }
    let paths = section.texts("message_id_paths");
    DedupeSettings {
        key: if by_id { DedupeKey::MessageId(paths) } else { DedupeKey::Payload },
        window: section.duration("window_seconds"),
        window_messages: section.integer("window_messages"),
    }
}
