//! What the node tells over HTTP, read from the board. Two listeners, parts on threads of
//! their own, serve the same routes.
//! The control socket in the state directory, which only the node's own user and root can open, answers everything. On
//! TCP (loopback by default) a guard stands before the routes: orders need a token, and away from loopback everything
//! but the probes does.

mod certificate;
mod control;
mod correlation;
mod crowd;
mod dead_letters;
mod guard;
mod limiter;
mod probes;
mod routes;
mod serve;
mod tokens;

pub use control::{ControlState, Reload, ReloadRequest};
pub use dead_letters::{DeadLetters, Orderer, Replay, ReplayError, ReplayRequest, ReplayResult};
pub use routes::{Access, ROUTES, Scope};
pub use serve::{HttpError, Listener, Listeners, listen};
pub use tokens::{Token, TokenError, TokenFile};

/// File name of the control socket in the state directory.
pub const CONTROL_SOCKET: &str = "control.sock";
