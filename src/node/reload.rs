//! A changed configuration, taken while the node runs: compared with the one in force, and only what differs is ended,
//! built anew or added. The buffer stays open throughout; what a part had not finished waits there or with the broker.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use super::assembly::Assembly;
use super::blueprint::{Basis, Blueprint, PartKey};
use super::service;
use super::supervisor::{AddPart, ForgetPart, RetirePart, Supervisor};
use crate::config::{EffectiveLine, Loaded, LogSettings, Report, Settings};
use crate::domain::{Changes, CorrelationId, PartChange, PartFate, Sequence, SettingChange};
use crate::http::Reload;
use crate::observe::LogControl;
use crate::part::Phase;

/// Reads and checks the configuration, whole.
pub type Loader = Arc<dyn Fn() -> Result<Loaded, Report> + Send + Sync>;

/// A part that is to be replaced ends within this, or is cancelled: what it was doing is done again by the next one.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is asked whether it has ended.
const RETIRE_POLL: Duration = Duration::from_millis(20);

/// What is built once, at the start: tables of the file, or single settings.
const FIXED: [&str; 5] = ["node.", "buffer.", "http.", "supervision.", "log.format"];

/// Asked over HTTP; the node answers between two turns of its own loop.
pub struct ReloadOrder {
    only_compare: bool,
    correlation_id: CorrelationId,
    answer: oneshot::Sender<Result<Changes, String>>,
}

/// The order as the HTTP listeners give it.
pub fn over(orders: mpsc::Sender<ReloadOrder>) -> Reload {
    Arc::new(move |only_compare, correlation_id| {
        let orders = orders.clone();
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let stopping = || "the node is stopping".to_owned();
            let order = ReloadOrder { only_compare, correlation_id, answer };
            orders.send(order).await.map_err(|_| stopping())?;
            answered.await.map_err(|_| stopping())?
        })
    })
}

/// The configuration in force and everything that follows it.
pub struct Reloader {
    config: PathBuf,
    load: Loader,
    log: LogControl,
    supervisor: Addr<Supervisor>,
    settings: watch::Sender<Arc<Settings>>,
    state: Mutex<InForce>,
}

struct InForce {
    assembly: Assembly,
    /// Path → value.
    values: BTreeMap<String, String>,
}

/// A configuration that passed, compared with the one in force.
struct Next {
    settings: Settings,
    blueprint: Blueprint,
    values: BTreeMap<String, String>,
    changes: Changes,
}

impl Reloader {
    pub fn new(
        loaded: &Loaded,
        load: Loader,
        log: LogControl,
        supervisor: Addr<Supervisor>,
        assembly: Assembly,
    ) -> Self {
        Reloader {
            config: PathBuf::from(&loaded.file),
            load,
            log,
            supervisor,
            settings: watch::Sender::new(assembly.settings().clone()),
            state: Mutex::new(InForce { assembly, values: values(&loaded.effective) }),
        }
    }

    /// The settings in force, and those of later reloads.
    pub fn settings(&self) -> watch::Receiver<Arc<Settings>> {
        self.settings.subscribe()
    }

    /// Launches every part of the configuration the node started with.
    pub async fn launch(&self) -> anyhow::Result<()> {
        let mut state = self.state.lock().await;
        let settings = state.assembly.settings().clone();
        let blueprint = Blueprint::of(&settings);
        self.follow(&mut state.assembly, settings, blueprint).await
    }

    /// Obeys orders for as long as the node runs.
    pub async fn obey(
        &self,
        orders: &mut mpsc::Receiver<ReloadOrder>,
        hangup: &mut tokio::signal::unix::Signal,
    ) {
        loop {
            tokio::select! {
                Some(()) = hangup.recv() => drop(self.reload(false, CorrelationId::new()).await),
                Some(order) = orders.recv() => {
                    // Whoever asked may have gone.
                    let outcome = self.reload(order.only_compare, order.correlation_id).await;
                    let _ = order.answer.send(outcome);
                }
            }
        }
    }

