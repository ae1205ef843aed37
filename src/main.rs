//! Arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser as _;
use telemetry::cli::{Cli, main as run};

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("telemetry: {error:#}");
            ExitCode::FAILURE
        }
    }
}
