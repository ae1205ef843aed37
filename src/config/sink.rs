//! `[streams.<name>.kafka]` and `[streams.<name>.tables.<table>]`.

use indexmap::IndexMap;

use super::leaf;
use super::node::reference;
use super::report::{At, Problems, did_you_mean};
use super::schema::*;
use super::section::Section;
use super::settings::*;
use crate::domain::SinkName;

/// The name of every stream's Kafka sink; no table sink may have it.
const KAFKA_SINK: &str = "kafka";

pub static KAFKA: Group = Group {
    doc: "The stream's Kafka topic. The record's key is the device id.",
    settings: &[
        required("cluster", Kind::Text, "Name of a `[clusters.<name>]`."),
        required("topic", Kind::Text, "Topic."),
        text(
            "raw",
            Kind::Choice(&["none", "root"]),
            "none",
            "`root` merges the source document into the top level of the record; `ts`, \
             `tags`, `fields` win a clash.",
        ),
        optional_section("ensure", &ENSURE, "a missing topic holds the sink"),
    ],
    refused: &[],
};

pub static ENSURE: Group = Group {
    doc: "Make the topic when it is missing. An existing one is left as it is.",
    settings: &[
        integer("partitions", (1, 10_000), 1, "Order holds per device within its partition."),
        integer("replication", (1, 100), 1, "Copies on different brokers."),
        integer(
            "retention_days",
            (1, 3650),
            7,
            "The topic keeps records this long; consumers that are away longer lose them.",
        ),
    ],
    refused: &[],
};

pub static TABLE: Group = Group {
    doc: "One table the stream writes to. The key names the sink and, unless `table` \
             says otherwise, the table.",
    settings: &[
        required("database", Kind::Text, "Name of a `[databases.<name>]`."),
        optional(
            "table",
            Kind::Identifier,
            "the key",
            "The table, where the sink's name is not the table's.",
        ),
        required(
            "kind",
            Kind::Choice(&["append", "latest"]),
            "`append`: a row per message. `latest`: a row per key, changed only when a \
             value changes; null never erases.",
        ),
        optional("fields", Kind::Texts, "all fields", "The fields that become columns."),
        optional(
            "columns",
            Kind::TextMap,
            "each column is called like its field",
            "Other names: `{ field = \"column\" }`.",
        ),
        text("time_column", Kind::Identifier, "time", "append: takes the arrival time."),
        text(
            "node_column",
            Kind::IdentifierOrNone,
            "node",
            "append: takes the node's name; `\"\"` where the table has none.",
        ),
        optional(
            "retention_days",
            Kind::Integer(1, 36_500),
            "kept for ever",
            "append: older rows are dropped with their partition. Of sinks that share a table the \
             longest counts.",
        ),
        integer(
            "partition_days",
            (1, 366),
            7,
            "append: width of a partition. Retention drops whole partitions. A hypertable has the width \
             of its chunks instead: this has no effect on it.",
        ),
        optional(
            "key",
            Kind::Text,
            "only append has none",
            "latest: the field that is the key; required there.",
        ),
        text(
            "updated_at_column",
            Kind::Identifier,
            "updated_at",
            "latest: arrival time of the message that last changed something.",
        ),
        optional(
            "insert_only",
            Kind::TextMap,
            "none",
            "latest: columns set when the row is first made and never again, `{ column = \
             \"field\" }`.",
        ),
        integer(
            "batch_rows_max",
            (1, 1_000_000),
            10_000,
            "Rows of one transaction at most, when lagging.",
        ),
        integer(
            "batch_bytes_max",
            (64 * KIB, 256 * MIB),
            8 * MIB,
            "Bytes of one transaction at most: memory per sink.",
        ),
        integer(
            "batch_linger_ms",
            (0, HOUR_MS),
            5,
            "A caught-up writer waits at most this long for company. 0 = lowest latency.",
        ),
    ],
    refused: &[("retention", "called `retention_days` here")],
};

const APPEND_ONLY: [&str; 4] = ["time_column", "node_column", "retention_days", "partition_days"];
const LATEST_ONLY: [&str; 3] = ["key", "updated_at_column", "insert_only"];

pub fn kafka(section: &Section, root: &Section, problems: &mut Problems) -> KafkaSinkSettings {
    KafkaSinkSettings {
        sink: SinkName::parse(KAFKA_SINK).expect("a fixed name"),
        cluster: reference(root, "clusters", section, "cluster", problems),
        topic: topic(section, problems),
        raw_root: section.text("raw") == "root",
        ensure: ensure(section),
    }
}

pub fn dead_letter_topic(section: &Section, problems: &mut Problems) -> DeadLetterTopic {
    DeadLetterTopic { topic: topic(section, problems), ensure: ensure(section) }
}

fn topic(section: &Section, problems: &mut Problems) -> String {
    let topic = section.text("topic");
    if section.has("topic") && !is_topic(&topic) && !topic.is_empty() {
        let rule = "a Kafka topic has 1 to 249 of a-z, A-Z, 0-9, '.', '_', '-'";
        problems.error(section.at("topic"), rule);
    }
    topic
}

fn ensure(section: &Section) -> Option<TopicSettings> {
    section.section("ensure").map(|ensure| TopicSettings {
        partitions: ensure.integer("partitions"),
        replication: ensure.integer("replication"),
        retention: ensure.duration("retention_days"),
    })
}

fn is_topic(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=249).contains(&text.len()) && text != "." && text != ".." && text.bytes().all(plain)
}

