//! Which parts a configuration asks for, and what each is made from: two of these compared say what a reload does.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;

use crate::config::{
    BrokerSettings, ClusterSettings, DatabaseSettings, Password, Settings, StreamSettings,
    TableSettings, TlsSettings,
};
use crate::domain::{SinkName, StreamName};
use crate::kafka;
use crate::private_file::Stamp;

/// One part, by what it serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PartKey {
    Migrator(String),
    Writer(StreamName, SinkName),
    Kafka(String),
    Stream(StreamName),
}

impl PartKey {
    /// As the supervisor, `/parts` and the log call it.
    pub fn name(&self) -> String {
        match self {
            PartKey::Migrator(database) => format!("migrator:{database}"),
            PartKey::Writer(stream, sink) => format!("writer:{stream}:{sink}"),
            PartKey::Kafka(cluster) => format!("kafka:{cluster}"),
            PartKey::Stream(stream) => format!("stream:{stream}"),
        }
    }
}

/// What a part is made from, for comparing: its settings, and which content of the files they name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Basis {
    settings: String,
    files: BTreeMap<PathBuf, Option<Stamp>>,
}

impl Basis {
    fn of(settings: &dyn Debug) -> Self {
        Basis { settings: format!("{settings:?}"), files: BTreeMap::new() }
    }

    fn file(mut self, path: &Path) -> Self {
        self.files.insert(path.to_owned(), Stamp::of(path).unwrap_or(None));
        self
    }

    fn files<'a>(self, paths: impl IntoIterator<Item = &'a Path>) -> Self {
        paths.into_iter().fold(self, Basis::file)
    }

    fn secrets(self, tls: Option<&TlsSettings>, passwords: [Option<&Password>; 2]) -> Self {
        let basis = self.files(tls.into_iter().flat_map(TlsSettings::files));
        basis.files(passwords.into_iter().flatten().filter_map(Password::file))
    }

    fn and(mut self, other: &Basis) -> Self {
        self.settings.push_str(&other.settings);
        self.files.extend(other.files.clone());
        self
    }

    /// The files whose content differs, though both name them.
    pub fn changed_files<'a>(&'a self, before: &'a Basis) -> impl Iterator<Item = &'a Path> {
        let changed = |(path, stamp): &(&PathBuf, &Option<Stamp>)| {
            before.files.get(*path).is_some_and(|known| known != *stamp)
        };
        self.files.iter().filter(changed).map(|(path, _)| path.as_path())
    }
}

/// Every part with its basis, the last stage first: a sink is there before its stream accepts.
#[derive(Debug, Clone, Default)]
pub struct Blueprint {
    pub parts: IndexMap<PartKey, Basis>,
    /// Of each cluster's part, which takes changes of its streams while it runs.
    pub lanes: IndexMap<(String, StreamName), String>,
    /// Of what the parts of one database share.
    pub databases: IndexMap<String, Basis>,
}

impl Blueprint {
    pub fn of(settings: &Settings) -> Self {
        let mut blueprint = Blueprint::default();
        blueprint.add_databases(settings);
        blueprint.add_clusters(settings);
        for (name, stream) in &settings.streams {
            let basis = reader(stream, &settings.brokers[&stream.broker]);
            blueprint.parts.insert(PartKey::Stream(name.clone()), basis);
        }
        blueprint
    }

    fn add_databases(&mut self, settings: &Settings) {
        for (name, database) in &settings.databases {
            let sinks = tables(settings, name);
            if sinks.is_empty() {
                continue;
            }
            let shared = database_basis(database);
            let tables: Vec<_> = sinks.iter().map(|(_, table)| table).collect();
            let migrator = migration_files(database).and(&Basis::of(&tables)).and(&shared);
            self.parts.insert(PartKey::Migrator(name.clone()), migrator);
            for (stream, table) in sinks {
                let key = PartKey::Writer(stream.name.clone(), table.sink.clone());
                let basis = Basis::of(&(&stream.mapping, table)).and(&shared);
                self.parts.insert(key, basis);
            }
            self.databases.insert(name.clone(), shared);
        }
    }

    fn add_clusters(&mut self, settings: &Settings) {
        for (name, cluster) in &settings.clusters {
            let streams = routes(settings, name);
            if streams.is_empty() && cluster.dead_letters.is_none() {
                continue;
            }
            self.parts.insert(PartKey::Kafka(name.clone()), cluster_basis(cluster));
            for stream in streams {
                let key = (name.clone(), stream.name.clone());
                self.lanes.insert(key, kafka::lane_basis(&stream));
            }
        }
    }
}

/// The table sinks of one database.
pub fn tables<'a>(
    settings: &'a Settings,
    database: &str,
) -> Vec<(&'a StreamSettings, &'a TableSettings)> {
    let of_stream =
        |stream: &'a StreamSettings| stream.tables.values().map(move |table| (stream, table));
    let all = settings.streams.values().flat_map(of_stream);
    all.filter(|(_, table)| table.database == database).collect()
}

/// The streams of one cluster.
pub fn routes(settings: &Settings, cluster: &str) -> Vec<StreamSettings> {
    let routed = |stream: &&StreamSettings| {
        stream.kafka.as_ref().is_some_and(|kafka| kafka.cluster == cluster)
    };
    settings.streams.values().filter(routed).cloned().collect()
}

fn reader(stream: &StreamSettings, broker: &BrokerSettings) -> Basis {
    let StreamSettings { name, topic_filter, qos, client_id, dedupe, .. } = stream;
    Basis::of(&(name, topic_filter, qos, client_id, dedupe, &stream.broker, broker))
        .secrets(broker.tls.as_ref(), [broker.password.as_ref(), None])
}

fn cluster_basis(cluster: &ClusterSettings) -> Basis {
    let password = cluster.sasl.as_ref().map(|sasl| &sasl.password);
    Basis::of(cluster).secrets(cluster.tls.as_ref(), [password, None])
}

fn database_basis(database: &DatabaseSettings) -> Basis {
    let migrator = database.migrator.as_ref().and_then(|login| login.password.as_ref());
    Basis::of(database).secrets(database.tls.as_ref(), [database.password.as_ref(), migrator])
}

/// A new file is a new migration: the migrator looks again.
fn migration_files(database: &DatabaseSettings) -> Basis {
    let entries =
        database.migrations_dir.iter().filter_map(|folder| std::fs::read_dir(folder).ok());
    let paths: Vec<_> = entries.flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    Basis::of(&paths.len()).files(paths.iter().map(PathBuf::as_path))
}