    async fn reload(
        &self,
        only_compare: bool,
        correlation_id: CorrelationId,
    ) -> Result<Changes, String> {
        let mut state = self.state.lock().await;
        if only_compare {
            return self.compare(&state).await.map(|next| next.changes);
        }
        service::reloading();
        let outcome = self.take(&mut state).await;
        service::ready(&state.assembly.board);
        match &outcome {
            Ok(changes) => tell(changes, &correlation_id),
            Err(why) => tracing::error!(
                event = "configuration_refused",
                %correlation_id,
                "the changed configuration is not taken, the old one goes on: {why}"
            ),
        }
        outcome
    }

    async fn take(&self, state: &mut InForce) -> Result<Changes, String> {
        let next = self.compare(state).await?;
        if next.changes.is_empty() {
            return Ok(next.changes);
        }
        self.log.set_filter(&next.settings.log).map_err(|error| error.to_string())?;
        let settings = Arc::new(next.settings);
        let followed = self.follow(&mut state.assembly, settings.clone(), next.blueprint).await;
        followed.map_err(|error| format!("{error:#}"))?;
        state.values = next.values;
        self.settings.send_replace(settings);
        Ok(next.changes)
    }

    async fn compare(&self, state: &InForce) -> Result<Next, String> {
        let load = self.load.clone();
        let loading = tokio::task::spawn_blocking(move || {
            let loaded = load()?;
            let blueprint = Blueprint::of(&loaded.settings);
            Ok::<_, Report>((loaded, blueprint))
        });
        let (loaded, blueprint) = match loading.await {
            Ok(checked) => checked.map_err(|report| report.to_string())?,
            Err(error) => return Err(error.to_string()),
        };
        let before = state.assembly.settings();
        if loaded.settings.node.name != before.node.name {
            return Err("node.name: the name is in client ids and cursors and cannot change while the node runs: \
                        restart it"
                .to_owned());
        }
        let (values, settings) = compare_values(&state.values, values(&loaded.effective));
        let mut changes = compare_parts(state.assembly.blueprint(), &blueprint);
        changes.config.clone_from(&self.config);
        changes.settings = settings;
        let mut settings = Settings {
            node: before.node.clone(),
            buffer: before.buffer.clone(),
            http: before.http.clone(),
            log: LogSettings { format: before.log.format, filter: loaded.settings.log.filter },
            supervision: before.supervision.clone(),
            ..loaded.settings
        };
        settings.share_presented(before);
        Ok(Next { settings, blueprint, values, changes })
    }

    /// Ends what has changed or gone, tells board and buffer, and launches what is new.
    async fn follow(
        &self,
        assembly: &mut Assembly,
        settings: Arc<Settings>,
        blueprint: Blueprint,
    ) -> anyhow::Result<()> {
        let before = assembly.blueprint().clone();
        let same = |key: &PartKey| before.parts.get(key) == blueprint.parts.get(key);
        let fresh: Vec<_> = blueprint.parts.keys().filter(|key| !same(key)).cloned().collect();
        let ended: Vec<_> = before.parts.keys().filter(|key| !same(key)).collect();
        self.retire(&ended).await?;
        let sinks: Vec<_> =
            settings.streams.values().map(|stream| (stream.name.clone(), stream.sinks())).collect();
        assembly.board.configure(&settings);
        assembly.buffer.configure(&sinks);
        for (stream, _) in &sinks {
            // No sink may let go of records before their stream has read them.
            assembly.buffer.remembered(stream, Sequence::ZERO);
        }
        for key in before.parts.keys().filter(|key| !blueprint.parts.contains_key(*key)) {
            self.supervisor.send(ForgetPart(key.name())).await?;
        }
        let copied_to = settings.dead_letter_clusters();
        assembly.buffer.state().copy_dead_letters_to(copied_to).await?;
        assembly.configure(settings, blueprint);
        for key in fresh {
            self.supervisor.send(AddPart(assembly.build(&key))).await?;
        }
        Ok(())
    }

