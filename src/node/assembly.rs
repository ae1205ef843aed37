//! From a blueprint to parts: on which thread each runs, and what each is built from.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;

use super::blueprint::{Basis, Blueprint, PartKey, routes, tables};
use super::replay::Replayers;
use super::supervisor::{PartSpec, Side};
use super::thread::Thread;
use crate::buffer::Buffer;
use crate::config::{DatabaseSettings, Settings, StreamSettings, TableSettings};
use crate::database::{BatchWriter, Pool, TableSink};
use crate::domain::{SinkName, StreamName};
use crate::kafka::{KafkaParts, KafkaProducer, Routes};
use crate::migrate::Migrator;
use crate::observe::{Board, MigrationState};
use crate::stream::StreamReader;

/// Builds parts, and keeps what they share from one configuration to the next.
pub struct Assembly {
    pub buffer: Buffer,
    pub board: Arc<Board>,
    pub replayers: Replayers,
    settings: Arc<Settings>,
    blueprint: Blueprint,
    databases: HashMap<String, SharedDatabase>,
    clusters: HashMap<String, SharedCluster>,
    stream_threads: Vec<Thread>,
    streams_placed: usize,
}

/// What the migrator and the writers of one database share.
struct SharedDatabase {
    basis: Basis,
    settings: Arc<DatabaseSettings>,
    /// One cap over all its writers.
    pool: Pool,
    thread: Thread,
    migrated: watch::Sender<MigrationState>,
}

struct SharedCluster {
    thread: Thread,
    routes: watch::Sender<Routes>,
}

impl Assembly {
    /// Of nothing yet, see [`Assembly::configure`].
    pub fn new(settings: Arc<Settings>, buffer: Buffer, board: Arc<Board>) -> Self {
        Assembly {
            buffer,
            board,
            replayers: Replayers::default(),
            settings,
            blueprint: Blueprint::default(),
            databases: HashMap::new(),
            clusters: HashMap::new(),
            stream_threads: Vec::new(),
            streams_placed: 0,
        }
    }

    /// The blueprint the running parts follow.
    pub fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// Follows `settings` from now on. The parts it replaces have ended, and the board and the buffer know what is new.
    pub fn configure(&mut self, settings: Arc<Settings>, blueprint: Blueprint) {
        self.settings = settings;
        self.blueprint = blueprint;
        self.share_databases();
        self.share_clusters();
        let sinks = self.table_sinks();
        self.replayers.set_tables(sinks);
        self.replayers.set_routes(&self.settings);
    }

    /// The spec of a part of the blueprint.
    pub fn build(&mut self, key: &PartKey) -> PartSpec {
        match key {
            PartKey::Migrator(database) => self.migrator(key, database),
            PartKey::Writer(stream, sink) => self.writer(key, stream, sink),
            PartKey::Kafka(cluster) => self.producer(key, cluster),
            PartKey::Stream(stream) => self.reader(key, stream),
        }
    }

    fn share_databases(&mut self) {
        let mut before = std::mem::take(&mut self.databases);
        for (name, basis) in &self.blueprint.databases {
            let known = before.remove(name);
            let shared = match known {
                Some(shared) if shared.basis == *basis => shared,
                known => {
                    let settings = Arc::new(self.settings.databases[name].clone());
                    let dependency = self.board.dependency(&format!("postgresql:{name}"));
                    SharedDatabase {
                        basis: basis.clone(),
                        pool: Pool::new(&settings, dependency),
                        settings,
                        thread: known.map_or_else(
                            || Thread::start(&format!("pg:{name}")),
                            |known| known.thread,
                        ),
                        migrated: watch::Sender::new(MigrationState::Waiting),
                    }
                }
            };
            self.databases.insert(name.clone(), shared);
        }
        for shared in before.into_values() {
            shared.thread.stop();
        }
    }

    fn share_clusters(&mut self) {
        let mut before = std::mem::take(&mut self.clusters);
        for key in self.blueprint.parts.keys() {
            let PartKey::Kafka(name) = key else { continue };
            let wanted = Arc::new(routes(&self.settings, name));
            let shared = before.remove(name).unwrap_or_else(|| SharedCluster {
                thread: Thread::start(&key.name()),
                routes: watch::Sender::new(wanted.clone()),
            });
            shared.routes.send_replace(wanted);
            self.clusters.insert(name.clone(), shared);
        }
        for shared in before.into_values() {
            shared.thread.stop();
        }
    }

