//! A panic or a hang where no part is: in the buffer's threads, in the supervisor, in an answer over HTTP; and of what listens
//! for those.

use std::collections::HashSet;
use std::time::Duration;

use rig::{Folder, eventually};
use serde_json::{Value, json};

use crate::manager::Manager;
use crate::world::{Changes, SOON, World};

/// What a service manager waits for a sign of life.
const WATCHDOG: Duration = Duration::from_secs(3);

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

/// As `/health` tells of it; null while it tells nothing.
fn part(world: &World, name: &str) -> Value {
    let health = world.node.get("/health").and_then(|answer| answer.json());
    health.map(|health| health["parts"][name].clone()).unwrap_or_default()
}

/// Publishes until the process has ended by itself, over the panic of this thread.
fn ends(world: &mut World, publisher: &rig::Publisher, thread: &str) {
    // It may end before it answers anything.
    world.node.spawn().unwrap();
    let mut ended = None;
    eventually(SOON, format!("the process ended over {thread}"), || {
        publisher.publish("energy", "saveeye/telemetry", reading(publisher.count() as u64));
        ended = world.node.daemon().exit_status().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "{}", world.node.log_text());
    let why = format!("\"event\":\"panic\",\"thread\":\"{thread}\"");
    assert!(world.node.log_text().contains(&why), "{why}");
    world.node.kill();
}

/// Without one of its threads the buffer answers nobody, without the supervisor nobody is started afresh: so the process
/// ends, and the next one finds everything.
#[test]
fn a_panic_of_the_supervisor_or_of_a_thread_of_the_buffer_ends_the_process_and_loses_nothing() {
    let mut world = World::start(Changes::default());
    world.node.stop(SOON).unwrap();
    let publisher = world.publisher();
    // What the first of these lives made durable waits for its sink, so that the second has to read it.
    for (thread, point) in [
        ("buffer-writer", "buffer_writer=5*off->panic(made by a test)"),
        ("buffer-reader", "buffer_reader=panic(made by a test)"),
        ("buffer-janitor", "buffer_janitor=panic(made by a test)"),
        ("buffer-state", "buffer_state=panic(made by a test)"),
        ("main", "supervisor=5*off->panic(made by a test)"),
    ] {
        world.node.set_failpoints(&format!("part_writer_energy=1*return;{point}"));
        ends(&mut world, &publisher, thread);
    }
    world.node.set_failpoints("");
    world.node.start().unwrap();
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all rows", || {
        world.count("telemetry", "energy_consumption") == publisher.count() as u64
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), publisher.count() as u64);
}

/// Publishes until this thread is told to hang, and ends the process once the watchdog is not fed, as systemd does.
fn hangs(world: &mut World, manager: &mut Manager, publisher: &rig::Publisher, thread: &str) {
    world.node.start().unwrap();
    let told = format!("\"thread\":\"{thread}\"");
    eventually(SOON, format!("the hang of {thread} is told"), || {
        publisher.publish("energy", "saveeye/telemetry", reading(publisher.count() as u64));
        let log = world.node.log_text();
        log.lines().any(|line| line.contains("buffer_stalled") && line.contains(&told))
    });
    let health = world.node.get("/health").unwrap().json().unwrap();
    let because = health["because"].to_string();
    assert_eq!(health["state"], "unhealthy", "{because}");
    assert!(because.contains(thread) && because.contains("part-stalled"), "{because}");
    manager.has_had_enough(WATCHDOG);
    world.node.kill();
}

/// Whoever asks a thread that hangs is made anew again and again, which helps nobody: the process has to end.
#[test]
fn a_hang_of_each_of_the_buffers_threads_is_told_starves_the_watchdog_and_loses_nothing() {
    let folder = Folder::new(None, "manager").unwrap();
    let path = folder.join("notify");
    let mut manager = Manager::listen(&path);
    let mut world = World::start(Changes {
        extra: "[supervision]\nstall_timeout_seconds = 5\n".to_owned(),
        environment: vec![("WATCHDOG_USEC".to_owned(), (WATCHDOG.as_micros() / 3).to_string())],
        notify_socket: path.display().to_string(),
        ..Changes::default()
    });
    world.node.stop(SOON).unwrap();
    let publisher = world.publisher();
    let hang = format!("1*sleep({})", 10 * SOON.as_millis());
    // What the first of these lives made durable waits for its sink, so that the second has to read it.
    for (point, action) in [
        ("buffer_janitor", format!("3*off->{hang};part_writer_energy=return")),
        ("buffer_reader", hang.clone()),
        ("buffer_state", format!("20*off->{hang}")),
    ] {
        world.node.set_failpoints(&format!("{point}={action}"));
        hangs(&mut world, &mut manager, &publisher, &point.replace('_', "-"));
    }
    world.node.set_failpoints("");
    world.node.start().unwrap();
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all rows", || {
        world.count("telemetry", "energy_consumption") == publisher.count() as u64
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), publisher.count() as u64);
}

