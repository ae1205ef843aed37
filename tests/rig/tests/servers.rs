//! The rig itself is tried on its own servers before anything is judged with it.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rig::{
    Certificates, Entry, Kafka, Mosquitto, MosquittoOptions, Mqtt, MqttOptions, Postgres,
    Publisher, block_on, eventually,
};
use rumqttc::v5::mqttbytes::v5::Packet;

const SOON: Duration = Duration::from_secs(20);

fn text(entry: &Entry) -> String {
    String::from_utf8(entry.payload.clone()).unwrap()
}

/// Takes `count` messages and acknowledges nothing; the connection ends with the call.
fn receive(port: u16, client: &str, filter: &str, count: usize) -> Vec<String> {
    let mut options = MqttOptions::new(port, client);
    options.clean_start = false;
    let filter = filter.to_owned();
    block_on(async move {
        let mut mqtt = Mqtt::connect(&options).await.unwrap();
        mqtt.subscribe(&filter).await.unwrap();
        let mut messages = Vec::new();
        while messages.len() < count {
            match mqtt.take().unwrap() {
                Some(Packet::Publish(message)) => {
                    messages.push(String::from_utf8(message.payload.to_vec()).unwrap());
                }
                Some(_) => {}
                None => match tokio::time::timeout(SOON, mqtt.fill()).await {
                    Ok(filled) => filled.unwrap(),
                    Err(_) => panic!("no more after {messages:?}"),
                },
            }
        }
        messages
    })
}

#[test]
fn a_message_the_broker_acknowledged_survives_its_death() {
    let mut broker = Mosquitto::start().unwrap();
    let port = broker.port();
    receive(port, "reader", "t/#", 0);
    let publisher = Publisher::new(port, "writer");
    for number in 0..50 {
        publisher.publish("s", "t/a", format!("message {number}"));
    }
    publisher.flush(SOON).unwrap();
    assert_eq!(publisher.ledger().acked_count(), 50);
    // Mosquitto acknowledges before it saves.
    let store = broker.folder().join("data/mosquitto.db");
    eventually(SOON, "the last one is saved", || {
        let saved = std::fs::read(&store).unwrap_or_default();
        saved.windows(10).any(|bytes| bytes == b"message 49")
    });

    broker.kill();
    publisher.publish("s", "t/a", "late");
    broker.restart().unwrap();
    publisher.flush(SOON).unwrap();

    let messages = receive(port, "reader", "t/#", 51);
    let comparison = publisher.ledger().compare(text, messages.iter().map(String::as_str));
    assert!(comparison.is_exact(), "{comparison:?}");
}

#[test]
fn a_refused_message_is_not_an_acknowledged_one() {
    let broker = Mosquitto::start_with(MosquittoOptions {
        acl: Some("topic write allowed\ntopic read #\n".into()),
        ..MosquittoOptions::default()
    })
    .unwrap();
    let publisher = Publisher::new(broker.port(), "writer");
    publisher.publish("s", "allowed", "1");
    publisher.publish("s", "forbidden", "2");
    publisher.flush(SOON).unwrap();
    let ledger = publisher.ledger();
    assert_eq!(ledger.acked().map(text).collect::<Vec<_>>(), ["1"]);
    assert_eq!(ledger.entries()[1].refused.as_deref(), Some("NotAuthorized"));
}

#[test]
fn users_and_certificates_are_asked_for() {
    let broker = Mosquitto::start_with(MosquittoOptions {
        users: vec![("node".into(), "secret".into())],
        ..MosquittoOptions::default()
    })
    .unwrap();
    let mut options = MqttOptions::new(broker.port(), "x");
    let refused = options.clone();
    block_on(async move { Mqtt::connect(&refused).await.unwrap_err() });
    options.login = Some(("node".into(), "secret".into()));
    block_on(async move { Mqtt::connect(&options).await.unwrap() });

    let tls = Some(Certificates::generate().unwrap());
    let encrypted =
        Mosquitto::start_with(MosquittoOptions { tls, ..MosquittoOptions::default() }).unwrap();
    let plain = MqttOptions::new(encrypted.port(), "x");
    block_on(async move { Mqtt::connect(&plain).await.unwrap_err() });
}

#[test]
fn a_database_keeps_its_rows_and_port_through_stop_and_kill() {
    let mut server = Postgres::start().unwrap();
    server.create_database("things").unwrap();
    server.create_role("reader", "it's").unwrap();
    server.execute("things", "CREATE TABLE t (n int); INSERT INTO t VALUES (1), (2)").unwrap();
    server.stop().unwrap();
    server.restart().unwrap();
    server.execute("things", "INSERT INTO t VALUES (3)").unwrap();
    server.kill();
    server.restart().unwrap();
    assert_eq!(server.count("things", "t").unwrap(), 3);
    let rows = server.query("things", "SELECT n, NULL FROM t ORDER BY n LIMIT 1").unwrap();
    assert_eq!(rows, [[Some("1".to_owned()), None]]);
    let error = format!("{:#}", server.execute("things", "SELECT nothing").unwrap_err());
    assert!(error.contains("42703"), "{error}");
}

