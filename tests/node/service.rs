//! What the service manager is told, read at its end of the socket.

use std::time::{Duration, Instant};

use rig::{Folder, Signal, eventually};

use crate::manager::Manager;
use crate::world::{Changes, SOON, World};

/// `drain_timeout_seconds` of the example, and what may pass after it.
const STOP_LIMIT: Duration = Duration::from_secs(20 + 5);

/// Of a sync that does not return.
const HANG: Duration = Duration::from_secs(20);

#[test]
fn a_disk_that_hangs_is_told_and_does_not_feed_the_watchdog() {
    let folder = Folder::new(None, "manager").unwrap();
    let path = folder.join("notify");
    let mut manager = Manager::listen(&path);
    let mut world = World::prepare(Changes {
        // The second group is not synced for a while, and every one after it is.
        failpoints: format!("buffer_sync=1*off->1*sleep({})->off", HANG.as_millis()),
        extra: "[supervision]\nstall_timeout_seconds = 5\n".to_owned(),
        environment: vec![("WATCHDOG_USEC".to_owned(), "1000000".to_owned())],
        notify_socket: path.display().to_string(),
        ..Changes::default()
    });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    let publish = |count: u64| {
        let reading = format!(
            r#"{{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {{"total": 1}},
                "activeTotalConsumption": {{"total": {count}}}}}"#
        );
        publisher.publish("energy", "saveeye/telemetry", reading);
    };
    publish(1);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the first is durable", || {
        world.sink("energy", "energy_consumption")["pending"] == 0
    });
    manager.hears("WATCHDOG=1");
    publish(2);
    let hung = Instant::now();
    eventually(SOON, "the hang is told", || world.node.log_text().contains("buffer_stalled"));
    // What was said before the limit.
    manager.collect();
    manager.heard.clear();
    while hung.elapsed() < HANG - Duration::from_secs(5) {
        manager.collect();
        let fed = manager.heard.iter().any(|message| message.contains("WATCHDOG=1"));
        assert!(!fed, "fed after {:?}", hung.elapsed());
        std::thread::sleep(Duration::from_millis(100));
    }
    eventually(SOON, "it is over", || world.node.log_text().contains("buffer_moves"));
    manager.hears("WATCHDOG=1");
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), 2);
}

#[test]
fn the_service_manager_hears_of_start_change_stop_and_of_a_long_recovery() {
    let folder = Folder::new(None, "manager").unwrap();
    let path = folder.join("notify");
    let mut manager = Manager::listen(&path);
    let mut world = World::prepare(Changes {
        // Only a start that finds generations comes here.
        failpoints: "recovery_generation=sleep(7000)".to_owned(),
        notify_socket: path.display().to_string(),
        ..Changes::default()
    });
    world.node.start().unwrap();
    assert!(manager.hears("READY=1").contains("STATUS=accepting"));
    manager.hears("STATUS=accepting; 5 of 5 streams subscribed");
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", "{");
    eventually(SOON, "a dead letter is kept", || {
        world.books("energy", "energy_consumption", "dead_lettered") == 1
    });
    world.node.signal(Signal::HUP).unwrap();
    assert!(manager.hears("RELOADING=1").contains("MONOTONIC_USEC="));
    manager.hears("READY=1");
    world.postgres.freeze();
    world.mosquitto.kill();
    manager.hears("STATUS=accepting; 0 of 5 streams subscribed");
    world.postgres.thaw();
    assert!(world.node.stop(STOP_LIMIT).unwrap().success());
    let stopping = manager.hears("STOPPING=1");
    // 20 s of drain and what comes after it: systemd must not be quicker.
    assert!(stopping.contains("EXTEND_TIMEOUT_USEC=46000000"), "{stopping}");

    world.node.start().unwrap();
    let recovering = manager.hears("EXTEND_TIMEOUT_USEC");
    assert!(
        recovering.contains("STATUS=recovering the buffer, generations read: 1"),
        "{recovering}"
    );
    assert!(!manager.heard.iter().any(|message| message.contains("EXTEND_TIMEOUT_USEC")));
    manager.hears("READY=1");

    world.node.kill();
    world.node.set_failpoints("salvage_copied=sleep(7000)");
    world.node.start().unwrap();
    let recovering = manager.hears("EXTEND_TIMEOUT_USEC");
    assert!(recovering.contains("generations read: 0"), "before the generations: {recovering}");
    manager.hears("READY=1");
}
