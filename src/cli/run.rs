//! `telemetry run`: the node.

use std::sync::Arc;

use clap::Args;

use super::{ConfigArg, Exit};

#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    config: ConfigArg,
}

pub fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let loaded = match super::check::load(&args.config.config) {
        Ok(loaded) => loaded,
        Err(report) => {
            crate::observe::tell_error(&report.to_string());
            return Ok(Exit::Configuration);
        }
    };
    let log = crate::observe::start_logging(&loaded.settings.log)?;
    for warning in &loaded.warnings {
        tracing::warn!(event = "configuration_warning", "{warning}");
    }
    let config = args.config.config.clone();
    crate::node::run(&loaded, Arc::new(move || super::check::load(&config)), log)?;
    Ok(Exit::Fine)
}