    fn table_sinks(&self) -> Vec<TableSink> {
        let mut sinks = Vec::new();
        for name in self.databases.keys() {
            let own = tables(&self.settings, name).into_iter();
            sinks.extend(own.map(|(stream, table)| self.table_sink(stream, table)));
        }
        sinks
    }

    fn table_sink(&self, stream: &StreamSettings, table: &TableSettings) -> TableSink {
        let shared = &self.databases[&table.database];
        TableSink {
            stream: Arc::new(stream.clone()),
            table: Arc::new(table.clone()),
            database_name: table.database.clone(),
            database: shared.settings.clone(),
            pool: shared.pool.clone(),
            log: self.buffer.identity(),
            board: self.board.clone(),
            node: self.settings.node.name.clone(),
        }
    }

    fn migrator(&self, key: &PartKey, database: &str) -> PartSpec {
        let shared = &self.databases[database];
        // Before the migrator's thread runs: a database nobody has looked at yet must not count as migrated, and a table
        // that is new is not there.
        shared.migrated.send_replace(MigrationState::Waiting);
        let view = self.board.dependency(&format!("postgresql:{database}"));
        view.update(|status| status.migration = Some(MigrationState::Waiting));
        let tables = tables(&self.settings, database).into_iter().map(|(_, table)| table.clone());
        let tables: Vec<_> = tables.collect();
        let (gate, settings) = (shared.migrated.clone(), shared.settings.clone());
        let (database, board) = (database.to_owned(), self.board.clone());
        PartSpec::new(key.name(), Side::Delivery, shared.thread.clone(), move || Migrator {
            database: database.clone(),
            settings: settings.as_ref().clone(),
            tables: tables.clone(),
            board: board.clone(),
            gate: gate.clone(),
        })
    }

    fn writer(&self, key: &PartKey, stream: &StreamName, sink: &SinkName) -> PartSpec {
        let stream = &self.settings.streams[stream];
        let table = &stream.tables[sink];
        let shared = &self.databases[&table.database];
        let (sink, buffer) = (self.table_sink(stream, table), self.buffer.clone());
        let migrated = shared.migrated.clone();
        PartSpec::new(key.name(), Side::Delivery, shared.thread.clone(), move || {
            BatchWriter::new(sink.clone(), buffer.clone(), migrated.subscribe())
        })
    }

    fn producer(&self, key: &PartKey, cluster: &str) -> PartSpec {
        let shared = &self.clusters[cluster];
        let (name, settings) = (cluster.to_owned(), self.settings.clusters[cluster].clone());
        let (buffer, board) = (self.buffer.clone(), self.board.clone());
        let (routes, replayers) = (shared.routes.clone(), self.replayers.clone());
        PartSpec::new(key.name(), Side::Delivery, shared.thread.clone(), move || {
            let producer = KafkaProducer::new(KafkaParts {
                cluster: name.clone(),
                settings: settings.clone(),
                routes: routes.subscribe(),
                buffer: buffer.clone(),
                board: board.clone(),
            });
            replayers.set_kafka(&name, producer.replayer());
            producer
        })
    }

    fn reader(&mut self, key: &PartKey, stream: &StreamName) -> PartSpec {
        let stream = self.settings.streams[stream].clone();
        let broker = self.settings.brokers[&stream.broker].clone();
        let (buffer, board) = (self.buffer.clone(), self.board.clone());
        let thread = self.stream_thread();
        PartSpec::new(key.name(), Side::Intake, thread, move || {
            StreamReader::new(stream.clone(), broker.clone(), buffer.clone(), board.clone())
        })
    }

    /// Streams are spread over a few threads on which nothing blocks.
    fn stream_thread(&mut self) -> Thread {
        let place = self.streams_placed % self.settings.node.stream_threads.max(1);
        self.streams_placed += 1;
        if place == self.stream_threads.len() {
            self.stream_threads.push(Thread::start(&format!("streams-{place}")));
        }
        self.stream_threads[place].clone()
    }
}
