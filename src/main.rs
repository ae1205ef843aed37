//! Arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser as _;
use telemetry::cli::{Cli, main as run};

fn main() -> ExitCode {
    run(Cli::parse()).into()
}
