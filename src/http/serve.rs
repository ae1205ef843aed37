//! The two listeners and their bounds.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix_web::dev::ServerHandle;
use actix_web::{App, HttpServer, web};

use super::control::{self, Caller, ControlState};
use super::probes;
use crate::observe::Board;

/// Threads of the TCP listener: two, so that a slow scrape never stands before a liveness probe.
const WORKERS: usize = 2;

/// Connections per worker: probes, a scraper, a few people.
const CONNECTIONS_MAX: usize = 256;

/// The head of a request must be there by then.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest body of an order.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A listener that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("cannot listen on {listen}: {problem}; choose a free address in [http] listen")]
    Listen { listen: SocketAddr, problem: std::io::Error },
    #[error("cannot open the control socket {}: {problem}", path.display())]
    Socket { path: PathBuf, problem: std::io::Error },
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

/// Opens both listeners, each with its own runtime on its own thread: a busy data path cannot delay a probe.
pub async fn serve(
    listen: SocketAddr,
    socket: &Path,
    board: Arc<Board>,
    state: ControlState,
) -> Result<Server, HttpError> {
    let tcp_board = board.clone();
    let (address, tcp) = on_own_thread("http", move || {
        let server = HttpServer::new(move || {
            App::new().app_data(web::Data::from(tcp_board.clone())).configure(probes::routes)
        })
        .workers(WORKERS)
        .max_connections(CONNECTIONS_MAX)
        .client_request_timeout(HEAD_TIMEOUT)
        .shutdown_timeout(1)
        .disable_signals()
        .bind(listen)
        .map_err(|problem| HttpError::Listen { listen, problem })?;
        let address = server.addrs().first().copied().unwrap_or(listen);
        let server = server.run();
        Ok((address, server.handle(), server))
    })
    .await?;
    let path = socket.to_owned();
    let ((), uds) = on_own_thread("control", move || {
        let problem = |problem| HttpError::Socket { path: path.clone(), problem };
        // What a killed node left behind; a living one holds the lock of the state directory, so this is ours.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(problem(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(problem)?;
        let state = web::Data::new(state);
        let server = HttpServer::new(move || {
            App::new()
                .app_data(web::Data::from(board.clone()))
                .app_data(state.clone())
                .app_data(web::JsonConfig::default().limit(BODY_BYTES_MAX))
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
            let uid = socket.and_then(|socket| socket.peer_cred().ok()).map(|peer| peer.uid());
            data.insert(Caller { uid });
        })
        .listen_uds(listener)
        .map_err(problem)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(problem)?;
        let server = server.run();
        Ok(((), server.handle(), server))
    })
    .await?;
    Ok(Server { address, handles: vec![tcp, uds] })
}

/// `open` runs on the new thread, inside its runtime; what it reports comes back before this returns.
async fn on_own_thread<T: Send + 'static>(
    name: &str,
    open: impl FnOnce() -> Result<(T, ServerHandle, actix_web::dev::Server), HttpError> + Send + 'static,
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
