//! How the node shows itself: the log, and the board on which every part writes what it knows. `/metrics`, `/health`,
//! `/streams` and `telemetry status` are all read from the board, so they cannot disagree.

mod board;
mod dependency;
pub mod health;
mod logging;
mod metrics;
mod process;

pub use board::{
    Board, BufferStatus, DisconnectReason, NodeStatus, PartState, PartStatus, Redelivery, Silence,
    SinkKind, SinkState, SinkStatus, SinkView, StreamStatus, StreamView,
};
pub use dependency::{BreakerShown, DependencyStatus, DependencyView, MigrationState};
pub use logging::start_logging;
pub use metrics::{BufferMeters, SinkMeters, StreamMeters};
