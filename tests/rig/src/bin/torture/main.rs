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

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use rig::{Disk, FileSystem, on_signal, target};

use lab::Lab;
use report::Report;
use round::Run;

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
    /// Only faults whose name contains one of these, separated by commas.
    #[arg(long, default_value = "")]
    faults: String,
    /// What the node's state is on.
    #[arg(long, value_enum, default_value = "ext4")]
    filesystem: FileSystem,
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
    let faults = faults::chosen(&options.faults)?;
    if options.list {
        faults.iter().for_each(|fault| println!("{:<28} {}", fault.name, fault.meaning));
        return Ok(true);
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
    let mut run = Run::new(Lab::open(&folder, &options.node, options.filesystem)?)?;
    let mut report = Report::new(&faults);
    for seed in options.seed..options.seed + options.rounds {
        let plan = plan::of(seed, &faults);
        let outcome = run.round(seed, &plan);
        if !report.enter(seed, &plan, outcome) {
            println!("{}", run.story());
            println!("its folder: {}", folder.display());
            println!("again: {}", command(options, seed));
            break;
        }
    }
    let held = report.held();
    run.end();
    println!("{report}\n{:.0} s", began.elapsed().as_secs_f64());
    if held {
        std::fs::remove_dir_all(&folder).context("remove the run's folder")?;
    }
    Ok(held)
}

fn command(options: &Options, seed: u64) -> String {
    let list = if options.faults.is_empty() {
        String::new()
    } else {
        format!(" FAULTS={}", options.faults)
    };
    let filesystem = match options.filesystem {
        FileSystem::Ext4 => "",
        FileSystem::Xfs => " FILESYSTEM=xfs",
    };
    format!("make torture ROUNDS=1 SEED={seed}{list}{filesystem}")
}
