//! What only shows when the whole configuration is in view: names used twice, things nobody uses,
//! limits that do not fit each other.

use std::collections::HashMap;
use std::time::Duration;

use super::access;
use super::report::Problems;
use super::section::Section;
use super::settings::*;
use super::topic::{Overlap, overlap};

pub fn check(root: &Section, settings: &Settings, problems: &mut Problems) {
    if root.sections("streams").next().is_none() {
        let mut at = root.itself();
        at.path = "streams".into();
        problems.error(at, "no stream is defined: add [streams.<name>]");
    }
    streams_do_not_meet(root, settings, problems);
    payloads_fit_their_broker(root, settings, problems);
    latest_tables_have_one_writer(root, settings, problems);
    shared_tables_are_kept_alike(root, settings, problems);
    pools_are_large_enough(root, settings, problems);
    required_fields_are_written(root, settings, problems);
    copies_have_a_topic_of_their_own(root, settings, problems);
    // A wrong reference would make its target look unused.
    if !problems.any_error() {
        everything_is_used(root, settings, problems);
    }
}

fn section<'s>(root: &'s Section, table: &'static str, name: &str) -> Option<&'s Section> {
    root.sections(table).find(|(key, _)| *key == name).map(|(_, section)| section)
}

/// The server behind a broker's name: two names may lead to one.
fn server<'s>(settings: &'s Settings, stream: &StreamSettings) -> Option<(&'s str, u16)> {
    let broker = settings.brokers.get(&stream.broker)?;
    let host = if access::is_local(&broker.host) { "localhost" } else { broker.host.as_str() };
    Some((host, broker.port))
}

fn streams_do_not_meet(root: &Section, settings: &Settings, problems: &mut Problems) {
    let streams: Vec<&StreamSettings> = settings.streams.values().collect();
    for (index, later) in streams.iter().enumerate() {
        let Some(section) = section(root, "streams", later.name.as_str()) else { continue };
        let Some(server_of_later) = server(settings, later) else { continue };
        let beside =
            |earlier: &&&StreamSettings| server(settings, earlier) == Some(server_of_later);
        for earlier in streams[..index].iter().filter(beside) {
            let other = &earlier.name;
            if earlier.client_id == later.client_id {
                let rule = format!(
                    "client id {:?} is used by stream {other} too: at one broker they throw each \
                     other out for ever",
                    later.client_id
                );
                problems.error(section.at("client_id"), rule);
            }
            if later.topic_filter.is_empty() || earlier.topic_filter.is_empty() {
                continue;
            }
            let at = section.at("topic_filter");
            match overlap(&earlier.topic_filter, &later.topic_filter) {
                Overlap::Equal => problems.error_with(
                    at,
                    format!("stream {other} claims this topic already"),
                    Some(format!("one stream can feed several sinks: add them to stream {other}")),
                ),
                Overlap::Some => problems.warn(
                    at,
                    format!(
                        "overlaps {:?} of stream {other}: a message that matches both is kept twice",
                        earlier.topic_filter
                    ),
                ),
                Overlap::None => {}
            }
        }
    }
}

fn payloads_fit_their_broker(root: &Section, settings: &Settings, problems: &mut Problems) {
    for stream in settings.streams.values() {
        let Some(broker) = settings.brokers.get(&stream.broker) else { continue };
        let Some(section) = section(root, "streams", stream.name.as_str()) else { continue };
        if stream.mapping.payload_bytes_max > broker.packet_bytes_max {
            let rule = format!(
                "above packet_bytes_max = {} of broker {}: such a message is cut off before",
                broker.packet_bytes_max, stream.broker
            );
            problems.error(section.at("payload_bytes_max"), rule);
        }
    }
}

fn latest_tables_have_one_writer(root: &Section, settings: &Settings, problems: &mut Problems) {
    let mut writers: Vec<(&str, &str, &StreamSettings)> = Vec::new();
    for stream in settings.streams.values() {
        let latest = |table: &&TableSettings| matches!(table.kind, TableKind::Latest { .. });
        for table in stream.tables.values().filter(latest) {
            let same = |(database, name, _): &&(&str, &str, &StreamSettings)| {
                *database == table.database && *name == table.table
            };
            let first = writers.iter().find(same);
            if let (Some((.., other)), Some(section)) =
                (first, section(root, "streams", stream.name.as_str()))
                && let Some((_, at)) =
                    section.sections("tables").find(|(key, _)| *key == table.sink.as_str())
            {
                let rule = format!(
                    "stream {} writes {} too: fine only while their keys differ",
                    other.name, table.table
                );
                problems.warn(at.itself(), rule);
            }
            writers.push((&table.database, &table.table, stream));
        }
    }
}

