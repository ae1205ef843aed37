//! The pages of `docs/runbooks`, one per state in which a person may be asked for. Log lines and health texts name them.

/// A page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runbook {
    BooksDoNotBalance,
    BufferFull,
    ClockJumped,
    DataLost,
    DeadLetterStoreFull,
    DeadLettersGrowing,
    DependencyDown,
    MigrationFailed,
    NodeRestarting,
    PartParked,
    PartStalled,
    SinkFenced,
    SinkHeld,
    StreamNotSubscribed,
    StreamSilent,
}

impl Runbook {
    pub const ALL: [Runbook; 15] = [
        Runbook::BooksDoNotBalance,
        Runbook::BufferFull,
        Runbook::ClockJumped,
        Runbook::DataLost,
        Runbook::DeadLetterStoreFull,
        Runbook::DeadLettersGrowing,
        Runbook::DependencyDown,
        Runbook::MigrationFailed,
        Runbook::NodeRestarting,
        Runbook::PartParked,
        Runbook::PartStalled,
        Runbook::SinkFenced,
        Runbook::SinkHeld,
        Runbook::StreamNotSubscribed,
        Runbook::StreamSilent,
    ];

    /// The file's name without its ending; alarms bear the same name.
    pub fn page(self) -> &'static str {
        match self {
            Runbook::BooksDoNotBalance => "books-do-not-balance",
            Runbook::BufferFull => "buffer-full",
            Runbook::ClockJumped => "clock-jumped",
            Runbook::DataLost => "data-lost",
            Runbook::DeadLetterStoreFull => "dead-letter-store-full",
            Runbook::DeadLettersGrowing => "dead-letters-growing",
            Runbook::DependencyDown => "dependency-down",
            Runbook::MigrationFailed => "migration-failed",
            Runbook::NodeRestarting => "node-restarting",
            Runbook::PartParked => "part-parked",
            Runbook::PartStalled => "part-stalled",
            Runbook::SinkFenced => "sink-fenced",
            Runbook::SinkHeld => "sink-held",
            Runbook::StreamNotSubscribed => "stream-not-subscribed",
            Runbook::StreamSilent => "stream-silent",
        }
    }
}
