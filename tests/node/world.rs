//! One node with its own broker and databases; Kafka is shared by all tests, with topics of their own.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rig::{
    Certificates, Disk, Folder, Homelab, Kafka, Ledger, Mosquitto, MosquittoOptions, Node,
    Postgres, PostgresOptions, Publisher, eventually, free_port,
};
use serde_json::Value;

/// Longest wait for something that normally takes well under a second.
pub const SOON: Duration = Duration::from_secs(30);

fn kafka() -> &'static Kafka {
    static KAFKA: OnceLock<Kafka> = OnceLock::new();
    KAFKA.get_or_init(|| Kafka::start().expect("Kafka starts"))
}

/// The homelab example between private servers.
pub struct World {
    pub mosquitto: Mosquitto,
    pub postgres: Postgres,
    pub node: Node,
    /// Where publishers connect.
    publish_port: u16,
    /// Of everyone who published.
    ledgers: Mutex<Vec<Arc<Mutex<Ledger>>>>,
    prefix: Option<String>,
    /// Instead of the shared one.
    own_kafka: Option<Kafka>,
    _folder: Folder,
}

/// What a test changes in the homelab example.
#[derive(Default)]
pub struct Changes {
    pub kafka: bool,
    /// A Kafka of its own, which may be stopped.
    pub own_kafka: bool,
    pub without_databases: bool,
    /// A broker with room for a flood, which saves nothing while it runs.
    pub flooded: bool,
    /// The node's listener of the broker speaks TLS, with this certificate; publishers have one without. Its files are in
    /// `tls/` beside the configuration.
    pub broker_tls: Option<Certificates>,
    /// Further TOML, written to `conf.d/`.
    pub extra: String,
    /// TOML of `[http]`; where it has `{port}` the listener is all its own.
    pub http: String,
    /// Broker and databases speak TLS alone, with this certificate.
    pub certificates: Option<Certificates>,
    /// Settings of the database server.
    pub database_settings: &'static [(&'static str, &'static str)],
    /// Sets FAILPOINTS for the node.
    pub failpoints: String,
    /// Further environment of the node.
    pub environment: Vec<(String, String)>,
    /// Where a service manager listens.
    pub notify_socket: String,
}

