//! Marked secrets wherever one can be given, and a search through everything the node ever shows.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rig::{
    CertificateFiles, Certificates, Folder, Homelab, Kafka, KafkaOptions, KafkaSecurity, Mosquitto,
    MosquittoOptions, MqttOptions, Node, PASSWORD, Postgres, Publisher, PublisherOptions,
    eventually, free_port, request_as,
};
use serde_json::Value;

use crate::world::SOON;

const MQTT: &str = "planted-mqtt-4c1d9e";
const KAFKA: &str = "planted-kafka-83ab02";
const WRONG_MQTT: &str = "mistaken-mqtt-55d0c7";
const WRONG_KAFKA: &str = "mistaken-kafka-9e17f4";
const WRONG_DATABASE: &str = "mistaken-database-0b6a33";
const VARIABLE: &str = "TELEMETRY_PLANTED_PASSWORD";

/// Every way in has a lock.
struct Site {
    mosquitto: Mosquitto,
    postgres: Postgres,
    kafka: Kafka,
    /// Each secret comes another way: file, credential, environment. Otherwise all come from files.
    mixed: bool,
    files: CertificateFiles,
    config: PathBuf,
    http_port: u16,
    folder: Folder,
}

fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

impl Site {
    fn start(mixed: bool) -> Self {
        let folder = Folder::new(None, "secrets").unwrap();
        let certificates = Certificates::generate().unwrap();
        let files = certificates.write(&folder.path().join("tls")).unwrap();
        let mosquitto = Mosquitto::start_with(MosquittoOptions {
            tls: mixed.then(|| certificates.clone()),
            client_certificates: mixed,
            users: vec![("node".into(), MQTT.into())],
            ..MosquittoOptions::default()
        })
        .unwrap();
        let postgres = Postgres::start().unwrap();
        postgres.create_database("telemetry").unwrap();
        let security = KafkaSecurity { certificates, user: "node".into(), password: KAFKA.into() };
        let kafka =
            Kafka::start_with(KafkaOptions { security: Some(security), ..KafkaOptions::default() })
                .unwrap();
        let config = folder.path().join("telemetry.toml");
        let http_port = free_port();
        let site = Site { mosquitto, postgres, kafka, mixed, files, config, http_port, folder };
        site.configure();
        site.plant(MQTT, KAFKA);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn configure(&self) {
        let text = |path: &Path| path.display().to_string();
        let mut homelab = Homelab::load().unwrap();
        homelab.keep_stream("energy").unwrap();
        homelab.node(&self.path("state"), self.http_port);
        homelab.set(&["http", "loopback_needs_token"], true);
        homelab.set(&["http", "requests_per_minute_max"], 1_000_000);
        homelab.set(&["log", "filter"], "debug");
        homelab.broker(self.mosquitto.port());
        let broker = |homelab: &mut Homelab, way: &[&str], value: String| {
            homelab.set(&[&["brokers", "home"], way].concat(), value);
        };
        broker(&mut homelab, &["username"], "node".into());
        broker(&mut homelab, &["password_file"], text(&self.path("mqtt-password")));
        if self.mixed {
            broker(&mut homelab, &["tls", "ca_file"], text(&self.files.authority));
            let certificate = text(&self.files.client_certificate);
            broker(&mut homelab, &["tls", "certificate_file"], certificate);
            broker(&mut homelab, &["tls", "key_file"], text(&self.files.client_key));
        }
        homelab.set(&["brokers", "home", "reconnect_max_ms"], 1000);
        homelab.databases(self.postgres.port(), self.folder.path()).unwrap();
        if self.mixed {
            homelab.remove(&["databases", "telemetry", "password_file"]);
            homelab.set(&["databases", "telemetry", "password_env"], VARIABLE);
        }
        homelab.set(&["databases", "telemetry", "retry_max_ms"], 1000);
        homelab.cluster(&self.kafka.login_bootstrap());
        homelab.set(&["clusters", "main", "tls", "ca_file"], text(&self.files.authority));
        homelab.set(&["clusters", "main", "sasl", "mechanism"], "SCRAM-SHA-512");
        homelab.set(&["clusters", "main", "sasl", "username"], "node");
        homelab.set(&["clusters", "main", "sasl", "password_credential"], "kafka");
        homelab.set(&["clusters", "main", "retry_max_ms"], 1000);
        homelab.write(&self.config).unwrap();
    }

    fn plant(&self, mqtt: &str, kafka: &str) {
        private(&self.path("mqtt-password"), mqtt);
        fs::create_dir_all(self.path("credentials")).unwrap();
        private(&self.path("credentials/kafka"), kafka);
    }

    fn node(&self, database: &str) -> Node {
        Node::new(env!("CARGO_BIN_EXE_telemetry"), &self.config, self.http_port)
            .environment(VARIABLE, database)
            .environment("CREDENTIALS_DIRECTORY", &self.path("credentials").display().to_string())
    }

    /// A command as its user would run it, with the same secrets at hand; both its streams.
    fn command(&self, database: &str, arguments: &[&str]) -> String {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_telemetry"))
            .args(arguments)
            .arg("--config")
            .arg(&self.config)
            .env(VARIABLE, database)
            .env("CREDENTIALS_DIRECTORY", self.path("credentials"))
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        format!("{}{}", text(&output.stdout), text(&output.stderr))
    }

    fn shown(&self, node: &mut Node, database: &str, token: &str) -> Vec<(String, String)> {
        let mut shown = Vec::new();
        for path in ["/health", "/health/ready", "/streams", "/metrics", "/parts", "/nothing"] {
            for token in [None, Some(token)] {
                let answer = request_as(self.http_port, token, "GET", path, "").unwrap();
                let refused = [401, 403, 429].contains(&answer.status);
                assert!(token.is_none() || !refused, "{path}: {}", answer.status);
                shown.push((path.to_owned(), format!("{}{}", answer.head, answer.body)));
            }
        }
        let plan = if database == PASSWORD { "up to date" } else { "authentication failed" };
        // With a word of what each of them is asked for: what only fails shows no secret either.
        for (arguments, word) in [
            (&["check"][..], "is fine"),
            (&["check", "--effective"], "brokers.home.host"),
            (&["check", "--effective", "--json"], "\"brokers.home.host\""),
            (&["status", "--json"], "\"dependencies\""),
            (&["parts", "list"], "writer:energy:energy_consumption"),
            (&["dlq", "list"], "no dead letters"),
            (&["token", "list", "--json"], "\"operate\""),
            (&["certs", "show", "--json"], "\"days_left\""),
            (&["doctor", "--json"], "\"findings\""),
            (&["migrate", "plan"], plan),
            // Refused: a second node on the same directory.
            (&["run"], "held by another process"),
        ] {
            let said = self.command(database, arguments);
            assert!(said.contains(word), "{word} in {arguments:?}:\n{said}");
            shown.push((arguments.join(" "), said));
        }
        let process = node.daemon().pid().unwrap();
        let arguments = fs::read(format!("/proc/{process}/cmdline")).unwrap();
        shown.push(("process list".to_owned(), String::from_utf8_lossy(&arguments).into_owned()));
        shown.push(("log".to_owned(), node.log_text()));
        shown
    }
}

/// The middle of a PEM file: long enough to be told from chance, and on one line of it.
fn key_material(path: &Path) -> String {
    fs::read_to_string(path).unwrap().lines().nth(1).unwrap().to_owned()
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files_below(&entry.path(), found);
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
}

fn all_up(health: &Value, wanted: bool) -> bool {
    ["mqtt:home", "kafka:main", "postgresql:telemetry"]
        .iter()
        .all(|name| health["dependencies"][name]["up"] == wanted)
}

#[test]
fn no_secret_is_in_anything_the_node_shows() {
    let site = Site::start(true);
    let mut node = site.node(PASSWORD);
    node.start().unwrap();
    let made: Value = serde_json::from_str(&site.command(
        PASSWORD,
        &["token", "create", "--scope", "operate", "--expires", "1h", "--json"],
    ))
    .unwrap();
    let token = made["token"].as_str().unwrap();
    let health = |token: &str| {
        let answer = request_as(site.http_port, Some(token), "GET", "/health", "");
        answer.ok().and_then(|answer| answer.json().ok()).unwrap_or(Value::Null)
    };
    let ups = |wanted: bool| all_up(&health(token), wanted);
    eventually(SOON * 2, "every way in is open with the right secrets", || ups(true));
    let mut shown = site.shown(&mut node, PASSWORD, token);
    node.stop(SOON).unwrap();

    site.plant(WRONG_MQTT, WRONG_KAFKA);
    let mut mistaken = site.node(WRONG_DATABASE);
    mistaken.start().unwrap();
    eventually(SOON * 2, "every way in is shut to the wrong ones", || ups(false));
    shown.extend(site.shown(&mut mistaken, WRONG_DATABASE, token));
    mistaken.stop(SOON).unwrap();

    let [client_key, server_key] =
        [&site.files.client_key, &site.files.server_key].map(|file| key_material(file));
    let secrets = [
        MQTT,
        KAFKA,
        PASSWORD,
        WRONG_MQTT,
        WRONG_KAFKA,
        WRONG_DATABASE,
        token,
        &client_key,
        &server_key,
    ];
    let log: usize = shown.iter().filter(|(what, _)| what == "log").map(|(_, t)| t.len()).sum();
    assert!(log > 1000, "the log was really read");
    let mut kept = Vec::new();
    files_below(&site.path("state"), &mut kept);
    for file in kept {
        let bytes = fs::read(&file).unwrap_or_default();
        shown.push((file.display().to_string(), String::from_utf8_lossy(&bytes).into_owned()));
    }
    for (what, text) in &shown {
        for secret in secrets {
            assert!(!text.contains(secret), "{secret} is in {what}:\n{text}");
        }
    }
}

#[test]
fn a_corrected_secret_counts_without_a_restart_and_the_backlog_flows() {
    const MESSAGES: u64 = 50;
    let site = Site::start(false);
    site.plant(WRONG_MQTT, WRONG_KAFKA);
    private(&site.path("database-password"), WRONG_DATABASE);
    let mut node = site.node("");
    node.start().unwrap();
    let status = || {
        let shown = site.command("", &["status", "--json"]);
        serde_json::from_str(&shown).unwrap_or(Value::Null)
    };
    eventually(SOON * 2, "every way in is shut", || all_up(&status(), false));

    site.plant(MQTT, WRONG_KAFKA);
    eventually(SOON, "the broker lets it in", || {
        status()["streams"][0]["status"]["subscribed"] == true
    });
    let mut mqtt = MqttOptions::new(site.mosquitto.port(), "publisher");
    mqtt.login = Some(("node".to_owned(), MQTT.to_owned()));
    let publisher = Publisher::with(PublisherOptions { mqtt, window: 100 });
    for count in 0..MESSAGES {
        let reading = serde_json::json!({"saveeyeDeviceSerialNumber": "SE-1",
            "activeActualConsumption": {"total": 500}, "activeTotalConsumption": {"total": count}});
        publisher.publish("energy", "saveeye/telemetry", reading.to_string());
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all is kept", || {
        status()["streams"][0]["status"]["sequence"].as_u64() == Some(MESSAGES)
    });

    site.plant(MQTT, KAFKA);
    private(&site.path("database-password"), PASSWORD);
    eventually(SOON * 2, "the backlog is in the table and in the topic", || {
        let rows = site.postgres.count("telemetry", "energy_consumption").unwrap_or(0);
        let records = site.kafka.count("homelab-energy-realtime").unwrap_or(0);
        (rows, records) == (MESSAGES, MESSAGES)
    });
    let parts = status()["parts"].clone();
    let restarts = parts.as_object().unwrap().values().map(|part| part["restarts"].as_u64());
    assert!(restarts.into_iter().all(|count| count == Some(0)), "{parts:#}");
}
