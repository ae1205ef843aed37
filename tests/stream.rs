//! A stream's part with the real buffer against a real broker.

#[path = "stream/odd_brokers.rs"]
mod odd_brokers;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rig::{Certificates, Link, Mosquitto, MosquittoOptions, Mqtt, MqttOptions, Proxy, Publisher};
use sha2::{Digest as _, Sha256};
use telemetry::buffer::Buffer;
use telemetry::config::{self, DedupeKey, DedupeSettings, MqttVersion, Settings, TlsSettings};
use telemetry::domain::{Delivered, Secret, Sequence, SinkName, StreamName, Verdict};
use telemetry::observe::{Board, DisconnectReason, Redelivery};
use telemetry::part::{Control, Part as _, PartResult, Phase, Progress};
use telemetry::stream::{StreamReader, probe};
use tokio::sync::watch;
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::timeout;

const LONG: Duration = Duration::from_secs(20);

/// The configuration of a node with one stream, `energy`.
fn settings(port: u16) -> Settings {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("telemetry.toml");
    let text = format!(
        r#"
        [node]
        name = "node"
        state_dir = "state"
        [brokers.home]
        host = "127.0.0.1"
        port = {port}
        [clusters.main]
        bootstrap_servers = ["127.0.0.1:1"]
        [streams.energy]
        broker = "home"
        topic_filter = "a/#"
        [streams.energy.fields]
        device = {{ path = "id", type = "text", device_id = true, tag = true }}
        [streams.energy.kafka]
        cluster = "main"
        topic = "energy"
        "#
    );
    std::fs::write(&file, text).unwrap();
    config::load(&file, &|_| None).unwrap().settings
}

fn energy() -> StreamName {
    StreamName::parse("energy").unwrap()
}

/// A stream's part, its buffer and its board.
struct Life {
    buffer: Buffer,
    board: Arc<Board>,
    phase: watch::Sender<Phase>,
    paused: watch::Sender<bool>,
    running: JoinHandle<PartResult>,
}

impl Life {
    fn begin(settings: &Settings, state: &Path) -> Self {
        let board = Board::new(settings);
        let stream = settings.streams[&energy()].clone();
        let streams = [(stream.name.clone(), stream.sinks())];
        let buffer = Buffer::open(state, &settings.buffer, &streams, board.clone()).unwrap();
        let broker = settings.brokers["home"].clone();
        let (phase, phases) = watch::channel(Phase::Running);
        let (paused, pauses) = watch::channel(false);
        let control = Control::new(phases, pauses, Arc::new(Progress::default()));
        let reader = StreamReader::new(stream, broker, buffer.clone(), board.clone());
        let running = tokio::task::spawn_local(reader.run(control));
        Life { buffer, board, phase, paused, running }
    }

    async fn until(&self, what: &str, holds: impl Fn(&Life) -> bool) {
        let waiting = async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(LONG, waiting).await.unwrap_or_else(|_| {
            panic!("{what}: not so; {:?}", self.board.stream(&energy()).status())
        });
    }

    async fn subscribed(&self) {
        self.until("subscribed", |life| life.board.stream(&energy()).status().subscribed).await;
    }

    async fn kept(&self, count: u64) {
        self.until("kept", |life| life.buffer.durable(&energy()).0.0 >= count).await;
    }

    fn trouble(&self) -> String {
        self.board.stream(&energy()).status().trouble.unwrap_or_default()
    }

    fn redelivered(&self, kind: Redelivery) -> u64 {
        self.board.stream(&energy()).meters.redelivered(kind).get()
    }

    /// As `kill -9` leaves it: no farewell, no note.
    async fn kill(self) {
        self.running.abort();
        let _ = self.running.await;
        self.buffer.close(LONG).await.unwrap();
    }

    async fn stop(self) {
        self.phase.send(Phase::Stopping).unwrap();
        timeout(LONG, self.running).await.unwrap().unwrap().unwrap();
        self.buffer.close(LONG).await.unwrap();
    }
}

fn publisher(port: u16) -> Publisher {
    Publisher::new(port, "publisher")
}