impl World {
    /// Servers up, databases made, node described but not started.
    pub fn prepare(changes: Changes) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let folder = Folder::new(None, "node").unwrap();
        let mut broker =
            MosquittoOptions { tls: changes.certificates.clone(), ..MosquittoOptions::default() };
        if changes.flooded {
            broker.autosave_on_changes = false;
            broker.max_inflight_messages = 4096;
        }
        let plain_port = changes.broker_tls.is_some().then(free_port);
        if let Some(port) = plain_port {
            broker.tls.clone_from(&changes.broker_tls);
            broker.extra = format!("listener {port} 127.0.0.1\n");
        }
        let mosquitto = Mosquitto::start_with(broker).unwrap();
        let publish_port = plain_port.unwrap_or(mosquitto.port());
        let settings = changes.database_settings.iter();
        let settings = settings.map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let postgres = Postgres::start_with(PostgresOptions {
            settings,
            tls: changes.certificates.clone(),
            ..PostgresOptions::default()
        })
        .unwrap();
        for database in ["telemetry", "homelab_settings"] {
            postgres.create_database(database).unwrap();
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let own_kafka = changes.own_kafka.then(|| Kafka::start().unwrap());
        let with_kafka = changes.kafka || changes.own_kafka;
        let prefix = with_kafka.then(|| format!("t{}-{count}-", std::process::id()));
        let http_port = free_port();
        let config = folder.path().join("telemetry.toml");
        let mut homelab = Homelab::load().unwrap();
        homelab.node(&folder.path().join("state"), http_port);
        homelab.broker(mosquitto.port());
        if let Some(certificates) = &changes.broker_tls {
            let files = certificates.write(&folder.path().join("tls")).unwrap();
            let authority = files.authority.display().to_string();
            homelab.set(&["brokers", "home", "tls", "ca_file"], authority);
        }
        homelab.databases(postgres.port(), folder.path()).unwrap();
        // Quicker than a person needs it, so that outages in tests are short.
        homelab.set(&["brokers", "home", "reconnect_max_ms"], 2000);
        for database in ["telemetry", "homelab_settings"] {
            homelab.set(&["databases", database, "retry_max_ms"], 1000);
        }
        if let Some(certificates) = &changes.certificates {
            let files = certificates.write(&folder.path().join("tls")).unwrap();
            let authority = files.authority.display().to_string();
            homelab.set(&["brokers", "home", "tls", "ca_file"], authority.as_str());
            for database in ["telemetry", "homelab_settings"] {
                homelab.set(&["databases", database, "tls_mode"], "verify_full");
                homelab.set(&["databases", database, "tls", "ca_file"], authority.as_str());
            }
        }
        match &prefix {
            None => homelab.without_kafka(),
            Some(prefix) => {
                homelab.cluster(&own_kafka.as_ref().unwrap_or_else(|| kafka()).bootstrap());
                homelab.each("streams", |stream| {
                    let kafka = stream.get_mut("kafka").and_then(|kafka| kafka.as_table_like_mut());
                    if let Some(kafka) = kafka {
                        let topic = kafka.get("topic").and_then(|topic| topic.as_str()).unwrap();
                        let topic = format!("{prefix}{topic}");
                        kafka.insert("topic", topic.into());
                    }
                });
            }
        }
        if changes.without_databases {
            homelab.remove(&["databases"]);
            homelab.each("streams", |stream| {
                stream.remove("tables");
            });
        }
        if changes.http.contains("{port}") {
            homelab.remove(&["http"]);
        }
        homelab.write(&config).unwrap();
        let http = rig::render(&changes.http, &[("port", &http_port)]);
        let extra = format!("{}\n{http}", changes.extra);
        if !extra.trim().is_empty() {
            fs::create_dir(folder.path().join("conf.d")).unwrap();
            fs::write(folder.path().join("conf.d/test.toml"), extra).unwrap();
        }
        let mut node = Node::new(env!("CARGO_BIN_EXE_telemetry"), config, http_port)
            .environment("FAILPOINTS", &changes.failpoints)
            .environment("NOTIFY_SOCKET", &changes.notify_socket);
        for (name, value) in &changes.environment {
            node = node.environment(name, value);
        }
        World {
            mosquitto,
            postgres,
            node,
            publish_port,
            ledgers: Mutex::default(),
            prefix,
            own_kafka,
            _folder: folder,
        }
    }

    /// Before it has started: its state on a disk of its own.
    pub fn put_state_on(&self, disk: &Disk) {
        let config = self.node.config();
        let text = fs::read_to_string(config).unwrap();
        let state = config.with_file_name("state").display().to_string();
        assert!(text.contains(&state), "{text}");
        let elsewhere = disk.mount_point().join("state").display().to_string();
        fs::write(config, text.replace(&state, &elsewhere)).unwrap();
    }

    /// What `/metrics` says of one series; 0 where there is none.
    pub fn metric(&self, series: &str) -> f64 {
        let page = self.node.get("/metrics").unwrap().body;
        let value = page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
        value.unwrap_or_default()
    }

    /// Everything up and ready.
    pub fn start(changes: Changes) -> Self {
        let mut world = World::prepare(changes);
        world.node.start().unwrap();
        world.node.wait_ready(SOON).unwrap();
        world.subscribed();
        world
    }

    /// Waits until every stream is subscribed: what is published to a broker that does not know the node yet is nobody's.
    #[track_caller]
    pub fn subscribed(&self) {
        subscribed(&self.node);
    }

    pub fn publisher(&self) -> Publisher {
        self.publisher_named("publisher")
    }

