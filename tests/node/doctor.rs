//! `telemetry doctor` and the watch over certificates, between real servers.

use rig::{Certificates, Folder, eventually, request_as};
use serde_json::Value;

use crate::world::{Changes, SOON, World};

/// Its exit code and its report.
pub fn doctor(world: &World) -> (Option<i32>, Value) {
    let output = world.node.command(&["doctor", "--json"]).unwrap();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), report)
}

pub fn findings<'r>(report: &'r Value, about: &str, check: &str) -> Vec<&'r Value> {
    let all = report["findings"].as_array().unwrap();
    all.iter().filter(|line| line["about"] == about && line["check"] == check).collect()
}

#[track_caller]
pub fn verdict(report: &Value, about: &str, check: &str) -> String {
    let found = findings(report, about, check);
    let first = found.first().unwrap_or_else(|| panic!("{about} {check} in {report:#}"));
    first["verdict"].as_str().unwrap().to_owned()
}

#[test]
fn a_whole_node_gets_a_clean_report() {
    let world = World::start(Changes { kafka: true, ..Changes::default() });
    eventually(SOON, "every sink delivers", || {
        world.node.get("/health").unwrap().json().unwrap()["state"] == "healthy"
    });
    let (code, report) = doctor(&world);
    assert_eq!(code, Some(0), "{report:#}");
    for (about, check) in [
        ("node", "running"),
        ("node", "rate"),
        ("node", "file descriptors"),
        ("drive", "sync"),
        ("drive", "write cache"),
        ("drive", "room"),
        ("mqtt:home", "reachable"),
        ("mqtt:home", "session expiry"),
        ("mqtt:home", "granted QoS"),
        ("mqtt:home", "dropped by the broker"),
        ("kafka:main", "reachable"),
        ("kafka:main", "acks"),
        ("postgresql:telemetry", "reachable"),
        ("postgresql:telemetry", "fsync"),
        ("postgresql:telemetry", "connections"),
        ("postgresql:telemetry", "rights"),
        ("postgresql:telemetry", "clock"),
        ("postgresql:telemetry", "table"),
    ] {
        assert_eq!(verdict(&report, about, check), "ok", "{about} {check}: {report:#}");
    }
    let granted = findings(&report, "mqtt:home", "granted QoS").len();
    assert_eq!(granted, 5, "one line per stream: {report:#}");
    let log = world.mosquitto.log_tail(1000);
    let left = log.matches("telemetry-doctor-").count();
    assert!(left > 0, "it was there under a name of its own: {log}");
    assert!(world.node.streams().unwrap()["streams"][0]["status"]["subscribed"] == true);
    let text = world.node.command(&["doctor"]).unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("ok    ") && text.contains("0 failures"), "{text}");
}

#[test]
fn what_is_away_or_breaks_a_promise_is_told_without_a_running_node() {
    let database_settings = &[("fsync", "off"), ("synchronous_commit", "off")];
    let mut world = World::prepare(Changes { database_settings, ..Changes::default() });
    world.mosquitto.stop().unwrap();
    let (code, report) = doctor(&world);
    assert_eq!(code, Some(1), "{report:#}");
    assert_eq!(verdict(&report, "node", "running"), "warn");
    assert_eq!(verdict(&report, "mqtt:home", "reachable"), "fail");
    assert_eq!(verdict(&report, "postgresql:telemetry", "fsync"), "fail");
    assert_eq!(verdict(&report, "postgresql:telemetry", "synchronous_commit"), "warn");
    assert_eq!(verdict(&report, "postgresql:telemetry", "table"), "warn", "not migrated yet");
    let quiet = world.node.command(&["doctor", "--quiet"]).unwrap();
    let quiet = String::from_utf8_lossy(&quiet.stdout).into_owned();
    let lines = |verdict: &str| quiet.lines().filter(|line| line.starts_with(verdict)).count();
    assert!(lines("fail ") > 0 && lines("warn ") > 0 && lines("ok ") == 0, "{quiet}");
}

