//! Simulated devices against a real broker, and against the mapping they are made for.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use rig::{Certificates, Mosquitto, MosquittoOptions};
use telemetry::config::{self, BackoffSettings, BrokerSettings, MqttVersion, TlsSettings};
use telemetry::domain::{Arrival, DeliveryFlags, Record, Sequence};
use telemetry::mapping::{Outcome, RecordMapper, RowMapper};
use telemetry::simulate::{Fault, FaultRates, Feed, Generator, Kind, Order, SimulateError, run};
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(30);

fn broker(port: u16, version: MqttVersion) -> BrokerSettings {
    BrokerSettings {
        host: "127.0.0.1".into(),
        port,
        version,
        tls: None,
        username: None,
        password: None,
        keepalive: Duration::from_secs(30),
        session_expiry: Duration::ZERO,
        connect_timeout: Duration::from_secs(5),
        operation_timeout: Duration::from_secs(5),
        reconnect: BackoffSettings {
            min: Duration::from_millis(20),
            max: Duration::from_millis(200),
        },
        breaker: Default::default(),
        receive_maximum: 100,
        unacknowledged_messages_max: 100,
        unacknowledged_bytes_max: 1 << 20,
        packet_bytes_max: 1 << 20,
    }
}

fn order(broker: BrokerSettings, ledger: &Path) -> Order {
    let feed = |kind: Kind| Feed {
        stream: kind.stream().to_owned(),
        kind,
        broker: 0,
        topic_filter: kind.topic_filter().to_owned(),
        rate: 2_000.0,
    };
    Order {
        brokers: vec![broker],
        feeds: Kind::ALL.map(feed).to_vec(),
        seed: 5,
        devices: 3,
        faults: FaultRates::default(),
        duration: Some(PATIENCE),
        count: Some(400),
        ledger: Some(ledger.to_owned()),
    }
}

fn never() -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    // Kept for ever: a sender that is gone would read as a stop.
    std::mem::forget(sender);
    receiver
}