    /// A second one beside it needs a name of its own.
    pub fn publisher_named(&self, name: &str) -> Publisher {
        let publisher = Publisher::new(self.publish_port, name);
        self.ledgers.lock().unwrap().push(publisher.shared_ledger());
        publisher
    }

    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.prefix.as_deref().unwrap_or_default())
    }

    pub fn kafka_records(&self, topic: &str) -> Vec<rig::Record> {
        let kafka = self.own_kafka.as_ref().unwrap_or_else(|| kafka());
        kafka.read_topic(&self.topic(topic)).unwrap_or_default()
    }

    pub fn bootstrap(&self) -> String {
        self.own_kafka.as_ref().unwrap_or_else(|| kafka()).bootstrap()
    }

    pub fn own_kafka(&mut self) -> &mut Kafka {
        self.own_kafka.as_mut().expect("the world was made with one")
    }

    /// One row as JSON, or none.
    pub fn row(&self, database: &str, sql: &str) -> Option<Value> {
        let rows =
            self.postgres.query(database, &format!("SELECT to_jsonb(r) FROM ({sql}) r")).unwrap();
        let text = rows.into_iter().next()?.into_iter().next()??;
        Some(serde_json::from_str(&text).unwrap())
    }

    pub fn count(&self, database: &str, table: &str) -> u64 {
        self.postgres.count(database, table).unwrap()
    }

    /// The events of one story in the node's log, in their order.
    pub fn told(&self, correlation_id: &str) -> Vec<String> {
        let log = self.node.log_text();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let of_it = lines.filter(|line| line["correlation_id"] == correlation_id);
        of_it.filter_map(|line| Some(line["event"].as_str()?.to_owned())).collect()
    }

    /// One stream from `/streams`; null before it is known.
    pub fn stream(&self, name: &str) -> Value {
        let all = self.node.streams().unwrap_or(Value::Null);
        let streams = all["streams"].as_array().cloned().unwrap_or_default();
        streams.into_iter().find(|line| line["name"] == name).unwrap_or(Value::Null)
    }

    /// The books of one of its sinks.
    pub fn sink(&self, stream: &str, sink: &str) -> Value {
        let sinks = self.stream(stream)["sinks"].as_array().cloned().unwrap_or_default();
        sinks.into_iter().find(|line| line["sink"] == sink).unwrap_or(Value::Null)
    }

    pub fn books(&self, stream: &str, sink: &str, what: &str) -> u64 {
        self.sink(stream, sink)["status"]["books"][what].as_u64().unwrap_or(0)
    }

    /// How many messages of each stream the broker took over.
    fn taken_over(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for ledger in self.ledgers.lock().unwrap().iter() {
            for entry in ledger.lock().unwrap().acked() {
                *counts.entry(entry.stream.clone()).or_default() += 1;
            }
        }
        counts
    }

    /// Waits until what the broker took over is durable here, every sink of every stream has passed it, and the books
    /// balance. What the broker has yet to hand over is pending nowhere: no sink alone can tell that all is done.
    #[track_caller]
    pub fn drained(&self, within: Duration) {
        let owed = self.taken_over();
        let settled = |sink: &Value| sink["pending"] == 0 && sink["difference"] == 0;
        eventually(within, "all is kept, and passed by every sink, with balanced books", || {
            let Ok(all) = self.node.streams() else { return false };
            let streams = all["streams"].as_array().cloned().unwrap_or_default();
            let kept = |(name, count): (&String, &u64)| {
                let stream = streams.iter().find(|stream| stream["name"] == **name);
                stream.is_some_and(|stream| stream["status"]["sequence"].as_u64() >= Some(*count))
            };
            !streams.is_empty()
                && owed.iter().all(kept)
                && streams.iter().all(|stream| {
                    stream["sinks"].as_array().is_some_and(|sinks| sinks.iter().all(settled))
                })
        });
    }
}

/// As [`World::subscribed`], of any node.
#[track_caller]
pub fn subscribed(node: &Node) {
    eventually(SOON, "every stream is subscribed", || {
        let Ok(all) = node.streams() else { return false };
        let streams = all["streams"].as_array().cloned().unwrap_or_default();
        !streams.is_empty() && streams.iter().all(|line| line["status"]["subscribed"] == true)
    });
}

/// A failed test shows what the node said.
impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the node's log ---\n{}", self.node.log_text());
        }
    }
}
