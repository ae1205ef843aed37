//! From settings to parts: which there are, on which thread each runs, and what each is built from.

use std::collections::HashMap;
use std::sync::Arc;

use actix::prelude::*;
use tokio::sync::watch;

use super::replay::Replayers;
use super::supervisor::{PartSpec, Side};
use super::thread;
use crate::buffer::Buffer;
use crate::config::{Settings, StreamSettings, TableSettings};
use crate::database::{BatchWriter, Pool, TableSink};
use crate::kafka::{KafkaParts, KafkaProducer};
use crate::migrate::{FAILED_RETRY, Migrator};
use crate::observe::{Board, MigrationState};
use crate::stream::StreamReader;

/// What every constructor may hold.
#[derive(Clone)]
pub struct Context {
    pub settings: Arc<Settings>,
    pub buffer: Buffer,
    pub board: Arc<Board>,
}

/// Every table sink, each with the pool of its database: one cap over all its writers.
pub type TableSinks = Vec<TableSink>;

pub fn table_sinks(context: &Context) -> TableSinks {
    let pools: HashMap<_, _> = context
        .settings
        .databases
        .iter()
        .map(|(name, database)| {
            let dependency = context.board.dependency(&format!("postgresql:{name}"));
            (name, (Arc::new(database.clone()), Pool::new(database, dependency)))
        })
        .collect();
    let of_stream = |stream: &StreamSettings| {
        let shared = Arc::new(stream.clone());
        let sink = |table: &TableSettings| {
            let (database, pool) = &pools[&table.database];
            TableSink {
                stream: shared.clone(),
                table: Arc::new(table.clone()),
                database_name: table.database.clone(),
                database: database.clone(),
                pool: pool.clone(),
                buffer: context.buffer.clone(),
                board: context.board.clone(),
                node: context.settings.node.name.clone(),
            }
        };
        stream.tables.values().map(sink).collect::<Vec<_>>()
    };
    context.settings.streams.values().flat_map(of_stream).collect()
}

/// Every part of the node, the last stage first: a sink is there before its stream accepts.
pub fn parts(context: &Context, sinks: &TableSinks, replayers: &Replayers) -> Vec<PartSpec> {
    let mut parts = database_parts(context, sinks);
    parts.extend(kafka_parts(context, replayers));
    parts.extend(stream_parts(context));
    parts
}

fn database_parts(context: &Context, sinks: &TableSinks) -> Vec<PartSpec> {
    let mut parts = Vec::new();
    for (name, settings) in &context.settings.databases {
        let sinks: Vec<_> = sinks.iter().filter(|sink| sink.database_name == *name).collect();
        if sinks.is_empty() {
            continue;
        }
        let arbiter = thread::arbiter();
        let (gate, migrated) = watch::channel(MigrationState::Waiting);
        // Before the migrator's thread runs: a database nobody has looked at yet must not count as migrated.
        let view = context.board.dependency(&format!("postgresql:{name}"));
        view.update(|status| status.migration = Some(MigrationState::Waiting));
        let tables: Vec<_> = sinks.iter().map(|sink| sink.table.as_ref().clone()).collect();
        let (database, settings, board) = (name.clone(), settings.clone(), context.board.clone());
        let migrator = move || Migrator {
            database: database.clone(),
            settings: settings.clone(),
            tables: tables.clone(),
            board: board.clone(),
            gate: gate.clone(),
            failed_retry: FAILED_RETRY,
        };
        let part = format!("migrator:{name}");
        parts.push(PartSpec::new(part, Side::Delivery, arbiter.clone(), migrator));
        for sink in sinks {
            let part = format!("writer:{}:{}", sink.stream.name, sink.table.sink);
            let (sink, migrated) = (sink.clone(), migrated.clone());
            parts.push(PartSpec::new(part, Side::Delivery, arbiter.clone(), move || {
                BatchWriter::new(sink.clone(), migrated.clone())
            }));
        }
    }
    parts
}

fn kafka_parts(context: &Context, replayers: &Replayers) -> Vec<PartSpec> {
    let mut parts = Vec::new();
    for (name, settings) in &context.settings.clusters {
        let routed = |stream: &&StreamSettings| {
            stream.kafka.as_ref().is_some_and(|kafka| kafka.cluster == *name)
        };
        let streams: Vec<_> = context.settings.streams.values().filter(routed).cloned().collect();
        if streams.is_empty() && settings.dead_letters.is_none() {
            continue;
        }
        let (name, settings, context) = (name.clone(), settings.clone(), context.clone());
        let replayers = replayers.clone();
        parts.push(PartSpec::new(
            format!("kafka:{name}"),
            Side::Delivery,
            thread::arbiter(),
            move || {
                let producer = KafkaProducer::new(KafkaParts {
                    cluster: name.clone(),
                    settings: settings.clone(),
                    streams: streams.clone(),
                    buffer: context.buffer.clone(),
                    board: context.board.clone(),
                });
                let served = streams.iter().map(|stream| stream.name.clone());
                replayers.set_kafka(served, &producer.replayer());
                producer
            },
        ));
    }
    parts
}

/// Streams are spread over a few threads on which nothing blocks.
fn stream_parts(context: &Context) -> Vec<PartSpec> {
    let threads = context.settings.node.stream_threads.min(context.settings.streams.len()).max(1);
    let arbiters: Vec<_> = (0..threads).map(|_| thread::arbiter()).collect();
    let streams = context.settings.streams.values().zip(arbiters.iter().cycle());
    let spec = |(stream, arbiter): (&StreamSettings, &ArbiterHandle)| {
        let broker = context.settings.brokers[&stream.broker].clone();
        let (stream, context) = (stream.clone(), context.clone());
        PartSpec::new(format!("stream:{}", stream.name), Side::Intake, arbiter.clone(), move || {
            let (buffer, board) = (context.buffer.clone(), context.board.clone());
            StreamReader::new(stream.clone(), broker.clone(), buffer, board)
        })
    };
    streams.map(spec).collect()
}
