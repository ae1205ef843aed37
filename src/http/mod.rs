//! What the node tells over HTTP, read from the board. Two listeners, on threads of their own: TCP (loopback by default)
//! only answers questions; the control socket in the state directory, which only the node's own user and root can open,
//! also takes orders.

mod control;
mod probes;
mod serve;

pub use control::{Caller, ControlState, Replay, ReplayRequest, ReplayResult};
pub use serve::{HttpError, Server, serve};

/// File name of the control socket in the state directory.
pub const CONTROL_SOCKET: &str = "control.sock";
