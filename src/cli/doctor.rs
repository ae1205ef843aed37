//! `telemetry doctor`: one report of everything that would break the promises, whether the node runs or not. Each folder
//! looks at what is its own; here it is asked for, put together and printed.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;

use clap::Args;
use futures_util::future::{join, join_all};
use jiff::Timestamp;
use serde_json::Value;

use super::client;
use super::clock;
use super::{ConfigArg, Exit, Told};
use crate::buffer::{self, Load};
use crate::certificates::CertificateFacts;
use crate::config::{Loaded, Settings, StreamSettings};
use crate::domain::{Finding, Findings, Verdict};
use crate::http::CONTROL_SOCKET;
use crate::observe::{CertificateStatus, Nearness, presented_certificates, read_certificates};
use crate::{database, kafka, stream};

#[derive(Args, Debug)]
pub struct DoctorArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print only what is not fine
    #[arg(long)]
    quiet: bool,
}

/// Fewer file descriptors than this and a busy node runs out of them.
const DESCRIPTORS_MIN: u64 = 1024;

pub fn run(args: &DoctorArgs) -> anyhow::Result<Exit> {
    let loaded = super::check::load(&args.config.config).map_err(|report| {
        eprint!("{report}");
        Told(Exit::Configuration)
    })?;
    let mut findings = super::block_on(examine(&loaded))?;
    if args.quiet {
        findings.retain(|finding| finding.verdict != Verdict::Ok);
    }
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    if args.json {
        println!("{:#}", serde_json::json!({ "verdict": worst, "findings": findings }));
    } else {
        print!("{}", render(&findings));
    }
    Ok(if worst == Verdict::Fail { Exit::Failed } else { Exit::Fine })
}

/// All that is outside is asked at once: an address that swallows everything costs its limit only once.
async fn examine(loaded: &Loaded) -> Vec<Finding> {
    let settings = &loaded.settings;
    let mut findings = configuration(loaded);
    let socket = settings.node.state_dir.join(CONTROL_SOCKET);
    let running = Running::ask(&socket).await;
    findings.extend(node(settings, running.as_ref()));
    findings.extend(clock::probe());
    let load = running.as_ref().and_then(Running::load);
    findings.extend(buffer::probe(&settings.node.state_dir, &settings.buffer, load));
    findings.extend(certificates(settings));
    let streams = |picked: &dyn Fn(&StreamSettings) -> bool| -> Vec<&StreamSettings> {
        settings.streams.values().filter(|stream| picked(stream)).collect()
    };
    let brokers = join_all(settings.brokers.iter().map(|(name, broker)| {
        let streams = streams(&|stream| stream.broker == *name);
        async move { stream::probe(name, broker, &streams).await }
    }));
    let clusters = join_all(settings.clusters.iter().map(|(name, cluster)| {
        let streams = streams(&|stream| stream.kafka.iter().any(|sink| sink.cluster == *name));
        async move { kafka::probe(name, cluster, &streams).await }
    }));
    let databases = join_all(settings.databases.iter().map(|(name, database)| {
        let streams = streams(&|stream| stream.tables.values().any(|of| of.database == *name));
        async move { database::probe(name, database, &streams).await }
    }));
    let (brokers, (clusters, databases)) = join(brokers, join(clusters, databases)).await;
    findings.extend(brokers.into_iter().chain(clusters).chain(databases).flatten());
    findings.extend(presented(settings));
    findings
}

/// It passed the check, or there would be no report; what is doubtful remains.
fn configuration(loaded: &Loaded) -> Vec<Finding> {
    let mut findings = Findings::about("configuration");
    findings.ok("settings", format!("{}: all known, none missing", loaded.file));
    for warning in &loaded.warnings {
        let figure = format!("{}: {}", warning.path, warning.rule);
        findings.warn("settings", figure, "see `telemetry check`");
    }
    findings.done()
}

fn certificates(settings: &Settings) -> Vec<Finding> {
    let found = read_certificates(&settings.certificate_files()).into_iter();
    let remedy = "renew it; a running node takes the new file up by itself";
    found.flat_map(|(peer, status)| certificate("certificate", &peer, &status, remedy)).collect()
}

/// Known from the visits before this. Kafka's library does not tell.
fn presented(settings: &Settings) -> Vec<Finding> {
    let found = presented_certificates(settings).into_iter();
    let remedy = "renew it at the server: from its end on the node does not connect any more";
    let line = |(peer, facts): (String, CertificateFacts)| {
        let status = CertificateStatus::presented(&facts);
        certificate("presented certificate", &peer, &status, remedy)
    };
    found.flat_map(line).collect()
}

fn certificate(
    check: &'static str,
    peer: &str,
    status: &CertificateStatus,
    remedy: &str,
) -> Vec<Finding> {
    let now = Timestamp::now();
    let mut findings = Findings::about(peer);
    let story = status.story(peer, now);
    match status.nearness(now) {
        Nearness::Far => findings.ok(check, story),
        Nearness::Soon | Nearness::VerySoon => findings.warn(check, story, remedy),
        Nearness::Over => findings.fail(check, story, remedy),
    }
    findings.done()
}

/// What the running node answered.
struct Running {
    health: Value,
    metrics: BTreeMap<String, f64>,
    process: Option<i32>,
}

impl Running {
    /// `None` when there is none, or its socket may not be opened.
    async fn ask(socket: &Path) -> Option<Self> {
        let health = client::order(socket, "/health", None::<&()>).await.ok()?;
        let (text, process) = client::metrics(socket).await.ok()?;
        Some(Running { health, metrics: sums(&text), process })
    }

