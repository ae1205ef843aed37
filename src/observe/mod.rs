//! How the node shows itself: the log, and the board on which every part writes what it knows. `/metrics`, `/health`,
//! `/streams` and `telemetry status` are all read from the board, so they cannot disagree.

mod board;
pub mod health;
mod logging;
mod metrics;
mod process;

pub use board::{
    Board, BufferStatus, DependencyStatus, DependencyView, DisconnectReason, MigrationState,
    NodeStatus, PartState, PartStatus, Redelivery, SinkKind, SinkState, SinkStatus, SinkView,
    StreamStatus, StreamView,
};
pub use logging::{start_logging, tell_error};
pub use metrics::{BufferMeters, SinkMeters, StreamMeters};
