//! A TCP connection with the faults of a network: everything of one server passes through here.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::background::{block_on, spawn};
use crate::ports::free_port;

/// Bytes that go on at once; a slow link carries them in pieces of a tenth of a second.
const PIECE_BYTES: usize = 16 * 1024;
const SLOW_PIECES_A_SECOND: usize = 10;

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Link {
    #[default]
    Fine,
    /// Nothing arrives, in neither direction, and nobody is told.
    BlackHole,
    /// What the client sends does not arrive.
    SilentToServer,
    /// What the server sends does not arrive.
    SilentToClient,
    /// So many bytes a second each way.
    Slow(usize),
    /// The first bytes, wherever the client sends them, arrive as the second.
    Replacing(&'static [u8], &'static [u8]),
    /// What a client sends does not arrive from the piece on that holds these bytes.
    Withholding(&'static [u8]),
    /// Carries so many bytes of what a client sends, and ends that connection by a reset.
    Cutting(usize),
}

impl Link {
    fn carries(self, direction: Direction) -> bool {
        match (self, direction) {
            (Link::SilentToServer, direction) => direction == Direction::ToClient,
            (Link::SilentToClient, direction) => direction == Direction::ToServer,
            (Link::BlackHole, _) => false,
            _ => true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

#[derive(Debug, Clone, Copy, Default)]
struct Weather {
    link: Link,
    /// Connections made before the last change of this are reset.
    resets: u64,
}

/// Listens on a port of its own and carries each connection to the server's.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    weather: watch::Sender<Weather>,
    replaced: Arc<AtomicU64>,
}

impl Proxy {
    /// For the server on this port of 127.0.0.1, which may come later.
    ///
    /// # Errors
    /// When there is no port to listen on.
    pub fn start(server_port: u16) -> Result<Self> {
        let port = free_port();
        let listener = block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
        let listener = listener.with_context(|| format!("listen on port {port}"))?;
        let (weather, seen) = watch::channel(Weather::default());
        let replaced = Arc::default();
        spawn(accept(listener, server_port, seen, Arc::clone(&replaced)));
        Ok(Self { port, weather, replaced })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on, for open connections and new ones. What was held back goes on when the link is fine again.
    pub fn set(&self, link: Link) {
        self.weather.send_modify(|weather| weather.link = link);
    }

    /// How many pieces of what clients send arrived as another.
    pub fn replaced(&self) -> u64 {
        self.replaced.load(Ordering::Relaxed)
    }

    /// Ends every open connection by a reset, wherever it is in what it says.
    pub fn reset(&self) {
        self.weather.send_modify(|weather| weather.resets += 1);
    }
}

/// Until the proxy is dropped.
async fn accept(
    listener: TcpListener,
    server_port: u16,
    mut weather: watch::Receiver<Weather>,
    counter: Arc<AtomicU64>,
) {
    loop {
        tokio::select! {
            changed = weather.changed() => if changed.is_err() { return },
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    spawn(carry(client, server_port, weather.clone(), counter.clone()));
                }
                Err(_) => sleep(Duration::from_millis(10)).await,
            },
        }
    }
}

async fn carry(
    mut client: TcpStream,
    server_port: u16,
    mut weather: watch::Receiver<Weather>,
    counter: Arc<AtomicU64>,
) {
    let born = weather.borrow().resets;
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, server_port)).await;
    let Ok(mut server) = server else {
        // As a server that is away, as far as that can be told after the handshake.
        return drop(client.set_zero_linger());
    };
    let _ = client.set_nodelay(true).and(server.set_nodelay(true));
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let up = pump(from_client, to_server, Direction::ToServer, weather.clone(), &counter);
    let down = pump(from_server, to_client, Direction::ToClient, weather.clone(), &counter);
    let whole = tokio::select! {
        ended = async { tokio::try_join!(up, down) } => ended.is_ok(),
        _ = weather.wait_for(|weather| weather.resets != born) => false,
    };
    if !whole {
        let _ = client.set_zero_linger().and(server.set_zero_linger());
    }
}

