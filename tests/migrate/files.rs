//! The ledger: each file once, in order, whole or not at all.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rig::Homelab;
use telemetry::database::maintenance::run_job;
use telemetry::domain::ErrorClass;
use telemetry::migrate::{MigrateError, Session};

use crate::database::{TestDatabase, shipped};

#[tokio::test]
async fn a_second_run_applies_nothing() {
    let database = TestDatabase::migrated("telemetry").await;
    let session = Session::open("telemetry", &database.settings).await.unwrap();
    assert_eq!(session.apply().await.unwrap(), []);
    let standing = session.standing().await.unwrap();
    assert_eq!(standing.applied.len(), std::fs::read_dir(shipped("telemetry")).unwrap().count());
    assert_eq!(standing.plan.pending, []);
    let ledger = "SELECT version, name, length(checksum), applied_at IS NOT NULL, duration_ms >= 0 \
                  FROM schema_migrations ORDER BY version LIMIT 1";
    assert_eq!(database.rows(ledger), ["1 0001_energy_consumption.sql 64 t t"]);
}

#[tokio::test]
async fn two_nodes_at_once_apply_each_file_once() {
    let database = TestDatabase::new();
    for number in 1..=5 {
        let sql = format!("SELECT pg_sleep(0.05); CREATE TABLE t{number} (a integer);");
        database.write(&format!("000{number}_t.sql"), &sql);
    }
    let nodes = (database.apply(), database.apply(), database.apply());
    let (a, b, c) = tokio::join!(nodes.0, nodes.1, nodes.2);
    let mut applied = [a.unwrap(), b.unwrap(), c.unwrap()].concat();
    applied.sort_unstable();
    assert_eq!(applied, [1, 2, 3, 4, 5]);
    assert_eq!(
        database.rows(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = \
                              (SELECT oid FROM pg_database WHERE datname = current_database())"
        ),
        ["0"]
    );
}

#[tokio::test]
async fn an_edited_file_is_refused_and_nothing_is_applied() {
    let database = TestDatabase::new();
    database.write("0001_a.sql", "CREATE TABLE a (x integer);");
    assert_eq!(database.apply().await.unwrap(), [1]);
    database.write("0001_a.sql", "CREATE TABLE a (x bigint);");
    database.write("0002_b.sql", "CREATE TABLE b (x integer);");
    let error = database.apply().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Standing);
    assert!(error.to_string().contains("0001_a.sql: was changed after it was applied"), "{error}");
    assert_eq!(database.rows("SELECT to_regclass('b')"), ["-"]);
}

#[tokio::test]
async fn a_failing_file_is_rolled_back_whole_and_applied_once_mended() {
    let database = TestDatabase::new();
    database.write("0001_a.sql", "CREATE TABLE a (x integer);");
    database.write("0002_b.sql", "CREATE TABLE b (x integer);\nCREATE TABLE c (x nonsense);");
    let error = database.apply().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Standing);
    let text = error.to_string();
    assert!(text.starts_with("0002_b.sql, line 3: ") && text.contains("nonsense"), "{text}");
    assert_eq!(database.rows("SELECT to_regclass('a'), to_regclass('b')"), ["a -"]);
    database.write("0002_b.sql", "CREATE TABLE b (x integer);");
    assert_eq!(database.apply().await.unwrap(), [2]);
}

/// Waiting is for what ends without a person, whatever a code means elsewhere.
#[tokio::test]
async fn a_file_waits_only_for_what_is_not_its_own_doing() {
    let database = TestDatabase::new();
    let lost = "SELECT pg_terminate_backend(pg_backend_pid())";
    let fails = |code| format!("DO $$BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END$$");
    for (sql, class, away) in [
        (fails("40001"), ErrorClass::Transient, false),
        (fails("40P01"), ErrorClass::Transient, false),
        (fails("55P03"), ErrorClass::Transient, false),
        (fails("25006"), ErrorClass::Transient, false),
        (fails("55000"), ErrorClass::Standing, false),
        (fails("55P04"), ErrorClass::Standing, false),
        (fails("57014"), ErrorClass::Standing, false),
        (fails("08001"), ErrorClass::Standing, false),
        (lost.to_owned(), ErrorClass::Transient, true),
    ] {
        database.write("0001_a.sql", &sql);
        let error = database.apply().await.unwrap_err();
        assert_eq!((error.class(), error.is_connection_trouble()), (class, away), "{error}");
        database.write("0001_a.sql", &format!("-- transaction: none\n{sql}"));
        let error = database.apply().await.unwrap_err();
        let class = ErrorClass::Standing;
        assert_eq!((error.class(), error.is_connection_trouble()), (class, away), "{error}");
    }
}

