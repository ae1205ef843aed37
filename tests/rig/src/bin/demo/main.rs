//! `make demo`: the homelab's streams through a real broker, the node, a real Kafka and a real PostgreSQL, live; and at
//! the end, if it has one, whether everything arrived.

mod observer;
mod published;
mod screen;
mod servers;
mod truth;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use rig::{Daemon, StreamState, Streams, on_signal, target};

use observer::Observer;
use published::Published;
use screen::Screen;
use servers::Servers;
use verdict::{Outside, Verdict};

const REFRESH: Duration = Duration::from_millis(500);
const DRAIN_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// Home-automation streams through the node, live.
#[derive(Debug, Parser)]
struct Options {
    /// The node's binary.
    #[arg(long)]
    node: PathBuf,
    /// Ends by itself after this many seconds and judges the result; without it Ctrl-C ends it.
    #[arg(long)]
    duration: Option<u64>,
    /// Leave Kafka (and Java) out.
    #[arg(long)]
    without_kafka: bool,
    /// Times the devices' real rates.
    #[arg(long, default_value = "10")]
    rate: f64,
    #[arg(long, default_value = "1")]
    seed: u64,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything is as it should be.
fn run(options: &Options) -> Result<bool> {
    let running = Arc::new(AtomicBool::new(false));
    let stop = Arc::new(AtomicBool::new(false));
    watch_signals(running.clone(), stop.clone())?;

    let folder = target().join("demo");
    println!("Private servers below {}:", folder.display());
    let mut servers = Servers::start(&folder, &options.node, !options.without_kafka)?;
    running.store(true, Ordering::SeqCst);

    let ledger = folder.join("published.jsonl");
    // Without an end there is no judgement, and nothing need be remembered for it.
    let judged = options.duration.is_some();
    let observer =
        judged.then(|| Observer::start(servers.mosquitto.port(), &servers.homelab)).transpose()?;
    let mut published = Published::new(&ledger, judged);
    let mut simulator = simulator(options, &servers, &folder, &ledger);
    simulator.start()?;
    let ended = watch(&mut servers, &mut simulator, &mut published, options, &stop);
    if simulator.is_running() {
        simulator.stop(STOP_WITHIN)?;
    }
    let exact = match ended? {
        Ended::Interrupted => {
            println!("Stopped.");
            true
        }
        Ended::Finished => match &observer {
            Some(observer) => judge(&servers, &published, observer)?,
            None => anyhow::bail!("the simulator ended by itself\n{}", simulator.story()),
        },
    };
    servers.node.stop(STOP_WITHIN)?;
    Ok(exact)
}

/// While the servers start an interruption ends the program, and the kernel ends them; later everything is stopped in
/// order, and only a second interruption is abrupt.
fn watch_signals(running: Arc<AtomicBool>, stop: Arc<AtomicBool>) -> Result<()> {
    on_signal(move || {
        if !running.load(Ordering::SeqCst) || stop.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
}

fn simulator(options: &Options, servers: &Servers, folder: &Path, ledger: &Path) -> Daemon {
    let simulator = Daemon::new("telemetry simulate", &options.node, folder.join("simulate.log"))
        .arguments(["simulate", "--config"])
        .argument(&servers.config)
        .arguments(["--rate", &format!("x{}", options.rate), "--seed", &options.seed.to_string()])
        .argument("--ledger")
        .argument(ledger);
    match options.duration {
        Some(seconds) => simulator.arguments(["--duration", &seconds.to_string()]),
        None => simulator,
    }
}

enum Ended {
    Interrupted,
    /// The simulator is done and every sink has dealt with everything.
    Finished,
}

fn watch(
    servers: &mut Servers,
    simulator: &mut Daemon,
    published: &mut Published,
    options: &Options,
    stop: &AtomicBool,
) -> Result<Ended> {
    let mut screen = Screen::open(footer(servers))?;
    let began = Instant::now();
    let mut quiet_since = None;
    loop {
        if stop.load(Ordering::SeqCst) {
            return Ok(Ended::Interrupted);
        }
        anyhow::ensure!(
            servers.node.daemon().is_running(),
            "the node ended\n{}",
            servers.node.daemon().story()
        );
        published.read_on()?;
        let streams = Streams::of(&servers.node)?;
        screen.show(&streams, published, &title(began, options))?;

        if let Some(status) = simulator.exit_status()? {
            anyhow::ensure!(status.success(), "{status}\n{}", simulator.story());
            published.read_on()?;
            let quiet = *quiet_since.get_or_insert_with(Instant::now);
            if is_done(&servers.homelab.names("streams"), &streams, published)
                || quiet.elapsed() > DRAIN_WITHIN
            {
                return Ok(Ended::Finished);
            }
        }
        std::thread::sleep(REFRESH);
    }
}

/// The names are the configuration's: the node may have left one out.
fn is_done(names: &[String], streams: &Streams, published: &Published) -> bool {
    streams.each(names, |stream| {
        stream.status.sequence >= published.count(&stream.name) && stream.is_drained()
    })
}

fn title(began: Instant, options: &Options) -> String {
    let passed = began.elapsed().as_secs();
    match options.duration {
        Some(seconds) => format!("telemetry demo: {passed} of {seconds} s"),
        None => format!("telemetry demo: {passed} s, Ctrl-C ends it"),
    }
}

/// Where to look, as commands to copy.
fn footer(servers: &Servers) -> Vec<String> {
    let http = format!("http://127.0.0.1:{}", servers.http_port);
    let mut lines = vec![
        format!("  node      {http}/health  {http}/streams  {http}/metrics"),
        format!("  broker    mqtt://127.0.0.1:{}", servers.mosquitto.port()),
    ];
    for dbname in servers.homelab.dbnames() {
        lines.push(format!(
            "  tables    PGPASSWORD={} psql -h 127.0.0.1 -p {} -U {} {dbname}",
            rig::PASSWORD,
            servers.postgres.port(),
            rig::SUPERUSER,
        ));
    }
    if let Some(kafka) = &servers.kafka {
        let topic = servers.homelab.topic("energy").unwrap_or("TOPIC");
        lines.push(format!(
            "  topics    java -cp '{}/*' org.apache.kafka.tools.consumer.ConsoleConsumer --bootstrap-server {} --from-beginning --topic {topic}",
            target().join("kafka/libs").display(),
            kafka.bootstrap(),
        ));
    }
    lines.push(format!("  logs      {}", servers.config.with_extension("log").display()));
    lines
}

fn judge(servers: &Servers, published: &Published, observer: &Observer) -> Result<bool> {
    let outside = Outside {
        homelab: &servers.homelab,
        postgres: &servers.postgres,
        kafka: servers.kafka.as_ref(),
    };
    let streams = Streams::of(&servers.node)?;
    let names = servers.homelab.names("streams");
    let verdicts: Vec<Verdict> = names
        .iter()
        .map(|name| outside.judge(name, published, &observer.stream(name)))
        .collect::<Result<_>>()
        .context("compare what was published with what is there")?;
    summarise(&verdicts, &streams);
    Ok(verdicts.iter().all(Verdict::is_exact) && streams.each(&names, StreamState::is_drained))
}

/// Found of expected, everywhere.
fn summarise(verdicts: &[Verdict], streams: &Streams) {
    let of = |outcome: &verdict::Outcome| format!("{}/{}", outcome.found, outcome.expected);
    println!(
        "\n{}",
        screen::row(&[
            "stream",
            "published",
            "filtered",
            "in Kafka",
            "in tables",
            "pending",
            "exact"
        ])
    );
    for verdict in verdicts {
        let tables: Vec<String> = verdict.tables.iter().map(|(_, outcome)| of(outcome)).collect();
        let state = streams.stream(&verdict.stream);
        let pending =
            state.and_then(|s| s.sinks.iter().map(|sink| s.pending(sink)).max().flatten());
        println!(
            "{}",
            screen::row(&[
                &verdict.stream,
                &verdict.published.to_string(),
                &verdict.filtered.to_string(),
                &verdict.kafka.as_ref().map_or_else(|| "-".into(), of),
                &tables.join(" "),
                &pending.map_or_else(|| "-".into(), |count| count.to_string()),
                if verdict.is_exact() { "yes" } else { "NO" },
            ])
        );
    }
    println!("  (found/expected; a latest-state table holds one row per device)");
    for difference in verdicts.iter().flat_map(Verdict::differences) {
        println!("  {difference}");
    }
    for trouble in streams.streams.iter().flat_map(screen::troubles) {
        println!("  {trouble}");
    }
}
