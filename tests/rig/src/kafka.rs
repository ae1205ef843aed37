//! A private Kafka broker: one node that is broker and controller (KRaft).

mod administration;
mod cluster;
mod follower;
mod jars;
mod layout;
mod reader;
mod security;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::background::block_on;
use crate::daemon::Daemon;
use crate::paths::Folder;
use crate::ports::free_port;
use crate::proxy::Proxy;
use layout::{Seat, far_listener, format_storage, properties};

pub use administration::KAFKA_RIGHTS;
pub use cluster::KafkaCluster;
pub use follower::Follower;
pub use reader::Record;
pub use security::KafkaSecurity;

/// After `kill -9` with a large log the broker recovers first.
const READY_WITHIN: Duration = Duration::from_secs(90);
const STOP_WITHIN: Duration = Duration::from_secs(60);
const ASK_WITHIN: Duration = Duration::from_secs(2);
const PORT_TRIES: usize = 3;

/// What the broker is to be like.
#[derive(Debug, Clone)]
pub struct KafkaOptions {
    /// `None` = a temporary folder.
    pub folder: Option<PathBuf>,
    pub heap_mib: u32,
    /// Lines of `server.properties`, which win over the rig's own.
    pub properties: Vec<(String, String)>,
    /// Further listeners, with TLS.
    pub security: Option<KafkaSecurity>,
    /// A further listener whose clients come through [`Kafka::link`], for the broker sends them there.
    pub far: bool,
}

impl Default for KafkaOptions {
    fn default() -> Self {
        Self { folder: None, heap_mib: 384, properties: Vec::new(), security: None, far: false }
    }
}

/// A running (or stopped) broker.
#[derive(Debug)]
pub struct Kafka {
    daemon: Daemon,
    port: u16,
    /// With user and password; with a client certificate.
    secure_ports: [u16; 2],
    link: Option<Proxy>,
    folder: Folder,
}

