//! The node's life: start, run until told to stop or until the disk fails, stop in order.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::assembly::Assembly;
use super::disk;
use super::reload::{self, Loader, ReloadOrder, Reloader};
use super::replay::replay;
use super::service;
use super::supervisor::{AddPart, GetAlive, GetUnfinished, PartSpec, SetPhase, Side, Supervisor};
use super::thread::{self, Thread};
use super::watch::watches;
use crate::buffer::Buffer;
use crate::config::{Loaded, Settings};
use crate::domain::Runbook;
use crate::http::{ControlState, DeadLetters, listen};
use crate::observe::{Board, LogControl};
use crate::part::Phase;

/// How often a stop looks whether parts have ended.
const STOP_POLL: Duration = Duration::from_millis(20);

/// What parts get to abandon what they do once they are told to end at once.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// The buffer syncs and closes within this, or the stop goes on without it (what was acknowledged is durable anyway).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a stop may take beyond its drain: both sides are told to end at once, HTTP ends, the buffer closes.
const STOP_RESERVE: Duration =
    Duration::from_secs(10 + 2 * STOP_GRACE.as_secs() + CLOSE_TIMEOUT.as_secs());

/// How often it is looked whether the supervisor lives.
const SUPERVISOR_LOOK: Duration = Duration::from_secs(1);

/// Orders to reload that wait; each is answered.
const RELOAD_ORDERS_MAX: usize = 4;

/// Runs the node until SIGTERM or SIGINT; SIGHUP makes it `load` its configuration again. `Err` when it could not start,
/// or when the disk failed under it or its supervisor: the process must then end non-zero, so that systemd starts it again.
pub fn run(loaded: &Loaded, load: Loader, log: LogControl) -> anyhow::Result<()> {
    install_panic_log();
    thread::system().block_on(async {
        let mut signals = Signals::listen()?;
        let (node, mut reloads) = Node::start(loaded, load, log).await?;
        let verdict = node.until_told(&mut signals, &mut reloads).await;
        node.stop(&mut signals).await;
        verdict
    })
}

/// A panic ends one part; its place belongs into the log like any other event.
fn install_panic_log() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        tracing::error!(event = "panic", thread = thread.name().unwrap_or("unnamed"), "{panic}");
    }));
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        stop_signal(&mut self.terminate, &mut self.interrupt).await;
    }
}

