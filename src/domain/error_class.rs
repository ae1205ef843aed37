//! What a failure at a sink means for the records waiting there.

/// Every error type of a sink answers `class()`; retry loops ask it and never read the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// The outside is away: keep, back off, no limit in time; never a dead letter.
    Transient,
    /// This record cannot be taken: isolate it, dead-letter it, deliver the rest.
    Data,
    /// Something a person must mend: hold this sink, say so, retry slowly.
    Standing,
}

impl ErrorClass {
    /// The metric label.
    pub fn code(self) -> &'static str {
        match self {
            ErrorClass::Transient => "transient",
            ErrorClass::Data => "data",
            ErrorClass::Standing => "standing",
        }
    }
}
