//! The supervised part of one database: migrations first, then upkeep for as long as the node runs.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::apply::Session;
use super::error::MigrateError;
use super::upkeep::Upkeep;
use crate::config::{DatabaseSettings, TableSettings};
use crate::crash::part_point;
use crate::database::maintenance::detect_tier;
use crate::domain::{ErrorClass, Runbook};
use crate::observe::{Board, DependencyView, MigrationState};
use crate::part::{Control, Part, PartResult, Phase};
use crate::retry::Backoff;

/// Waits for its database, applies what is pending, opens the gate, keeps the tables in shape. What fails here keeps
/// this database's writers off and nothing else: the node stays up and goes on keeping messages.
pub struct Migrator {
    /// Key in `Settings::databases`; the files name it too.
    pub database: String,
    pub settings: DatabaseSettings,
    /// Every table sink of this database.
    pub tables: Vec<TableSettings>,
    pub board: Arc<Board>,
    /// The writers of this database wait for `Done`. Once open this part never shuts it again, whatever its restart
    /// finds: the tables are there. Only a reload does, for tables that are new.
    pub gate: watch::Sender<MigrationState>,
}

impl Part for Migrator {
    async fn run(self, control: Control) -> PartResult {
        let mut phase = control.clone();
        let over = async {
            while phase.phase() == Phase::Running {
                phase.changed().await;
            }
        };
        // Ending in the middle of a file drops the connection, and the server rolls the file back.
        let progress = control.progress.clone();
        progress.set_work_waiting(true);
        // A statement may take as long as it was given, and every wait has its limit: all that can hang is the thread.
        tokio::select! {
            () = over => {}
            never = progress.waiting(self.live(control)) => match never {},
        }
        progress.set_work_waiting(false);
        Ok(())
    }
}

impl Migrator {
    async fn live(self, mut control: Control) -> std::convert::Infallible {
        let view = self.board.dependency(&format!("postgresql:{}", self.database));
        self.show(&view, MigrationState::Waiting);
        let session = self.migrate(&view, &mut control).await;
        self.say_tier(&session).await;
        let upkeep = Upkeep::new(self.database, self.settings, self.tables, view);
        upkeep.run(session, control).await
    }

    async fn migrate(&self, view: &DependencyView, control: &mut Control) -> Session {
        let mut backoff = Backoff::new(self.settings.retry);
        let mut told = Told { since: Instant::now(), waiting: false, failure: String::new() };
        let mut left = None;
        loop {
            while control.paused() {
                control.changed().await;
            }
            let attempt = self.attempt(view, left.as_ref()).await;
            control.progress.beat();
            let error = match attempt {
                Ok(session) => {
                    view.update(|status| {
                        status.migrations_pending = 0;
                        status.trouble = None;
                    });
                    self.show(view, MigrationState::Done);
                    return session;
                }
                Err(error) => error,
            };
            if let Some(checksum) = error.left_by() {
                left = Some(Left { checksum: checksum.to_owned(), failure: error.to_string() });
            }
            let pause = backoff.next_pause();
            let pause = match error.class() {
                ErrorClass::Transient => {
                    self.report_waiting(view, &error, &mut told);
                    view.breaker().rest().unwrap_or(pause)
                }
                ErrorClass::Data | ErrorClass::Standing => {
                    self.report_failed(view, &error, &mut told);
                    // The files are read again, so mending them is enough.
                    pause
                }
            };
            tokio::select! {
                _ = control.sleep(pause) => {}
                () = view.breaker().recovered() => {}
            }
        }
    }

    async fn attempt(
        &self,
        view: &DependencyView,
        left: Option<&Left>,
    ) -> Result<Session, MigrateError> {
        let session = Session::open_if_let(&self.database, &self.settings, view).await?;
        part_point(|| format!("part_migrator_{}", self.database)).await;
        view.reachable();
        let pending = session.standing().await?.plan.pending;
        view.update(|status| status.migrations_pending = pending.len() as u64);
        // Wherever it stands: one that was put before it since would be applied, and then it as it is.
        let again = left.filter(|left| pending.iter().any(|it| it.checksum == left.checksum));
        if let Some(left) = again {
            return Err(MigrateError::NotRepeated { failure: left.failure.clone() });
        }
        session.apply().await?;
        Ok(session)
    }

    fn report_waiting(&self, view: &DependencyView, error: &MigrateError, told: &mut Told) {
        if error.is_connection_trouble() {
            view.unreachable(&error.to_string());
        } else if !error.is_resting() {
            view.update(|status| status.trouble = Some(error.to_string()));
        }
        if !told.waiting && told.since.elapsed() >= self.settings.migration_wait {
            told.waiting = true;
            tracing::warn!(
                event = "migration_waiting",
                correlation_id = view.outage().current().map(tracing::field::display),
                database = self.database,
                waited_seconds = told.since.elapsed().as_secs(),
                %error,
                "still waiting to migrate the database; messages are kept meanwhile"
            );
        }
    }

    fn report_failed(&self, view: &DependencyView, error: &MigrateError, told: &mut Told) {
        let text = error.to_string();
        if error.is_connection_trouble() {
            view.unreachable(&text);
        }
        view.update(|status| status.trouble = Some(text.clone()));
        self.show(view, MigrationState::Failed);
        if told.failure != text {
            tracing::error!(
                event = "migration_failed",
                runbook = Runbook::MigrationFailed.page(),
                database = self.database,
                retry_seconds = self.settings.retry.max.as_secs(),
                %error,
                "the database is not migrated; its writers stay off, messages are kept"
            );
            told.failure = text;
        }
    }

    fn show(&self, view: &DependencyView, state: MigrationState) {
        let changed = |current: &mut MigrationState| {
            let change = *current != MigrationState::Done && *current != state;
            if change {
                *current = state;
            }
            change
        };
        self.gate.send_if_modified(changed);
        let shown = *self.gate.borrow();
        view.update(|status| status.migration = Some(shown));
    }

    async fn say_tier(&self, session: &Session) {
        // Only said: each table's own shape decides what is done with it.
        if let Ok(tier) = detect_tier(session.client()).await {
            tracing::info!(event = "database_tier", database = self.database, %tier, "the database is ready");
        }
    }
}

/// A file that may have left something, and why. Only a person knows whether it can run again: by changing it, or by
/// `telemetry migrate apply`.
struct Left {
    checksum: String,
    failure: String,
}

/// What was said, so that it is said once.
struct Told {
    since: Instant,
    waiting: bool,
    failure: String,
}