/// One direction, until its sender has said all.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    direction: Direction,
    mut weather: watch::Receiver<Weather>,
    counter: &AtomicU64,
) -> std::io::Result<()> {
    let mut bytes = vec![0; PIECE_BYTES];
    let mut carried = 0;
    loop {
        let link = weather.borrow_and_update().link;
        let piece = match link {
            Link::Slow(rate) => (rate / SLOW_PIECES_A_SECOND).clamp(1, PIECE_BYTES),
            _ => PIECE_BYTES,
        };
        let count = from.read(&mut bytes[..piece]).await?;
        let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let seen = weather.wait_for(|weather| weather.link.carries(direction)).await;
        let link = seen.map_err(gone)?.link;
        if matches!(link, Link::Slow(_)) {
            sleep(Duration::from_secs(1) / SLOW_PIECES_A_SECOND as u32).await;
        }
        if count == 0 {
            return to.shutdown().await;
        }
        match link {
            Link::Cutting(limit) if direction == Direction::ToServer => {
                carried += count;
                if carried > limit {
                    return Err(std::io::ErrorKind::ConnectionReset.into());
                }
                to.write_all(&bytes[..count]).await?;
            }
            Link::Withholding(what)
                if direction == Direction::ToServer && holds(&bytes[..count], what) =>
            {
                weather.wait_for(|weather| weather.link != link).await.map_err(gone)?;
                to.write_all(&bytes[..count]).await?;
            }
            Link::Replacing(what, by) if direction == Direction::ToServer => {
                let other = replaced(&bytes[..count], what, by);
                counter.fetch_add(u64::from(other != bytes[..count]), Ordering::Relaxed);
                to.write_all(&other).await?;
            }
            _ => to.write_all(&bytes[..count]).await?,
        }
    }
}

