//! The node as its users have it: the binary, a configuration file, signals, HTTP.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::daemon::Daemon;
use crate::http::{self, Response};
use crate::paths::target;
use crate::wait::until;

const LIVE_WITHIN: Duration = Duration::from_secs(20);

/// `telemetry run` with one configuration.
#[derive(Debug)]
pub struct Node {
    daemon: Daemon,
    http_port: u16,
    config: PathBuf,
}

impl Node {
    /// Describes the node; [`Node::start`] starts it. `config` must make it listen on `http_port`; the log goes
    /// beside the configuration. In an integration test give `env!("CARGO_BIN_EXE_telemetry")` as the binary.
    pub fn new(binary: impl Into<PathBuf>, config: impl Into<PathBuf>, http_port: u16) -> Self {
        let config = config.into();
        let daemon = Daemon::new("telemetry", binary, config.with_extension("log"))
            .arguments(["run", "--config"])
            .argument(&config);
        Self { daemon, http_port, config }
    }

    /// The binary built with this profile (`debug`, `release`), or the one that CARGO_BIN_EXE_telemetry names.
    pub fn binary(profile: &str) -> PathBuf {
        std::env::var_os("CARGO_BIN_EXE_telemetry")
            .map_or_else(|| target().join(profile).join("telemetry"), PathBuf::from)
    }

    /// For the node's own process only, e.g. `RUST_LOG`.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.daemon = self.daemon.environment(name, value);
        self
    }

    /// As another user: options of `setpriv`.
    pub fn privileges(mut self, options: &[&str]) -> Self {
        self.daemon = self.daemon.privileges(options.iter().map(|&option| option.into()).collect());
        self
    }

    /// Run by another program, e.g. strace, which must leave the node our child; empty = by itself.
    pub fn through(mut self, words: Vec<String>) -> Self {
        self.daemon = self.daemon.through(words);
        self
    }

    /// What FAILPOINTS says from the next start on; empty = nothing.
    pub fn set_failpoints(&mut self, points: &str) {
        self.daemon.set_environment("FAILPOINTS", points);
    }

    /// Starts it and waits until it answers `/health/live`.
    ///
    /// # Errors
    /// Names the command and the log's last lines.
    pub fn start(&mut self) -> Result<()> {
        self.daemon.start()?;
        let port = self.http_port;
        self.daemon.wait_ready(LIVE_WITHIN, || {
            Ok(http::get(port, "/health/live").is_ok_and(|answer| answer.status == 200))
        })
    }

    /// Starts it without waiting for anything.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        self.daemon.start()
    }

    /// Waits until `/health/ready` says 200.
    ///
    /// # Errors
    /// With the last answer and the log's last lines.
    pub fn wait_ready(&mut self, within: Duration) -> Result<()> {
        let mut last = String::from("no answer");
        let outcome = until(within, "the node ready", || {
            if let Some(status) = self.daemon.exit_status()? {
                bail!("the node ended ({status})");
            }
            match self.get("/health/ready") {
                Ok(answer) if answer.status == 200 => return Ok(Some(())),
                Ok(answer) => last = format!("{} {}", answer.status, answer.body),
                Err(error) => last = format!("{error:#}"),
            }
            Ok(None)
        });
        outcome
            .map_err(|error| anyhow!("{error:#}; /health/ready: {last}\n{}", self.daemon.story()))
    }

    /// # Errors
    /// When it does not answer.
    pub fn get(&self, path: &str) -> Result<Response> {
        http::get(self.http_port, path)
    }

    /// `GET /streams`.
    ///
    /// # Errors
    /// When it does not answer with JSON.
    pub fn streams(&self) -> Result<serde_json::Value> {
        self.get("/streams")?.json()
    }

    /// SIGTERM; gives how it ended.
    ///
    /// # Errors
    /// When it does not end in time; then it is killed.
    pub fn stop(&mut self, within: Duration) -> Result<ExitStatus> {
        self.daemon.stop(within)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// # Errors
    /// When it does not run.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        self.daemon.signal(signal)
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    pub fn http_port(&self) -> u16 {
        self.http_port
    }

    pub fn log_text(&self) -> String {
        self.daemon.log_text()
    }

    /// Runs another command of the binary with the same configuration, e.g. `["dlq", "list", "--json"]`.
    ///
    /// # Errors
    /// When it cannot be started; how it ended is in the output.
    pub fn command(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.prepared(arguments).output();
        output.with_context(|| format!("run telemetry {}", arguments.join(" ")))
    }

    /// The same, not waited for; what it says is lost.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn begin(&self, arguments: &[&str]) -> Result<Child> {
        let begun = self.prepared(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        begun.with_context(|| format!("run telemetry {}", arguments.join(" ")))
    }

    fn prepared(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.daemon.program());
        command.args(arguments).arg("--config").arg(&self.config).stdin(Stdio::null());
        command
    }
}
