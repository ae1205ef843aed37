//! Servers, configurations and nodes for the measures.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rig::{
    Homelab, Kafka, KafkaOptions, Mosquitto, MosquittoOptions, Node, Postgres, PostgresOptions,
    SinkState, StreamState, Streams, free_port, until,
};

use crate::process::cpu_seconds;

/// Its table takes every row.
const STREAM: &str = "energy";
/// Its table has one row for each plug.
pub const PLUGS: &str = "plug";
pub const DATABASE: &str = "telemetry";
pub const TABLE: &str = "energy_consumption";
/// The default of a table's `batch_rows_max`: the baseline's batches are the same.
pub const BATCH_ROWS: u64 = 10_000;

const GIB: i64 = 1 << 30;
const QUOTA_BYTES: i64 = 64 * GIB;
const STOP_WITHIN: Duration = Duration::from_secs(60);
const SUBSCRIBED_WITHIN: Duration = Duration::from_secs(60);
/// Migrations included.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Often enough for runs of seconds, and too seldom to cost the node anything.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Less than a tenth of this in CPU time, and the broker counts as idle.
const IDLE_FOR: Duration = Duration::from_millis(500);
const IDLE_WITHIN: Duration = Duration::from_secs(30);
/// Without any progress for this long a run has failed.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// Which sink a node has, and whether it can be reached.
#[derive(Debug, Clone)]
pub enum Sink {
    Table,
    /// The table's server is away.
    TableAway,
    Kafka {
        topic: String,
    },
    KafkaAway,
    /// A table and a topic, and neither server is there.
    BothAway,
}

/// How a node differs from the defaults.
#[derive(Debug, Clone)]
pub struct Plan {
    pub stream: &'static str,
    pub sink: Sink,
    /// A folder to go on with; `None` = a fresh one.
    pub state: Option<PathBuf>,
    /// Name and topic to go on with; `None` = new ones.
    pub identity: Option<String>,
    /// Without any wait for company.
    pub lowest_latency: bool,
}

impl Plan {
    pub fn new(sink: Sink) -> Self {
        Self { stream: STREAM, sink, state: None, identity: None, lowest_latency: false }
    }
}

/// A node under measurement.
pub struct Subject {
    pub node: Node,
    stream: &'static str,
    /// Of the plugs a filter, with a `+` for the plug.
    pub topic: String,
    pub state: PathBuf,
    pub identity: String,
    /// When it was started.
    pub started: Instant,
}

/// All servers, and a folder for everything.
pub struct Lab {
    pub folder: PathBuf,
    pub binary: PathBuf,
    pub mosquitto: Mosquitto,
    pub postgres: Postgres,
    pub kafka: Kafka,
    count: u32,
}

impl Lab {
    /// # Errors
    /// When a server does not start.
    pub fn open(folder: &Path, binary: &Path) -> Result<Self> {
        let servers = folder.join("servers");
        if servers.exists() {
            std::fs::remove_dir_all(&servers).context("remove the servers of an earlier run")?;
        }
        let at = |name: &str| Some(servers.join(name));
        let mosquitto = Mosquitto::start_with(MosquittoOptions {
            folder: at("mosquitto"),
            // A large queue saved after each change would measure the broker's disk.
            autosave_on_changes: false,
            // As many as the node announces that it takes.
            max_inflight_messages: 4_096,
            max_queued_messages: 10_000_000,
            ..MosquittoOptions::default()
        })?;
        let settings = [("max_wal_size", "8GB"), ("shared_buffers", "256MB")];
        let postgres = Postgres::start_with(PostgresOptions {
            folder: at("postgres"),
            // Checkpoints would fall into some runs and not into others.
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            ..PostgresOptions::default()
        })?;
        let kafka = Kafka::start_with(KafkaOptions {
            folder: at("kafka"),
            heap_mib: 768,
            ..KafkaOptions::default()
        })?;
        let (folder, binary) = (servers, binary.to_owned());
        Ok(Self { folder, binary, mosquitto, postgres, kafka, count: 0 })
    }

    /// A word that was not used before.
    pub fn fresh(&mut self) -> String {
        self.count += 1;
        format!("bench-{}", self.count)
    }

    /// Waits until the broker has nothing to do any more: it uses no CPU time.
    ///
    /// # Errors
    /// When it goes on working.
    pub fn broker_idle(&mut self) -> Result<()> {
        let pid = self.mosquitto.daemon().pid().context("the broker runs")?;
        let mut before = cpu_seconds(pid)?;
        until(IDLE_WITHIN, "the broker idle", || {
            std::thread::sleep(IDLE_FOR);
            let now = cpu_seconds(pid)?;
            let idle = now - before < IDLE_FOR.as_secs_f64() / 10.0;
            before = now;
            Ok(idle.then_some(()))
        })
    }

