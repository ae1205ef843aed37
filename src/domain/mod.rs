//! The words every other folder speaks: names, positions, kept records, dead letters, books.
//!
//! Nothing here waits, reads or writes.

mod books;
mod change;
mod correlation;
mod dead_letter;
mod error_class;
mod finding;
mod names;
mod position;
mod presented;
mod record;
mod runbook;
mod secret;

pub use books::Books;
pub use change::{Changes, PartChange, PartFate, SettingChange};
pub use correlation::{CorrelationId, Incident};
pub use dead_letter::{DeadLetter, DeadLetterKey, Reason, Stage};
pub use error_class::ErrorClass;
pub use finding::{Finding, Findings, Verdict};
pub use names::{NameError, NodeName, SinkName, StreamName};
pub use position::{
    Appended, Delivered, Durable, LogIdentity, Sequence, SequenceRange, TelemetryId,
};
pub use presented::Presented;
pub use record::{Arrival, DeliveryFlags, Record};
pub use runbook::Runbook;
pub use secret::Secret;
