//! The two listeners and their bounds.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix_web::dev::ServerHandle;
use actix_web::middleware::from_fn;
use actix_web::{App, HttpServer, web};

use super::control::{self, ControlState, Peer};
use super::correlation::correlate;
use super::crowd::Crowd;
use super::guard::{Guard, guard};
use super::{certificate, probes};
use crate::config::HttpSettings;
use crate::observe::Board;
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

/// A listener that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("cannot listen on {listen}: {problem}; choose a free address in [http] listen")]
    Listen { listen: SocketAddr, problem: std::io::Error },
    #[error("cannot open the control socket {}: {problem}", path.display())]
    Socket { path: PathBuf, problem: std::io::Error },
    #[error("[http.tls]: {0}")]
    Certificate(#[from] TlsError),
    #[error("the thread of the HTTP server ended before it answered")]
    Thread,
}

/// The running listeners.
pub struct Server {
    pub address: SocketAddr,
    handles: Vec<ServerHandle>,
}

impl Server {
    /// Ends both listeners; requests under way get a second.
    pub async fn stop(self) {
        for handle in self.handles {
            handle.stop(true).await;
        }
    }
}

/// Opens both listeners, each with its own runtime on its own thread: a busy data path cannot delay a probe. Tokens and
/// the control socket are files of that name in `state_dir`.
pub async fn serve(
    settings: &HttpSettings,
    state_dir: &Path,
    board: Arc<Board>,
    state: ControlState,
) -> Result<Server, HttpError> {
    let (own, path, tcp_board, tcp_state) =
        (settings.clone(), state_dir.to_owned(), board.clone(), state.clone());
    let (address, tcp) =
        on_own_thread("http", move || open_tcp(&own, &path, tcp_board, tcp_state)).await?;
    let socket = state_dir.join(super::CONTROL_SOCKET);
    let ((), uds) = on_own_thread("control", move || open_socket(socket, board, state)).await?;
    Ok(Server { address, handles: vec![tcp, uds] })
}

type Opened<T> = Result<(T, ServerHandle, actix_web::dev::Server), HttpError>;

fn open_tcp(
    settings: &HttpSettings,
    state_dir: &Path,
    board: Arc<Board>,
    state: ControlState,
) -> Opened<SocketAddr> {
    let shared = web::Data::new(Guard::new(settings, state_dir, board.http_meters.clone()));
    let crowd = Crowd::new(settings.connections_per_peer_max, board.http_meters.clone());
    let state = web::Data::new(state);
    let listen = settings.listen;
    let problem = |problem| HttpError::Listen { listen, problem };
    let server = HttpServer::new(move || {
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
    let listener = bounded_listener(listen).map_err(problem)?;
    let server = match &settings.certificate {
        None => server.listen(listener),
        Some(files) => server.listen_rustls_0_23(listener, certificate::server_config(files)?),
    };
    let server = server.map_err(problem)?;
    let address = server.addrs().first().copied().unwrap_or(listen);
    let server = server.run();
    Ok((address, server.handle(), server))
}

/// What is accepted on it inherits the limit.
fn bounded_listener(listen: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(listen)?;
    let milliseconds = u32::try_from(UNREAD_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(&listener, milliseconds)?;
    Ok(listener)
}

fn open_socket(path: PathBuf, board: Arc<Board>, state: ControlState) -> Opened<()> {
    let problem = |problem| HttpError::Socket { path: path.clone(), problem };
    // What a killed node left behind; a living one holds the lock of the state directory, so this is ours.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(problem(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(problem)?;
    let state = web::Data::new(state);
    let server = HttpServer::new(move || {
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
    })
    .listen_uds(listener)
    .map_err(problem)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(problem)?;
    let server = server.run();
    Ok(((), server.handle(), server))
}

/// `open` runs on the new thread, inside its runtime; what it reports comes back before this returns.
async fn on_own_thread<T: Send + 'static>(
    name: &str,
    open: impl FnOnce() -> Opened<T> + Send + 'static,
) -> Result<(T, ServerHandle), HttpError> {
    let (tell, told) = tokio::sync::oneshot::channel();
    let run = move || {
        actix_rt::System::new().block_on(async move {
            match open() {
                Err(error) => {
                    let _ = tell.send(Err(error));
                }
                Ok((what, handle, server)) => {
                    let _ = tell.send(Ok((what, handle)));
                    if let Err(error) = server.await {
                        tracing::error!(event = "http_failed", %error, "an HTTP listener ended");
                    }
                }
            }
        });
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|_| HttpError::Thread)?;
    told.await.map_err(|_| HttpError::Thread)?
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