    /// The average since it started.
    fn load(&self) -> Option<Load> {
        let metric = |name: &str| self.metrics.get(name).copied();
        let now = Timestamp::now().as_millisecond() as f64 / 1e3;
        let seconds = (now - metric("process_start_time_seconds")?).max(1.0);
        let bytes = metric("telemetry_received_bytes_total")?;
        let buffered_bytes = metric("telemetry_buffer_bytes")? as u64;
        Some(Load { bytes_per_second: bytes / seconds, buffered_bytes })
    }

    fn messages_per_second(&self) -> Option<f64> {
        let metric = |name: &str| self.metrics.get(name).copied();
        let now = Timestamp::now().as_millisecond() as f64 / 1e3;
        let seconds = (now - metric("process_start_time_seconds")?).max(1.0);
        Some(metric("telemetry_accepted_messages_total")? / seconds)
    }
}

/// Every metric, summed over its labels.
fn sums(text: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let name = series.split('{').next().unwrap_or(series);
        *sums.entry(name.to_owned()).or_insert(0.0) += value.parse().unwrap_or(0.0);
    }
    sums
}

fn node(settings: &Settings, running: Option<&Running>) -> Vec<Finding> {
    let mut findings = Findings::about("node");
    let Some(running) = running else {
        findings.warn(
            "running",
            "it does not run, or its control socket may not be opened",
            "start it, or run this as the node's user or as root",
        );
        free_port(settings, &mut findings);
        return findings.done();
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match running.health["state"].as_str() {
        Some("healthy") => findings.ok("running", "healthy"),
        Some("degraded") => findings.warn("running", "degraded", "see the lines below"),
        _ => findings.fail("running", text(&running.health["state"]), "see the lines below"),
    }
    for because in running.health["because"].as_array().into_iter().flatten() {
        findings.warn("health", text(because), "see docs/guarantees.md and `telemetry status`");
    }
    data_age(settings, running, &mut findings);
    if let Some(rate) = running.messages_per_second() {
        let queue = (rate * 3600.0).ceil();
        findings.ok(
            "rate",
            format!(
                "{rate:.1} messages/s: an absence of 1 h needs {queue} places in the broker's queue"
            ),
        );
    }
    if let Some(process) = running.process {
        descriptors(process, &mut findings);
    }
    findings.done()
}

fn data_age(settings: &Settings, running: &Running, findings: &mut Findings) {
    for line in running.health["streams"].as_array().into_iter().flatten() {
        let Some(name) = line["name"].as_str() else { continue };
        let stream = settings.streams.values().find(|stream| stream.name.as_str() == name);
        let Some((warning, critical)) = stream.map(|stream| stream.silent_after) else { continue };
        let Some(age) = line["data_age_seconds"].as_f64() else { continue };
        let over = |limit: Option<std::time::Duration>| {
            limit.is_some_and(|limit| age > limit.as_secs_f64())
        };
        let figure = format!("{name}: the last message came {age:.0} s ago");
        let remedy = "look at the device and its way to the broker";
        if over(critical) {
            findings.fail("data age", figure, remedy);
        } else if over(warning) {
            findings.warn("data age", figure, remedy);
        } else {
            findings.ok("data age", figure);
        }
    }
}

/// A node that is to start needs it.
fn free_port(settings: &Settings, findings: &mut Findings) {
    let listen = settings.http.listen;
    match TcpListener::bind(listen) {
        Ok(_) => findings.ok("port", format!("{listen} is free")),
        Err(error) => findings.fail(
            "port",
            format!("{listen}: {error}"),
            "stop what listens there, or choose another address in [http] listen",
        ),
    }
}

/// As the kernel has it for the running process: a unit's limit differs from a shell's.
fn descriptors(process: i32, findings: &mut Findings) {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let limit = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).map(Iterator::count);
    let (Some(limit), Ok(open)) = (limit, open) else { return };
    let figure = format!("{open} of {limit} open");
    let remedy = "raise LimitNOFILE of the service";
    if open as u64 * 10 > limit * 9 {
        findings.fail("file descriptors", figure, remedy);
    } else if limit < DESCRIPTORS_MIN {
        findings.warn("file descriptors", figure, remedy);
    } else {
        findings.ok("file descriptors", figure);
    }
}

fn render(findings: &[Finding]) -> String {
    let widest = findings.iter().map(|finding| finding.about.len()).max().unwrap_or(0);
    let mut out = String::new();
    for Finding { about, check, verdict, figure, remedy } in findings {
        out.push_str(&format!("{:<4}  {about:<widest$}  {check}: {figure}\n", verdict.code()));
        if let Some(remedy) = remedy {
            out.push_str(&format!("      {:widest$}  → {remedy}\n", ""));
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (warnings, failures) = (count(Verdict::Warn), count(Verdict::Fail));
    out.push_str(&format!("{failures} failures, {warnings} warnings\n"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_their_labels() {
        let text = "# HELP x y\ntelemetry_received_bytes_total{stream=\"a\"} 10\n\
                    telemetry_received_bytes_total{stream=\"b\"} 5\nprocess_start_time_seconds 2.5\n";
        let sums = sums(text);
        assert_eq!(sums["telemetry_received_bytes_total"], 15.0);
        assert_eq!(sums["process_start_time_seconds"], 2.5);
    }

    #[test]
    fn a_line_says_verdict_figure_and_remedy() {
        let mut findings = Findings::about("drive");
        findings.ok("sync", "0.8 ms");
        findings.fail("room", "none", "make room");
        let shown = render(&findings.done());
        assert!(shown.contains("ok    drive  sync: 0.8 ms\n"), "{shown}");
        assert!(shown.contains("fail  drive  room: none\n"), "{shown}");
        assert!(shown.contains("→ make room\n1 failures, 0 warnings\n"), "{shown}");
    }
}
