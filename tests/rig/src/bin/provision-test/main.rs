//! `make service-test`, its second part: a bare Debian 12 becomes a node with broker and database by the playbooks, over
//! ssh, as `ansible/README.md` tells it; then everything is changed, broken, upgraded and taken away again.

mod archive;
mod node;
mod servers;
mod site;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use rig::{Container, Step, on_stage, play};

use site::Site;

/// A bare Debian becomes a node by the playbooks.
#[derive(Debug, Parser)]
struct Options {
    /// The package under test.
    #[arg(long)]
    package: PathBuf,
    /// The same with a higher version, to upgrade to and to go back from.
    #[arg(long)]
    newer: PathBuf,
    /// Only from the bare host to messages that flow, that nothing changes after it, and reloads: two minutes.
    #[arg(long)]
    quick: bool,
    /// Where the network is our own; the program starts itself again with it.
    #[arg(long, hide = true)]
    isolated: bool,
}

/// In this order: each begins where the one before has left the machine.
const STEPS: [Step<Site>; 16] = [
    ("check mode on a bare host", node::bare_check),
    ("from a bare host to a ready node", node::provision),
    ("messages flow", node::flow),
    ("the second run changes nothing", node::second_run),
    ("check mode on a converged host", node::converged_check),
    ("a changed setting: reload where that will do", node::reload),
    ("the writer writes, the reader reads", servers::least_rights),
    ("only the needed ports are open", servers::firewall),
    ("a killed broker keeps what it acknowledged", servers::killed_broker),
    ("a change shows in check mode, and is made", node::change),
    ("a wrong configuration is refused", node::refused),
    ("new passwords", servers::new_passwords),
    ("a node that is not ready ends a rolling run", node::gate),
    ("upgrade and back-out", node::upgrade),
    ("kernel settings are put back", servers::tuning),
    ("removal keeps the data, purge does not", node::remove),
];

/// How many of them the short form takes.
const QUICK_STEPS: usize = 6;

fn main() -> ExitCode {
    let options = Options::parse();
    let fetch = || {
        let base = Container::base().context("the machine's file system")?;
        archive::fetch(&base).context("the packages the playbooks install")
    };
    on_stage("provision-test", options.isolated, fetch, || run(&options))
}

fn run(options: &Options) -> Result<()> {
    let began = Instant::now();
    let mut site = Site::begin(&options.package, &options.newer)?;
    println!("a bare Debian 12 is booted after {:.1} s", began.elapsed().as_secs_f64());
    play(&mut site, if options.quick { &STEPS[..QUICK_STEPS] } else { &STEPS[..] })
}
