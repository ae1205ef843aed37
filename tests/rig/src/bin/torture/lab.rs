//! Servers and node of a run, started once. The node reaches broker and database through a network that can fail.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, anyhow};
use rig::{
    Disk, Homelab, KafkaCluster, KafkaOptions, Mosquitto, MosquittoOptions, Node, PASSWORD,
    Postgres, PostgresOptions, Proxy, Streams, free_port, until,
};

use crate::exact::Shapes;
use crate::faults::Fault;
use crate::traffic::{POISON, STREAMS};

/// The node's, in the database.
pub const ROLE: &str = "node";
/// Of each topic, where there are brokers to share them.
pub const KAFKA_PARTITIONS: i32 = 3;
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Of each log, when a round fails; the whole logs stay in the folder.
const TOLD_LINES: usize = 10;
const TOLD_COLUMNS: usize = 240;

/// Everything a fault can lay hands on. Fields are dropped, and so ended, from the first to the last.
pub struct Lab {
    pub node: Node,
    /// The node's own; `None` where it was not asked for or the system does not let us have one.
    pub disk: Option<Disk>,
    pub to_broker: Proxy,
    pub to_database: Proxy,
    pub kafka: KafkaCluster,
    pub postgres: Postgres,
    pub mosquitto: Mosquitto,
    pub topics: Vec<String>,
    pub shapes: Shapes,
    /// Of the running round: closed by whoever needs the broker to be at rest.
    pub gate: Arc<Mutex<()>>,
    pub meanwhile: Meanwhile,
}

/// What happens while another fault lasts.
#[derive(Default)]
pub struct Meanwhile {
    pub waiting: Option<&'static Fault>,
    pub taken: Vec<&'static str>,
}

impl Lab {
    /// # Errors
    /// When a server does not start.
    pub fn open(
        folder: &Path,
        binary: &Path,
        disk: Option<Disk>,
        kafka_nodes: usize,
    ) -> Result<Self> {
        let at = |name: &str| Some(folder.join(name));
        let kafka = start_kafka(at("kafka"), kafka_nodes);
        let postgres = Postgres::start_with(PostgresOptions {
            folder: at("postgres"),
            ..PostgresOptions::default()
        })?;
        let mosquitto = Mosquitto::start_with(MosquittoOptions {
            folder: at("mosquitto"),
            ..MosquittoOptions::default()
        })?;
        let kafka =
            kafka.join().map_err(|_| anyhow!("the thread that starts Kafka panicked"))??;
        let to_broker = Proxy::start(mosquitto.port())?;
        let to_database = Proxy::start(postgres.port())?;
        let http_port = free_port();
        let state = disk.as_ref().map_or_else(|| folder.to_owned(), Disk::mount_point);
        let mut homelab = configuration(&state.join("state"), http_port)?;
        homelab.broker(to_broker.port());
        homelab.databases(to_database.port(), folder)?;
        homelab.cluster(&kafka.far_bootstrap());
        if kafka.len() > 1 {
            share_topics(&mut homelab, kafka.len());
        }
        own_databases(&mut homelab, &postgres)?;
        let config = folder.join("telemetry.toml");
        homelab.write(&config)?;
        let topics = STREAMS.iter().filter_map(|stream| homelab.topic(stream.name));
        let topics = topics.map(str::to_owned).collect();
        let node = Node::new(binary, config, http_port);
        let mut lab = Lab {
            node,
            disk,
            to_broker,
            to_database,
            kafka,
            postgres,
            mosquitto,
            topics,
            shapes: Shapes::of(&homelab),
            gate: Arc::default(),
            meanwhile: Meanwhile::default(),
        };
        lab.first_start()?;
        Ok(lab)
    }

    /// Tables and topics are made, streams subscribed: a message published before that has nobody to be kept for.
    fn first_start(&mut self) -> Result<()> {
        self.node.start()?;
        self.node.wait_ready(READY_WITHIN)?;
        until(READY_WITHIN, "every stream subscribed", || {
            Ok(Streams::of(&self.node)?.all_subscribed().then_some(()))
        })?;
        self.refuse_poison()
    }

    /// From now on a row of this value is an error.
    pub fn refuse_poison(&self) -> Result<()> {
        let refuse = format!(
            "ALTER TABLE energy_consumption \
             ADD CONSTRAINT no_poison CHECK (active_power_total <> {POISON}) NOT VALID"
        );
        self.postgres.execute("telemetry", &refuse)
    }

    pub fn take_poison(&self) -> Result<()> {
        self.postgres
            .execute("telemetry", "ALTER TABLE energy_consumption DROP CONSTRAINT no_poison")
    }

    /// What each party said last.
    pub fn story(&mut self) -> String {
        let kafkas = self.kafka.nodes().iter().map(|kafka| ("Kafka", kafka.log_tail(TOLD_LINES)));
        [
            ("the node", self.node.daemon().log_tail(TOLD_LINES)),
            ("Mosquitto", self.mosquitto.log_tail(TOLD_LINES)),
            ("PostgreSQL", self.postgres.log_tail(TOLD_LINES)),
        ]
        .into_iter()
        .chain(kafkas)
        .map(|(who, said)| format!("--- {who} ---\n{}", shortened(&said)))
        .collect()
    }
}