#[test]
fn a_server_that_cannot_start_shows_its_command_and_log() {
    let options = rig::PostgresOptions {
        settings: vec![("no_such_setting".into(), "1".into())],
        ..rig::PostgresOptions::default()
    };
    let error = format!("{:#}", Postgres::start_with(options).unwrap_err());
    assert!(error.contains("bin/postgres -D"), "{error}");
    assert!(error.contains("unrecognized configuration parameter"), "{error}");
}

#[test]
fn records_come_back_with_all_their_parts_after_a_kill() {
    use rdkafka::message::{Header, OwnedHeaders};
    use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

    let mut broker = Kafka::start().unwrap();
    broker.create_topic("things", 2).unwrap();
    assert_eq!(broker.count("things").unwrap(), 0);
    let producer: BaseProducer = rdkafka::ClientConfig::new()
        .set("bootstrap.servers", broker.bootstrap())
        .set("acks", "all")
        .create()
        .unwrap();
    for number in 0..100 {
        let (key, value) = (format!("key-{}", number % 7), number.to_string());
        let header = Header { key: "id", value: Some(&value) };
        let record = BaseRecord::to("things")
            .key(&key)
            .payload(&value)
            .timestamp(1_700_000_000_000)
            .headers(OwnedHeaders::new().insert(header));
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(SOON).unwrap();
    drop(producer);

    broker.kill();
    broker.restart().unwrap();
    let records = broker.read_topic("things").unwrap();
    assert_eq!(records.len(), 100);
    assert_eq!(broker.count("things").unwrap(), 100);
    assert!(records.iter().any(|record| record.partition == 1));
    for record in &records {
        let value = std::str::from_utf8(&record.value).unwrap();
        assert_eq!(record.header("id"), Some(value));
        assert_eq!(record.timestamp, Some(1_700_000_000_000));
        assert!(record.key.as_deref().unwrap().starts_with(b"key-"));
    }
    assert!(broker.read_topic("nothing").is_err());
}

#[test]
fn a_frozen_server_stays_connected_and_says_nothing() {
    // A client asks for TLS, and for GSSAPI; a server that speaks answers either with a letter.
    const TLS: &[u8] = &[0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f];
    const GSSAPI: &[u8] = &[0, 0, 0, 8, 4, 0xd2, 0x16, 0x30];
    let answer = |client: &mut TcpStream, within| {
        client.set_read_timeout(Some(within)).unwrap();
        let mut letter = [0];
        client.read_exact(&mut letter).map_err(|error| error.kind())
    };
    let server = Postgres::start().unwrap();
    let connect = || TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    let mut before = connect();
    before.write_all(TLS).unwrap();
    answer(&mut before, SOON).unwrap();
    server.freeze();
    // The kernel still takes connections for it.
    let mut clients = [before, connect()];
    clients
        .iter_mut()
        .zip([GSSAPI, TLS])
        .for_each(|(client, words)| client.write_all(words).unwrap());
    for client in &mut clients {
        assert_eq!(answer(client, Duration::from_secs(1)), Err(ErrorKind::WouldBlock));
    }
    server.thaw();
    for client in &mut clients {
        answer(client, SOON).unwrap();
    }
}

#[test]
fn a_database_works_in_a_folder_that_only_root_may_enter() {
    use std::os::unix::fs::PermissionsExt;
    let outer = tempfile::tempdir().unwrap();
    std::fs::set_permissions(outer.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let folder = Some(outer.path().join("deep/cluster"));
    let server =
        Postgres::start_with(rig::PostgresOptions { folder, ..Default::default() }).unwrap();
    assert_eq!(server.value("postgres", "SELECT 1").unwrap(), "1");
}

/// Set for the process that `nothing_outlives_its_program` starts and kills.
const TO_BE_KILLED: &str = "RIG_TO_BE_KILLED";

#[test]
fn nothing_outlives_its_program() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    if let Some(folder) = std::env::var_os(TO_BE_KILLED) {
        let folder = Some(folder.into());
        let mut broker =
            Mosquitto::start_with(MosquittoOptions { folder, ..Default::default() }).unwrap();
        println!("\nbroker {}", broker.daemon().pid().unwrap());
        std::thread::sleep(Duration::from_secs(600));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut program = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "nothing_outlives_its_program", "--nocapture"])
        .env(TO_BE_KILLED, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(program.stdout.take().unwrap()).lines();
    let pid =
        lines.map(Result::unwrap).find_map(|line| line.strip_prefix("broker ").map(str::to_owned));
    let broker = format!("/proc/{}/stat", pid.expect("the program told its broker's id"));
    program.kill().unwrap();
    program.wait().unwrap();
    eventually(SOON, "the broker went with its program", || {
        std::fs::read_to_string(&broker).map_or(true, |stat| stat.contains(") Z "))
    });
}