/// The partitions of a table are looked after once, whoever writes into it.
fn shared_tables_are_kept_alike(root: &Section, settings: &Settings, problems: &mut Problems) {
    let mut first: HashMap<(&str, &str), (&StreamSettings, &TableSettings)> = HashMap::new();
    for stream in settings.streams.values() {
        for table in stream.tables.values() {
            let key = (table.database.as_str(), table.table.as_str());
            let (other_stream, other) = *first.entry(key).or_insert((stream, table));
            let Some(at) = section(root, "streams", stream.name.as_str()).and_then(|section| {
                let mut sinks = section.sections("tables");
                sinks.find(|(key, _)| *key == table.sink.as_str()).map(|(_, section)| section)
            }) else {
                continue;
            };
            let of = format!("sink {} of stream {}", other.sink, other_stream.name);
            partitions_are_alike(at, &of, table, other, problems);
        }
    }
}

fn partitions_are_alike(
    section: &Section,
    of: &str,
    table: &TableSettings,
    other: &TableSettings,
    problems: &mut Problems,
) {
    let (
        TableKind::Append { retention, partition, .. },
        TableKind::Append { retention: other_retention, partition: other_partition, .. },
    ) = (&table.kind, &other.kind)
    else {
        return;
    };
    let days = |duration: &Duration| duration.as_secs() / 86_400;
    if retention != other_retention {
        let kept = match other_retention {
            Some(kept) => format!("for {} days", days(kept)),
            None => "for ever".to_owned(),
        };
        let rule = format!("{of} keeps the same table {kept}: the longest counts");
        problems.warn(section.at("retention_days"), rule);
    }
    if partition != other_partition {
        let rule = format!(
            "{of} has {} for the same table: whichever makes a partition decides its width",
            days(other_partition)
        );
        problems.warn(section.at("partition_days"), rule);
    }
}

/// The record needs the device id alone, and a table only what it has.
fn required_fields_are_written(root: &Section, settings: &Settings, problems: &mut Problems) {
    for stream in settings.streams.values() {
        let Some(section) = section(root, "streams", stream.name.as_str()) else { continue };
        let required = &stream.mapping.require_any;
        let written = |table: &TableSettings| {
            let insert_only = match &table.kind {
                TableKind::Latest { insert_only, .. } => Some(insert_only.values()),
                TableKind::Append { .. } => None,
            };
            let mut fields = table.columns.keys().chain(insert_only.into_iter().flatten());
            fields.any(|field| required.contains(field))
        };
        if !required.is_empty() && !stream.tables.values().any(written) {
            let rule = "has no effect: no table has one of these fields";
            problems.warn(section.at("require_any"), rule);
        }
    }
}

fn pools_are_large_enough(root: &Section, settings: &Settings, problems: &mut Problems) {
    for (name, database) in &settings.databases {
        let Some(section) = section(root, "databases", name) else { continue };
        let tables = settings.streams.values().flat_map(|stream| stream.tables.values());
        let sinks = tables.filter(|table| table.database == *name).count();
        if sinks > database.connections_max as usize {
            let rule = format!(
                "{sinks} table sinks share {} connections: they will wait for each other; raise \
                 connections_max",
                database.connections_max
            );
            problems.warn(section.at("connections_max"), rule);
        }
    }
}

fn copies_have_a_topic_of_their_own(root: &Section, settings: &Settings, problems: &mut Problems) {
    for (name, cluster) in &settings.clusters {
        let Some(copies) = &cluster.dead_letters else { continue };
        let Some(section) = section(root, "clusters", name) else { continue };
        let shared = settings.streams.values().find(|stream| {
            let routed =
                |sink: &KafkaSinkSettings| sink.cluster == *name && sink.topic == copies.topic;
            stream.kafka.as_ref().is_some_and(routed)
        });
        if let (Some(stream), Some(table)) = (shared, section.section("dead_letters")) {
            let rule = format!("stream {} writes its records to this topic", stream.name);
            problems.error(table.at("topic"), rule);
        }
    }
}

fn everything_is_used(root: &Section, settings: &Settings, problems: &mut Problems) {
    let streams = || settings.streams.values();
    let used = |table: &str, name: &str| match table {
        "brokers" => streams().any(|stream| stream.broker == name),
        "clusters" => {
            settings.clusters.get(name).is_some_and(|cluster| cluster.dead_letters.is_some())
                || streams().flat_map(|stream| &stream.kafka).any(|sink| sink.cluster == name)
        }
        _ => streams().flat_map(|stream| stream.tables.values()).any(|sink| sink.database == name),
    };
    for table in ["brokers", "clusters", "databases"] {
        for (name, section) in root.sections(table) {
            if !used(table, name) {
                problems.warn(section.itself(), "no stream uses it");
            }
        }
    }
}
