//! The two listeners and their bounds.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix_web::dev::Server;
use actix_web::middleware::from_fn;
use actix_web::{App, HttpServer, web};

use super::control::{self, ControlState, Peer};
use super::correlation::correlate;
use super::crowd::Crowd;
use super::guard::{Guard, guard};
use super::{certificate, probes};
use crate::config::HttpSettings;
use crate::crash::part_point;
use crate::observe::Board;
use crate::part::{Control, Part, PartResult, Phase, Progress};
use crate::tls::TlsError;

/// Threads of the TCP listener: two, so that a slow scrape never stands before a liveness probe.
const WORKERS: usize = 2;

/// Connections per worker: probes, a scraper, a few people.
const CONNECTIONS_MAX: usize = 256;

/// The head of a request must be there by then.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest body of an order.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A peer that does not read its answer is disconnected by the kernel after this.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a worker shows that it gets round to its connections.
const TURN: Duration = Duration::from_secs(1);

/// A listener that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("cannot listen on {listen}: {problem}; choose a free address in [http] listen")]
    Listen { listen: SocketAddr, problem: std::io::Error },
    #[error("cannot open the control socket {}: {problem}", path.display())]
    Socket { path: PathBuf, problem: std::io::Error },
    #[error("[http.tls]: {0}")]
    Certificate(#[from] TlsError),
    #[error("{name} ended without being told to")]
    Ended { name: &'static str },
}

type Open = dyn Fn(&Control) -> std::io::Result<Server> + Send + Sync;

/// One listener, as often as it takes: its socket stays open over all its lives, so that whoever connects between two of
/// them waits instead of being refused.
#[derive(Clone)]
pub struct Listener {
    pub name: &'static str,
    open: Arc<Open>,
}

impl Part for Listener {
    /// Answers until everything else has ended. Dropping the server closes what it has of the socket and leaves workers
    /// that do not end behind.
    async fn run(self, mut control: Control) -> PartResult {
        control.progress.set_work_waiting(true);
        let mut server = (self.open)(&control)?;
        part_point(|| format!("part_listener_{}", self.name)).await;
        control.progress.set_work_waiting(false);
        while control.phase() != Phase::Stopping {
            tokio::select! {
                ended = &mut server => {
                    ended?;
                    return Err(HttpError::Ended { name: self.name }.into());
                }
                () = control.changed() => {}
            }
        }
        let told = server.handle().stop(true);
        tokio::select! {
            _ = &mut server => {}
            () = told => {}
        }
        Ok(())
    }
}

/// The two listeners.
pub struct Listeners {
    pub address: SocketAddr,
    pub parts: [Listener; 2],
}

/// Opens both sockets; what answers on them are parts of their own, so that a worker that hangs is seen and left. Tokens
/// and the control socket are files of that name in `state_dir`.
pub fn listen(
    settings: &HttpSettings,
    state_dir: &Path,
    board: &Arc<Board>,
    state: &ControlState,
) -> Result<Listeners, HttpError> {
    let (address, tcp) = tcp(settings, state_dir, board.clone(), state.clone())?;
    let socket = state_dir.join(super::CONTROL_SOCKET);
    let control = control_socket(socket, board.clone(), state.clone())?;
    Ok(Listeners { address, parts: [tcp, control] })
}

/// Beats on the worker's own thread for as long as the worker lives.
fn beat(progress: Arc<Progress>) {
    struct Alive(Arc<Progress>);
    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.set_work_waiting(false);
        }
    }
    let alive = Alive(progress);
    alive.0.set_work_waiting(true);
    actix_rt::spawn(async move {
        loop {
            alive.0.beat();
            tokio::time::sleep(TURN).await;
        }
    });
}

fn tcp(
    settings: &HttpSettings,
    state_dir: &Path,
    board: Arc<Board>,
    state: ControlState,
) -> Result<(SocketAddr, Listener), HttpError> {
    let shared = web::Data::new(Guard::new(settings, state_dir, board.http_meters.clone()));
    let crowd = Crowd::new(settings.connections_per_peer_max, board.http_meters.clone());
    let state = web::Data::new(state);
    let listen = settings.listen;
    let problem = |problem| HttpError::Listen { listen, problem };
    let listener = bounded_listener(listen).map_err(problem)?;
    let address = listener.local_addr().map_err(problem)?;
    let secured = settings.certificate.as_ref().map(certificate::server_config).transpose()?;
    let open = move |control: &Control| {
        let (board, shared, state) = (board.clone(), shared.clone(), state.clone());
        let (crowd, control) = (crowd.clone(), control.clone());
        let server = HttpServer::new(move || {
            beat(control.beside().progress);
            App::new()
                .app_data(web::Data::from(board.clone()))
                .app_data(shared.clone())
                .app_data(state.clone())
                .app_data(web::JsonConfig::default().limit(BODY_BYTES_MAX))
                .app_data(web::PayloadConfig::new(BODY_BYTES_MAX))
                .wrap(from_fn(guard))
                .wrap(from_fn(correlate))
                .configure(probes::routes)
                .configure(control::routes)
        })
        .workers(WORKERS)
        .max_connections(CONNECTIONS_MAX)
        .client_request_timeout(HEAD_TIMEOUT)
        .shutdown_timeout(1)
        .disable_signals()
        .on_connect(move |connection, data| crowd.receive(connection, data));
        let listener = listener.try_clone()?;
        let server = match &secured {
            None => server.listen(listener),
            Some(secured) => server.listen_rustls_0_23(listener, secured.clone()),
        };
        Ok(server?.run())
    };
    Ok((address, Listener { name: "http", open: Arc::new(open) }))
}

/// What is accepted on it inherits the limit.
fn bounded_listener(listen: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(listen)?;
    let milliseconds = u32::try_from(UNREAD_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(&listener, milliseconds)?;
    Ok(listener)
}

fn control_socket(
    path: PathBuf,
    board: Arc<Board>,
    state: ControlState,
) -> Result<Listener, HttpError> {
    let problem = |problem| HttpError::Socket { path: path.clone(), problem };
    // What a killed node left behind; a living one holds the lock of the state directory, so this is ours.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(problem(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(problem)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(problem)?;
    let state = web::Data::new(state);
    let open = move |control: &Control| {
        let (board, state, control) = (board.clone(), state.clone(), control.clone());
        let server = HttpServer::new(move || {
            beat(control.beside().progress);
            App::new()
                .app_data(web::Data::from(board.clone()))
                .app_data(state.clone())
                .app_data(web::JsonConfig::default().limit(BODY_BYTES_MAX))
                .wrap(from_fn(correlate))
                .configure(probes::routes)
                .configure(control::routes)
        })
        .workers(1)
        .max_connections(CONNECTIONS_MAX)
        .client_request_timeout(HEAD_TIMEOUT)
        .shutdown_timeout(1)
        .disable_signals()
        .on_connect(|connection, data| {
            let socket = connection.downcast_ref::<actix_rt::net::UnixStream>();
            if let Some(peer) = socket.and_then(|socket| socket.peer_cred().ok()) {
                data.insert(Peer { uid: peer.uid() });
            }
        });
        Ok(server.listen_uds(listener.try_clone()?)?.run())
    };
    Ok(Listener { name: "control", open: Arc::new(open) })
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn an_accepted_connection_may_not_leave_its_answer_unread_for_ever() {
        let listener = bounded_listener(([127, 0, 0, 1], 0).into()).unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let limit = rustix::net::sockopt::tcp_user_timeout(&accepted).unwrap();
        assert_eq!(u128::from(limit), UNREAD_TIMEOUT.as_millis());
    }
}