    /// An empty database; the next node makes the tables.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn fresh_database(&self) -> Result<()> {
        let drop = format!("DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)");
        self.postgres.execute("postgres", &drop)?;
        self.postgres.create_database(DATABASE)
    }

    /// # Errors
    /// When there is no table.
    pub fn empty_table(&self) -> Result<()> {
        self.postgres.execute(DATABASE, &format!("TRUNCATE {TABLE}"))?;
        self.postgres.execute(DATABASE, "CHECKPOINT")
    }

    /// Starts a node and waits until it is subscribed, and its tables are there when it has some.
    ///
    /// # Errors
    /// When it is not in time, with its log.
    pub fn start(&mut self, plan: &Plan) -> Result<Subject> {
        let mut subject = self.spawn(plan)?;
        subject.wait_subscribed()?;
        if matches!(plan.sink, Sink::Table) {
            subject.node.wait_ready(READY_WITHIN)?;
        }
        Ok(subject)
    }

    /// Starts a node without waiting.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self, plan: &Plan) -> Result<Subject> {
        let identity = plan.identity.clone().unwrap_or_else(|| self.fresh());
        let home = self.folder.join(&identity);
        std::fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
        let state = plan.state.clone().unwrap_or_else(|| home.join("state"));
        let topic = match plan.stream {
            PLUGS => format!("{identity}/+/STATE"),
            _ => format!("{identity}/telemetry"),
        };
        let http_port = free_port();
        let config = home.join("telemetry.toml");
        self.configure(plan, &identity, &topic, &state, http_port)?.write(&config)?;
        let mut node = Node::new(&self.binary, config, http_port);
        let started = Instant::now();
        node.spawn()?;
        Ok(Subject { node, stream: plan.stream, topic, state, identity, started })
    }

    fn configure(
        &self,
        plan: &Plan,
        identity: &str,
        topic: &str,
        state: &Path,
        http_port: u16,
    ) -> Result<Homelab> {
        let mut homelab = Homelab::load()?;
        homelab.keep_stream(plan.stream)?;
        homelab.node(state, http_port);
        homelab.set(&["node", "name"], identity);
        homelab.set(&["buffer", "quota_bytes"], QUOTA_BYTES);
        homelab.set(&["streams", plan.stream, "topic_filter"], topic);
        homelab.broker(self.mosquitto.port());
        // Roll-ups would run in some rounds and not in others.
        homelab.each("databases", |database| {
            database.remove("jobs");
            database.insert("dbname", toml_edit::value(DATABASE));
        });
        match &plan.sink {
            Sink::BothAway => {
                homelab.set(&["node", "drain_timeout_seconds"], 0);
                homelab.databases(free_port(), &self.folder)?;
                homelab.cluster(&format!("127.0.0.1:{}", free_port()));
            }
            Sink::Table | Sink::TableAway => {
                homelab.without_kafka();
                let away = matches!(plan.sink, Sink::TableAway);
                let port = if away { free_port() } else { self.postgres.port() };
                if away {
                    homelab.set(&["node", "drain_timeout_seconds"], 0);
                }
                homelab.databases(port, &self.folder)?;
            }
            Sink::Kafka { .. } | Sink::KafkaAway => {
                homelab.remove(&["streams", plan.stream, "tables"]);
                homelab.remove(&["databases"]);
                match &plan.sink {
                    Sink::Kafka { topic } => {
                        homelab.cluster(&self.kafka.bootstrap());
                        homelab.set(&["streams", plan.stream, "kafka", "topic"], topic.as_str());
                    }
                    _ => {
                        homelab.set(&["node", "drain_timeout_seconds"], 0);
                        homelab.cluster(&format!("127.0.0.1:{}", free_port()));
                    }
                }
            }
        }
        if plan.lowest_latency {
            homelab.set(&["buffer", "sync_linger_ms"], 0);
            homelab.set(&["streams", STREAM, "tables", TABLE, "batch_linger_ms"], 0);
        }
        Ok(homelab)
    }
}

impl Subject {
    /// # Errors
    /// When it is not subscribed in time, with its log.
    pub fn wait_subscribed(&mut self) -> Result<()> {
        let outcome = until(SUBSCRIBED_WITHIN, "the node subscribed", || {
            let running = self.node.daemon().is_running();
            anyhow::ensure!(running, "the node ended");
            Ok(self.look().ok().filter(|stream| stream.status.subscribed))
        });
        outcome.map(drop).map_err(|error| anyhow!("{error:#}\n{}", self.node.daemon().story()))
    }

    pub fn look(&self) -> Result<StreamState> {
        let streams = Streams::of(&self.node)?;
        streams.stream(self.stream).cloned().context("the node shows its stream")
    }

    pub fn pid(&mut self) -> Result<u32> {
        self.node.daemon().pid().context("the node runs")
    }

    /// Looks again and again until `count` reaches `goal`, and gives the moment.
    ///
    /// # Errors
    /// When there is no progress any more.
    pub fn wait_for(&mut self, goal: u64, count: impl Fn(&StreamState) -> u64) -> Result<Instant> {
        let mut best = (0, Instant::now());
        loop {
            let state = self.look().with_context(|| self.node.daemon().story())?;
            let now = count(&state);
            if now >= goal {
                return Ok(Instant::now());
            }
            if now > best.0 {
                best = (now, Instant::now());
            }
            anyhow::ensure!(
                best.1.elapsed() < STUCK_AFTER,
                "stuck at {now} of {goal}: {state:?}\n{}",
                self.node.daemon().story()
            );
            std::thread::sleep(LOOK_PAUSE);
        }
    }

    /// SIGTERM; it must end well.
    ///
    /// # Errors
    /// When it does not.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.node.stop(STOP_WITHIN)?;
        anyhow::ensure!(
            status.success(),
            "the node ended with {status}\n{}",
            self.node.daemon().story()
        );
        Ok(())
    }
}

/// Durable records.
pub fn kept(stream: &StreamState) -> u64 {
    stream.status.sequence
}

/// Records its only sink has taken.
pub fn delivered(stream: &StreamState) -> u64 {
    stream.sinks.first().map_or(0, |sink: &SinkState| sink.books().delivered)
}
