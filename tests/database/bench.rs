//! The homelab configuration on a database of the test's own: a real buffer, real mappings, one writer at a time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use rig::{PASSWORD, Postgres, SUPERUSER};
use telemetry::buffer::{Appender, Buffer, DeadLetterFilter, Incoming};
use telemetry::config::{BackoffSettings, DatabaseSettings, Settings, StreamSettings, load};
use telemetry::database::{BatchWriter, Pool, TableSink};
use telemetry::domain::{Arrival, Books, DeadLetter, DeliveryFlags, Secret, SinkName, StreamName};
use telemetry::migrate::Session;
use telemetry::observe::{Board, DependencyView, MigrationState, SinkState, SinkStatus};
use telemetry::part::{Control, Part as _, Phase, Progress};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::{JoinHandle, LocalSet};

pub const PATIENCE: Duration = Duration::from_secs(20);

/// The cluster lives as long as one test uses it: a `static` of its own would never be stopped.
static CLUSTER: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
static DATABASES: AtomicUsize = AtomicUsize::new(0);

fn shared_cluster() -> Arc<Postgres> {
    let mut shared = CLUSTER.lock().unwrap_or_else(|broken| broken.into_inner());
    if let Some(cluster) = shared.upgrade() {
        return cluster;
    }
    let cluster = Arc::new(Postgres::start().expect("start PostgreSQL"));
    *shared = Arc::downgrade(&cluster);
    cluster
}

pub struct Bench {
    pub cluster: Arc<Postgres>,
    /// One database holds both of the homelab's: their tables have different names.
    pub database: String,
    pub settings: Settings,
    pub buffer: Buffer,
    pub board: Arc<Board>,
    appenders: RefCell<HashMap<StreamName, Appender>>,
    _folder: TempDir,
}

/// Runs a test body where parts can be spawned.
pub fn local<T>(body: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, body)
}

impl Bench {
    pub async fn new() -> Bench {
        Self::on(shared_cluster()).await
    }

    pub async fn on(cluster: Arc<Postgres>) -> Bench {
        Self::made(cluster, |_| {}).await
    }

    /// With settings that count from the start.
    pub async fn with(change: impl FnOnce(&mut Settings)) -> Bench {
        Self::made(shared_cluster(), change).await
    }

    async fn made(cluster: Arc<Postgres>, change: impl FnOnce(&mut Settings)) -> Bench {
        let database = format!("bench_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        cluster.create_database(&database).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut settings = homelab();
        settings.node.state_dir = folder.path().to_owned();
        settings.buffer.ballast_bytes = 0;
        settings.buffer.free_bytes_min = 0;
        for (name, own) in &mut settings.databases {
            point_at(own, cluster.port(), &database);
            // Both folders count from 1, so each has a ledger of its own.
            own.schema.clone_from(name);
            Session::open(name, own).await.unwrap().apply().await.unwrap();
        }
        change(&mut settings);
        let board = Board::new(&settings);
        let streams: Vec<_> =
            settings.streams.iter().map(|(name, stream)| (name.clone(), stream.sinks())).collect();
        let buffer =
            Buffer::open(folder.path(), &settings.buffer, &streams, board.clone()).unwrap();
        let appenders = RefCell::default();
        Bench { cluster, database, settings, buffer, board, appenders, _folder: folder }
    }

    /// Keeps messages and waits until they are durable.
    pub async fn feed(&self, stream: &str, messages: Vec<Incoming>) {
        let name = StreamName::parse(stream).unwrap();
        let appender = self.appenders.borrow_mut().remove(&name);
        let appender = appender.unwrap_or_else(|| self.buffer.appender(&name));
        let mut last = None;
        for batch in messages.chunks(2000) {
            let durable = appender.try_append(batch.to_vec()).expect("room").await;
            last = Some(durable.expect("durable"));
        }
        // The answer may come before the news.
        eventually("durable", || Some(self.buffer.durable(&name)) >= last).await;
        self.appenders.borrow_mut().insert(name, appender);
    }

    pub fn sink(&self, stream: &str, sink: &str) -> TableSink {
        let stream = &self.settings.streams[&StreamName::parse(stream).unwrap()];
        self.sink_of(stream, sink)
    }

    pub fn sink_of(&self, stream: &StreamSettings, sink: &str) -> TableSink {
        let table = &stream.tables[&SinkName::parse(sink).unwrap()];
        let database = &self.settings.databases[&table.database];
        TableSink {
            table: Arc::new(table.clone()),
            stream: Arc::new(stream.clone()),
            database_name: table.database.clone(),
            database: Arc::new(database.clone()),
            pool: Pool::new(database, self.dependency(&table.database)),
            log: self.buffer.identity(),
            board: self.board.clone(),
            node: self.settings.node.name.clone(),
        }
    }

    pub fn dependency(&self, database: &str) -> Arc<DependencyView> {
        self.board.dependency(&format!("postgresql:{database}"))
    }

    pub fn start(&self, stream: &str, sink: &str) -> Running {
        self.run(self.sink(stream, sink))
    }

    pub fn run(&self, sink: TableSink) -> Running {
        Running::start(sink, self.buffer.clone())
    }

    /// The rows of a query, every value as text, values separated by one space, NULL as `-`.
    pub fn rows(&self, sql: &str) -> Vec<String> {
        let text = |row: Vec<Option<String>>| {
            let values = row.into_iter().map(|value| value.unwrap_or_else(|| "-".to_owned()));
            values.collect::<Vec<_>>().join(" ")
        };
        let sql = format!(
            "SET search_path TO telemetry, homelab_settings, public; SET timezone TO 'UTC'; {sql}"
        );
        self.cluster.query(&self.database, &sql).unwrap().into_iter().map(text).collect()
    }

    pub async fn letters(&self) -> Vec<DeadLetter> {
        self.buffer.state().dead_letters(DeadLetterFilter::default(), None, 1000).await.unwrap()
    }
}

/// A writer at work.
pub struct Running {
    pub sink: TableSink,
    buffer: Buffer,
    pub phase: watch::Sender<Phase>,
    pub paused: watch::Sender<bool>,
    pub gate: watch::Sender<MigrationState>,
    pub progress: Arc<Progress>,
    pub task: JoinHandle<Result<(), anyhow::Error>>,
}

impl Running {
    fn start(sink: TableSink, buffer: Buffer) -> Running {
        let (phase, phase_seen) = watch::channel(Phase::Running);
        let (paused, paused_seen) = watch::channel(false);
        let (gate, gate_seen) = watch::channel(MigrationState::Done);
        let progress = Arc::new(Progress::default());
        let control = Control::new(phase_seen, paused_seen, progress.clone());
        let writer = BatchWriter::new(sink.clone(), buffer.clone(), gate_seen);
        let task = tokio::task::spawn_local(writer.run(control));
        Running { sink, buffer, phase, paused, gate, progress, task }
    }

