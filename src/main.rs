//! Arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser as _;
use telemetry::cli::{Cli, main as run};

fn main() -> ExitCode {
    // Only a test build has fail points; FAILPOINTS says what they do there.
    let _scenario = fail::has_failpoints().then(fail::FailScenario::setup);
    run(Cli::parse()).into()
}