/// The library's own thread, which tells what became of the records: the cluster answers, and nothing is confirmed.
#[test]
fn a_kafka_producer_whose_thread_hangs_is_replaced_and_leaves_no_hole() {
    const RECORDS: u64 = 200;
    let mut world = World::prepare(Changes {
        kafka: true,
        failpoints: format!("callback_delivery=20*off->1*sleep({})", 10 * SOON.as_millis()),
        extra: "[clusters.main]\nmessage_timeout_seconds = 3\n".to_owned(),
        ..Changes::default()
    });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    (0..RECORDS).for_each(|count| {
        publisher.publish("energy", "saveeye/telemetry", reading(count));
    });
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    let records = world.kafka_records("homelab-energy-realtime");
    let ids: HashSet<_> = records.iter().filter_map(|one| one.header("telemetry-id")).collect();
    assert_eq!(ids.len() as u64, RECORDS);
    assert_eq!(world.count("telemetry", "energy_consumption"), RECORDS);
    let status = world.node.stop(SOON).unwrap();
    assert!(status.success(), "the thread that hangs holds no stop up: {status}");
}

#[test]
fn answers_that_panic_stop_no_message_and_no_later_answer() {
    let failpoints = "http_request=3*off->20*panic(made by a test)->off".to_owned();
    let mut world = World::prepare(Changes { failpoints, ..Changes::default() });
    world.node.start().unwrap();
    let mut refused = 0;
    eventually(SOON, "answers come again", || {
        let answer = world.node.get("/health/live");
        refused += usize::from(answer.is_err());
        refused == 20 && answer.is_ok()
    });
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the row", || world.count("telemetry", "energy_consumption") == 1);
}

/// Each listener loses one life at a time, in the middle of its opening; whoever connects meanwhile waits.
#[test]
fn a_listener_that_panics_or_hangs_is_started_afresh_and_the_others_go_on() {
    let mut world = World::prepare(Changes {
        extra: "[supervision]\nstall_timeout_seconds = 5\n".to_owned(),
        ..Changes::default()
    });
    let publisher = world.publisher();
    let listeners = ["http", "control"];
    for (action, stalls) in [("1*panic(made by a test)", 0), ("1*return", 1)] {
        let points = listeners.map(|name| format!("part_listener_{name}={action};"));
        world.node.set_failpoints(&points.concat());
        world.node.start().unwrap();
        world.subscribed();
        for listener in listeners {
            eventually(SOON, format!("{listener} was started afresh"), || {
                let part = part(&world, listener);
                part["restarts"] == 1 && part["stalls"] == stalls && part["state"] == "running"
            });
        }
        eventually(SOON, "a command is answered", || {
            world.node.command(&["parts", "list"]).is_ok_and(|asked| asked.status.success())
        });
        publisher.publish("energy", "saveeye/telemetry", reading(publisher.count() as u64));
        publisher.flush(SOON).unwrap();
        world.drained(SOON);
        let health = world.node.get("/health").unwrap().json().unwrap();
        for (name, status) in health["parts"].as_object().unwrap() {
            let times = u64::from(listeners.contains(&name.as_str()));
            assert_eq!(status["restarts"], times, "{name}: {status}");
        }
        assert!(world.node.stop(SOON).unwrap().success());
    }
    assert_eq!(world.count("telemetry", "energy_consumption"), publisher.count() as u64);
}

