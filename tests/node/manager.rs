//! The service manager's end of the socket.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use rig::eventually;

use crate::world::SOON;

pub struct Manager {
    socket: UnixDatagram,
    pub heard: Vec<String>,
}

impl Manager {
    pub fn listen(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Manager { socket, heard: Vec::new() }
    }

    pub fn collect(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            self.heard.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
    }

    /// Waits until it has heard this; messages before it are forgotten.
    #[track_caller]
    pub fn hears(&mut self, words: &str) -> String {
        eventually(SOON, format!("the service manager hears {words}"), || {
            self.collect();
            self.heard.iter().any(|message| message.contains(words))
        });
        let place = self.heard.iter().position(|message| message.contains(words)).unwrap();
        self.heard.drain(..=place).next_back().unwrap()
    }

    /// Waits until the watchdog was not fed for this long: the manager ends a process then.
    #[track_caller]
    pub fn has_had_enough(&mut self, limit: Duration) {
        let mut fed = Instant::now();
        eventually(SOON, "the watchdog has had enough", || {
            self.heard.clear();
            self.collect();
            if self.heard.iter().any(|message| message.contains("WATCHDOG=1")) {
                fed = Instant::now();
            }
            fed.elapsed() > limit
        });
    }
}