#[test]
fn a_certificate_near_its_end_shows_everywhere_and_a_renewal_ends_that() {
    let folder = Folder::new(None, "certificates").unwrap();
    let shelf = folder.path().join("tls");
    let certs = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_telemetry"))
            .arg("certs")
            .args(arguments)
            .arg("--dir")
            .arg(&shelf)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    certs(&["init", "--name", "localhost", "--name", "127.0.0.1", "--days", "5"]);
    let again = certs(&["init", "--name", "localhost", "--name", "127.0.0.1", "--days", "5"]);
    assert!(!again.contains("made"), "{again}");
    let file = |name: &str| shelf.join(name).display().to_string();
    let http = format!(
        "[http.tls]\ncertificate_file = {:?}\nkey_file = {:?}\n",
        file("server.crt"),
        file("server.key")
    );
    let mut world = World::prepare(Changes { http, ..Changes::default() });
    world.node.spawn().unwrap();
    let status = || {
        let output = world.node.command(&["status", "--json"]).unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or(Value::Null)
    };
    eventually(SOON, "the node counts as degraded", || {
        status()["because"].to_string().contains("a certificate of http expires in")
    });
    assert!(world.node.log_text().contains("certificate_expires"));
    let (_, report) = doctor(&world);
    assert_eq!(verdict(&report, "http", "certificate"), "warn");
    let shown = world.node.command(&["certs", "show", "--json"]).unwrap();
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert!(matches!(shown[0]["days_left"].as_i64(), Some(4 | 5)), "{shown:#}");
    assert_eq!(shown[0]["names"], serde_json::json!(["127.0.0.1", "localhost"]));
    let renewed = certs(&["renew"]);
    assert!(renewed.contains("made") && renewed.contains("server.crt"), "{renewed}");
    let (_, report) = doctor(&world);
    assert_eq!(verdict(&report, "http", "certificate"), "ok");
    let ca = file("ca.crt");
    let address = format!("127.0.0.1:{}", world.node.http_port());
    let arguments = ["status", "--json", "--address", &address, "--ca-file", &ca];
    let over_https = std::process::Command::new(env!("CARGO_BIN_EXE_telemetry"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&over_https.stdout).contains("\"state\""),
        "{}",
        String::from_utf8_lossy(&over_https.stderr)
    );
}

#[test]
fn the_expiry_is_a_metric_also_of_a_broker_nobody_uses() {
    let folder = Folder::new(None, "expiry").unwrap();
    let files = Certificates::generate().unwrap().write(folder.path()).unwrap();
    let http = "[http]\nlisten = \"0.0.0.0:{port}\"\nclear_text_allowed = true\n\
                requests_per_minute_max = 1000000\n"
        .to_owned();
    let extra = format!(
        "[brokers.spare]\nhost = \"127.0.0.1\"\n[brokers.spare.tls]\nca_file = {:?}\n",
        files.authority
    );
    let mut world = World::prepare(Changes { http, extra, ..Changes::default() });
    world.node.start().unwrap();
    let made =
        world.node.command(&["token", "create", "--scope", "read", "--expires", "1h"]).unwrap();
    let token = String::from_utf8(made.stdout).unwrap();
    let port = world.node.http_port();
    eventually(SOON, "the metric is there", || {
        let answer = request_as(port, Some(token.trim()), "GET", "/metrics", "").unwrap();
        answer
            .body
            .contains(r#"telemetry_certificate_expiry_timestamp_seconds{peer="mqtt:spare"} "#)
    });
}

#[test]
fn a_certificate_that_others_present_is_watched_as_our_own() {
    let certificates = Certificates::generate_for_days(5).unwrap();
    let mut world =
        World::start(Changes { certificates: Some(certificates), ..Changes::default() });
    let peers = ["mqtt:home", "postgresql:telemetry", "postgresql:homelab_settings"];
    for peer in peers {
        eventually(SOON, format!("the end of the certificate of {peer} is told"), || {
            let log = world.node.log_text();
            let told = |line: &str| line.contains(r#""event":"certificate_expires""#);
            log.lines()
                .any(|line| told(line) && line.contains(&format!("{peer} expires in 4 days")))
        });
    }
    let health = world.node.get("/health").unwrap().json().unwrap();
    assert!(health["because"].to_string().contains("as it presented it"), "{health:#}");
    let (_, report) = doctor(&world);
    let shown = world.node.command(&["certs", "show", "--json"]).unwrap();
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    for peer in peers {
        assert_eq!(verdict(&report, peer, "presented certificate"), "warn", "{report:#}");
        let mut lines = shown.as_array().unwrap().iter();
        let line = lines.find(|line| line["presented_by"] == peer);
        assert_eq!(line.unwrap_or_else(|| panic!("{peer} in {shown:#}"))["days_left"], 4);
    }
    let metrics = world.node.get("/metrics").unwrap().body;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    for peer in peers {
        let series = format!("telemetry_certificate_expiry_timestamp_seconds{{peer=\"{peer}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&series)).unwrap();
        let days = (line.parse::<f64>().unwrap() - now.as_secs_f64()) / 86_400.0;
        assert!((4.9..=5.0).contains(&days), "{peer}: {days}");
    }
    world.node.kill();
    let shown = world.node.command(&["certs", "show", "--json"]).unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("\"file\"") && !shown.contains("presented_by"), "{shown}");
}
