//! `telemetry run`: the node.

use clap::Args;

use super::{ConfigArg, Exit};

/// Examples:
///   telemetry run --config telemetry.toml
///
/// Ends with 0 after SIGTERM, 78 on a mistake in the configuration, 1 when the disk failed.
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct RunArgs {
    #[command(flatten)]
    config: ConfigArg,
}

pub fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let loaded = match super::check::load(&args.config.config) {
        Ok(loaded) => loaded,
        Err(report) => {
            eprint!("{report}");
            return Ok(Exit::Configuration);
        }
    };
    crate::observe::start_logging(&loaded.settings.log)?;
    for warning in &loaded.warnings {
        tracing::warn!(event = "configuration_warning", "{warning}");
    }
    crate::node::run(loaded.settings)?;
    Ok(Exit::Fine)
}
