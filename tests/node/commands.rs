//! What a person sees: commands, health, metrics.

use std::io::Write as _;
use std::process::{Command, Stdio};

use rig::eventually;

use crate::world::{Changes, SOON, World};

#[test]
fn probes_metrics_and_status_tell_the_same_story() {
    let mut world = World::start(Changes::default());
    let publisher = world.publisher();
    publisher.publish(
        "energy",
        "saveeye/telemetry",
        r#"{"saveeyeDeviceSerialNumber": "SE-1", "newField": {"a": 1},
        "activeActualConsumption": {"total": 1}}"#,
    );
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    for path in ["/health/live", "/ping", "/health/ready", "/ready"] {
        let answer = world.node.get(path).unwrap();
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }
    let health = world.node.get("/health").unwrap().json().unwrap();
    assert_eq!(health["state"], "healthy", "{health:#}");
    let metrics = world.node.get("/metrics").unwrap().body;
    for line in [
        r#"telemetry_accepted_messages_total{stream="energy"} 1"#,
        r#"telemetry_delivered_messages_total{stream="energy",sink="energy_consumption"} 1"#,
        r#"telemetry_sink_pending_messages{stream="energy",sink="energy_consumption"} 0"#,
        "telemetry_ready 1",
        // Alerts on latency ask for this one; how many were in time is the machine's matter.
        r#"telemetry_end_to_end_duration_seconds_bucket{le="1.0",stream="energy",sink="energy_consumption"} "#,
    ] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
    eventually(SOON, "the member nobody maps is listed", || {
        world.node.get("/streams").unwrap().body.contains("newField")
    });
    let status = world.node.command(&["status"]).unwrap();
    assert!(status.status.success());
    let shown = String::from_utf8(status.stdout).unwrap();
    assert!(shown.contains("energy_consumption") && shown.contains("delivering"), "{shown}");
    let inspect = world.node.command(&["buffer", "inspect"]).unwrap();
    assert!(inspect.status.success(), "{}", String::from_utf8_lossy(&inspect.stderr));
    assert!(String::from_utf8_lossy(&inspect.stdout).contains("energy"));
    let status = world.node.stop(SOON).unwrap();
    assert!(status.success(), "{status}");
    let verify = world.node.command(&["buffer", "verify"]).unwrap();
    assert!(verify.status.success(), "{}", String::from_utf8_lossy(&verify.stdout));
    let export = world.node.command(&["buffer", "export", "energy"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&export.stdout).lines().count(), 1);
}

#[test]
fn the_ledger_balances_running_and_stopped() {
    let mut world = World::start(Changes::default());
    let publisher = world.publisher();
    for count in 0..100 {
        let power = if count % 10 == 0 { "\"1\"" } else { "1" };
        let payload = format!(
            r#"{{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {{"total": {power}}}}}"#
        );
        publisher.publish("energy", "saveeye/telemetry", payload);
    }
    publisher.publish("energy", "saveeye/telemetry", r#"{"saveeyeDeviceSerialNumber": "SE-1"}"#);
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    let energy = |world: &World| {
        let output = world.node.command(&["ledger", "--json"]).unwrap();
        let lines: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let lines = lines.as_array().unwrap().clone();
        let line = lines.into_iter().find(|line| line["sink"] == "energy_consumption").unwrap();
        (output.status.code(), line)
    };
    let (code, line) = energy(&world);
    assert_eq!(code, Some(0), "{line}");
    let expected = serde_json::json!({"stream": "energy", "sink": "energy_consumption",
        "received": 101, "delivered": 90, "pending": 0, "dead_lettered": 10, "filtered": 0,
        "incomplete": 1, "lost": 0, "difference": 0});
    assert_eq!(line, expected);
    let shown = world.node.command(&["ledger"]).unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("DIFFERENCE"));
    world.node.stop(SOON).unwrap();
    assert_eq!(energy(&world), (Some(0), expected), "the stopped node says the same");

    // A wrong count in the cursor row is found.
    world
        .postgres
        .execute(
            "telemetry",
            "UPDATE telemetry_cursors SET delivered = delivered - 3 WHERE stream = 'energy'",
        )
        .unwrap();
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    eventually(SOON, "the running node says what is missing", || {
        world.sink("energy", "energy_consumption")["difference"] == 3
    });
    let (code, line) = energy(&world);
    assert_eq!((code, &line["difference"]), (Some(1), &3.into()));
    let health = world.node.get("/health").unwrap().body;
    assert!(health.contains("do not balance"), "{health}");
    let log = world.node.log_text();
    let told: Vec<_> = log.lines().filter(|line| line.contains("books_do_not_balance")).collect();
    let named = |line: &&&str| {
        line.contains(r#""runbook":"books-do-not-balance""#) && line.contains(r#""difference":3"#)
    };
    assert_eq!((told.len(), told.iter().filter(named).count()), (1, 1), "{told:#?}");

    world.node.stop(SOON).unwrap();
    let (code, line) = energy(&world);
    assert_eq!((code, &line["difference"]), (Some(1), &3.into()), "the stopped node says the same");
}

#[test]
fn a_second_node_on_the_same_directory_is_refused() {
    let world = World::start(Changes::default());
    let output = world.node.command(&["run"]).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("another"), "{error}");
}