async fn stop_signal(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

struct Node {
    settings: Arc<Settings>,
    board: Arc<Board>,
    buffer: Buffer,
    supervisor: Addr<Supervisor>,
    reloader: Reloader,
}

impl Node {
    /// The node, and the orders to reload that reach it.
    async fn start(
        loaded: &Loaded,
        load: Loader,
        log: LogControl,
    ) -> anyhow::Result<(Self, mpsc::Receiver<ReloadOrder>)> {
        let began = Instant::now();
        let settings = Arc::new(loaded.settings.clone());
        let board = Board::new(&settings);
        make_state_dir(&settings.node.state_dir)?;
        let sinks: Vec<_> =
            settings.streams.values().map(|stream| (stream.name.clone(), stream.sinks())).collect();
        let buffer = service::while_recovering(&board, || {
            Buffer::open(&settings.node.state_dir, &settings.buffer, &sinks, board.clone())
        })?;
        board.update_node(|node| node.log_identity = buffer.identity().to_string());
        let supervisor = Supervisor::new(settings.supervision.clone(), board.clone()).start();
        let assembly = Assembly::new(settings.clone(), buffer.clone(), board.clone());
        let (orders, reloads) = mpsc::channel(RELOAD_ORDERS_MAX);
        let control = ControlState {
            supervisor: supervisor.clone().recipient(),
            letters: DeadLetters {
                state: buffer.state(),
                replay: replay(assembly.replayers.clone()),
            },
            reload: reload::over(orders),
        };
        let listeners = listen(&settings.http, &settings.node.state_dir, &board, &control)?;
        let thread = Thread::start("listeners");
        for listener in listeners.parts {
            let name = listener.name.to_owned();
            let part = PartSpec::new(name, Side::Answers, thread.clone(), move || listener.clone());
            supervisor.send(AddPart(part)).await.context("launch the listeners")?;
        }
        let reloader = Reloader::new(loaded, load, log, supervisor.clone(), assembly);
        reloader.launch().await.context("launch the parts")?;
        let stall_timeout = settings.supervision.stall_timeout;
        for watch in watches(&board, &buffer, stall_timeout, &reloader.settings()) {
            supervisor.send(AddPart(watch)).await.context("launch the watches")?;
        }
        board.update_node(|node| node.running = true);
        tracing::info!(event = "node_started", node = %settings.node.name,
            log = %buffer.identity(), http = %listeners.address,
            streams = settings.streams.len(), after_ms = began.elapsed().as_millis() as u64,
            "accepting as soon as a broker is there");
        service::ready(&board);
        Ok((Node { settings, board, buffer, supervisor, reloader }, reloads))
    }

    /// Until a signal, the first error of the disk, or the supervisor's own.
    async fn until_told(
        &self,
        signals: &mut Signals,
        reloads: &mut mpsc::Receiver<ReloadOrder>,
    ) -> anyhow::Result<()> {
        let Signals { terminate, interrupt, hangup } = signals;
        let watchdog = async {
            match sd_notify::watchdog_enabled() {
                Some(limit) => self.feed_watchdog(limit / 2).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop_signal(terminate, interrupt) => Ok(()),
            error = self.buffer.failed() => {
                tracing::error!(event = "buffer_failed",
                    runbook = Runbook::NodeRestarting.page(), %error,
                    "the disk failed: the node ends and must be started afresh");
                Err(error.into())
            }
            () = self.supervisor_gone() => {
                tracing::error!(event = "supervisor_gone",
                    runbook = Runbook::NodeRestarting.page(),
                    "nobody looks after the parts: the node ends and must be started afresh");
                Err(anyhow::anyhow!("the supervisor has panicked"))
            }
            () = watchdog => Ok(()),
            () = service::keep_telling(&self.board) => Ok(()),
            () = self.reloader.obey(reloads, hangup) => Ok(()),
        }
    }

    /// Its parts go on without it and would never be started afresh, nor told to stop.
    async fn supervisor_gone(&self) {
        while self.supervisor.connected() {
            tokio::time::sleep(SUPERVISOR_LOOK).await;
        }
    }

    /// Only real progress feeds it: a supervisor that does not answer, a part that stays stalled, or a thread of the buffer
    /// that hangs does not.
    async fn feed_watchdog(&self, interval: Duration) {
        loop {
            let alive = tokio::time::timeout(interval, self.supervisor.send(GetAlive)).await;
            let hung = disk::hung_thread(&self.buffer, self.settings.supervision.stall_timeout);
            if matches!(alive, Ok(Ok(true))) && hung.is_none() {
                service::alive();
            }
            tokio::time::sleep(interval).await;
        }
    }

    /// 1. not ready 2. intake ends 3. sinks work until the deadline 4. whoever is left ends at once 5. HTTP ends
    /// 6. the buffer closes. A second signal goes to 4.
    async fn stop(self, signals: &mut Signals) {
        let began = Instant::now();
        self.board.update_node(|node| {
            node.running = false;
            node.draining = true;
        });
        service::stopping(self.settings.node.drain_timeout + STOP_RESERVE);
        let deadline = began + self.settings.node.drain_timeout;
        tracing::info!(
            event = "node_stopping",
            drain_timeout_ms = self.settings.node.drain_timeout.as_millis() as u64,
            "intake ends, sinks deliver what they can"
        );
        tokio::select! {
            () = self.drain(deadline) => {}
            () = signals.next() => {
                tracing::info!(event = "node_stopping_at_once", "a second signal: what is pending stays in the buffer");
            }
        }
        for side in [Side::Intake, Side::Delivery] {
            self.set_phase(side, Phase::Stopping).await;
        }
        for side in [Side::Intake, Side::Delivery, Side::Answers] {
            self.set_phase(side, Phase::Stopping).await;
            let left = self.wait_finished(side, Instant::now() + STOP_GRACE).await;
            if !left.is_empty() {
                tracing::warn!(
                    event = "parts_left",
                    parts = left.join(", "),
                    "did not end in time"
                );
            }
        }
        if let Err(error) = self.buffer.close(CLOSE_TIMEOUT).await {
            tracing::warn!(event = "buffer_close_failed", %error, "closing the buffer");
        }
        tracing::info!(
            event = "node_stopped",
            after_ms = began.elapsed().as_millis() as u64,
            "stopped"
        );
    }

    async fn drain(&self, deadline: Instant) {
        self.set_phase(Side::Intake, Phase::Draining { deadline }).await;
        self.wait_finished(Side::Intake, deadline).await;
        self.set_phase(Side::Delivery, Phase::Draining { deadline }).await;
        let left = self.wait_finished(Side::Delivery, deadline).await;
        if !left.is_empty() {
            tracing::info!(
                event = "drain_deadline",
                parts = left.join(", "),
                "the deadline has come: what is pending stays in the buffer"
            );
        }
    }

    async fn set_phase(&self, side: Side, phase: Phase) {
        // The supervisor lives as long as the node; a failed send means that the system is going down anyway.
        let _ = self.supervisor.send(SetPhase(side, phase)).await;
    }

    /// Who is left at the deadline.
    async fn wait_finished(&self, side: Side, deadline: Instant) -> Vec<String> {
        loop {
            let left = self.supervisor.send(GetUnfinished(side)).await.unwrap_or_default();
            if left.is_empty() || Instant::now() >= deadline {
                return left;
            }
            tokio::time::sleep(STOP_POLL).await;
        }
    }
}

fn make_state_dir(path: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("make the state directory {}", path.display()))
}
