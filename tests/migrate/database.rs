//! A fresh database per test on a cluster all tests share, and settings for it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use indexmap::IndexMap;
use rig::{PASSWORD, Postgres, SUPERUSER};
use telemetry::config::{
    BackoffSettings, DatabaseSettings, DatabaseTls, JobSettings, TableKind, TableSettings,
};
use telemetry::domain::{Secret, SinkName};
use telemetry::migrate::{MigrateError, Migration, Session};

/// The cluster lives as long as one test uses it: a `static` of its own would never be stopped.
static CLUSTER: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
static DATABASES: AtomicUsize = AtomicUsize::new(0);

pub const DAY: Duration = Duration::from_secs(86_400);

pub struct TestDatabase {
    cluster: Arc<Postgres>,
    pub name: String,
    pub settings: DatabaseSettings,
    folder: tempfile::TempDir,
}

fn cluster() -> Arc<Postgres> {
    let mut shared = CLUSTER.lock().unwrap_or_else(|broken| broken.into_inner());
    if let Some(cluster) = shared.upgrade() {
        return cluster;
    }
    let cluster = Arc::new(Postgres::start().expect("start PostgreSQL"));
    *shared = Arc::downgrade(&cluster);
    cluster
}

impl TestDatabase {
    /// An empty database and an empty migrations folder.
    pub fn new() -> Self {
        let cluster = cluster();
        let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        cluster.create_database(&name).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(cluster.port(), &name, Some(folder.path().to_path_buf()));
        TestDatabase { cluster, name, settings, folder }
    }

    /// With a folder of the project, applied.
    pub async fn migrated(folder: &str) -> Self {
        let mut database = Self::new();
        database.settings.migrations_dir = Some(shipped(folder));
        Session::open(folder, &database.settings).await.unwrap().apply().await.unwrap();
        database
    }

    pub fn write(&self, file: &str, sql: &str) {
        let text = format!("-- database: telemetry\n{sql}");
        std::fs::write(self.folder.path().join(file), text).unwrap();
    }

    pub async fn apply(&self) -> Result<Vec<i32>, MigrateError> {
        let done = Session::open("telemetry", &self.settings).await?.apply().await?;
        Ok(done.iter().map(|migration: &Migration| migration.version).collect())
    }

    /// The rows of a query, every value as text, values separated by one space, NULL as `-`.
    pub fn rows(&self, sql: &str) -> Vec<String> {
        let text = |row: Vec<Option<String>>| {
            let values = row.into_iter().map(|value| value.unwrap_or_else(|| "-".to_owned()));
            values.collect::<Vec<_>>().join(" ")
        };
        let schema = telemetry::database::maintenance::quoted(&self.settings.schema);
        let session =
            format!("SET search_path TO {schema}, public; SET timezone TO 'Asia/Kathmandu'");
        let sql = format!("{session}; {sql}");
        self.cluster.query(&self.name, &sql).unwrap().into_iter().map(text).collect()
    }

    pub fn execute(&self, sql: &str) {
        self.rows(sql);
    }

    /// How many sessions have ended here, or lasted a second. Asked elsewhere, so that asking is none of them.
    pub fn sessions(&self) -> u64 {
        let name = &self.name;
        let sql = format!("SELECT sessions FROM pg_stat_database WHERE datname = '{name}'");
        self.cluster.value("postgres", &sql).unwrap().parse().unwrap()
    }

    pub async fn client(&self) -> tokio_postgres::Client {
        let client = telemetry::database::connect(&self.settings).await.unwrap();
        telemetry::database::maintenance::prepare_session(&client, &self.settings).await.unwrap();
        client
    }
}

pub fn shipped(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations").join(folder)
}

pub fn settings(port: u16, dbname: &str, migrations_dir: Option<PathBuf>) -> DatabaseSettings {
    DatabaseSettings {
        host: "127.0.0.1".to_owned(),
        port,
        dbname: dbname.to_owned(),
        user: SUPERUSER.to_owned(),
        password: Some(Secret::new(PASSWORD.to_owned()).into()),
        migrator: None,
        tls_mode: DatabaseTls::Off,
        tls: None,
        schema: "public".to_owned(),
        connections_max: 4,
        connect_timeout: Duration::from_secs(10),
        pool_timeout: Duration::from_secs(10),
        statement_timeout: Duration::from_secs(30),
        query_timeout: Duration::from_secs(60),
        retry: BackoffSettings { min: Duration::from_millis(20), max: Duration::from_millis(100) },
        breaker: Default::default(),
        migrations_dir,
        migration_wait: Duration::from_millis(100),
        jobs: IndexMap::new(),
    }
}

pub fn rollup_job() -> JobSettings {
    JobSettings {
        function: "refresh_energy_rollups".to_owned(),
        interval: Duration::from_millis(50),
        lookback: 2 * DAY,
    }
}

pub fn append_table(
    table: &str,
    partition: Duration,
    retention: Option<Duration>,
) -> TableSettings {
    TableSettings {
        sink: SinkName::parse(table).unwrap(),
        database: "telemetry".to_owned(),
        table: table.to_owned(),
        kind: TableKind::Append {
            time_column: "time".to_owned(),
            node_column: Some("node".to_owned()),
            retention,
            partition,
        },
        columns: IndexMap::new(),
        batch_rows_max: 1000,
        batch_bytes_max: 1 << 20,
        batch_linger: Duration::from_millis(5),
    }
}
