//! `make bench`: the node's speed and memory beside the least that anyone would have to do, in turn on the same machine.
//! It prints what it finds; a missed bar is a fact and not a failure, but for those of promises.

mod baseline;
mod drain;
mod lab;
mod latency;
mod load;
mod outage;
mod poison;
mod process;
mod report;
mod throughput;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use rig::{on_signal, target};

use lab::Lab;
use report::Measure;

/// The node's speed and memory, each beside a baseline.
#[derive(Debug, Parser)]
struct Options {
    /// The node's binary, a release build.
    #[arg(long)]
    node: PathBuf,
    /// Smaller runs: under two minutes instead of under ten.
    #[arg(long)]
    quick: bool,
    /// Only groups whose name contains this: accept, end-to-end, queued, postgres, kafka, latency, backlog,
    /// recovery, outage, poison.
    #[arg(long)]
    only: Option<String>,
}

/// How much of everything.
struct Scale {
    rounds: usize,
    accept: u64,
    queued: u64,
    postgres: u64,
    kafka: u64,
    latency_seconds: u64,
    backlog: u64,
    busy_seconds: u64,
    recovery: u64,
    outage: u64,
}

const FULL: Scale = Scale {
    rounds: 3,
    accept: 300_000,
    queued: 300_000,
    postgres: 1_000_000,
    kafka: 1_000_000,
    latency_seconds: 10,
    backlog: 3_000_000,
    busy_seconds: 20,
    recovery: 1_000_000,
    outage: 600_000,
};

const QUICK: Scale = Scale {
    rounds: 3,
    accept: 60_000,
    queued: 200_000,
    postgres: 150_000,
    kafka: 150_000,
    latency_seconds: 3,
    backlog: 300_000,
    busy_seconds: 3,
    recovery: 150_000,
    outage: 100_000,
};

type Group<'a> = (&'a str, Box<dyn Fn(&mut Lab) -> Result<Vec<Measure>>>);

fn groups(scale: &'static Scale) -> Vec<Group<'static>> {
    let rounds = scale.rounds;
    vec![
        ("postgres", Box::new(move |lab| drain::to_postgres(lab, scale.postgres, rounds))),
        ("kafka", Box::new(move |lab| drain::to_kafka(lab, scale.kafka, rounds))),
        ("accept", Box::new(move |lab| throughput::accept(lab, scale.accept, rounds))),
        ("end-to-end", Box::new(move |lab| throughput::end_to_end(lab, scale.accept, rounds))),
        ("queued", Box::new(move |lab| throughput::queued(lab, scale.queued, rounds))),
        ("latency", Box::new(move |lab| latency::measure(lab, scale.latency_seconds, rounds))),
        ("backlog", Box::new(move |lab| drain::backlog(lab, scale.backlog, scale.busy_seconds))),
        ("recovery", Box::new(move |lab| outage::recovery(lab, scale.recovery, rounds))),
        ("outage", Box::new(move |lab| outage::catch_up(lab, scale.outage))),
        ("poison", Box::new(poison::measure)),
    ]
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    // Everything started goes with this process.
    on_signal(|| std::process::exit(130))?;
    let began = Instant::now();
    let folder = target().join("bench");
    std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    println!("Private servers and results below {}", folder.display());
    let mut lab = Lab::open(&folder, &options.node)?;
    let scale = if options.quick { &QUICK } else { &FULL };
    let mut measures = Vec::new();
    for (name, group) in groups(scale) {
        if options.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let found = group(&mut lab).with_context(|| format!("measure {name}"))?;
        found.iter().for_each(|measure| println!("{}", measure.line()));
        measures.extend(found);
    }
    let results = folder.join("results.json");
    report::write(&measures, &results)?;
    let servers = lab.folder.clone();
    drop(lab);
    std::fs::remove_dir_all(&servers).context("remove the servers' folders")?;
    println!("{} after {:.0} s", results.display(), began.elapsed().as_secs_f64());
    let broken = measures.iter().filter(|measure| measure.breaks_a_promise());
    let broken: Vec<&str> = broken.map(|measure| measure.name).collect();
    anyhow::ensure!(broken.is_empty(), "not as promised: {}", broken.join("; "));
    Ok(())
}
