//! `make service-test`: the package as people get it, on a booted Debian 12 with a real systemd, under load. One machine
//! goes through a whole life, from installation to purge; what is published meanwhile is compared with what arrived.

mod install;
mod journal;
mod life;
mod load;
mod sandbox;
mod secrets;
mod world;

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use rig::{Container, Kafka, on_signal};

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

type Step = (&'static str, fn(&mut World) -> Result<String>);

/// In this order: each begins where the one before has left the machine.
const STEPS: [Step; 18] = [
    ("install: nothing is enabled or started", install::fresh),
    ("no configuration: says so, exit 78, no loop", life::unconfigured),
    ("configure, enable and start", life::start),
    ("1,000 messages a second", life::load),
    ("a second node beside it (template unit)", life::second_node),
    ("reload, good and bad", life::reloaded),
    ("kill -9", life::killed),
    ("SIGSTOP: the watchdog", life::frozen),
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
    let outcome = if options.isolated { run(&options) } else { isolate() };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("service-test: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What needs the real network is fetched; then the program goes on in a network of its own, where the ports are free and
/// nothing can leave. Never returns when that works.
fn isolate() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        let error =
            own_program(Command::new("sudo").arg("--preserve-env=CARGO_TARGET_DIR"), false)?.exec();
        bail!("booting a machine needs root, and sudo cannot be run: {error}");
    }
    Container::base().context("the machine's file system")?;
    Kafka::fetch().context("Kafka")?;
    let mut command = Command::new("unshare");
    let error = own_program(command.args(["--net", "--mount", "--"]), true)?.exec();
    bail!("run unshare (Debian: util-linux): {error}")
}

fn own_program(command: &mut Command, isolated: bool) -> Result<&mut Command> {
    let program = std::env::current_exe().context("find this program")?;
    Ok(command
        .arg(program)
        .args(std::env::args_os().skip(1))
        .args(isolated.then_some("--isolated")))
}

fn run(options: &Options) -> Result<()> {
    on_signal(|| std::process::exit(130))?;
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("run ip (Debian: iproute2)")?;
    if !up.success() {
        bail!("a network of our own cannot be set up here ({up})");
    }
    let began = Instant::now();
    let mut world = World::begin(&options.package, &options.newer)?;
    println!("Debian 12 is booted, servers are up after {:.1} s", began.elapsed().as_secs_f64());
    for (name, step) in STEPS {
        let started = Instant::now();
        let found = step(&mut world).with_context(|| format!("{name}\n{}", world.story()))?;
        println!("ok  {name:<45} {:>5.1} s  {found}", started.elapsed().as_secs_f64());
    }
    println!("{} steps passed in {:.0} s", STEPS.len(), began.elapsed().as_secs_f64());
    Ok(())
}