    pub fn status(&self) -> SinkStatus {
        self.sink.view().status()
    }

    /// Until everything kept is behind the cursor; the books must then balance.
    pub async fn drained(&self) -> Books {
        let durable = || self.buffer.durable(&self.sink.stream.name).0;
        let at_the_end = || self.status().books.is_some_and(|books| books.cursor == durable());
        until(|| format!("drained: {:?}", self.status()), at_the_end).await;
        let books = self.status().books.unwrap();
        assert_eq!(books.difference(), 0, "{books:?}");
        books
    }

    pub async fn reaches(&self, state: SinkState) -> SinkStatus {
        let what = || format!("{state:?}: {:?}", self.status());
        until(what, || self.status().state == state).await;
        self.status()
    }

    /// Makes a writer that pauses between attempts try at once.
    pub async fn nudge(&self) {
        self.paused.send_replace(true);
        self.reaches(SinkState::Paused).await;
        self.paused.send_replace(false);
    }

    pub async fn stop(self) {
        self.phase.send_replace(Phase::Stopping);
        tokio::time::timeout(PATIENCE, self.task).await.expect("in time").unwrap().unwrap();
    }
}

pub async fn eventually(what: &str, holds: impl FnMut() -> bool) {
    until(|| what.to_owned(), holds).await;
}

async fn until(what: impl Fn() -> String, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {}", what()));
}

pub fn homelab() -> Settings {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/homelab/telemetry.toml");
    load(&example, &|_| None).expect("the example is right").settings
}

fn point_at(database: &mut DatabaseSettings, port: u16, name: &str) {
    database.port = port;
    database.dbname = name.to_owned();
    database.user = SUPERUSER.to_owned();
    database.password = Some(Secret::new(PASSWORD.to_owned()).into());
    database.retry =
        BackoffSettings { min: Duration::from_millis(10), max: Duration::from_millis(100) };
}

/// 2026-03-14T07:21:05.412908Z and so many microseconds.
pub fn at(micros: i64) -> Arrival {
    Arrival(1_773_472_865_412_908 + micros)
}

pub fn message(topic: &str, payload: impl Into<Bytes>, arrival: Arrival) -> Incoming {
    Incoming {
        topic: Bytes::copy_from_slice(topic.as_bytes()),
        payload: payload.into(),
        arrival,
        flags: DeliveryFlags { qos: 1, ..DeliveryFlags::default() },
        packet_id: 1,
    }
}

/// An energy message whose total power is `watts`.
pub fn energy(watts: i64, arrival: Arrival) -> Incoming {
    let payload = format!(
        r#"{{"saveeyeDeviceSerialNumber": "SE-4471-K", "meterType": "three-phase", "wifiRssi": -41,
        "activeActualConsumption": {{"total": {watts}, "L1": 612.9, "L2": 389, "L3": 283}},
        "activeActualProduction": {{"total": 0}}, "activeTotalConsumption": {{"total": 104233871}},
        "activeTotalProduction": {{"total": 83}}, "rmsVoltage": {{"L1": 237, "L2": 238, "L3": 236}},
        "rmsCurrent": {{"L1": 2583, "L2": 1634, "L3": null}}, "powerFactor": {{"total": 98}}}}"#
    );
    message("saveeye/telemetry", payload, arrival)
}

/// So many energy messages, one per millisecond, with watts counting from 1.
pub fn energies(count: i64) -> Vec<Incoming> {
    (1..=count).map(|watts| energy(watts, at(watts * 1000))).collect()
}
