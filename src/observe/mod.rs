//! How the node shows itself: the log, and the board on which every part writes what it knows. `/metrics`, `/health`,
//! `/streams` and `telemetry status` are all read from the board, so they cannot disagree.

mod board;
mod dependency;
mod edges;
pub mod events;
mod expiry;
pub mod health;
mod http_meters;
mod logging;
mod metrics;
mod process;
mod seldom;
mod status;

pub use board::{Board, SinkView, StreamView};
pub use dependency::{BreakerShown, DependencyStatus, DependencyView, MigrationState};
pub use edges::{Edge, EdgeMeter, Entered};
pub use expiry::{
    CertificateStatus, CertificateWatch, Nearness, presented_certificates, read_certificates,
};
pub use http_meters::{HttpMeters, HttpRefusal};
pub use logging::{LogControl, start_logging, tell_error};
pub use metrics::{BufferMeters, SinkMeters, StreamMeters};
pub use seldom::Seldom;
pub use status::{
    BufferStatus, DisconnectReason, NodeStatus, PartState, PartStatus, Redelivery, Silence,
    SinkKind, SinkState, SinkStatus, StreamStatus,
};