#[tokio::test]
async fn what_fails_at_the_commit_names_its_file() {
    let database = TestDatabase::new();
    database.write(
        "0001_a.sql",
        "CREATE TABLE a (x integer PRIMARY KEY, y integer REFERENCES a DEFERRABLE INITIALLY DEFERRED); \
         INSERT INTO a VALUES (1, 2)",
    );
    let error = database.apply().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Standing);
    let text = error.to_string();
    assert!(text.starts_with("0001_a.sql: ") && text.contains("23503"), "{text}");
    assert!(text.ends_with("rolled back, correct the file"), "{text}");
}

#[tokio::test]
async fn a_file_of_another_database_is_refused() {
    let database = TestDatabase::new();
    let mut settings = database.settings.clone();
    settings.migrations_dir = Some(shipped("homelab_settings"));
    let session = Session::open("telemetry", &settings).await.unwrap();
    let error = session.apply().await.unwrap_err().to_string();
    assert!(
        error.contains("0001_settings.sql: is for database homelab_settings, this is telemetry"),
        "{error}"
    );
    assert!(error.contains("0002_power_plugs.sql"), "all at once: {error}");
    assert_eq!(database.rows("SELECT to_regclass('settings')"), ["-"]);
}

#[tokio::test]
async fn a_file_that_ends_its_transaction_is_told() {
    let database = TestDatabase::new();
    database.write(
        "0001_a.sql",
        "CREATE TABLE a (x integer); COMMIT; BEGIN; CREATE TABLE b (x integer);",
    );
    let error = database.apply().await.unwrap_err().to_string();
    assert!(error.contains("0001_a.sql: ends its transaction itself"), "{error}");
    assert_eq!(database.rows("SELECT count(*) FROM schema_migrations"), ["0"]);
}

#[tokio::test]
async fn a_marked_exception_runs_without_a_transaction() {
    let database = TestDatabase::new();
    database.write("0001_a.sql", "CREATE TABLE a (x integer);");
    database.write("0002_i.sql", "-- transaction: none\nCREATE INDEX CONCURRENTLY a_x ON a (x);");
    assert_eq!(database.apply().await.unwrap(), [1, 2]);
    database.write("0003_j.sql", "-- transaction: none\nCREATE INDEX CONCURRENTLY a_y ON a (y);");
    let error = database.apply().await.unwrap_err().to_string();
    assert!(error.contains("0003_j.sql") && error.contains("without a transaction"), "{error}");
}

#[tokio::test]
async fn every_schema_has_its_own_tables_and_ledger() {
    let mut database = TestDatabase::new();
    database.settings.migrations_dir = Some(shipped("telemetry"));
    for schema in ["public", "next \"stack\""] {
        database.settings.schema = schema.to_owned();
        assert_eq!(database.apply().await.unwrap().len(), 5, "{schema}");
        assert_eq!(database.apply().await.unwrap().len(), 0, "{schema}");
        let job = crate::database::rollup_job();
        run_job(&database.client().await, &database.settings, &job).await.unwrap();
    }
    let where_are = "SELECT schemaname FROM pg_tables WHERE tablename = 'energy_hourly' ORDER BY 1";
    assert_eq!(database.rows(where_are), ["next \"stack\"", "public"]);
}

#[tokio::test]
async fn a_setting_a_file_leaves_behind_does_not_reach_the_next() {
    let database = TestDatabase::new();
    database.write("0001_a.sql", "CREATE SCHEMA aside; SET search_path TO aside;");
    database.write("0002_b.sql", "CREATE TABLE b (x integer);");
    assert_eq!(database.apply().await.unwrap(), [1, 2]);
    assert_eq!(database.rows("SELECT schemaname FROM pg_tables WHERE tablename = 'b'"), ["public"]);
}

#[tokio::test]
async fn without_a_folder_only_the_nodes_own_tables_are_made() {
    let mut database = TestDatabase::new();
    database.settings.migrations_dir = None;
    assert_eq!(database.apply().await.unwrap(), [0; 0]);
    let tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1";
    let own =
        ["schema_migrations", "telemetry_cursors", "telemetry_latest_seen", "telemetry_replayed"];
    assert_eq!(database.rows(tables), own);
}