pub fn table(
    key: &str,
    section: &Section,
    root: &Section,
    mapping: &MappingSettings,
    problems: &mut Problems,
) -> Option<(SinkName, TableSettings)> {
    // A name that is none is reported and left out where tables are read.
    let sink = SinkName::parse(key).ok()?;
    if key == KAFKA_SINK {
        let rule = "\"kafka\" is the name of the stream's Kafka sink; give the sink another name \
             and set table";
        problems.error(section.itself(), rule);
    }
    let table = section.optional_text("table").unwrap_or_else(|| key.to_owned());
    section.derive("table", &table);
    let columns = columns(section, mapping, problems);
    let kind = kind(section, mapping, problems);
    columns_are_written_once(section, &columns, &kind, problems);
    let settings = TableSettings {
        sink: sink.clone(),
        database: reference(root, "databases", section, "database", problems),
        table,
        kind,
        columns,
        batch_rows_max: section.integer("batch_rows_max"),
        batch_bytes_max: section.integer("batch_bytes_max"),
        batch_linger: section.duration("batch_linger_ms"),
    };
    Some((sink, settings))
}

fn columns(
    section: &Section,
    mapping: &MappingSettings,
    problems: &mut Problems,
) -> IndexMap<String, String> {
    let renamed = section.text_map("columns");
    let chosen: Vec<String> = match section.texts("fields") {
        some if !some.is_empty() => some,
        _ => mapping.fields.keys().cloned().collect(),
    };
    for name in chosen.iter().filter(|name| !mapping.fields.contains_key(*name)) {
        unknown_field(section.at("fields"), name, &mapping.fields, problems);
    }
    for (name, column) in &renamed {
        if !mapping.fields.contains_key(name) {
            unknown_field(section.at("columns"), name, &mapping.fields, problems);
        } else if !chosen.contains(name) {
            problems.error(section.at("columns"), format!("{name} is not among fields"));
        }
        if let Err(rule) = leaf::identifier(column) {
            problems.error(section.at("columns"), rule);
        }
    }
    chosen
        .into_iter()
        .map(|name| {
            let column = renamed.get(&name).cloned().unwrap_or_else(|| name.clone());
            (name, column)
        })
        .collect()
}

pub fn unknown_field(
    at: At,
    name: &str,
    fields: &IndexMap<String, FieldSettings>,
    problems: &mut Problems,
) {
    let names: Vec<&str> = fields.keys().map(String::as_str).collect();
    let hint = did_you_mean(name, names.iter().copied())
        .unwrap_or_else(|| format!("its fields: {}", names.join(", ")));
    problems.error_with(at, format!("the stream has no field {name:?}"), Some(hint));
}

fn kind(section: &Section, mapping: &MappingSettings, problems: &mut Problems) -> TableKind {
    let kind = section.optional_text("kind");
    let mut only = |names: &[&'static str], kind: &str| {
        for name in names.iter().copied().filter(|name| section.has(name)) {
            problems.error(section.at(name), format!("only for kind = {kind:?}"));
        }
    };
    match kind.as_deref() {
        Some("latest") => {
            only(&APPEND_ONLY, "append");
            section.leave_out(&APPEND_ONLY);
            latest(section, mapping, problems)
        }
        Some("append") => {
            only(&LATEST_ONLY, "latest");
            section.leave_out(&LATEST_ONLY);
            append(section, problems)
        }
        // Wrong or missing, and reported: nothing can be said about the rest.
        _ => append(section, &mut Problems::default()),
    }
}

fn append(section: &Section, problems: &mut Problems) -> TableKind {
    let retention = section.optional_duration("retention_days");
    let partition = section.duration("partition_days");
    if retention.is_some_and(|retention| retention < partition) {
        let rule = "shorter than a partition (partition_days): only whole partitions are dropped";
        problems.error(section.at("retention_days"), rule);
    }
    TableKind::Append {
        time_column: section.text("time_column"),
        node_column: section.optional_text("node_column").filter(|name| !name.is_empty()),
        retention,
        partition,
    }
}

fn latest(section: &Section, mapping: &MappingSettings, problems: &mut Problems) -> TableKind {
    let key = section.text("key");
    if !section.has("key") {
        let hint = (!mapping.device_id.is_empty())
            .then(|| format!("one row per device: key = {:?}", mapping.device_id));
        problems.error_with(section.at("key"), "a latest table needs its key", hint);
    } else if !mapping.fields.contains_key(&key) {
        unknown_field(section.at("key"), &key, &mapping.fields, problems);
    } else if section.has("fields") && !section.texts("fields").contains(&key) {
        problems.error(section.at("key"), "the key must be among fields");
    }
    let insert_only = section.text_map("insert_only");
    for (column, field) in &insert_only {
        if !mapping.fields.contains_key(field) {
            unknown_field(section.at("insert_only"), field, &mapping.fields, problems);
        }
        if let Err(rule) = leaf::identifier(column) {
            problems.error(section.at("insert_only"), rule);
        }
    }
    TableKind::Latest { key, updated_at_column: section.text("updated_at_column"), insert_only }
}

fn columns_are_written_once(
    section: &Section,
    columns: &IndexMap<String, String>,
    kind: &TableKind,
    problems: &mut Problems,
) {
    let own: Vec<&String> = match kind {
        TableKind::Append { time_column, node_column, .. } => {
            std::iter::once(time_column).chain(node_column).collect()
        }
        TableKind::Latest { updated_at_column, insert_only, .. } => {
            std::iter::once(updated_at_column).chain(insert_only.keys()).collect()
        }
    };
    let mut seen = own;
    for (field, column) in columns {
        if seen.contains(&column) {
            let rule =
                format!("column {column:?} is written twice, the second time by field {field}");
            problems.error(section.itself(), rule);
        }
        seen.push(column);
    }
}
