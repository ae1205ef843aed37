//! How many connections one address may hold at a time, so that no single peer can take them all.

use std::any::Any;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actix_rt::net::TcpStream;
use actix_tls::accept::rustls_0_23::TlsStream;
use actix_web::dev::Extensions;
use rustix::net::Shutdown;

use super::limiter::network;
use crate::observe::{HttpMeters, Seldom};

/// The open connections of every address.
#[derive(Debug)]
pub struct Crowd {
    connections_max: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
    meters: HttpMeters,
    told: Seldom,
}

/// One connection's place; given back when it is dropped, with the connection.
#[derive(Debug)]
struct Seat {
    crowd: Arc<Crowd>,
    address: IpAddr,
}

impl Crowd {
    pub fn new(connections_max: usize, meters: HttpMeters) -> Arc<Self> {
        Arc::new(Crowd { connections_max, open: Mutex::default(), meters, told: Seldom::default() })
    }

    /// Called for each new connection (after the handshake, with TLS): one too many is closed before it is read.
    pub fn receive(self: &Arc<Self>, connection: &dyn Any, data: &mut Extensions) {
        let Some(socket) = socket(connection) else { return };
        let Ok(peer) = socket.peer_addr() else { return };
        match self.enter(peer.ip()) {
            Some(seat) => drop(data.insert(seat)),
            None => {
                // A socket that is already gone needs no closing.
                let _ = rustix::net::shutdown(socket, Shutdown::Both);
                self.tell(peer.ip());
            }
        }
    }

    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Seat> {
        let address = network(address);
        let mut open = self.open();
        let count = open.entry(address).or_default();
        if *count >= self.connections_max {
            return None;
        }
        *count += 1;
        Some(Seat { crowd: self.clone(), address })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, peer: IpAddr) {
        self.meters.refused_connections.inc();
        if let Some(connections) = self.told.due() {
            tracing::warn!(
                event = "http_crowded",
                %peer,
                connections,
                limit = self.connections_max,
                "an address has too many connections, new ones were closed; this line comes at most once a minute"
            );
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.crowd.open();
        if let Some(count) = open.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.address);
            }
        }
    }
}

fn socket(connection: &dyn Any) -> Option<&TcpStream> {
    let secure = || connection.downcast_ref::<TlsStream<TcpStream>>().map(|tls| tls.get_ref().0);
    connection.downcast_ref::<TcpStream>().or_else(secure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_its_own_places_and_gets_them_back() {
        let crowd = Crowd::new(2, HttpMeters::default());
        let (here, there) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into());
        let seats = [crowd.enter(here).unwrap(), crowd.enter(here).unwrap()];
        assert!(crowd.enter(here).is_none());
        let other = crowd.enter(there).unwrap();
        drop(seats);
        assert_eq!(crowd.open().len(), 1, "an address without connections is forgotten");
        assert!(crowd.enter(here).is_some());
        drop(other);
    }
}