/// Before it knew by the sequence what is newer.
#[tokio::test]
async fn what_latest_rows_have_seen_is_kept_when_a_first_version_is_replaced() {
    let database = TestDatabase::new();
    database.rows(
        "CREATE TABLE telemetry_latest_seen (sink text, key text, seen_at timestamptz NOT NULL, \
         PRIMARY KEY (sink, key)); \
         INSERT INTO telemetry_latest_seen VALUES ('plug/power_plugs', 'desk', 'epoch')",
    );
    // Who uses it is not in the way of the others for long.
    let reader = database.client().await;
    let lock = "BEGIN; LOCK TABLE telemetry_latest_seen IN ACCESS SHARE MODE";
    reader.batch_execute(lock).await.unwrap();
    let refused = database.apply().await.unwrap_err();
    assert!(refused.class() == ErrorClass::Transient, "{refused}");
    reader.batch_execute("COMMIT").await.unwrap();
    database.apply().await.unwrap();
    let rows = "SELECT key, log IS NULL, sequence IS NULL FROM telemetry_latest_seen";
    assert_eq!(database.rows(rows), ["desk t t"]);
}

#[tokio::test]
async fn own_tables_that_are_there_need_no_lock_on_them() {
    let mut database = TestDatabase::new();
    database.apply().await.unwrap();
    let reader = database.client().await;
    reader
        .batch_execute("BEGIN; LOCK TABLE telemetry_latest_seen IN ACCESS SHARE MODE")
        .await
        .unwrap();
    database.settings.query_timeout = std::time::Duration::from_millis(500);
    database.apply().await.unwrap();
}

#[tokio::test]
async fn a_run_that_is_given_up_leaves_no_lock_and_no_half_of_a_file() {
    let database = TestDatabase::new();
    database.write(
        "0001_a.sql",
        "CREATE TABLE a (x integer); SELECT pg_sleep(1); CREATE TABLE b (x integer);",
    );
    let locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = \
                  (SELECT oid FROM pg_database WHERE datname = current_database())";
    tokio::select! {
        done = database.apply() => panic!("not so soon: {done:?}"),
        () = until_rows(&database, locked, "1") => {}
    }
    assert_eq!(database.apply().await.unwrap(), [1]);
    assert_eq!(database.rows("SELECT to_regclass('a'), to_regclass('b')"), ["a b"]);
}

#[tokio::test]
async fn who_holds_the_lock_is_named() {
    let mut database = TestDatabase::new();
    let other = database.client().await;
    let lock = "SELECT pg_advisory_lock(hashtextextended('telemetry migrations of public', 0))";
    other.execute(lock, &[]).await.unwrap();
    database.settings.query_timeout = std::time::Duration::from_millis(300);
    let error = database.apply().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Transient);
    assert!(error.to_string().contains("telemetry-migrator at 127.0.0.1"), "{error}");
}

async fn until_rows(database: &TestDatabase, sql: &str, wanted: &str) {
    while database.rows(sql) != [wanted] {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn told_to_stop_it_finishes_the_running_file_and_begins_no_other() {
    let database = TestDatabase::new();
    for number in 1..=3 {
        database.write(&format!("000{number}_t.sql"), &format!("CREATE TABLE t{number} ();"));
    }
    let session = Session::open("telemetry", &database.settings).await.unwrap();
    let asked = std::cell::Cell::new(0);
    let after_two = || asked.replace(asked.get() + 1) == 2;
    let error = session.apply_unless(&after_two).await.unwrap_err();
    assert!(matches!(error, MigrateError::Interrupted { left: 1 }), "{error}");
    assert_eq!(database.rows("SELECT version FROM schema_migrations"), ["1", "2"]);
    assert_eq!(database.apply().await.unwrap(), [3]);
}

#[test]
fn sigterm_lets_the_command_finish_its_file() {
    let database = TestDatabase::new();
    database.write("0001_slow.sql", "SELECT pg_sleep(1); CREATE TABLE a ();");
    database.write("0002_next.sql", "CREATE TABLE b ();");
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("telemetry.toml");
    let mut homelab = Homelab::load().unwrap();
    homelab.keep_stream("energy").unwrap();
    homelab.without_kafka();
    homelab.node(&folder.path().join("state"), rig::free_port());
    homelab.databases(database.settings.port, folder.path()).unwrap();
    homelab.set(&["databases", "telemetry", "dbname"], database.name.as_str());
    let files = database.settings.migrations_dir.as_ref().unwrap().to_str().unwrap();
    homelab.set(&["databases", "telemetry", "migrations_dir"], files);
    homelab.write(&config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_telemetry"))
        .args(["migrate", "apply", "--config"])
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let sleeping = format!(
        "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = '{}'",
        database.name
    );
    let deadline = Instant::now() + Duration::from_secs(20);
    while database.rows(&sleeping).is_empty() {
        assert!(Instant::now() < deadline, "the first file never ran");
    }
    let pid = rustix::process::Pid::from_child(&command);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(command.wait().unwrap().code(), Some(1));
    assert_eq!(database.rows("SELECT version FROM schema_migrations"), ["1"]);
}
