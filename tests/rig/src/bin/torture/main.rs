//! `make torture`: rounds of faults under load against real servers. Each round publishes, breaks what its seed says,
//! lets everything come to rest, and then compares every message the broker acknowledged with what is in PostgreSQL,
//! in Kafka and among the dead letters.

mod books;
mod chronicle;
mod collect;
mod exact;
mod fate;
mod faults;
mod lab;
mod latest;
mod options;
mod oracle;
mod plan;
mod report;
mod round;
mod traffic;
mod verdict;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use rig::{Disk, on_signal, target};

use faults::Fault;
use lab::Lab;
use options::Options;
use report::Report;
use round::Run;

/// Faults whose moment did not come in the rounds that should have taken them.
const FURTHER_ROUNDS_MAX: u64 = 20;

fn main() -> ExitCode {
    ExitCode::from(status(run(&Options::parse())))
}

/// As the shell sees it: 0 only when every round held.
fn status(outcome: Result<bool>) -> u8 {
    match outcome {
        Ok(held) => u8::from(!held),
        Err(error) => {
            eprintln!("torture: {error:#}");
            1
        }
    }
}

/// Whether every round held.
fn run(options: &Options) -> Result<bool> {
    let (faults, left_out) = chosen(options)?;
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
    let disk = own_disk(options, &folder, &faults)?;
    let lab = Lab::open(&folder, &options.node, disk, options.kafka_nodes.into())?;
    let mut run = Run::new(lab)?;
    let mut report = Report::new(&faults, &left_out);
    rounds(options, &faults, &mut run, &mut report);
    run.end();
    println!("{report}\n{:.0} s", began.elapsed().as_secs_f64());
    leave(&folder, report.held())?;
    Ok(report.held())
}

/// The faults of the run, and of those asked for the ones it goes without.
fn chosen(options: &Options) -> Result<(Vec<&'static Fault>, Vec<&'static Fault>)> {
    let all = faults::chosen(&options.faults, options.kafka_nodes.into())?;
    let (faults, left_out): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|fault| !(options.without_disk && fault.needs_disk()));
    if faults.is_empty() {
        bail!("without a disk of the node's own there is nothing to take of {:?}", options.faults);
    }
    Ok((faults, left_out))
}

/// Where the system does not let us have one, a run that takes no fault of it goes on; any other would promise more
/// than it did.
fn own_disk(options: &Options, folder: &Path, faults: &[&'static Fault]) -> Result<Option<Disk>> {
    if options.without_disk {
        return Ok(None);
    }
    let error = match Disk::open(&folder.join("disk"), options.filesystem) {
        Ok(disk) => return Ok(Some(disk)),
        Err(error) => error,
    };
    let of_disk = faults.iter().filter(|fault| fault.needs_disk()).map(|fault| fault.name);
    let of_disk: Vec<_> = of_disk.collect();
    if of_disk.is_empty() {
        println!("No disk of the node's own: {error:#}");
        return Ok(None);
    }
    Err(error.context(format!(
        "without a disk of the node's own (root, loop devices) these would never be taken: {}; \
         `make torture DISK=no` goes without them",
        of_disk.join(", ")
    )))
}

/// What is needed to look into a failure stays.
fn leave(folder: &Path, held: bool) -> Result<()> {
    if held {
        return std::fs::remove_dir_all(folder).context("remove the run's folder");
    }
    println!("the folder of the run: {}", folder.display());
    Ok(())
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
        println!("again: {}", options.again(seed, words));
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_run_that_held_ends_with_0_and_without_its_folder() {
        let parent = rig::Folder::new(None, "torture-leave").unwrap();
        for (held, expected) in [(false, 1), (true, 0)] {
            let folder = parent.join("run");
            std::fs::create_dir_all(&folder).unwrap();
            leave(&folder, held).unwrap();
            assert_eq!((status(Ok(held)), folder.exists()), (expected, !held));
        }
        assert_eq!(status(Err(anyhow::anyhow!("no server"))), 1);
    }

    #[test]
    fn only_who_says_so_goes_without_the_faults_of_the_disk() {
        let options = |more: &[&str]| {
            let words = ["torture", "--node", "telemetry"];
            Options::parse_from(words.iter().chain(more))
        };
        let (faults, left_out) = chosen(&options(&[])).unwrap();
        assert!(left_out.is_empty() && faults.iter().any(|fault| fault.needs_disk()));
        let (faults, left_out) = chosen(&options(&["--without-disk"])).unwrap();
        assert!(!faults.iter().any(|fault| fault.needs_disk()));
        assert!(left_out.len() > 4 && left_out.iter().all(|fault| fault.needs_disk()));
        assert!(chosen(&options(&["--without-disk", "--faults", "power"])).is_err());
        // A folder below a file: there no disk can be made, whoever runs this test.
        let nowhere = Path::new("/dev/null/torture");
        let all = options(&[]);
        let refused = own_disk(&all, nowhere, &chosen(&all).unwrap().0).unwrap_err();
        assert!(format!("{refused:#}").contains("power-cut, power-cut-twice"), "{refused:#}");
        let others = options(&["--faults", "node"]);
        assert!(own_disk(&others, nowhere, &chosen(&others).unwrap().0).unwrap().is_none());
    }
}