fn ledger_lines(path: &Path) -> u64 {
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["sha256"].as_str().is_some_and(|hash| hash.len() == 64)).count() as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_message_is_in_the_ledger() {
    let server = Mosquitto::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for version in [MqttVersion::V5, MqttVersion::V311] {
        let ledger = folder.path().join("ledger");
        let order = order(broker(server.port(), version), &ledger);
        let totals = run(order, never(), |_| {}).await.unwrap();
        for (name, stream) in &totals.streams {
            assert_eq!((stream.published, stream.acknowledged), (400, 400), "{name} {version:?}");
            assert_eq!((stream.refused, stream.unconfirmed), (0, 0), "{name}");
        }
        assert_eq!(ledger_lines(&ledger), 2_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_no_acknowledgement() {
    let acl = Some("topic write saveeye/#\n".to_owned());
    let options = MosquittoOptions { acl, ..MosquittoOptions::default() };
    let server = Mosquitto::start_with(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ledger = folder.path().join("ledger");
    let order = order(broker(server.port(), MqttVersion::V5), &ledger);
    let totals = run(order, never(), |_| {}).await.unwrap();
    for (name, stream) in &totals.streams {
        let expected = if name == "energy" { (400, 0) } else { (0, 400) };
        assert_eq!((stream.acknowledged, stream.refused), expected, "{name}");
    }
    assert_eq!(ledger_lines(&ledger), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_dies_leaves_the_books_balanced() {
    let mut server = Mosquitto::start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for version in [MqttVersion::V5, MqttVersion::V311] {
        let ledger = folder.path().join("ledger");
        let mut order = order(broker(server.port(), version), &ledger);
        order.count = None;
        order.duration = Some(PATIENCE);
        let (stop, stopped) = watch::channel(false);
        let (seen, mut watched) = watch::channel(0);
        let running = tokio::spawn(run(order, stopped, move |totals| {
            seen.send_replace(totals.acknowledged());
        }));
        watched.wait_for(|count| *count > 1_000).await.unwrap();
        server.kill();
        server.restart().unwrap();
        let before = *watched.borrow_and_update();
        tokio::time::timeout(PATIENCE, watched.wait_for(|count| *count > before + 1_000))
            .await
            .unwrap()
            .unwrap();
        stop.send_replace(true);
        let totals = running.await.unwrap().unwrap();
        for (name, stream) in &totals.streams {
            let answered = stream.acknowledged + stream.refused + stream.unconfirmed;
            assert_eq!(stream.published, answered, "{name} {version:?}");
        }
        assert_eq!(ledger_lines(&ledger), totals.acknowledged());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_broker_it_says_so() {
    let nobody = Mosquitto::prepare(&MosquittoOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut order = order(broker(nobody.port(), MqttVersion::V5), &folder.path().join("ledger"));
    order.duration = Some(Duration::from_millis(500));
    let outcome = run(order, never(), |_| {}).await;
    assert!(matches!(outcome, Err(SimulateError::NothingAcknowledged { .. })), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_name_counts_instead_of_the_host() {
    let certificates = Certificates::generate_for(&["broker.plant"]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let files = certificates.write(folder.path()).unwrap();
    let server = Mosquitto::start_with(MosquittoOptions {
        tls: Some(certificates),
        ..MosquittoOptions::default()
    })
    .unwrap();
    for version in [MqttVersion::V5, MqttVersion::V311] {
        for (name, fits) in [("broker.plant", true), ("elsewhere.plant", false)] {
            let mut broker = broker(server.port(), version);
            broker.tls = Some(TlsSettings {
                ca_file: Some(files.authority.clone()),
                server_name: Some(name.to_owned()),
                ..TlsSettings::default()
            });
            let mut order = order(broker, &folder.path().join("ledger"));
            order.count = Some(10);
            order.duration = Some(Duration::from_secs(if fits { 30 } else { 1 }));
            let outcome = run(order, never(), |_| {}).await;
            assert_eq!(outcome.is_ok(), fits, "{name} {version:?}: {outcome:?}");
        }
    }
}

#[test]
fn the_example_configuration_maps_what_the_devices_send() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/homelab/telemetry.toml");
    let loaded = config::load(&path, &|_| None).unwrap();
    for (name, stream) in &loaded.settings.streams {
        let kind = Kind::of_stream(name.as_str()).unwrap();
        for (fault, all_fine) in
            [(None, true), (Some(Fault::WrongClock), true), (Some(Fault::BadValue), false)]
        {
            let faults = fault.map_or_else(String::new, |fault| format!("{}=1", fault.name()));
            let faults = FaultRates::parse(&faults).unwrap();
            let mut generator = Generator::new(kind, &stream.topic_filter, 3, faults, 11);
            let mut record_mapper = RecordMapper::compile(stream).unwrap();
            let mut tables: Vec<RowMapper> = stream
                .tables
                .values()
                .map(|table| RowMapper::compile(stream, table).unwrap())
                .collect();
            for sequence in 1..100 {
                let messages = generator.next(Timestamp::now());
                let message = &messages[0];
                assert_eq!(message.fault, fault, "{name}");
                let record = Record {
                    sequence: Sequence(sequence),
                    arrival: Arrival::now(),
                    topic: &message.topic,
                    payload: &message.payload,
                    flags: DeliveryFlags::default(),
                    packet_id: 1,
                };
                let (mut json, mut key) = (Vec::new(), Vec::new());
                let outcome = record_mapper.map(&record, &mut json, &mut key);
                let mut fine = matches!(outcome, Outcome::Mapped(()));
                for table in &mut tables {
                    fine &= matches!(table.map(&record), Outcome::Mapped(_));
                }
                assert_eq!(fine, all_fine, "{name}: {fault:?}");
                if all_fine {
                    assert_eq!(
                        parsed(&json)["tags"].as_object().map(|tags| tags.is_empty()),
                        Some(false)
                    );
                }
            }
        }
    }
}

fn parsed(json: &[u8]) -> serde_json::Value {
    serde_json::from_slice(json).unwrap()
}
