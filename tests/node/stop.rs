//! SIGTERM: intake ends, sinks finish, exit 0; a second one ends at once. Nothing is lost either way.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rig::{Publisher, eventually};
use serde_json::json;

use crate::world::{Changes, SOON, World};

/// `drain_timeout_seconds` of the example, and what may pass after it.
const STOP_LIMIT: Duration = Duration::from_secs(20 + 5);

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

fn terminate(world: &mut World) {
    let pid = world.node.daemon().pid().expect("the node runs").to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
}

/// Messages a second.
const RATE: u64 = 2000;

/// Publishes while `play` lasts; how many.
fn under_load(publisher: &Publisher, play: impl FnOnce()) -> u64 {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut count, begun) = (0, Instant::now());
            while !ended.load(Ordering::Relaxed) {
                while count < begun.elapsed().as_millis() as u64 * RATE / 1000 {
                    publisher.publish("energy", "saveeye/telemetry", reading(count));
                    count += 1;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            count
        });
        play();
        ended.store(true, Ordering::Relaxed);
        load.join().unwrap()
    })
}

/// Each message is a row, once.
fn assert_all_rows(world: &World, count: u64) {
    eventually(SOON, "all rows", || world.count("telemetry", "energy_consumption") >= count);
    world.drained(SOON);
    let distinct = "SELECT count(DISTINCT active_energy_total) FROM energy_consumption";
    assert_eq!(world.postgres.value("telemetry", distinct).unwrap(), count.to_string());
    assert_eq!(world.count("telemetry", "energy_consumption"), count);
}

#[test]
fn a_stop_under_load_ends_in_time_and_loses_nothing() {
    let mut world = World::start(Changes { flooded: true, ..Changes::default() });
    let publisher = world.publisher();
    let count = under_load(&publisher, || {
        eventually(SOON, "the load arrives", || {
            world.books("energy", "energy_consumption", "delivered") > RATE
        });
        let started = Instant::now();
        let status = world.node.stop(STOP_LIMIT).unwrap();
        assert!(status.success(), "{status} after {:?}", started.elapsed());
    });
    publisher.flush(SOON).unwrap();
    world.node.start().unwrap();
    world.subscribed();
    assert_all_rows(&world, count);
}

#[test]
fn a_second_signal_ends_a_drain_at_once_and_what_is_pending_stays() {
    let mut world = World::start(Changes { flooded: true, ..Changes::default() });
    world.postgres.freeze();
    let publisher = world.publisher();
    let count = under_load(&publisher, || {
        eventually(SOON, "the load is kept", || {
            let streams = world.node.streams().unwrap_or_default();
            streams["streams"][0]["status"]["sequence"].as_u64() > Some(RATE)
        });
        terminate(&mut world);
        eventually(SOON, "it drains", || world.node.log_text().contains("node_stopping"));
        let ready = world.node.get("/health/ready").unwrap();
        assert_eq!(ready.status, 503);
        assert!(ready.body.contains("the node is stopping"), "{}", ready.body);
        let second = Instant::now();
        terminate(&mut world);
        let status = world.node.daemon().wait(STOP_LIMIT).unwrap();
        assert!(status.success(), "{status}");
        assert!(second.elapsed() < Duration::from_secs(5), "{:?}", second.elapsed());
    });
    publisher.flush(SOON).unwrap();
    world.postgres.thaw();
    world.node.start().unwrap();
    world.subscribed();
    assert_all_rows(&world, count);
}

#[test]
fn a_drain_that_gets_nowhere_ends_at_its_limit_and_what_is_pending_stays() {
    let limit = Duration::from_secs(3);
    let mut world = World::prepare(Changes::default());
    let config = world.node.config().to_owned();
    let text = std::fs::read_to_string(&config).unwrap();
    let setting = format!("[node]\ndrain_timeout_seconds = {}", limit.as_secs());
    std::fs::write(&config, text.replacen("[node]", &setting, 1)).unwrap();
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    world.subscribed();
    world.postgres.freeze();
    let publisher = world.publisher();
    for count in 0..100 {
        publisher.publish("energy", "saveeye/telemetry", reading(count));
    }
    publisher.flush(SOON).unwrap();
    let asked = Instant::now();
    let status = world.node.stop(STOP_LIMIT).unwrap();
    let took = asked.elapsed();
    assert!(status.success(), "{status}");
    assert!(took >= limit && took < limit + Duration::from_secs(10), "{took:?}");
    assert!(world.node.log_text().contains("\"drain_deadline\""), "{}", world.node.log_text());
    world.postgres.thaw();
    world.node.start().unwrap();
    eventually(SOON, "all rows", || world.count("telemetry", "energy_consumption") == 100);
    world.drained(SOON);
}

#[test]
fn a_liveness_probe_answers_while_everything_outside_hangs() {
    /// Whoever asks what is frozen waits longer than this.
    const PROBE_LIMIT: Duration = Duration::from_secs(2);
    let extra = "[brokers.home]\nkeepalive_seconds = 5\n\
                 [databases.telemetry]\nstatement_timeout_seconds = 5\n";
    let world = World::start(Changes { extra: extra.to_owned(), ..Changes::default() });
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(0));
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    world.postgres.freeze();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "a row waits for the database", || {
        world.sink("energy", "energy_consumption")["pending"] == 1
    });
    world.mosquitto.freeze();
    eventually(SOON, "both are said to be away", || {
        let asked = Instant::now();
        let answer = world.node.get("/health/live").unwrap();
        assert_eq!(answer.status, 200);
        assert!(asked.elapsed() < PROBE_LIMIT, "{:?}", asked.elapsed());
        let health = world.node.get("/health").unwrap().json().unwrap();
        let away = |name: &str| health["dependencies"][name]["up"] == false;
        away("mqtt:home") && away("postgresql:telemetry")
    });
    world.postgres.thaw();
    world.mosquitto.thaw();
}