impl Kafka {
    /// Fetches what a start takes when it is missing; from then on no network is needed.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn fetch() -> Result<()> {
        jars::folder().map(drop)
    }

    /// With the defaults.
    ///
    /// # Errors
    /// As [`Kafka::start_with`].
    pub fn start() -> Result<Self> {
        Self::start_with(KafkaOptions::default())
    }

    /// Fetches the jars when they are missing, formats the storage, starts the broker and waits until it answers.
    ///
    /// # Errors
    /// Names the command and the log's last lines.
    pub fn start_with(options: KafkaOptions) -> Result<Self> {
        first_that_starts(|| {
            let mut broker = Self::prepare(&options)?;
            Ok(broker.restart().map(|()| broker))
        })
    }

    /// Formats the storage and chooses the ports, but starts nothing: a broker that is away.
    ///
    /// # Errors
    /// When the jars cannot be had or the storage not be formatted.
    pub fn prepare(options: &KafkaOptions) -> Result<Self> {
        let [seat] = &Seat::of_cluster(1)[..] else { unreachable!("one was asked for") };
        Self::seated(options, seat)
    }

    fn seated(options: &KafkaOptions, seat: &Seat) -> Result<Self> {
        let class_path = class_path()?;
        let folder = Folder::new(options.folder.clone(), "kafka")?;
        let port = free_port();
        let secure_ports = [free_port(), free_port()];
        let mut properties = properties(port, seat, &folder);
        if let Some(security) = &options.security {
            security.add_to(&mut properties, secure_ports, &folder.join("tls"))?;
        }
        let link = if options.far { Some(far_listener(&mut properties)?) } else { None };
        properties.extend(options.properties.iter().cloned());
        let text: String =
            properties.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        let file = folder.join("server.properties");
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        if !folder.join("data").join("meta.properties").exists() {
            let users = options.security.iter().map(KafkaSecurity::scram_user);
            format_storage(&class_path, &file, seat, users)?;
        }
        let daemon = Daemon::new("kafka", "java", folder.join("kafka.log"))
            .working_folder(folder.path())
            .argument(format!("-Xmx{}m", options.heap_mib))
            .arguments(JAVA)
            .arguments(["-cp", &class_path, "kafka.Kafka"])
            .argument(file);
        Ok(Self { daemon, port, secure_ports, link, folder })
    }

    /// Starts it again, with the same port and data.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.start()?;
        self.wait_ready(1)
    }

    /// Until it answers and knows of so many brokers.
    fn wait_ready(&mut self, brokers: usize) -> Result<()> {
        let bootstrap = self.bootstrap();
        self.daemon.wait_ready(READY_WITHIN, || {
            // A client made while nothing listens waits longer and longer between its attempts.
            if std::net::TcpStream::connect(&bootstrap).is_err() {
                return Ok(false);
            }
            let client: BaseConsumer = config(&bootstrap).create().context("make a client")?;
            Ok(client
                .fetch_metadata(None, ASK_WITHIN)
                .is_ok_and(|data| data.brokers().len() >= brokers))
        })
    }

    /// SIGTERM, and wait.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop(STOP_WITHIN).map(drop)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// SIGSTOP: it keeps its connections and says nothing.
    pub fn freeze(&self) {
        self.daemon.freeze();
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.daemon.thaw();
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    pub fn log_tail(&self, lines: usize) -> String {
        self.daemon.log_tail(lines)
    }

    /// `host:port` for clients.
    pub fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// As [`Kafka::bootstrap`], but through the link, where there is one.
    pub fn far_bootstrap(&self) -> String {
        let port = self.link.as_ref().map_or(self.port, Proxy::port);
        format!("127.0.0.1:{port}")
    }

    /// What the network does to the clients of [`Kafka::far_bootstrap`]. Only with [`KafkaOptions::far`].
    pub fn link(&self) -> Option<&Proxy> {
        self.link.as_ref()
    }

    /// As [`Kafka::bootstrap`]: TLS, user and password. Only with [`KafkaOptions::security`].
    pub fn login_bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.secure_ports[0])
    }

    /// As [`Kafka::bootstrap`]: TLS both ways. Only with [`KafkaOptions::security`].
    pub fn certificate_bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.secure_ports[1])
    }

    /// # Errors
    /// When it exists already or the broker does not answer.
    pub fn create_topic(&self, name: &str, partitions: i32) -> Result<()> {
        let bootstrap = self.bootstrap();
        let topic = name.to_owned();
        block_on(async move {
            let admin: AdminClient<_> = config(&bootstrap).create().context("make a client")?;
            let order = NewTopic::new(&topic, partitions, TopicReplication::Fixed(1));
            let answers = admin.create_topics([&order], &AdminOptions::new()).await?;
            for answer in answers {
                answer.map_err(|(topic, code)| anyhow::anyhow!("create topic {topic}: {code}"))?;
            }
            Ok(())
        })
    }

    /// Every record of a topic up to its end at the moment of asking, by partition and offset.
    ///
    /// # Errors
    /// When the topic does not exist or the broker does not answer in time.
    pub fn read_topic(&self, topic: &str) -> Result<Vec<Record>> {
        reader::read(&self.bootstrap(), topic, usize::MAX)
    }

    /// As [`Kafka::read_topic`], but not more than the first so many that come.
    ///
    /// # Errors
    /// As there.
    pub fn read_first(&self, topic: &str, limit: usize) -> Result<Vec<Record>> {
        reader::read(&self.bootstrap(), topic, limit)
    }

    /// # Errors
    /// When one does not exist or the broker does not answer.
    pub fn delete_topics(&self, names: &[&str]) -> Result<()> {
        let bootstrap = self.bootstrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        block_on(async move {
            let admin: AdminClient<_> = config(&bootstrap).create().context("make a client")?;
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            for answer in admin.delete_topics(&names, &AdminOptions::new()).await? {
                answer.map_err(|(topic, code)| anyhow::anyhow!("delete topic {topic}: {code}"))?;
            }
            Ok(())
        })
    }

    /// Follows topics from their first record on; they must exist.
    ///
    /// # Errors
    /// When one does not exist or the broker does not answer.
    pub fn follow(&self, topics: &[&str]) -> Result<Follower> {
        Follower::new(&self.bootstrap(), topics)
    }

    /// The number of records of a topic, from its offsets alone; 0 when it does not exist.
    ///
    /// # Errors
    /// When the broker does not answer in time.
    pub fn count(&self, topic: &str) -> Result<u64> {
        reader::count(&self.bootstrap(), topic)
    }
}

/// Quick to start rather than quick for ever, except that benchmarks use it too: only what does not cost speed.
const JAVA: [&str; 3] =
    ["-XX:+UseSerialGC", "-Xshare:auto", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"];

/// A port that was free may be taken a moment later; then all is tried anew.
fn first_that_starts<T>(mut start: impl FnMut() -> Result<Result<T>>) -> Result<T> {
    let mut last = None;
    for _ in 0..PORT_TRIES {
        match start()? {
            Ok(started) => return Ok(started),
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("there was at least one try"))
}

/// Kafka's own programs, the broker among them.
fn class_path() -> Result<String> {
    Ok(format!("{}/*", jars::folder()?.display()))
}

pub(crate) fn config(bootstrap: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    // The library's own lines about lost connections would only spoil the output of a test.
    config.set("bootstrap.servers", bootstrap).set("log_level", "2");
    config
}
