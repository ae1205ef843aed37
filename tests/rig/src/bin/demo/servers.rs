//! The demo's private servers, all below one folder that is made anew each time.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rig::{
    Homelab, Kafka, KafkaOptions, Mosquitto, MosquittoOptions, Node, Postgres, PostgresOptions,
    Streams, free_port, until,
};

/// Migrations included.
const SUBSCRIBED_WITHIN: Duration = Duration::from_secs(60);

/// Everything that runs. Fields are dropped, and so ended, from the first to the last.
pub struct Servers {
    pub node: Node,
    pub kafka: Option<Kafka>,
    pub postgres: Postgres,
    pub mosquitto: Mosquitto,
    pub homelab: Homelab,
    pub config: PathBuf,
    pub http_port: u16,
}

impl Servers {
    /// Starts all of them, telling each one.
    ///
    /// # Errors
    /// Names what failed, its command and the last lines of its log.
    pub fn start(folder: &Path, binary: &Path, with_kafka: bool) -> Result<Self> {
        let kept = folder.to_owned();
        if folder.exists() {
            std::fs::remove_dir_all(folder)
                .with_context(|| format!("remove {}", folder.display()))?;
        }
        // The slow ones start beside each other.
        let at = |name: &str| Some(kept.join(name));
        let (kafka, postgres) = (at("kafka"), at("postgres"));
        let kafka = with_kafka.then(|| {
            std::thread::spawn(move || {
                timed("Kafka", || {
                    Kafka::start_with(KafkaOptions { folder: kafka, ..KafkaOptions::default() })
                })
            })
        });
        let postgres = std::thread::spawn(move || {
            timed("PostgreSQL", || {
                let options = PostgresOptions { folder: postgres, ..PostgresOptions::default() };
                Postgres::start_with(options)
            })
        });
        let mosquitto = timed("Mosquitto", || {
            let folder = at("mosquitto");
            Mosquitto::start_with(MosquittoOptions { folder, ..MosquittoOptions::default() })
        });
        let postgres = joined(postgres);
        let kafka = kafka.map(joined).transpose();
        let (mosquitto, postgres, kafka) = (mosquitto?, postgres?, kafka?);

        let http_port = free_port();
        let mut homelab = Homelab::load()?;
        homelab.node(&folder.join("state"), http_port);
        homelab.broker(mosquitto.port());
        homelab.databases(postgres.port(), folder)?;
        match &kafka {
            Some(kafka) => homelab.cluster(&kafka.bootstrap()),
            None => homelab.without_kafka(),
        }
        for dbname in homelab.dbnames() {
            postgres.create_database(&dbname)?;
        }
        let config = folder.join("telemetry.toml");
        homelab.write(&config)?;
        let node = timed("telemetry run", || start_node(binary, &config, http_port, &homelab))?;
        Ok(Self { node, kafka, postgres, mosquitto, homelab, config, http_port })
    }
}

fn start_node(binary: &Path, config: &Path, http_port: u16, homelab: &Homelab) -> Result<Node> {
    let names = homelab.names("streams");
    let mut node = Node::new(binary, config, http_port);
    node.start()?;
    // A message published before the first subscription has nobody to be kept for.
    until(SUBSCRIBED_WITHIN, "every stream subscribed", || {
        Ok(Streams::of(&node)?.each(&names, |stream| stream.status.subscribed).then_some(()))
    })
    .map_err(|error| anyhow!("{error:#}\n{}", node.daemon().story()))?;
    Ok(node)
}

fn timed<T>(name: &str, start: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let outcome = start().with_context(|| format!("{name} did not start"));
    if outcome.is_ok() {
        println!("  {name:<14} {:>5.1} s", began.elapsed().as_secs_f64());
    }
    outcome
}

fn joined<T>(thread: std::thread::JoinHandle<Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("the thread that starts it panicked")))
}