fn holds(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

/// What is cut in two by the end of a piece stays as it is.
fn replaced(bytes: &[u8], what: &[u8], by: &[u8]) -> Vec<u8> {
    let mut result = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(first) = rest.first() {
        match rest.strip_prefix(what) {
            Some(behind) if !what.is_empty() => {
                result.extend_from_slice(by);
                rest = behind;
            }
            _ => {
                result.push(*first);
                rest = &rest[1..];
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    /// What does not arrive within this time is held back.
    const SHORT: Duration = Duration::from_millis(200);
    /// What is to arrive may take so long on a busy machine.
    const LONG: Duration = Duration::from_secs(20);

    /// The proxy and the test as its server.
    struct Net {
        proxy: Proxy,
        listener: TcpListener,
    }

    impl Net {
        fn new() -> Self {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let proxy = Proxy::start(listener.local_addr().unwrap().port()).unwrap();
            Net { proxy, listener }
        }

        /// The client's end of a new connection, and the server's.
        fn connect(&self) -> (TcpStream, TcpStream) {
            let client = TcpStream::connect((Ipv4Addr::LOCALHOST, self.proxy.port())).unwrap();
            (client, self.listener.accept().unwrap().0)
        }
    }

    fn read_within(time: Duration, end: &mut TcpStream, count: usize) -> Result<String, ErrorKind> {
        end.set_read_timeout(Some(time)).unwrap();
        let mut bytes = vec![0; count];
        end.read_exact(&mut bytes).map_err(|error| error.kind())?;
        Ok(String::from_utf8(bytes).unwrap())
    }

    #[track_caller]
    fn arrives(end: &mut TcpStream, words: &str) {
        assert_eq!(read_within(LONG, end, words.len()).as_deref(), Ok(words));
    }

    #[track_caller]
    fn is_silent(end: &mut TcpStream) {
        assert_eq!(read_within(SHORT, end, 1), Err(ErrorKind::WouldBlock));
    }

    #[track_caller]
    fn is_reset(end: &mut TcpStream) {
        assert_eq!(read_within(LONG, end, 1), Err(ErrorKind::ConnectionReset));
    }

    #[test]
    fn each_link_carries_in_its_directions_alone_and_nobody_is_told() {
        let links = [
            (Link::Fine, true, true),
            (Link::BlackHole, false, false),
            (Link::SilentToServer, false, true),
            (Link::SilentToClient, true, false),
        ];
        for (link, to_server, to_client) in links {
            println!("{link:?}");
            let net = Net::new();
            let (mut client, mut server) = net.connect();
            net.proxy.set(link);
            client.write_all(b"to the server").unwrap();
            server.write_all(b"to the client").unwrap();
            let ends = [
                (&mut server, to_server, "to the server"),
                (&mut client, to_client, "to the client"),
            ];
            let held_back = ends.into_iter().filter_map(|(end, carried, words)| {
                if carried {
                    arrives(end, words)
                } else {
                    is_silent(end)
                }
                (!carried).then_some((end, words))
            });
            let held_back: Vec<_> = held_back.collect();
            net.proxy.set(Link::Fine);
            held_back.into_iter().for_each(|(end, words)| arrives(end, words));
        }
    }

    #[test]
    fn a_slow_link_takes_its_time_each_way() {
        let net = Net::new();
        net.proxy.set(Link::Slow(4_000));
        let words = "x".repeat(2_000);
        let (client, server) = net.connect();
        for (mut from, mut to) in
            [(&client, server.try_clone().unwrap()), (&server, client.try_clone().unwrap())]
        {
            let began = Instant::now();
            from.write_all(words.as_bytes()).unwrap();
            arrives(&mut to, &words);
            assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());
        }
    }

    #[test]
    fn what_is_withheld_arrives_with_all_behind_it_once_the_link_is_fine() {
        let net = Net::new();
        net.proxy.set(Link::Withholding(b"secret"));
        let (mut one, mut ones_server) = net.connect();
        let (mut other, mut others_server) = net.connect();
        one.write_all(b"a secret").unwrap();
        is_silent(&mut ones_server);
        one.write_all(b" and more").unwrap();
        is_silent(&mut ones_server);
        ones_server.write_all(b"a secret").unwrap();
        arrives(&mut one, "a secret");
        other.write_all(b"nothing of the kind").unwrap();
        arrives(&mut others_server, "nothing of the kind");
        net.proxy.set(Link::Fine);
        arrives(&mut ones_server, "a secret and more");
    }

    #[test]
    fn a_cutting_link_ends_a_connection_behind_so_much_of_what_its_client_sends() {
        let net = Net::new();
        net.proxy.set(Link::Cutting(6));
        for _ in 0..2 {
            let (mut client, mut server) = net.connect();
            server.write_all(b"more than six bytes").unwrap();
            arrives(&mut client, "more than six bytes");
            client.write_all(b"three").unwrap();
            arrives(&mut server, "three");
            client.write_all(b"four").unwrap();
            is_reset(&mut client);
            is_reset(&mut server);
        }
    }

    #[test]
    fn what_is_to_be_replaced_is_and_the_rest_stays() {
        assert_eq!(replaced(b"a COMMIT, COMMIT", b"COMMIT", b"ROLLBACK"), b"a ROLLBACK, ROLLBACK");
        assert_eq!(replaced(b"COMMI", b"COMMIT", b"ROLLBACK"), b"COMMI");
        let net = Net::new();
        net.proxy.set(Link::Replacing(b"COMMIT", b"ROLLBACK"));
        let (mut client, mut server) = net.connect();
        client.write_all(b"COMMIT;").unwrap();
        arrives(&mut server, "ROLLBACK;");
        server.write_all(b"COMMIT;").unwrap();
        arrives(&mut client, "COMMIT;");
    }

    #[test]
    fn a_reset_ends_what_is_open_and_nothing_later() {
        let net = Net::new();
        let (mut client, mut server) = net.connect();
        client.write_all(b"before").unwrap();
        arrives(&mut server, "before");
        net.proxy.reset();
        is_reset(&mut client);
        is_reset(&mut server);
        let (mut client, mut server) = net.connect();
        client.write_all(b"after").unwrap();
        arrives(&mut server, "after");
    }
}
