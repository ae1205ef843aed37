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
    let settings = super::settings(&args.config.config)?;
    crate::observe::start_logging(&settings.log)?;
    crate::node::run(settings)?;
    Ok(Exit::Fine)
}
