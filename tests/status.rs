//! `telemetry status` where no node answers, or another than expected.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

fn telemetry(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_telemetry"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn a_node_is_asked_by_name() {
    let listener = TcpListener::bind("localhost:0").unwrap();
    let address = format!("localhost:{}", listener.local_addr().unwrap().port());
    let node = std::thread::spawn(move || {
        let mut asked = listener.accept().unwrap().0;
        let mut question = [0; 1024];
        let length = asked.read(&mut question).unwrap();
        let body = r#"{"state":"healthy","node":{"name":"n1"}}"#;
        write!(asked, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
        String::from_utf8_lossy(&question[..length]).into_owned()
    });
    let output = telemetry(&["status", "--json", "--address", &address]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(node.join().unwrap().starts_with("GET /health"));
    let output = telemetry(&["status", "--address", "node.lan"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("it is not HOST:PORT"), "{output:?}");
}

#[test]
fn without_the_socket_the_listener_is_asked_over_tls_when_it_speaks_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let certificates = rig::Certificates::generate().unwrap().write(folder.path()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let text = format!(
        r#"
[node]
name = "node-1"
state_dir = "."
[http]
listen = "{}"
tls = {{ certificate_file = "{}", key_file = "{}" }}
[brokers.home]
host = "127.0.0.1"
[clusters.main]
bootstrap_servers = ["127.0.0.1:9092"]
[streams.one]
broker = "home"
topic_filter = "a"
fields.device = {{ path = "id", type = "text", device_id = true }}
kafka = {{ cluster = "main", topic = "one" }}
"#,
        listener.local_addr().unwrap(),
        certificates.server_certificate.display(),
        certificates.server_key.display(),
    );
    std::fs::write(path("telemetry.toml"), text).unwrap();
    let node = std::thread::spawn(move || {
        let mut first = [0];
        listener.accept().unwrap().0.read_exact(&mut first).unwrap();
        first[0]
    });
    let authority = certificates.authority.display().to_string();
    let arguments =
        ["status", "--config", &path("telemetry.toml"), "--ca-file", &authority].map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = telemetry(&arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    const HANDSHAKE: u8 = 22;
    assert_eq!(node.join().unwrap(), HANDSHAKE);
}

#[test]
fn a_watch_outlives_a_node_that_does_not_answer() {
    let nobody = format!("127.0.0.1:{}", rig::free_port());
    let mut watch = telemetry(&["status", "--watch", "--address", &nobody]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    let ended = watch.try_wait().unwrap();
    watch.kill().unwrap();
    let output = watch.wait_with_output().unwrap();
    assert_eq!(ended, None, "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.matches("does not answer").count() >= 2, "{told}");
}
