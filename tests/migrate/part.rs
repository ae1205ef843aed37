//! The supervised part: gate, retries, upkeep, stop.

use std::sync::Arc;
use std::time::Duration;

use indexmap::IndexMap;
use rig::{Link, Proxy};
use telemetry::config::{
    BufferSettings, HttpSettings, JobSettings, LogFormat, LogSettings, NodeSettings, Settings,
    SupervisionSettings, TableSettings,
};
use telemetry::domain::NodeName;
use telemetry::migrate::Migrator;
use telemetry::observe::{Board, MigrationState};
use telemetry::part::{Control, Part, Phase, Progress};
use tokio::sync::watch;
use tokio::task::{JoinHandle, LocalSet};

use crate::database::{DAY, TestDatabase, append_table, rollup_job};

const PATIENCE: Duration = Duration::from_secs(30);

fn node(database: &TestDatabase) -> Settings {
    let second = Duration::from_secs(1);
    Settings {
        node: NodeSettings {
            name: NodeName::parse("test").unwrap(),
            state_dir: std::env::temp_dir(),
            drain_timeout: second,
            stream_threads: 1,
        },
        buffer: BufferSettings {
            quota_bytes: 1,
            generation_bytes: 1,
            sync_linger: second,
            group_messages_max: 1,
            tail_bytes_max: 1,
            dead_letter_quota_bytes: 1,
            ballast_bytes: 1,
            free_bytes_min: 1,
        },
        http: HttpSettings {
            listen: ([127, 0, 0, 1], 0).into(),
            certificate: None,
            guarded: false,
            requests_per_minute_max: 600,
            connections_per_peer_max: 64,
        },
        log: LogSettings { format: LogFormat::Text, filter: "info".to_owned() },
        supervision: SupervisionSettings {
            restarts_max: 1,
            restart_window: second,
            backoff_min: second,
            backoff_max: second,
            parked_retry: second,
            stall_timeout: second,
        },
        brokers: IndexMap::new(),
        clusters: IndexMap::new(),
        databases: IndexMap::from([("telemetry".to_owned(), database.settings.clone())]),
        streams: IndexMap::new(),
    }
}

/// A part that runs, and the ends of what it was given.
struct Running {
    board: Arc<Board>,
    gate: watch::Receiver<MigrationState>,
    phase: watch::Sender<Phase>,
    _paused: watch::Sender<bool>,
    task: JoinHandle<Result<(), anyhow::Error>>,
}

fn start(database: &TestDatabase, tables: Vec<TableSettings>) -> Running {
    let board = Board::new(&node(database));
    let (gate_sender, gate) = watch::channel(MigrationState::Waiting);
    let (phase, phase_seen) = watch::channel(Phase::Running);
    let (paused, paused_seen) = watch::channel(false);
    let migrator = Migrator {
        database: "telemetry".to_owned(),
        settings: database.settings.clone(),
        tables,
        board: board.clone(),
        gate: gate_sender,
    };
    let control = Control::new(phase_seen, paused_seen, Arc::new(Progress::default()));
    let task = tokio::task::spawn_local(migrator.run(control));
    Running { board, gate, phase, _paused: paused, task }
}

impl Running {
    async fn reaches(&mut self, wanted: MigrationState) {
        let reached = self.gate.wait_for(|state| *state == wanted);
        let _ = tokio::time::timeout(PATIENCE, reached).await.expect("in time").unwrap();
    }

    async fn stop(self) {
        self.phase.send_replace(Phase::Stopping);
        tokio::time::timeout(PATIENCE, self.task).await.expect("in time").unwrap().unwrap();
    }
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn a_failed_file_keeps_the_gate_shut_until_it_is_mended() {
    let database = TestDatabase::new();
    database.write("0001_a.sql", "CREATE TABLE a (x nonsense);");
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Failed).await;
            let status = running.board.dependency("postgresql:telemetry").status();
            assert_eq!((status.up, status.migrations_pending), (Some(true), 1));
            let trouble = status.trouble.unwrap();
            assert!(
                trouble.contains("0001_a.sql, line 2") && trouble.contains("nonsense"),
                "{trouble}"
            );
            database.write("0001_a.sql", "CREATE TABLE a (x integer);");
            running.reaches(MigrationState::Done).await;
            let status = running.board.dependency("postgresql:telemetry").status();
            assert_eq!((status.migration, status.trouble), (Some(MigrationState::Done), None));
            assert_eq!(status.migrations_pending, 0);
            running.stop().await;
        })
        .await;
}

