//! What the service manager is told, read at its end of the socket.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use rig::{Folder, Signal, eventually};

use crate::world::{Changes, SOON, World};

/// `drain_timeout_seconds` of the example, and what may pass after it.
const STOP_LIMIT: Duration = Duration::from_secs(20 + 5);

struct Manager {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl Manager {
    fn listen(path: &std::path::Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Manager { socket, heard: Vec::new() }
    }

    /// Waits until it has heard this; messages before it are forgotten.
    #[track_caller]
    fn hears(&mut self, words: &str) -> String {
        eventually(SOON, format!("the service manager hears {words}"), || {
            let mut buffer = [0; 4096];
            while let Ok(length) = self.socket.recv(&mut buffer) {
                self.heard.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
            }
            self.heard.iter().any(|message| message.contains(words))
        });
        let place = self.heard.iter().position(|message| message.contains(words)).unwrap();
        self.heard.drain(..=place).next_back().unwrap()
    }
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
}
