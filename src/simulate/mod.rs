//! Devices that are not there: messages of the five homelab streams, made from a seed, published to a real broker,
//! with a ledger of what the broker acknowledged.
//!
//! `generator` and `kind` are pure and serve tests too; `publisher` is the only file that knows the MQTT client.

mod faults;
mod generator;
mod kind;
mod ledger;
mod publisher;
mod run;

pub use faults::{Fault, FaultRates};
pub use generator::{Generator, Message};
pub use kind::Kind;
pub use run::{Feed, Order, StreamTotals, Totals, run};

/// Why a simulation ended early.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    #[error("fault rates are name=probability, e.g. bad-value=0.01,gap=0.001: {problem}")]
    Faults { problem: String },
    #[error("cannot write the ledger {path}: {source}; give a file in a writable folder")]
    Ledger {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Tls(#[from] crate::tls::TlsError),
    #[error("no broker acknowledged anything: {problem}")]
    NothingAcknowledged { problem: String },
}