/// That of the database's only file it is told so, and that a quick one in its place is applied.
async fn assert_takes_too_long(database: &TestDatabase) {
    LocalSet::new()
        .run_until(async {
            let mut running = start(database, Vec::new());
            let view = running.board.dependency("postgresql:telemetry");
            eventually("reached", || view.status().up == Some(true)).await;
            let since = view.status().since;
            running.reaches(MigrationState::Failed).await;
            let status = view.status();
            assert_eq!((status.up, status.since), (Some(true), since), "it was never away");
            let trouble = status.trouble.unwrap();
            assert!(
                trouble.contains("0001_a.sql") && trouble.contains("query_timeout_seconds"),
                "{trouble}"
            );
            database.write("0001_a.sql", "CREATE TABLE a ();");
            running.reaches(MigrationState::Done).await;
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_file_that_takes_too_long_has_failed_and_the_database_is_not_away() {
    let mut database = TestDatabase::new();
    database.settings.query_timeout = Duration::from_millis(500);
    database.write("0001_a.sql", "CREATE TABLE a (); SELECT pg_sleep(60);");
    assert_takes_too_long(&database).await;
}

/// The server's own limit begins anew with each statement.
#[tokio::test]
async fn a_file_whose_statements_take_too_long_together_has_failed() {
    let mut database = TestDatabase::new();
    database.settings.query_timeout = Duration::from_millis(500);
    database.settings.statement_timeout = Duration::from_millis(100);
    let slow = "SELECT pg_sleep(0.4); ".repeat(5);
    database.write("0001_a.sql", &format!("CREATE TABLE a (); {slow}"));
    assert_takes_too_long(&database).await;
}

/// By the server's count: each attempt is a session of its own. The first to be counted may have begun before.
async fn several_more_attempts(database: &TestDatabase) {
    let before = database.sessions();
    eventually("several attempts", || database.sessions() >= before + 4).await;
}

/// A second run would take the invalid index of the first for the one it makes.
#[tokio::test]
async fn a_file_without_a_transaction_that_failed_is_left_to_a_person() {
    let database = TestDatabase::new();
    database.write("0001_a.sql", "CREATE TABLE a (x integer); INSERT INTO a VALUES (1), (1);");
    let index = "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS a_x ON a (x);";
    database.write("0002_x.sql", &format!("-- transaction: none\n{index}"));
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Failed).await;
            several_more_attempts(&database).await;
            let status = running.board.dependency("postgresql:telemetry").status();
            assert_eq!(status.migration, Some(MigrationState::Failed));
            let trouble = status.trouble.unwrap();
            assert!(trouble.contains("0002_x.sql") && trouble.contains("23505"), "{trouble}");
            database.execute("DROP INDEX a_x; DELETE FROM a");
            assert_eq!(database.apply().await.unwrap(), [2], "as `telemetry migrate apply` does");
            running.reaches(MigrationState::Done).await;
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_file_that_ended_its_transaction_does_its_work_once() {
    let database = TestDatabase::new();
    database.write(
        "0001_a.sql",
        "CREATE TABLE IF NOT EXISTS a (); INSERT INTO a DEFAULT VALUES; COMMIT; BEGIN;",
    );
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Failed).await;
            several_more_attempts(&database).await;
            assert_eq!(database.rows("SELECT count(*) FROM a"), ["1"]);
            database.write("0001_a.sql", "CREATE TABLE IF NOT EXISTS a ();");
            running.reaches(MigrationState::Done).await;
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_file_that_commits_and_then_fails_does_its_work_once() {
    let database = TestDatabase::new();
    database.write(
        "0001_a.sql",
        "CREATE TABLE IF NOT EXISTS a (); INSERT INTO a DEFAULT VALUES; COMMIT; BEGIN; SELECT 1/0;",
    );
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Failed).await;
            several_more_attempts(&database).await;
            assert_eq!(database.rows("SELECT count(*) FROM a"), ["1"]);
            let trouble =
                running.board.dependency("postgresql:telemetry").status().trouble.unwrap();
            assert!(
                trouble.contains("22012")
                    && trouble.contains("COMMIT")
                    && !trouble.contains("rolled back"),
                "{trouble}"
            );
            database.write("0001_a.sql", "CREATE TABLE IF NOT EXISTS a ();");
            running.reaches(MigrationState::Done).await;
            running.stop().await;
        })
        .await;
}