#[test]
fn no_part_of_a_secret_is_ever_shown() {
    let mut world = World::start(Changes::default());
    let mut shown = world.node.get("/health").unwrap().body;
    shown.push_str(&world.node.get("/metrics").unwrap().body);
    // With a word of what each is asked for: what only fails shows no secret either.
    for (arguments, word) in [
        (&["check", "--effective"][..], "databases.telemetry.password_file"),
        (&["status", "--json"], "\"dependencies\""),
    ] {
        let output = world.node.command(arguments).unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(word), "{word} in {arguments:?}:\n{said}");
        shown.push_str(&said);
        shown.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    world.postgres.stop().unwrap();
    eventually(SOON, "it notices", || world.node.get("/health").unwrap().body.contains("is away"));
    shown.push_str(&world.node.log_text());
    assert!(!shown.contains(rig::PASSWORD), "the password is in what the node shows");
}

/// A start at a database that has everything is answered by a notice for each thing that is there already.
#[test]
fn what_the_database_only_mentions_is_no_line_of_the_log() {
    const NOTICE: &str = "already exists, skipping";
    let loud = "[log]\nfilter = \"info,tokio_postgres=info\"\n".to_owned();
    for (extra, told) in [(loud, true), (String::new(), false)] {
        let mut world = World::start(Changes { extra, ..Changes::default() });
        world.node.stop(SOON).unwrap();
        world.node.start().unwrap();
        world.node.wait_ready(SOON).unwrap();
        assert_eq!(world.node.log_text().contains(NOTICE), told);
    }
}

#[test]
fn without_any_database_the_node_feeds_its_topics() {
    let world =
        World::start(Changes { kafka: true, without_databases: true, ..Changes::default() });
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", r#"{"saveeyeDeviceSerialNumber": "SE-1"}"#);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "its record", || world.kafka_records("homelab-energy-realtime").len() == 1);
    world.drained(SOON);
}

fn check(arguments: &[&str], message: &str) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_telemetry"));
    command.arg("check").args(arguments).current_dir(rig::repository());
    let piped = || Stdio::piped();
    let mut child =
        command.stdin(piped()).stdout(piped()).stderr(piped()).spawn().expect("the binary runs");
    child.stdin.take().unwrap().write_all(message.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn check_passes_the_example_and_ends_with_78_on_mistakes() {
    let fine = check(&["--config", "examples/homelab/telemetry.toml"], "");
    assert_eq!(fine.status.code(), Some(0), "{}", String::from_utf8_lossy(&fine.stderr));
    let broken = check(&["--config", "tests/check/unknown_keys.toml"], "");
    assert_eq!(broken.status.code(), Some(78));
    let report = String::from_utf8_lossy(&broken.stderr).into_owned();
    assert!(report.contains("mistake"), "{report}");
    let run = Command::new(env!("CARGO_BIN_EXE_telemetry"))
        .args(["run", "--config", "tests/check/unknown_keys.toml"])
        .current_dir(rig::repository())
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(78), "nothing is started on a mistake");
}

#[test]
fn check_explains_what_each_rule_made_of_a_message() {
    let message = r#"{"temperature_c": 6.4, "humidity_pct": 71, "surprise": 1}"#;
    let example = "examples/homelab/telemetry.toml";
    let arguments = ["--config", example, "--explain", "temperature_outdoor"];
    let text = check(&arguments, message);
    assert_eq!(text.status.code(), Some(0), "{}", String::from_utf8_lossy(&text.stderr));
    let shown = String::from_utf8_lossy(&text.stdout).into_owned();
    for word in ["temperature_sensors", "humidity", "6.4", "outdoor-sensor"] {
        assert!(shown.contains(word), "{word} in\n{shown}");
    }
    let json = check(&[&arguments[..], &["--json"]].concat(), message);
    serde_json::from_slice::<serde_json::Value>(&json.stdout).expect("JSON");
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_telemetry"))
        .args(["check", "--effective", "--config", "examples/homelab/telemetry.toml"])
        .current_dir(rig::repository())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("panicked"), "{error}");
}