/// The other one tells of it, and takes the order that brings it back.
#[test]
fn a_listener_that_panics_for_ever_is_parked_alone_and_started_by_hand() {
    let mut world = World::prepare(Changes {
        failpoints: "part_listener_http=3*panic(made by a test)".to_owned(),
        extra: "[supervision]\nrestarts_max = 2\nbackoff_min_ms = 10\nbackoff_max_ms = 20\n"
            .to_owned(),
        ..Changes::default()
    });
    let publisher = world.publisher();
    world.node.spawn().unwrap();
    eventually(SOON, "it is parked", || {
        let Ok(asked) = world.node.command(&["parts", "list", "--json"]) else { return false };
        let parts: Value = serde_json::from_slice(&asked.stdout).unwrap_or_default();
        parts["http"]["state"] == "parked" && parts["http"]["restarts"] == 3
    });
    let restarted = world.node.command(&["parts", "restart", "http"]).unwrap();
    assert!(restarted.status.success(), "{restarted:?}");
    world.node.wait_ready(SOON).unwrap();
    world.subscribed();
    publisher.publish("energy", "saveeye/telemetry", reading(0));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the row", || world.count("telemetry", "energy_consumption") == 1);
    assert!(world.node.stop(SOON).unwrap().success());
}

/// One request after the other takes a worker of its listener with it, and whoever else that worker serves.
#[test]
fn a_listener_of_which_a_worker_hangs_is_started_afresh_and_answers_everybody() {
    for listener in ["http", "control"] {
        let mut world = World::prepare(Changes {
            failpoints: format!("http_request=1*sleep({})", 4 * SOON.as_millis()),
            extra: "[supervision]\nstall_timeout_seconds = 5\n".to_owned(),
            ..Changes::default()
        });
        world.node.spawn().unwrap();
        let ask = |world: &World| match listener {
            "http" => world.node.get("/health/live").is_ok_and(|answer| answer.status == 200),
            _ => world.node.command(&["parts", "list"]).is_ok_and(|asked| asked.status.success()),
        };
        eventually(SOON, "it listens", || match listener {
            "http" => std::net::TcpStream::connect(("127.0.0.1", world.node.http_port())).is_ok(),
            _ => world.node.config().with_file_name("state/control.sock").exists(),
        });
        assert!(!ask(&world), "{listener}: this one hangs");
        let publisher = world.publisher();
        publisher.publish("energy", "saveeye/telemetry", reading(1));
        eventually(SOON, format!("{listener} was started afresh"), || {
            let part = part(&world, listener);
            part["stalls"] == 1 && part["restarts"] == 1 && part["state"] == "running"
        });
        for _ in 0..8 {
            let began = std::time::Instant::now();
            assert!(ask(&world), "{listener}");
            assert!(began.elapsed() < SOON / 10, "{listener}: {:?}", began.elapsed());
        }
        world.subscribed();
        publisher.publish("energy", "saveeye/telemetry", reading(2));
        publisher.flush(SOON).unwrap();
        eventually(SOON, "the row", || {
            world.postgres.count("telemetry", "energy_consumption").is_ok_and(|rows| rows > 0)
        });
        assert!(world.node.stop(SOON).unwrap().success());
    }
}

/// What answers cannot be told by whoever it does not answer to go on, so it takes no pause; a stop waits for it a moment.
#[test]
fn a_listener_takes_no_pause_and_its_hung_worker_holds_no_stop_up() {
    let mut world =
        World::start(Changes { failpoints: "http_request=off".to_owned(), ..Changes::default() });
    for listener in ["http", "control"] {
        let paused = world.node.command(&["parts", "pause", listener]).unwrap();
        assert!(!paused.status.success());
        let restarted = world.node.command(&["parts", "restart", listener]).unwrap();
        assert!(restarted.status.success(), "{restarted:?}");
        eventually(SOON, format!("{listener} was started afresh"), || {
            part(&world, listener)["restarts"] == 1
        });
    }
    world.node.stop(SOON).unwrap();
    world.node.set_failpoints(&format!("http_request=1*sleep({})", 4 * SOON.as_millis()));
    world.node.spawn().unwrap();
    eventually(SOON, "it listens", || {
        std::net::TcpStream::connect(("127.0.0.1", world.node.http_port())).is_ok()
    });
    assert!(world.node.get("/health/live").is_err(), "this one hangs");
    assert!(world.node.stop(SOON).unwrap().success());
    assert!(world.node.log_text().contains("\"parts\":\"http\""), "it is told who was left");
}
