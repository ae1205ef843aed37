//! From settings to parts: which there are, on which thread each runs, and what each is built from.

use std::sync::Arc;

use actix::prelude::*;
use tokio::sync::watch;

use super::supervisor::{PartSpec, Side};
use crate::buffer::Buffer;
use crate::config::{Settings, StreamSettings, TableSettings};
use crate::database::{BatchWriter, BatchWriterInputs, Pool};
use crate::domain::SinkName;
use crate::kafka::{KafkaParts, KafkaProducer};
use crate::migrate::{Migrator, MigratorInputs};
use crate::observe::{Board, MigrationState};
use crate::stream::StreamReader;

/// What every constructor may hold.
#[derive(Clone)]
pub struct Context {
    pub settings: Arc<Settings>,
    pub buffer: Buffer,
    pub board: Arc<Board>,
}

/// Every part of the node, the last stage first: a sink is there before its stream accepts.
pub fn parts(context: &Context, pools: &Pools) -> Vec<PartSpec> {
    let mut parts = database_parts(context, pools);
    parts.extend(kafka_parts(context));
    parts.extend(stream_parts(context));
    parts
}

/// One pool per database, shared by all its writers, so that the cap is one.
pub type Pools = indexmap::IndexMap<String, Pool>;

fn tables_of<'a>(
    settings: &'a Settings,
    database: &'a str,
) -> impl Iterator<Item = (&'a StreamSettings, &'a SinkName, &'a TableSettings)> {
    settings.streams.values().flat_map(move |stream| {
        let tables = stream.tables.iter().filter(move |(_, table)| table.database == database);
        tables.map(move |(sink, table)| (stream, sink, table))
    })
}

fn database_parts(context: &Context, pools: &Pools) -> Vec<PartSpec> {
    let mut parts = Vec::new();
    for (name, database) in &context.settings.databases {
        if tables_of(&context.settings, name).next().is_none() {
            continue;
        }
        let arbiter = Arbiter::new().handle();
        let (gate, migrated) = watch::channel(MigrationState::Waiting);
        let inputs = MigratorInputs {
            name: name.clone(),
            database: database.clone(),
            tables: tables_of(&context.settings, name).map(|(_, _, table)| table.clone()).collect(),
            board: context.board.clone(),
            gate: Arc::new(gate),
        };
        parts.push(PartSpec::new(
            format!("migrator:{name}"),
            Side::Delivery,
            arbiter.clone(),
            move || Migrator::new(inputs.clone()),
        ));
        for (stream, sink, table) in tables_of(&context.settings, name) {
            let inputs = BatchWriterInputs {
                node: context.settings.node.name.clone(),
                stream: stream.clone(),
                table: table.clone(),
                database_name: name.clone(),
                database: database.clone(),
                pool: pools[name].clone(),
                buffer: context.buffer.clone(),
                board: context.board.clone(),
                migrated: migrated.clone(),
            };
            parts.push(PartSpec::new(
                format!("writer:{}:{sink}", stream.name),
                Side::Delivery,
                arbiter.clone(),
                move || BatchWriter::new(inputs.clone()),
            ));
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
        if streams.is_empty() {
            continue;
        }
        let (name, settings, context) = (name.clone(), settings.clone(), context.clone());
        let replayers = replayers.clone();
        parts.push(PartSpec::new(
            format!("kafka:{name}"),
            Side::Delivery,
            Arbiter::new().handle(),
            move || {
                let producer = KafkaProducer::new(KafkaParts {
                    cluster: name.clone(),
                    settings: settings.clone(),
                    streams: streams.clone(),
                    buffer: context.buffer.clone(),
                    board: context.board.clone(),
                });
                replayers.set_kafka(&name, producer.replayer());
                producer
            },
        ));
    }
    parts
}

/// Streams are spread over a few threads on which nothing blocks.
fn stream_parts(context: &Context) -> Vec<PartSpec> {
    let threads = context.settings.node.stream_threads.min(context.settings.streams.len()).max(1);
    let arbiters: Vec<_> = (0..threads).map(|_| Arbiter::new().handle()).collect();
    let streams = context.settings.streams.values().zip(arbiters.iter().cycle());
    let spec = |(stream, arbiter): (&StreamSettings, &ArbiterHandle)| {
        let broker = context.settings.brokers[&stream.broker].clone();
        let (stream, context) = (stream.clone(), context.clone());
        PartSpec::new(
            format!("stream:{}", stream.name),
            Side::Intake,
            arbiter.clone(),
            move || {
                let (buffer, board) = (context.buffer.clone(), context.board.clone());
                StreamReader::new(stream.clone(), broker.clone(), buffer, board)
            },
        )
    };
    streams.map(spec).collect()
}