/// Without a save after every change, which costs seconds with a queue.
fn quick_broker() -> Mosquitto {
    let options = MosquittoOptions { autosave_on_changes: false, ..MosquittoOptions::default() };
    Mosquitto::start_with(options).unwrap()
}

fn all_payloads(buffer: &Buffer) -> Vec<Vec<u8>> {
    let blocks = buffer.recent(&energy(), 1_000_000).unwrap();
    let records = blocks.iter().flat_map(|block| block.records_after(Sequence::ZERO));
    records.map(|record| record.payload.to_vec()).collect()
}

/// The log lets go of what every sink has: what the broker may send again must be known without it.
#[tokio::test]
async fn a_copy_is_recognised_after_its_record_was_dropped() {
    const COUNT: u64 = 3_000;
    let broker = Mosquitto::start_with(MosquittoOptions {
        autosave_on_changes: false,
        max_inflight_messages: 4_096,
        ..MosquittoOptions::default()
    })
    .unwrap();
    let proxy = Proxy::start(broker.port()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(proxy.port());
    settings.buffer.generation_bytes = 1 << 20;
    LocalSet::new()
        .run_until(async {
            let publisher = publisher(broker.port());
            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            // Not one acknowledgement arrives.
            proxy.set(Link::SilentToServer);
            for id in 0..COUNT {
                // Nothing is won by compressing it, so that the log goes through some generations.
                let digest = |part| Sha256::digest(format!("{id}/{part}"));
                let payload: Vec<u8> = (0..25).flat_map(digest).collect();
                publisher.publish("energy", "a/b", payload);
            }
            life.kept(COUNT).await;
            let kafka = SinkName::parse("kafka").unwrap();
            life.buffer.delivered(&energy(), &kafka, Delivered(Sequence(COUNT)));
            life.until("dropped", |life| life.buffer.oldest(&energy()) > Sequence(1)).await;
            life.kill().await;

            proxy.reset();
            proxy.set(Link::Fine);
            publisher.publish("energy", "a/b", "last");
            let life = Life::begin(&settings, state.path());
            let last_is_kept = |life: &Life| all_payloads(&life.buffer).last().unwrap() == b"last";
            life.until("the last one kept", last_is_kept).await;
            // On a busy machine a connection may be lost once more.
            assert!(life.redelivered(Redelivery::Dup) >= COUNT, "each was sent again");
            assert_eq!(life.buffer.durable(&energy()).0, Sequence(COUNT + 1));
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn each_publication_is_kept_once_over_kills_stops_and_a_pause() {
    for version in [MqttVersion::V5, MqttVersion::V311] {
        kept_once(version).await;
    }
}

async fn kept_once(version: MqttVersion) {
    let broker = quick_broker();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(broker.port());
    settings.brokers.get_mut("home").unwrap().version = version;
    LocalSet::new()
        .run_until(async {
            let publisher = publisher(broker.port());
            let mut sent = 0;
            let mut publish = |count: u64| {
                for _ in 0..count {
                    publisher.publish("energy", "a/b", format!("{{\"id\":{sent}}}"));
                    sent += 1;
                }
            };
            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            publish(2000);
            life.kept(500).await;
            life.kill().await;

            let life = Life::begin(&settings, state.path());
            life.kept(2000).await;
            life.paused.send(true).unwrap();
            life.until("paused", |life| !life.board.stream(&energy()).status().connected).await;
            publish(1000);
            life.paused.send(false).unwrap();
            life.kept(3000).await;
            life.stop().await;

            publish(1000);
            let life = Life::begin(&settings, state.path());
            life.kept(4000).await;
            life.until("acknowledged", |life| {
                life.board.stream(&energy()).status().unacknowledged == 0
            })
            .await;
            let expected: Vec<_> =
                (0..4000).map(|id| format!("{{\"id\":{id}}}").into_bytes()).collect();
            assert_eq!(all_payloads(&life.buffer), expected);
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_retained_copy_after_a_new_subscription_is_not_kept_again() {
    let broker = Mosquitto::start().unwrap();
    let state = tempfile::tempdir().unwrap();
    let settings = settings(broker.port());
    LocalSet::new()
        .run_until(async {
            let retained = |payload: &str| {
                let port = broker.port().to_string();
                let status = std::process::Command::new("mosquitto_pub")
                    .args(["-h", "127.0.0.1", "-p", &port, "-q", "1", "-r", "-t", "a/b", "-m"])
                    .arg(payload)
                    .status();
                assert!(status.unwrap().success());
            };
            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            retained("one");
            life.kept(1).await;
            life.stop().await;

            let mut fresh = settings.clone();
            fresh.streams[&energy()].client_id = "another-session".to_owned();
            let life = Life::begin(&fresh, state.path());
            life.until("recognised", |life| life.redelivered(Redelivery::Retained) == 1).await;
            retained("two");
            life.kept(2).await;
            assert_eq!(all_payloads(&life.buffer), [b"one".to_vec(), b"two".to_vec()]);
            life.stop().await;
        })
        .await;
}

/// As after a crash of the broker: the same message, under a packet id of its own and without the DUP flag.
#[tokio::test]
async fn a_message_that_comes_again_as_another_is_known_by_the_id_it_declares() {
    let broker = quick_broker();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(broker.port());
    settings.streams[&energy()].dedupe = Some(DedupeSettings {
        key: DedupeKey::MessageId(vec!["id".to_owned(), "at".to_owned()]),
        window: Duration::from_secs(3600),
        window_messages: 1000,
    });
    LocalSet::new()
        .run_until(async {
            let publisher = publisher(broker.port());
            let publish = |text: &str| {
                publisher.publish("energy", "a/b", text);
            };
            let first = r#"{"id": "x", "at": 1, "attempt": 1}"#;
            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            for text in [first, r#"{"id": "x", "at": 1, "attempt": 2}"#, r#"{"id": "x", "at": 2}"#]
            {
                publish(text);
            }
            life.kept(2).await;
            life.until("recognised", |life| life.redelivered(Redelivery::MessageId) == 1).await;
            life.kill().await;

            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            publish(first);
            life.until("still recognised", |life| life.redelivered(Redelivery::MessageId) == 1)
                .await;
            publish(r#"{"id": "x", "at": 3}"#);
            life.kept(3).await;
            let expected = [first, r#"{"id": "x", "at": 2}"#, r#"{"id": "x", "at": 3}"#];
            assert_eq!(all_payloads(&life.buffer), expected.map(|text| text.as_bytes().to_vec()));
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn of_two_nodes_with_one_client_id_one_says_so_and_steps_back() {
    let broker = Mosquitto::start().unwrap();
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut settings = settings(broker.port());
    settings.brokers.get_mut("home").unwrap().reconnect.min = Duration::from_millis(20);
    LocalSet::new()
        .run_until(async {
            let lives = [one.path(), other.path()].map(|state| Life::begin(&settings, state));
            let status = |index: usize| lives[index].board.stream(&energy()).status();
            let yielded = |index: usize| {
                let meters = &lives[index].board.stream(&energy()).meters;
                meters.disconnected(DisconnectReason::Takeover).get() == 1
            };
            lives[0].until("one yields", |_| yielded(0) || yielded(1)).await;
            let loser = usize::from(yielded(1));
            let trouble = status(loser).trouble.unwrap();
            assert!(trouble.contains("another client connects as"), "{trouble}");
            lives[0].until("the other receives", |_| status(1 - loser).subscribed).await;
            for life in lives {
                life.stop().await;
            }
        })
        .await;
}

#[tokio::test]
async fn a_broker_that_comes_back_is_read_again_and_a_refusal_is_told() {
    let mut broker = Mosquitto::start_with(MosquittoOptions {
        acl: Some("user node\ntopic read a/#\nuser dev\ntopic readwrite #\n".to_owned()),
        users: [("node", "good"), ("dev", "dev")].map(|(u, p)| (u.into(), p.into())).into(),
        ..MosquittoOptions::default()
    })
    .unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(broker.port());
    let home = settings.brokers.get_mut("home").unwrap();
    home.reconnect.min = Duration::from_millis(20);
    home.username = Some("node".to_owned());
    home.password = Some(Secret::new("bad".to_owned()).into());
    let trouble = |life: &Life| life.board.stream(&energy()).status().trouble.unwrap_or_default();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            life.until("refused", |life| !trouble(life).is_empty()).await;
            // Mosquitto does not tell a wrong password from a missing right.
            assert!(trouble(&life).contains("password"), "{}", trouble(&life));
            life.stop().await;

            let home = settings.brokers.get_mut("home").unwrap();
            home.password = Some(Secret::new("good".to_owned()).into());
            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            broker.stop().unwrap();
            life.until("lost", |life| trouble(life).contains("refused the connection")).await;
            broker.restart().unwrap();
            life.subscribed().await;
            assert_eq!(life.board.dependency("mqtt:home").status().up, Some(true));
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn each_failure_of_tls_is_told_apart() {
    let files = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let authorities = [Certificates::generate().unwrap(), Certificates::generate().unwrap()];
    let [ours, theirs] = [0, 1].map(|i| authorities[i].write(files[i].path()).unwrap().authority);
    let secure = Mosquitto::start_with(MosquittoOptions {
        tls: Some(authorities[0].clone()),
        ..MosquittoOptions::default()
    })
    .unwrap();
    let plain = Mosquitto::start().unwrap();
    let old = Certificates::generate_expired().unwrap();
    let old_files = tempfile::tempdir().unwrap();
    let old_authority = old.write(old_files.path()).unwrap().authority;
    let expired =
        Mosquitto::start_with(MosquittoOptions { tls: Some(old), ..MosquittoOptions::default() })
            .unwrap();
    // Made for a client, shown by the server.
    let misused = Certificates {
        server_certificate: authorities[0].client_certificate.clone(),
        server_key: authorities[0].client_key.clone(),
        ..authorities[0].clone()
    };
    let misused = Mosquitto::start_with(MosquittoOptions {
        tls: Some(misused),
        ..MosquittoOptions::default()
    })
    .unwrap();
    let tls = |authority: &Path, name: Option<&str>| TlsSettings {
        ca_file: Some(authority.to_owned()),
        server_name: name.map(str::to_owned),
        ..TlsSettings::default()
    };
    for (port, authority, name, expected) in [
        (secure.port(), &theirs, None, "an authority unknown here; set tls.ca_file"),
        (secure.port(), &ours, Some("elsewhere.example"), "not for \"elsewhere.example\""),
        (plain.port(), &ours, None, "closed the connection during the TLS handshake"),
        (misused.port(), &ours, None, "give the broker one that is made for a TLS server"),
        (expired.port(), &old_authority, None, "is not valid now (certificate expired"),
    ] {
        let mut settings = settings(port);
        settings.brokers.get_mut("home").unwrap().tls = Some(tls(authority, name));
        assert_trouble(&settings, expected).await;
    }
    // A wrong authority file that is corrected mends itself: the files are read at each dial.
    let corrected = files[1].path().join("corrected.crt");
    std::fs::copy(&theirs, &corrected).unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut settings = settings(secure.port());
    settings.brokers.get_mut("home").unwrap().tls = Some(tls(&corrected, None));
    settings.brokers.get_mut("home").unwrap().reconnect.min = Duration::from_millis(20);
    let publish = || {
        let port = secure.port().to_string();
        let status = std::process::Command::new("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &port, "-q", "1", "-t", "a/b", "-m", "one"])
            .arg("--cafile")
            .arg(&ours)
            .status();
        assert!(status.unwrap().success());
    };
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            life.until("troubled", |life| !life.trouble().is_empty()).await;
            std::fs::copy(&ours, &corrected).unwrap();
            life.subscribed().await;
            publish();
            life.kept(1).await;
            life.stop().await;
        })
        .await;
}

#[tokio::test]
async fn an_unknown_host_and_a_closed_port_are_told_apart() {
    let mut settings = settings(rig::free_port());
    assert_trouble(&settings, "refused the connection").await;
    settings.brokers.get_mut("home").unwrap().host = "no-such-host.invalid".to_owned();
    assert_trouble(&settings, "cannot resolve no-such-host.invalid").await;
}

#[tokio::test]
async fn a_missing_client_certificate_is_told_as_that_and_a_given_one_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = Certificates::generate().unwrap();
    let files = certificates.write(folder.path()).unwrap();
    let broker = Mosquitto::start_with(MosquittoOptions {
        tls: Some(certificates),
        client_certificates: true,
        ..MosquittoOptions::default()
    })
    .unwrap();
    let mut settings = settings(broker.port());
    let tls = |client_certificate| TlsSettings {
        ca_file: Some(files.authority.clone()),
        client_certificate,
        ..TlsSettings::default()
    };
    settings.brokers.get_mut("home").unwrap().tls = Some(tls(None));
    assert_trouble(&settings, "check the client certificate").await;
    let client = (files.client_certificate.clone(), files.client_key.clone());
    settings.brokers.get_mut("home").unwrap().tls = Some(tls(Some(client)));
    let state = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(&settings, state.path());
            life.subscribed().await;
            life.stop().await;
        })
        .await;
}

/// The stream does not connect, and says why.
async fn assert_trouble(settings: &Settings, expected: &str) {
    let state = tempfile::tempdir().unwrap();
    LocalSet::new()
        .run_until(async {
            let life = Life::begin(settings, state.path());
            life.until("troubled", |life| !life.trouble().is_empty()).await;
            assert!(life.trouble().contains(expected), "{}", life.trouble());
            life.stop().await;
        })
        .await;
}

/// With a session that lasts beside it, so that what is not found was really looked for.
async fn session_that_stays(port: u16) {
    let mut options = MqttOptions::new(port, "someone-who-stays");
    options.clean_start = false;
    Mqtt::connect(&options).await.unwrap().subscribe("b").await.unwrap();
}

#[tokio::test]
async fn a_look_at_a_broker_tells_what_it_grants_and_leaves_no_session_behind() {
    for version in [MqttVersion::V5, MqttVersion::V311] {
        let mut broker = Mosquitto::start_with(MosquittoOptions {
            max_inflight_messages: 10,
            extra: "sys_interval 1".to_owned(),
            ..MosquittoOptions::default()
        })
        .unwrap();
        session_that_stays(broker.port()).await;
        let mut settings = settings(broker.port());
        settings.brokers["home"].version = version;
        let stream = settings.streams[&energy()].clone();
        let found = probe("home", &settings.brokers["home"], &[&stream]).await;
        let verdict = |check: &str| {
            let line = found.iter().find(|line| line.check == check);
            line.map(|line| (line.verdict, line.figure.as_str()))
        };
        assert_eq!(verdict("reachable").unwrap().0, Verdict::Ok, "{found:?}");
        assert_eq!(verdict("granted QoS"), Some((Verdict::Ok, "energy (a/#): 1")), "{found:?}");
        assert_eq!(verdict("dropped by the broker").unwrap().0, Verdict::Ok, "{found:?}");
        if version == MqttVersion::V5 {
            assert_eq!(verdict("session expiry"), Some((Verdict::Ok, "168 h")), "{found:?}");
            assert_eq!(verdict("receive maximum"), Some((Verdict::Warn, "10")), "{found:?}");
        } else {
            assert_eq!(verdict("session expiry").unwrap().0, Verdict::Warn, "{found:?}");
        }
        broker.stop().unwrap();
        let saved = std::fs::read(broker.folder().join("data/mosquitto.db")).unwrap();
        let saved = String::from_utf8_lossy(&saved).into_owned();
        assert!(saved.contains("someone-who-stays"), "sessions are saved there");
        assert!(!saved.contains("telemetry-doctor-"), "{version:?}: its session was left behind");
    }
}

#[tokio::test]
async fn a_look_at_a_broker_that_grants_too_little_fails() {
    let broker = Mosquitto::start_with(MosquittoOptions {
        extra: "max_qos 0".to_owned(),
        ..MosquittoOptions::default()
    })
    .unwrap();
    let settings = settings(broker.port());
    let stream = settings.streams[&energy()].clone();
    let found = probe("home", &settings.brokers["home"], &[&stream]).await;
    let line = found.iter().find(|line| line.check == "granted QoS").unwrap();
    assert_eq!(
        (line.verdict, line.figure.as_str()),
        (Verdict::Fail, "energy (a/#): 0 instead of 1")
    );
}