/// The node is no superuser there, so that it can be refused what it needs.
fn own_databases(homelab: &mut Homelab, postgres: &Postgres) -> Result<()> {
    postgres.create_role(ROLE, PASSWORD)?;
    for database in homelab.names("databases") {
        homelab.set(&["databases", &database, "user"], ROLE);
    }
    for dbname in homelab.dbnames() {
        postgres.create_database(&dbname)?;
        postgres.execute("postgres", &format!("ALTER DATABASE {dbname} OWNER TO {ROLE}"))?;
    }
    Ok(())
}

fn shortened(lines: &str) -> String {
    lines
        .lines()
        .map(|line| line.chars().take(TOLD_COLUMNS).chain(['\n']).collect::<String>())
        .collect()
}

fn start_kafka(
    folder: Option<PathBuf>,
    nodes: usize,
) -> std::thread::JoinHandle<Result<KafkaCluster>> {
    let options = KafkaOptions { folder, heap_mib: 256, far: true, ..KafkaOptions::default() };
    std::thread::spawn(move || KafkaCluster::start_with(nodes, &options))
}

/// Every broker has every partition, and not all of them have the same leader.
fn share_topics(homelab: &mut Homelab, brokers: usize) {
    for stream in homelab.names("streams") {
        let ensure = ["streams", &stream, "kafka", "ensure"];
        let mut set = |name, value: i64| homelab.set(&[&ensure[..], &[name]].concat(), value);
        set("partitions", i64::from(KAFKA_PARTITIONS));
        set("replication", brokers as i64);
    }
}

/// The homelab with waits that suit rounds of seconds.
fn configuration(state: &Path, http_port: u16) -> Result<Homelab> {
    let mut homelab = Homelab::load()?;
    homelab.node(state, http_port);
    // Whatever the surroundings would make of it: alarms are looked for in it.
    homelab.set(&["log", "format"], "json");
    for stream in homelab.names("streams") {
        let Some(taking_part) = STREAMS.iter().find(|known| known.name == stream) else {
            homelab.remove(&["streams", &stream]);
            continue;
        };
        if !taking_part.keeps_repeats {
            homelab.set(&["streams", &stream, "dedupe", "by"], "payload");
        }
    }
    let whole = |homelab: &mut Homelab, path: &[&str], value: i64| homelab.set(path, value);
    for (section, name, value) in [
        ("node", "drain_timeout_seconds", 5),
        // A generation, and with it a switch and a drop, in nearly every round.
        ("buffer", "generation_bytes", 1 << 20),
        ("buffer", "free_bytes_min", 16 << 20),
        ("buffer", "ballast_bytes", 4 << 20),
        ("supervision", "backoff_min_ms", 50),
        ("supervision", "backoff_max_ms", 500),
        ("supervision", "parked_retry_seconds", 1),
    ] {
        whole(&mut homelab, &[section, name], value);
    }
    for (section, kind, name, value) in [
        ("brokers", "home", "keepalive_seconds", 5),
        ("brokers", "home", "connect_timeout_seconds", 1),
        ("brokers", "home", "operation_timeout_seconds", 2),
        ("brokers", "home", "reconnect_min_ms", 50),
        ("brokers", "home", "reconnect_max_ms", 250),
        ("clusters", "main", "message_timeout_seconds", 5),
        ("clusters", "main", "operation_timeout_seconds", 3),
        ("clusters", "main", "retry_min_ms", 50),
        ("clusters", "main", "retry_max_ms", 250),
        ("clusters", "main", "cursor_save_ms", 50),
    ] {
        whole(&mut homelab, &[section, kind, name], value);
    }
    for name in ["reconnect.backoff.ms", "reconnect.backoff.max.ms"] {
        homelab.set(&["clusters", "main", "properties", name], "100");
    }
    for database in homelab.names("databases") {
        homelab.remove(&["databases", &database, "jobs"]);
        for (name, value) in [
            ("connect_timeout_seconds", 1),
            ("pool_timeout_seconds", 2),
            ("statement_timeout_seconds", 2),
            ("query_timeout_seconds", 5),
            ("retry_min_ms", 50),
            ("retry_max_ms", 250),
        ] {
            whole(&mut homelab, &["databases", &database, name], value);
        }
    }
    // Several transactions a round.
    homelab.each("streams", |stream| {
        let tables = stream.get_mut("tables").and_then(|tables| tables.as_table_like_mut());
        for (_, table) in tables.into_iter().flat_map(|tables| tables.iter_mut()) {
            if let Some(table) = table.as_table_like_mut() {
                table.insert("batch_rows_max", toml_edit::value(100));
            }
        }
    });
    Ok(homelab)
}
