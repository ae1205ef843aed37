//! `telemetry doctor` and the machine: clock, port, file descriptors, a drive that is none, and the configuration itself.

use std::net::TcpListener;
use std::process::Command;

use rig::{Homelab, eventually};

use crate::doctor::{doctor, findings, verdict};
use crate::world::{Changes, SOON, World};

#[test]
fn a_port_that_is_taken_fails_and_a_free_one_does_not() {
    let world = World::prepare(Changes::default());
    let (_, report) = doctor(&world);
    assert_eq!(verdict(&report, "node", "port"), "ok");
    let _taken = TcpListener::bind(("127.0.0.1", world.node.http_port())).unwrap();
    let (code, report) = doctor(&world);
    assert_eq!((code, verdict(&report, "node", "port").as_str()), (Some(1), "fail"));
}

#[test]
fn the_machines_clock_has_a_line_without_any_database() {
    let world =
        World::prepare(Changes { without_databases: true, kafka: true, ..Changes::default() });
    let (_, report) = doctor(&world);
    let line = findings(&report, "machine", "clock")[0];
    let figure = line["figure"].as_str().unwrap();
    // Which of them is true here is the machine's matter.
    let known = ["kept by a time service to within", "no time service keeps it", "unknown: "];
    assert!(known.iter().any(|words| figure.starts_with(words)), "{figure}");
    assert_ne!(line["verdict"], "fail", "{line}");
    assert_eq!(line["verdict"] == "ok", line["remedy"].is_null(), "{line}");
}

#[test]
fn few_file_descriptors_are_doubtful_and_hardly_any_left_fail() {
    let mut world = World::start(Changes::default());
    let process = world.node.daemon().pid().unwrap().to_string();
    let open = || std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count();
    let says = |limit: usize, expected: &str| {
        let mut command = Command::new("prlimit");
        command.args(["--pid", &process, &format!("--nofile={limit}:")]);
        assert!(command.status().unwrap().success());
        let (_, report) = doctor(&world);
        let line = findings(&report, "node", "file descriptors").first().copied().cloned();
        let line = line.unwrap_or_default();
        let figure = line["figure"].as_str().unwrap_or_default();
        line["verdict"] == expected && figure.contains(&format!("of {limit} open"))
    };
    eventually(SOON, "few are doubtful", || says(512, "warn"));
    // How many are open changes by the moment, and the look itself needs some.
    eventually(SOON, "hardly any left fail", || says(open() + 4, "fail"));
}

#[test]
fn a_state_directory_in_memory_is_no_drive_and_room_is_told_in_hours_once_the_rate_is_known() {
    let mut world = World::prepare(Changes::default());
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut homelab = Homelab::open(world.node.config()).unwrap();
    homelab.set(&["node", "state_dir"], memory.path().display().to_string());
    homelab.write(world.node.config()).unwrap();
    let (code, report) = doctor(&world);
    assert_eq!((code, verdict(&report, "drive", "sync").as_str()), (Some(1), "fail"));
    let room = |report: &serde_json::Value| {
        findings(report, "drive", "room")[0]["figure"].as_str().unwrap().to_owned()
    };
    assert!(room(&report).ends_with("the rate is known once a node runs"), "{report:#}");
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("plug", "tele/plug-1/STATE", r#"{"POWER": "ON"}"#);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the rate is known", || {
        room(&doctor(&world).1).contains("h of outage at the present rate")
    });
    let queue = doctor(&world).1;
    let queue = findings(&queue, "node", "rate")[0]["figure"].as_str().unwrap().to_owned();
    assert!(queue.contains("an absence of 1 h needs"), "{queue}");
}

#[test]
fn doubts_of_the_configuration_are_lines_and_an_unknown_setting_is_its_mistake() {
    let extra = "[brokers.spare]\nhost = \"127.0.0.1\"\n".to_owned();
    let world = World::prepare(Changes { extra, ..Changes::default() });
    let (_, report) = doctor(&world);
    let figures = findings(&report, "configuration", "settings");
    let spare = |line: &&&serde_json::Value| {
        line["figure"].as_str().unwrap().contains("brokers.spare: no stream uses it")
    };
    assert_eq!(figures.iter().find(spare).map(|line| &line["verdict"]), Some(&"warn".into()));

    let mut homelab = Homelab::open(world.node.config()).unwrap();
    homelab.set(&["buffer", "quota_byte"], 1);
    homelab.write(world.node.config()).unwrap();
    let refused = world.node.command(&["doctor"]).unwrap();
    assert_eq!(refused.status.code(), Some(78));
    let report = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(report.contains("buffer.quota_byte") && report.contains("quota_bytes"), "{report}");
}
