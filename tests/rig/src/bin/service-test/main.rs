//! `make service-test`: the package as people get it, on a booted Debian 12 with a real systemd, under load. One machine
//! goes through a whole life, from installation to purge; what is published meanwhile is compared with what arrived.

mod hang;
mod held;
mod install;
mod journal;
mod life;
mod load;
mod memory;
mod newcomer;
mod sandbox;
mod secrets;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use rig::{Container, Kafka, Step, on_stage, play};

use world::World;

/// The package in a booted systemd, from installation to purge.
#[derive(Debug, Parser)]
struct Options {
    /// The package under test.
    #[arg(long)]
    package: PathBuf,
    /// The same with a higher version, to upgrade to and to go back from.
    #[arg(long)]
    newer: PathBuf,
    /// Where the network is our own; the program starts itself again with it.
    #[arg(long, hide = true)]
    isolated: bool,
}

/// In this order: each begins where the one before has left the machine.
const STEPS: [Step<World>; 23] = [
    ("a newcomer follows docs/install.md", newcomer::follow),
    ("by hand, from the sources' folder", newcomer::by_hand),
    ("install: nothing is enabled or started", install::fresh),
    ("no configuration: says so, exit 78, no loop", life::unconfigured),
    ("configure, enable and start", life::start),
    ("1,000 messages a second", life::load),
    ("a second node beside it (template unit)", life::second_node),
    ("reload, good and bad", life::reloaded),
    ("kill -9", life::killed),
    ("SIGSTOP: the watchdog", hang::process),
    ("threads that hang: their parts go on on others", hang::threads),
    ("the supervisor's thread hangs: the watchdog", hang::supervisor),
    ("a disk that stands still: the watchdog", hang::disk),
    ("an outage, told in the journal", journal::outage),
    ("sandbox in force", sandbox::in_force),
    ("secrets stay secret", secrets::stay_secret),
    ("stop and start under load", life::stopped),
    ("a drain longer than TimeoutStopSec=", life::long_drain),
    ("upgrade under load", install::upgrade),
    ("downgrade under load", install::downgrade),
    ("the ledger", life::ledger),
    ("remove keeps the state, reinstall goes on", install::remove),
    ("purge deletes it", install::purge),
];

fn main() -> ExitCode {
    let options = Options::parse();
    let fetch = || {
        Container::base().context("the machine's file system")?;
        Kafka::fetch().context("Kafka")
    };
    on_stage("service-test", options.isolated, fetch, || run(&options))
}

fn run(options: &Options) -> Result<()> {
    let began = Instant::now();
    let mut world = World::begin(&options.package, &options.newer)?;
    println!("Debian 12 is booted, servers are up after {:.1} s", began.elapsed().as_secs_f64());
    play(&mut world, &STEPS)
}