    async fn retire(&self, parts: &[&PartKey]) -> anyhow::Result<()> {
        let deadline = Instant::now() + RETIRE_TIMEOUT;
        let mut living: Vec<_> = parts.to_vec();
        loop {
            let mut still = Vec::new();
            for key in living {
                let phase = match key {
                    // What it has received becomes durable and is acknowledged.
                    PartKey::Stream(_) => Phase::Draining { deadline },
                    _ => Phase::Stopping,
                };
                let cancel = Instant::now() >= deadline;
                let order = RetirePart { name: key.name(), phase, cancel };
                if self.supervisor.send(order).await? {
                    still.push(key);
                }
            }
            if still.is_empty() || Instant::now() >= deadline + RETIRE_TIMEOUT {
                return Ok(());
            }
            living = still;
            tokio::time::sleep(RETIRE_POLL).await;
        }
    }
}

fn values(lines: &[EffectiveLine]) -> BTreeMap<String, String> {
    lines.iter().map(|line| (line.path.clone(), line.value.clone())).collect()
}

/// What is in force when `after` has been taken, and how it differs.
fn compare_values(
    before: &BTreeMap<String, String>,
    after: BTreeMap<String, String>,
) -> (BTreeMap<String, String>, Vec<SettingChange>) {
    let mut paths: Vec<_> = before.keys().chain(after.keys()).cloned().collect();
    paths.sort_unstable();
    paths.dedup();
    let mut in_force = after.clone();
    let mut changes = Vec::new();
    for path in paths {
        let (old, new) = (before.get(&path).cloned(), after.get(&path).cloned());
        if old == new {
            continue;
        }
        let needs_restart = FIXED.iter().any(|fixed| path.starts_with(fixed));
        if needs_restart {
            in_force.remove(&path);
            in_force.extend(old.clone().map(|old| (path.clone(), old)));
        }
        changes.push(SettingChange { path, before: old, after: new, needs_restart });
    }
    (in_force, changes)
}

fn compare_parts(before: &Blueprint, after: &Blueprint) -> Changes {
    let mut changes = Changes::default();
    let mut enter = |part: String, old: bool, new: bool, same: bool| match (old, new) {
        (true, true) if same => changes.parts_untouched += 1,
        (true, true) => changes.parts.push(PartChange { part, fate: PartFate::Renewed }),
        (true, false) => changes.parts.push(PartChange { part, fate: PartFate::Removed }),
        (false, _) => changes.parts.push(PartChange { part, fate: PartFate::Added }),
    };
    let keys = after.parts.keys();
    for key in keys.chain(before.parts.keys().filter(|key| !after.parts.contains_key(*key))) {
        let (old, new) = (before.parts.get(key), after.parts.get(key));
        enter(key.name(), old.is_some(), new.is_some(), old == new);
    }
    let lanes = after.lanes.keys();
    for key in lanes.chain(before.lanes.keys().filter(|key| !after.lanes.contains_key(*key))) {
        let (old, new) = (before.lanes.get(key), after.lanes.get(key));
        let cluster = PartKey::Kafka(key.0.clone());
        // A part that is renewed renews its lanes.
        if old != new && before.parts.get(&cluster) == after.parts.get(&cluster) {
            let part = format!("{}/{}", cluster.name(), key.1);
            enter(part, old.is_some(), new.is_some(), false);
        }
    }
    let changed = |(key, basis): (&PartKey, &Basis)| {
        let files = before.parts.get(key).map(|known| basis.changed_files(known));
        files.into_iter().flatten().map(|path| path.to_owned()).collect::<Vec<_>>()
    };
    changes.files = after.parts.iter().flat_map(changed).collect();
    changes.files.sort_unstable();
    changes.files.dedup();
    changes
}

fn tell(changes: &Changes, correlation_id: &CorrelationId) {
    let of = |fate: PartFate| {
        let parts = changes.parts.iter().filter(|change| change.fate == fate);
        parts.map(|change| change.part.as_str()).collect::<Vec<_>>().join(", ")
    };
    tracing::info!(
        event = "configuration_reloaded",
        %correlation_id,
        settings = changes.settings.len(),
        files = changes.files.len(),
        added = of(PartFate::Added),
        renewed = of(PartFate::Renewed),
        removed = of(PartFate::Removed),
        untouched = changes.parts_untouched,
        "the configuration was read again"
    );
    let waiting = changes.need_restart();
    if !waiting.is_empty() {
        tracing::warn!(
            event = "restart_needed",
            %correlation_id,
            settings = waiting.join(", "),
            "these settings count from the next start on: systemctl restart telemetry"
        );
    }
}
