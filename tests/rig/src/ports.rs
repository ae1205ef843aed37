//! Free ports on the loopback interface.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{LazyLock, Mutex};

use rand::Rng;

/// Below the range the kernel takes outgoing ports from. A port inside it could be taken by any connection while its
/// server is down, and a client that dials it in vain can even end up connected to itself.
const RANGE: std::ops::Range<u16> = 12_000..32_000;

static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);

/// A port on 127.0.0.1 that nobody listens on now and that this process has not given out before.
///
/// # Panics
/// When none of many tries is free.
pub fn free_port() -> u16 {
    let mut given = GIVEN.lock().expect("no holder of the lock panics");
    for _ in 0..10_000 {
        let port = rand::rng().random_range(RANGE);
        if !given.contains(&port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            given.insert(port);
            return port;
        }
    }
    panic!("no free port between {} and {}", RANGE.start, RANGE.end);
}
