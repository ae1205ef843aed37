//! One log, three forms: text on a terminal, the journal under systemd, JSON otherwise.

use std::io::IsTerminal as _;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config::{LogFormat, LogSettings};

/// Changes what the running log lets through.
#[derive(Debug, Clone)]
pub struct LogControl {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl LogControl {
    /// Another filter from now on; the form of the log stays.
    pub fn set_filter(&self, settings: &LogSettings) -> anyhow::Result<()> {
        Ok(self.filter.reload(filter(settings)?)?)
    }
}

fn filter(settings: &LogSettings) -> anyhow::Result<EnvFilter> {
    // actix tells of its workers at every start, and a database server of every table that is already there and of each
    // rollback that had nothing left to do; whoever wants that says so, for later directives win.
    let quiet = "actix_server=warn,tokio_postgres=warn";
    Ok(EnvFilter::try_new(format!("{quiet},{}", settings.filter))?)
}

/// Starts the log of this process; later calls change nothing. A filter that does not parse is an error (the
/// configuration check has already seen it).
pub fn start_logging(settings: &LogSettings) -> anyhow::Result<LogControl> {
    let (filter, handle) = reload::Layer::new(filter(settings)?);
    let format = match settings.format {
        LogFormat::Auto => detect(),
        chosen => chosen,
    };
    let layer = match format {
        LogFormat::Journald => tracing_journald::layer()?
            .with_field_prefix(None)
            .with_syslog_identifier("telemetry".to_owned())
            .with_priority_mappings(priorities())
            .boxed(),
        LogFormat::Text | LogFormat::Auto => tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(std::io::stderr)
            .boxed(),
    };
    // A second start in one process (tests) keeps the first.
    let _ = tracing_subscriber::registry().with(filter).with(layer).try_init();
    Ok(LogControl { filter: handle })
}

/// What is only information is no notice: notices of a machine are read.
fn priorities() -> tracing_journald::PriorityMappings {
    use tracing_journald::{Priority, PriorityMappings};
    PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        ..PriorityMappings::new()
    }
}

/// Tells of an error before, or without, the log: on standard error, where the journal takes each line as an error.
pub fn tell_error(text: &str) {
    let priority = if in_journal() { "<3>" } else { "" };
    for line in text.lines() {
        eprintln!("{priority}{line}");
    }
}

/// Standard error goes to the journal: systemd started us.
fn in_journal() -> bool {
    std::env::var_os("JOURNAL_STREAM").is_some()
}

fn detect() -> LogFormat {
    if in_journal() {
        LogFormat::Journald
    } else if std::io::stderr().is_terminal() {
        LogFormat::Text
    } else {
        LogFormat::Json
    }
}
