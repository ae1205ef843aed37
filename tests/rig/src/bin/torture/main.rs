//! `make torture`: rounds of faults under load against real servers. Each round publishes, breaks what its seed says,
//! lets everything come to rest, and then compares every message the broker acknowledged with what is in PostgreSQL,
//! in Kafka and among the dead letters.

mod chronicle;
mod collect;
mod faults;
mod lab;
mod oracle;
mod plan;
mod report;
mod round;
mod traffic;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use rig::{Disk, FileSystem, on_signal, target};

use faults::Fault;
use lab::Lab;
use report::Report;
use round::Run;

/// Faults whose moment did not come in the rounds that should have taken them.
const FURTHER_ROUNDS_MAX: u64 = 20;

/// Rounds of faults under load, and whether anything was lost, doubled, reordered or stuck.
#[derive(Debug, Parser)]
struct Options {
    /// The node's binary; only a build with fail points can take the crashes.
    #[arg(long)]
    node: PathBuf,
    #[arg(long, default_value = "40")]
    rounds: u64,
    /// Of the first round; each further one has the next number.
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Only faults whose name is or contains one of these, separated by commas.
    #[arg(long, default_value = "")]
    faults: String,
    /// What the node's state is on.
    #[arg(long, value_enum, default_value = "ext4")]
    filesystem: FileSystem,
    /// Kafka brokers; of three, each has every record, and the leaders of topics come and go.
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u8).range(1..=3))]
    kafka_nodes: u8,
    /// Print the list of faults and end.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every round held.
fn run(options: &Options) -> Result<bool> {
    let mut faults = faults::chosen(&options.faults, options.kafka_nodes.into())?;
    if options.list {
        faults.iter().for_each(|fault| println!("{:<28} {}", fault.name, fault.meaning));
        return Ok(true);
    }
    if faults.iter().any(|fault| fault.needs_fail_points()) {
        demand_fail_points(&options.node)?;
    }
    let folder = target().join("torture");
    let mounted = folder.join("disk");
    Disk::clear(&mounted);
    // Every process started goes with this one.
    on_signal(move || {
        Disk::clear(&mounted);
        std::process::exit(130);
    })?;
    if folder.exists() {
        std::fs::remove_dir_all(&folder).context("remove the folder of an earlier run")?;
    }
    let began = Instant::now();
    println!("Private servers below {}", folder.display());
    let lab = Lab::open(&folder, &options.node, options.filesystem, options.kafka_nodes.into())?;
    if lab.disk.is_none() {
        faults.retain(|fault| !fault.needs_disk());
    }
    let mut run = Run::new(lab)?;
    let mut report = Report::new(&faults);
    rounds(options, &faults, &mut run, &mut report);
    let held = report.held();
    if !held {
        println!("the folder of the run: {}", folder.display());
    }
    run.end();
    println!("{report}\n{:.0} s", began.elapsed().as_secs_f64());
    if held {
        std::fs::remove_dir_all(&folder).context("remove the run's folder")?;
    }
    Ok(held)
}

/// Without them no crash would ever come, and the run would not say so before its end.
fn demand_fail_points(node: &Path) -> Result<()> {
    let asked = Command::new(node).arg("--version").output();
    let version = asked.with_context(|| format!("ask {} for its version", node.display()))?.stdout;
    let version = String::from_utf8_lossy(&version);
    if version.contains("fail points") {
        return Ok(());
    }
    bail!(
        "{} ({}) is built without fail points, so it cannot be made to crash: build it with \
         `cargo build --workspace --all-targets`",
        node.display(),
        version.trim()
    )
}

/// Until one fails. What was still not taken after rounds enough for all, because its moment did not come, has some
/// more of its own.
fn rounds(options: &Options, faults: &[&'static Fault], run: &mut Run, report: &mut Report) {
    let mut seeds = options.seed..;
    for seed in seeds.by_ref().take(options.rounds as usize) {
        if !round(options, seed, (faults, &options.faults), run, report) {
            return;
        }
    }
    if !plan::takes_all(options.rounds, faults) {
        return;
    }
    for (seed, _) in seeds.zip(0..FURTHER_ROUNDS_MAX) {
        let Some(name) = report.never_taken().first().copied() else { return };
        let alone: Vec<_> = faults.iter().filter(|fault| fault.name == name).copied().collect();
        if !round(options, seed, (&alone, name), run, report) {
            return;
        }
    }
    report.demand_all();
}

/// One round over some faults and the words that choose them; false when it did not hold.
fn round(
    options: &Options,
    seed: u64,
    (faults, words): (&[&'static Fault], &str),
    run: &mut Run,
    report: &mut Report,
) -> bool {
    let plan = plan::of(seed, faults);
    let outcome = run.round(seed, &plan);
    let held = report.enter(seed, &plan, outcome);
    if !held {
        println!("{}", run.story());
        println!("again: {}", command(options, seed, words));
    }
    held
}

fn command(options: &Options, seed: u64, words: &str) -> String {
    let list = if words.is_empty() { String::new() } else { format!(" FAULTS={words}") };
    let filesystem = match options.filesystem {
        FileSystem::Ext4 => "",
        FileSystem::Xfs => " FILESYSTEM=xfs",
    };
    let nodes = match options.kafka_nodes {
        1 => String::new(),
        nodes => format!(" KAFKA_NODES={nodes}"),
    };
    format!("make torture ROUNDS=1 SEED={seed}{list}{filesystem}{nodes}")
}