/// It was given the next number, to make room for another.
#[tokio::test]
async fn a_new_file_before_one_that_is_left_to_a_person_does_not_run_that_again() {
    let database = TestDatabase::new();
    let ends_its_transaction =
        "CREATE TABLE IF NOT EXISTS a (); INSERT INTO a DEFAULT VALUES; COMMIT; BEGIN;";
    database.write("0001_a.sql", ends_its_transaction);
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Failed).await;
            let folder = database.settings.migrations_dir.as_ref().unwrap();
            std::fs::rename(folder.join("0001_a.sql"), folder.join("0002_a.sql")).unwrap();
            database.write("0001_b.sql", "CREATE TABLE b ();");
            several_more_attempts(&database).await;
            assert_eq!(database.rows("SELECT count(*) FROM a"), ["1"]);
            database.write("0002_a.sql", "CREATE TABLE IF NOT EXISTS a ();");
            running.reaches(MigrationState::Done).await;
            assert_eq!(database.rows("SELECT version FROM schema_migrations"), ["1", "2"]);
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn another_node_that_migrates_is_waited_for_and_the_database_is_not_away() {
    let mut database = TestDatabase::new();
    let other = database.client().await;
    let lock = "SELECT pg_advisory_lock(hashtextextended('telemetry migrations of public', 0))";
    other.execute(lock, &[]).await.unwrap();
    database.settings.query_timeout = Duration::from_millis(300);
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            let view = running.board.dependency("postgresql:telemetry");
            let told = || view.status().trouble.is_some_and(|why| why.contains("migration lock"));
            eventually("told", told).await;
            let status = view.status();
            assert_eq!((status.up, status.migration), (Some(true), Some(MigrationState::Waiting)));
            drop(other);
            running.reaches(MigrationState::Done).await;
            assert_eq!(view.status().trouble, None);
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn an_absent_database_is_waited_for_and_the_part_can_be_stopped() {
    let mut database = TestDatabase::new();
    database.settings.port = 1;
    LocalSet::new()
        .run_until(async {
            let running = start(&database, Vec::new());
            let view = running.board.dependency("postgresql:telemetry");
            eventually("unreachable", || view.status().up == Some(false)).await;
            assert_eq!(view.status().migration, Some(MigrationState::Waiting));
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_server_that_falls_silent_in_the_middle_of_a_file_is_given_up_on_and_asked_again() {
    let mut database = TestDatabase::new();
    database.write("0001_a.sql", "CREATE TABLE a (x integer); SELECT pg_sleep(0.5);");
    let proxy = Proxy::start(database.settings.port).unwrap();
    database.settings.port = proxy.port();
    database.settings.query_timeout = Duration::from_secs(2);
    database.settings.statement_timeout = Duration::from_millis(500);
    let asleep = "SELECT count(*) FROM pg_stat_activity \
                  WHERE wait_event = 'PgSleep' AND datname = current_database()";
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            eventually("the file runs", || database.rows(asleep) == ["1"]).await;
            proxy.set(Link::SilentToClient);
            let view = running.board.dependency("postgresql:telemetry");
            let told = || view.status().trouble.is_some_and(|why| why.contains("no answer within"));
            eventually("given up", told).await;
            proxy.set(Link::Fine);
            running.reaches(MigrationState::Done).await;
            assert_eq!(database.rows("SELECT count(*) FROM a"), ["0"]);
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_lock_held_elsewhere() {
    let database = TestDatabase::new();
    let other = database.client().await;
    let lock = "SELECT pg_advisory_lock(hashtextextended('telemetry migrations of public', 0))";
    other.execute(lock, &[]).await.unwrap();
    LocalSet::new()
        .run_until(async {
            let running = start(&database, Vec::new());
            let view = running.board.dependency("postgresql:telemetry");
            let tried = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                         AND query LIKE 'SELECT pg_try_advisory_lock%'";
            eventually("it wants the lock", || database.rows(tried) == ["1"]).await;
            assert_eq!(view.status().migration, Some(MigrationState::Waiting));
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_wrong_password_is_a_failure_that_says_so() {
    let mut database = TestDatabase::new();
    let wrong = "hunter2-not-to-be-seen";
    database.settings.password = Some(telemetry::domain::Secret::new(wrong.to_owned()).into());
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Failed).await;
            let trouble =
                running.board.dependency("postgresql:telemetry").status().trouble.unwrap();
            assert!(trouble.contains("password") && !trouble.contains(wrong), "{trouble}");
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn after_the_migrations_partitions_are_made_and_jobs_run() {
    let mut database = TestDatabase::migrated("telemetry").await;
    database.settings.jobs = IndexMap::from([("energy".to_owned(), rollup_job())]);
    LocalSet::new()
        .run_until(async {
            let table = append_table("energy_consumption", DAY, Some(90 * DAY));
            let mut running = start(&database, vec![table]);
            running.reaches(MigrationState::Done).await;
            let partitions =
                "SELECT count(*) FROM pg_inherits WHERE inhparent = 'energy_consumption'::regclass";
            eventually("3 partitions", || database.rows(partitions) == ["3"]).await;
            database.execute(
                "INSERT INTO energy_consumption (time, device_serial, active_energy_total) \
                 VALUES (now(), 'a', 5), (now() + interval '1 microsecond', 'a', 9)",
            );
            let energy = "SELECT coalesce(sum(energy_wh), 0) FROM energy_daily_summary";
            eventually("rolled up", || database.rows(energy) == ["4"]).await;
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_failing_job_is_told_and_the_gate_stays_open() {
    let mut database = TestDatabase::migrated("telemetry").await;
    let mut job = rollup_job();
    job.function = "no_such_function".to_owned();
    database.settings.jobs = IndexMap::from([("energy".to_owned(), job)]);
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Done).await;
            let view = running.board.dependency("postgresql:telemetry");
            eventually("told", || view.status().trouble.is_some()).await;
            let trouble = view.status().trouble.unwrap();
            assert!(trouble.contains("job energy") && trouble.contains("no_such_function"), "{trouble}");
            view.unreachable("away for a moment, as a writer saw it");
            view.reachable();
            eventually("shown again", || view.status().trouble.as_deref() == Some(&trouble)).await;
            assert_eq!(view.status().migration, Some(MigrationState::Done));
            database.execute("CREATE FUNCTION no_such_function(a timestamptz, b timestamptz) RETURNS void LANGUAGE sql AS ''");
            eventually("recovered", || view.status().trouble.is_none()).await;
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn upkeep_outlives_its_connection() {
    let mut database = TestDatabase::migrated("telemetry").await;
    database.settings.jobs = IndexMap::from([("energy".to_owned(), rollup_job())]);
    LocalSet::new()
        .run_until(async {
            let table = append_table("energy_consumption", 7 * DAY, None);
            let mut running = start(&database, vec![table]);
            running.reaches(MigrationState::Done).await;
            let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'energy_consumption'::regclass";
            eventually("3 partitions", || database.rows(partitions) == ["3"]).await;
            let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                        WHERE application_name = 'telemetry-migrator' AND datname = current_database()";
            assert_eq!(database.rows(kill), ["t"]);
            database.execute("INSERT INTO energy_consumption (time, device_serial, active_energy_total) VALUES (now(), 'a', 5)");
            let hours = "SELECT count(*) FROM energy_hourly";
            eventually("rolled up", || database.rows(hours) == ["1"]).await;
            let status = running.board.dependency("postgresql:telemetry").status();
            assert_eq!((status.up, status.migration), (Some(true), Some(MigrationState::Done)));
            running.stop().await;
        })
        .await;
}

/// As after a failover behind one name: the server that was the primary keeps its sessions, and refuses to write.
#[tokio::test]
async fn upkeep_does_not_stay_with_a_server_that_is_read_only() {
    let mut database = TestDatabase::migrated("telemetry").await;
    database.settings.jobs = IndexMap::from([("energy".to_owned(), rollup_job())]);
    let name = database.name.clone();
    LocalSet::new()
        .run_until(async {
            let table = append_table("energy_consumption", 7 * DAY, None);
            let mut running = start(&database, vec![table]);
            running.reaches(MigrationState::Done).await;
            let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'energy_consumption'::regclass";
            eventually("3 partitions", || database.rows(partitions) == ["3"]).await;
            database.execute(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on"));
            let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                        WHERE application_name = 'telemetry-migrator' AND datname = current_database()";
            assert_eq!(database.rows(kill), ["t"]);
            let view = running.board.dependency("postgresql:telemetry");
            let told = || view.status().trouble.is_some_and(|why| why.contains("25006"));
            eventually("told", told).await;
            database.execute(&format!(
                "BEGIN READ WRITE; ALTER DATABASE {name} RESET default_transaction_read_only; COMMIT"
            ));
            database.execute("INSERT INTO energy_consumption (time, device_serial, active_energy_total) VALUES (now(), 'a', 5)");
            let hours = "SELECT count(*) FROM energy_hourly";
            eventually("rolled up", || database.rows(hours) == ["1"]).await;
            eventually("there again", || view.status().trouble.is_none()).await;
            running.stop().await;
        })
        .await;
}

/// Fails as what the server refuses, and as a function that asks another server in vain.
#[tokio::test]
async fn a_job_that_fails_as_if_the_database_were_away_is_the_jobs_failure_alone() {
    let mut database = TestDatabase::new();
    let refresh = "REFRESH MATERIALIZED VIEW CONCURRENTLY one";
    let far = |code| format!("RAISE EXCEPTION 'far away' USING ERRCODE = '{code}'");
    database.write(
        "0001_a.sql",
        &format!(
            "CREATE MATERIALIZED VIEW one AS SELECT 1 AS a; CREATE TABLE done (); {} {} {} {}",
            job_function("a_refresh", refresh),
            job_function("b_far", &far("08001")),
            job_function("c_far_read_only", &far("25006")),
            job_function("d_fine", "INSERT INTO done DEFAULT VALUES"),
        ),
    );
    add_jobs(&mut database, &["a_refresh", "b_far", "c_far_read_only", "d_fine"]);
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Done).await;
            let view = running.board.dependency("postgresql:telemetry");
            let since = view.status().since;
            eventually("the last job ran", || database.rows("SELECT FROM done").len() > 1).await;
            let status = view.status();
            assert_eq!((status.up, status.since), (Some(true), since), "it was never away");
            let trouble = status.trouble.unwrap();
            assert!(trouble.contains("job a_refresh") && trouble.contains("55000"), "{trouble}");
            assert!(trouble.contains("job b_far") && trouble.contains("08001"), "{trouble}");
            assert!(
                trouble.contains("job c_far_read_only") && trouble.contains("25006"),
                "{trouble}"
            );
            running.stop().await;
        })
        .await;
}

#[tokio::test]
async fn a_job_that_ends_its_session_is_tried_ever_more_seldom_and_the_others_run() {
    let mut database = TestDatabase::new();
    let end = "PERFORM nextval('tries'); PERFORM pg_terminate_backend(pg_backend_pid())";
    database.write(
        "0001_a.sql",
        &format!(
            "CREATE SEQUENCE tries; CREATE TABLE done (); {} {}",
            job_function("a_end", end),
            job_function("b_fine", "INSERT INTO done DEFAULT VALUES"),
        ),
    );
    add_jobs(&mut database, &["a_end", "b_fine"]);
    database.settings.retry.max = Duration::from_secs(5);
    LocalSet::new()
        .run_until(async {
            let mut running = start(&database, Vec::new());
            running.reaches(MigrationState::Done).await;
            eventually("the other job ran", || !database.rows("SELECT FROM done").is_empty()).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            let tries: u32 = database.rows("SELECT last_value FROM tries")[0].parse().unwrap();
            assert!((2..15).contains(&tries), "{tries}");
            running.stop().await;
        })
        .await;
}

fn job_function(name: &str, body: &str) -> String {
    format!(
        "CREATE FUNCTION {name}(a timestamptz, b timestamptz) RETURNS void LANGUAGE plpgsql AS $$BEGIN {body}; END$$;"
    )
}

fn add_jobs(database: &mut TestDatabase, functions: &[&str]) {
    let job = |name: &&str| {
        (name.to_string(), JobSettings { function: name.to_string(), ..rollup_job() })
    };
    database.settings.jobs = functions.iter().map(job).collect();
}
