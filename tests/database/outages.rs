//! The server goes away, refuses, or changes under a writer at work: nothing is lost, nothing doubled, nothing of it a
//! dead letter, and the writer goes on by itself when the cause is gone.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rig::{Certificates, Disk, FileSystem, Folder, Link, Postgres, PostgresOptions, Proxy};
use telemetry::config::{DatabaseSettings, DatabaseTls, Settings, TlsSettings};
use telemetry::domain::{ErrorClass, Secret};
use telemetry::migrate::Migrator;
use telemetry::observe::{MigrationState, SinkState, SinkStatus};
use telemetry::part::{Control, Part as _, Phase, Progress};
use tokio::sync::watch;
use tokio_postgres::{Client, NoTls};

use crate::bench::{Bench, Running, at, energies, energy, eventually, local, message};

const QUICK: Duration = Duration::from_millis(300);

/// A statement that takes longer fails soon.
fn impatient(bench: &mut Bench) {
    bench.settings.databases["telemetry"].statement_timeout = QUICK;
}

/// So many rows, each once, and no dead letter.
async fn assert_once_each(bench: &Bench, count: usize) {
    let counts = "SELECT count(*), count(DISTINCT active_power_total) FROM energy_consumption";
    assert_eq!(bench.rows(counts), [format!("{count} {count}")]);
    assert!(bench.letters().await.is_empty());
}

/// Ends every session of the node.
fn end_sessions(bench: &Bench) {
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE application_name = 'telemetry' AND datname = ";
    bench.cluster.execute("postgres", &format!("{end}'{}'", bench.database)).unwrap();
}

pub async fn session(bench: &Bench) -> Client {
    let target = bench.cluster.connection_string(&bench.database);
    let (client, connection) = tokio_postgres::connect(&target, NoTls).await.unwrap();
    tokio::task::spawn_local(connection);
    client
}

/// A writer that has delivered the first 100 readings.
async fn at_work(bench: &Bench) -> Running {
    bench.feed("energy", energies(100)).await;
    let running = bench.start("energy", "energy_consumption");
    running.drained().await;
    running
}

fn next_hundred() -> Vec<telemetry::buffer::Incoming> {
    energies(200).split_off(100)
}

#[test]
fn a_server_frozen_for_longer_than_the_statement_timeout_gets_each_row_once() {
    local(async {
        let mut bench = Bench::on(Arc::new(Postgres::start().unwrap())).await;
        impatient(&mut bench);
        let running = at_work(&bench).await;
        let sessions =
            || bench.rows("SELECT pid FROM pg_stat_activity WHERE application_name = 'telemetry'");
        let before = sessions();
        bench.cluster.freeze();
        bench.feed("energy", next_hundred()).await;
        let trouble = running.reaches(SinkState::Waiting).await.trouble.unwrap();
        assert!(trouble.contains("no answer within"), "{trouble}");
        assert_eq!(running.sink.dependency().status().up, Some(false));
        bench.cluster.thaw();
        assert_eq!(running.drained().await.delivered, 200);
        let kept = || sessions().iter().any(|session| before.contains(session));
        eventually("the session that did not answer is gone", || !kept()).await;
        assert_once_each(&bench, 200).await;
        running.stop().await;
    });
}

#[test]
fn a_server_killed_again_and_again_under_load_gets_each_row_once() {
    const ROUNDS: u64 = 5;
    local(async {
        let mut bench = Bench::on(Arc::new(Postgres::start().unwrap())).await;
        bench.feed("energy", energies(30_000)).await;
        let mut sink = bench.sink("energy", "energy_consumption");
        Arc::make_mut(&mut sink.table).batch_rows_max = 50;
        let running = bench.run(sink);
        let cursor = || running.status().books.map_or(0, |books| books.cursor.0);
        for round in 1..=ROUNDS {
            eventually("progress", || cursor() >= round * 1000).await;
            Arc::get_mut(&mut bench.cluster).expect("the only user").kill();
            assert!(cursor() < 30_000, "killed while there was nothing to do");
            running.reaches(SinkState::Waiting).await;
            Arc::get_mut(&mut bench.cluster).expect("the only user").restart().unwrap();
        }
        assert_eq!(running.drained().await.delivered, 30_000);
        assert_once_each(&bench, 30_000).await;
        running.stop().await;
    });
}

/// All of the bench's tables, on a disk of their own.
async fn move_to(disk: &Disk, bench: &Bench) {
    let place = disk.mount_point().join("tables");
    std::fs::create_dir(&place).unwrap();
    let server = std::fs::metadata(bench.cluster.folder()).unwrap();
    chown(&place, Some(server.uid()), Some(server.gid())).unwrap();
    let make = format!("CREATE TABLESPACE small LOCATION '{}'", place.display());
    bench.cluster.execute("postgres", &make).unwrap();
    let move_there = format!("ALTER DATABASE {} SET TABLESPACE small", bench.database);
    // Until the sessions that migrated it have ended.
    eventually("moved", || bench.cluster.execute("postgres", &move_there).is_ok()).await;
}

#[test]
fn a_server_without_space_holds_the_writer_until_there_is_some() {
    const COUNT: usize = 20_000;
    local(async {
        let folder = Folder::new(None, "space").unwrap();
        let disk = Disk::open(&folder.join("disk"), FileSystem::Ext4).unwrap();
        let mut bench = Bench::on(Arc::new(Postgres::start().unwrap())).await;
        move_to(&disk, &bench).await;
        bench.settings.databases["telemetry"].retry.max = QUICK;
        let running = at_work(&bench).await;
        let filling = disk.fill(0).unwrap();
        bench.feed("energy", energies(COUNT as i64).split_off(100)).await;
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("53100") && trouble.contains("No space left"), "{trouble}");
        drop(filling);
        assert_eq!(running.drained().await.delivered, COUNT as u64);
        assert_once_each(&bench, COUNT).await;
        running.stop().await;
    });
}

#[test]
fn a_read_only_database_is_waited_for() {
    local(async {
        let bench = Bench::new().await;
        let running = at_work(&bench).await;
        let set = |what: &str| {
            let sql = format!("ALTER DATABASE {} {what}", bench.database);
            bench.cluster.execute("postgres", &sql).unwrap();
            end_sessions(&bench);
        };
        set("SET default_transaction_read_only = on");
        bench.feed("energy", next_hundred()).await;
        let says_so = || {
            let status = running.status();
            status.state == SinkState::Waiting
                && status.trouble.is_some_and(|trouble| trouble.contains("25006"))
        };
        eventually("waits, and says why", says_so).await;
        set("RESET default_transaction_read_only");
        running.drained().await;
        assert_once_each(&bench, 200).await;
        running.stop().await;
    });
}

/// What follows a refused statement in the same transaction is refused too, and says nothing of why.
#[test]
fn a_read_only_database_never_holds_a_latest_table() {
    local(async {
        let bench = Bench::new().await;
        let plug =
            |micros| message("tele/desk/STATE", r#"{"POWER": "ON", "UptimeSec": 1}"#, at(micros));
        bench.feed("plug", vec![plug(1)]).await;
        let running = bench.start("plug", "power_plugs");
        running.drained().await;
        let read_only =
            format!("ALTER DATABASE {} SET default_transaction_read_only = on", bench.database);
        bench.cluster.execute("postgres", &read_only).unwrap();
        end_sessions(&bench);
        bench.feed("plug", vec![plug(2)]).await;
        let refusals = || running.sink.view().meters.error(ErrorClass::Transient).get();
        let held = || running.status().state == SinkState::Held;
        eventually("refused again and again", || refusals() >= 20 || held()).await;
        let status = running.status();
        assert!(status.trouble.is_some_and(|why| why.contains("25006")));
        assert!(!held());
        running.stop().await;
    });
}

#[test]
fn a_server_without_a_free_connection_is_named_and_used_when_one_is_free() {
    local(async {
        let settings = vec![("max_connections".to_owned(), "10".to_owned())];
        let options = PostgresOptions { settings, ..PostgresOptions::default() };
        let bench = Bench::on(Arc::new(Postgres::start_with(options).unwrap())).await;
        let running = at_work(&bench).await;
        end_sessions(&bench);
        let target = bench.cluster.connection_string(&bench.database);
        let mut others = Vec::new();
        while let Ok((client, connection)) = tokio_postgres::connect(&target, NoTls).await {
            others.push((client, tokio::task::spawn_local(connection)));
        }
        bench.feed("energy", next_hundred()).await;
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        for expected in ["53300", "user postgres", &bench.database, "max_connections"] {
            assert!(trouble.contains(expected), "{expected} is not in {trouble}");
        }
        for (client, connection) in others {
            drop(client);
            connection.await.unwrap().unwrap();
        }
        running.nudge().await;
        running.drained().await;
        assert_once_each(&bench, 200).await;
        running.stop().await;
    });
}

#[test]
fn a_wrong_password_holds_migrator_and_writer_until_the_server_takes_it() {
    local(async {
        let mut bench = Bench::new().await;
        bench.cluster.create_role("collector", "another").unwrap();
        bench.cluster.execute("postgres", "ALTER ROLE collector SUPERUSER").unwrap();
        let database = &mut bench.settings.databases["telemetry"];
        database.user = "collector".to_owned();
        database.password = Some(Secret::new("made-up".to_owned()).into());
        let settings = database.clone();
        bench.feed("energy", energies(100)).await;
        let running = bench.start("energy", "energy_consumption");
        running.gate.send_replace(MigrationState::Waiting);
        let migrator = Migrator {
            database: "telemetry".to_owned(),
            settings,
            tables: Vec::new(),
            board: bench.board.clone(),
            gate: running.gate.clone(),
        };
        let (phase, phase_seen) = watch::channel(Phase::Running);
        let (_paused, paused_seen) = watch::channel(false);
        let control = Control::new(phase_seen, paused_seen, Arc::new(Progress::default()));
        let migrating = tokio::task::spawn_local(migrator.run(control));
        let held = running.reaches(SinkState::Held).await.trouble.unwrap();
        let dependency = running.sink.dependency().status();
        assert_eq!(
            (dependency.up, dependency.migration),
            (Some(false), Some(MigrationState::Failed))
        );
        for text in [held, dependency.trouble.unwrap()] {
            for expected in ["user collector", &bench.database, "28P01", "set the right password"] {
                assert!(text.contains(expected), "{expected} is not in {text}");
            }
            assert!(!text.contains("made-up"), "the password is shown: {text}");
        }
        bench.cluster.execute("postgres", "ALTER ROLE collector PASSWORD 'made-up'").unwrap();
        running.drained().await;
        assert_once_each(&bench, 100).await;
        assert_eq!(running.sink.dependency().status().up, Some(true));
        phase.send_replace(Phase::Stopping);
        migrating.await.unwrap().unwrap();
        running.stop().await;
        bench.rows("REASSIGN OWNED BY collector TO postgres; DROP OWNED BY collector");
        bench.cluster.execute("postgres", "DROP ROLE collector").unwrap();
    });
}

/// As a server that ends a transaction without a word: the rows are not there, and no statement failed.
#[test]
fn a_commit_that_is_answered_by_a_rollback_loses_no_row() {
    local(async {
        let mut bench = Bench::new().await;
        let proxy = Proxy::start(bench.cluster.port()).unwrap();
        bench.settings.databases["telemetry"].port = proxy.port();
        let running = at_work(&bench).await;
        // A rollback does not take a sequence's number back.
        bench.rows(
            "CREATE SEQUENCE public.tries; \
             CREATE FUNCTION public.tried() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM nextval('public.tries'); RETURN NEW; END $$; \
             CREATE TRIGGER tried BEFORE INSERT ON energy_consumption FOR EACH ROW \
             WHEN (NEW.active_power_total = 200) EXECUTE FUNCTION public.tried()",
        );
        proxy.set(Link::Replacing(b"Q\0\0\0\x0bCOMMIT\0", b"Q\0\0\0\x0dROLLBACK\0"));
        bench.feed("energy", next_hundred()).await;
        // A writer that believed the first answer would have nothing left to try again.
        let before = running.status().books.unwrap();
        let tries = "SELECT count(*) FROM public.tries WHERE last_value > 3";
        eventually("the last row is tried again", || bench.rows(tries) == ["1"]).await;
        assert_eq!(running.status().books.unwrap(), before, "rows that are not there count");
        assert_once_each(&bench, 100).await;
        proxy.set(Link::Fine);
        running.drained().await;
        assert_once_each(&bench, 200).await;
        running.stop().await;
    });
}

/// The rows are there, and nobody hears of it: only the cursor row tells.
#[test]
fn a_commit_whose_answer_is_lost_is_neither_repeated_nor_taken_for_another_nodes() {
    local(async {
        let mut bench = Bench::new().await;
        let proxy = Proxy::start(bench.cluster.port()).unwrap();
        let database = &mut bench.settings.databases["telemetry"];
        database.port = proxy.port();
        database.statement_timeout = Duration::from_secs(1);
        let running = at_work(&bench).await;
        bench.rows(
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$; \
             CREATE CONSTRAINT TRIGGER slowly AFTER UPDATE ON telemetry_cursors \
             DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slowly()",
        );
        bench.feed("energy", next_hundred()).await;
        let committing = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query = 'COMMIT'";
        eventually("the server commits", || bench.rows(committing) == ["1"]).await;
        proxy.set(Link::SilentToClient);
        assert_eq!(running.status().books.unwrap().delivered, 100);
        let rows = "SELECT count(*) FROM energy_consumption";
        eventually("it has", || bench.rows(rows) == ["200"]).await;
        let trouble = running.reaches(SinkState::Waiting).await.trouble.unwrap();
        assert!(trouble.contains("no answer within"), "{trouble}");
        proxy.set(Link::Fine);
        assert_eq!(running.drained().await.delivered, 200);
        assert_once_each(&bench, 200).await;
        running.reaches(SinkState::Delivering).await;
        running.stop().await;
    });
}

#[test]
fn a_server_without_tls_or_with_a_question_nobody_answers_is_waited_for_and_says_what_to_do() {
    local(async {
        for (remedy, change) in [
            ("set `ssl = on`", as_by_default as fn(&mut DatabaseSettings)),
            ("set `password_file`", |database| database.password = None),
        ] {
            let mut bench = Bench::new().await;
            change(&mut bench.settings.databases["telemetry"]);
            bench.feed("energy", energies(10)).await;
            let running = bench.start("energy", "energy_consumption");
            let says = || running.status().trouble.is_some_and(|trouble| trouble.contains(remedy));
            eventually(remedy, says).await;
            assert_eq!(running.status().state, SinkState::Waiting);
            assert_eq!(running.sink.dependency().status().up, Some(false));
            running.stop().await;
        }
    });
}

/// TLS as it is by default.
fn as_by_default(database: &mut DatabaseSettings) {
    database.tls_mode = DatabaseTls::VerifyFull;
}

/// On a server with these certificates, where this file holds the authority's.
async fn over_tls(theirs: &Certificates, ca_file: &Path) -> Bench {
    let options = PostgresOptions { tls: Some(theirs.clone()), ..PostgresOptions::default() };
    let mut bench = Bench::on(Arc::new(Postgres::start_with(options).unwrap())).await;
    let database = &mut bench.settings.databases["telemetry"];
    as_by_default(database);
    let ca_file = Some(ca_file.to_owned());
    database.tls = Some(TlsSettings { ca_file, ..TlsSettings::default() });
    bench.feed("energy", energies(10)).await;
    bench
}

/// It gives no code, as a lost connection does; but waiting does not mend it.
#[test]
fn a_certificate_that_is_refused_holds_the_writer_and_says_what_to_do() {
    let other = Certificates::generate().unwrap();
    let far = Certificates::generate_for(&["db.plant"]).unwrap();
    let old = Certificates::generate_expired().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    local(async {
        for (theirs, trusted, remedy) in [
            (&far, &other, "set `ca_file`"),
            (&far, &far, "set `server_name`"),
            (&old, &old, "renew it"),
        ] {
            std::fs::write(&ca_file, &trusted.authority).unwrap();
            let bench = over_tls(theirs, &ca_file).await;
            let running = bench.start("energy", "energy_consumption");
            let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
            assert!(trouble.contains(remedy), "{trouble}");
            assert_eq!(running.sink.dependency().status().up, Some(false));
            running.stop().await;
        }
    });
}

#[test]
fn a_writer_held_for_an_unknown_authority_goes_on_once_it_is_given_and_knows_the_servers_other_name()
 {
    let [theirs, other] = [(); 2].map(|()| Certificates::generate_for(&["db.plant"]).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, &other.authority).unwrap();
    local(async {
        let mut bench = over_tls(&theirs, &ca_file).await;
        let tls = bench.settings.databases["telemetry"].tls.as_mut().unwrap();
        tls.server_name = Some("db.plant".to_owned());
        let running = bench.start("energy", "energy_consumption");
        running.reaches(SinkState::Held).await;
        std::fs::write(&ca_file, &theirs.authority).unwrap();
        assert_eq!(running.drained().await.delivered, 10);
        running.reaches(SinkState::Delivering).await;
        running.stop().await;
    });
}

/// As long as the settings allow: a supervisor that took it for hung would end what a slow link needs that long for, and
/// its next life would begin it again.
#[test]
fn a_writer_that_waits_for_an_answer_makes_progress() {
    local(async {
        let bench = Bench::new().await;
        let running = at_work(&bench).await;
        let lock = session(&bench).await;
        lock.batch_execute("BEGIN; LOCK TABLE telemetry.energy_consumption").await.unwrap();
        bench.feed("energy", next_hundred()).await;
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'telemetry' \
                     AND datname = current_database() AND wait_event_type = 'Lock' \
                     AND query_start < now() - interval '4 s'";
        eventually("it waits", || bench.rows(waits) == ["1"]).await;
        let stalled_for = running.progress.stalled_for().expect("there is work");
        assert!(stalled_for < Duration::from_secs(3), "{stalled_for:?}");
        lock.batch_execute("ROLLBACK").await.unwrap();
        assert_eq!(running.drained().await.delivered, 200);
        running.stop().await;
    });
}

#[test]
fn a_table_dropped_under_the_writer_holds_it_until_there_is_one_again() {
    local(async {
        let bench = Bench::new().await;
        let running = at_work(&bench).await;
        bench.rows(
            "CREATE TABLE spare (LIKE energy_consumption INCLUDING ALL); DROP TABLE energy_consumption CASCADE",
        );
        bench.feed("energy", next_hundred()).await;
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("telemetry migrate draft energy"), "{trouble}");
        bench.rows("ALTER TABLE spare RENAME TO energy_consumption");
        running.nudge().await;
        assert_eq!(running.drained().await.delivered, 200);
        assert_once_each(&bench, 100).await;
        running.stop().await;
    });
}

#[test]
fn a_column_of_another_type_takes_the_right_value_or_holds_the_writer() {
    local(async {
        let bench = Bench::new().await;
        let running = at_work(&bench).await;
        let newest = "SELECT active_power_total, wifi_rssi, current_l1 FROM energy_consumption \
                      ORDER BY time DESC LIMIT 1";
        // Wider: the bytes no longer fit, and all of the batch would be refused.
        bench.rows("ALTER TABLE energy_consumption ALTER wifi_rssi TYPE integer");
        bench.feed("energy", vec![energy(101, at(101_000))]).await;
        running.drained().await;
        assert_eq!(bench.rows(newest), ["101 -41 2583"]);
        // As wide as before: the server would take an integer's bytes for a fraction's.
        bench.rows("ALTER TABLE energy_consumption ALTER current_l1 TYPE real");
        bench.feed("energy", vec![energy(102, at(102_000))]).await;
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("current_l1 is real"), "{trouble}");
        assert_eq!(bench.rows(newest), ["101 -41 2583"]);
        bench.rows("ALTER TABLE energy_consumption ALTER current_l1 TYPE integer");
        running.nudge().await;
        running.drained().await;
        assert_eq!(bench.rows(newest), ["102 -41 2583"]);
        assert_once_each(&bench, 102).await;
        running.stop().await;
    });
}

/// What it reads of the row does not fit its plan: no fault of the server's, which other writers use.
#[test]
fn a_column_altered_under_a_latest_writer_is_no_outage() {
    local(async {
        let change = |settings: &mut Settings| {
            for database in settings.databases.values_mut() {
                database.breaker.failures = 1;
            }
        };
        let bench = Bench::with(change).await;
        let plug = |seconds: u32| {
            let payload = format!(r#"{{"POWER": "ON", "UptimeSec": {seconds}}}"#);
            message("tele/desk/STATE", payload, at(i64::from(seconds)))
        };
        bench.feed("plug", vec![plug(1)]).await;
        let running = bench.start("plug", "power_plugs");
        running.drained().await;
        bench.rows("ALTER TABLE power_plugs ALTER uptime_seconds TYPE bigint");
        bench.feed("plug", vec![plug(2)]).await;
        running.drained().await;
        assert_eq!(bench.rows("SELECT uptime_seconds FROM power_plugs"), ["2"]);
        assert_eq!(running.sink.dependency().status().breaker.trips, 0);
        running.stop().await;
    });
}

/// Between the look at the table and the first row.
#[test]
fn a_table_altered_before_the_first_row_buries_none() {
    local(async {
        let bench = Bench::new().await;
        let other = session(&bench).await;
        other.batch_execute("BEGIN; LOCK TABLE telemetry.energy_consumption").await.unwrap();
        bench.feed("energy", energies(100)).await;
        let running = bench.start("energy", "energy_consumption");
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'COPY%'";
        eventually("the first rows wait", || bench.rows(waiting) == ["1"]).await;
        let alter = "ALTER TABLE telemetry.energy_consumption ALTER wifi_rssi TYPE text; COMMIT";
        other.batch_execute(alter).await.unwrap();
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("wifi_rssi is text"), "{trouble}");
        bench.rows(
            "ALTER TABLE energy_consumption ALTER wifi_rssi TYPE smallint USING wifi_rssi::smallint",
        );
        running.nudge().await;
        running.drained().await;
        assert_once_each(&bench, 100).await;
        running.stop().await;
    });
}

#[test]
fn a_rule_added_under_the_writer_holds_it_instead_of_burying_every_row() {
    local(async {
        let bench = Bench::new().await;
        let running = at_work(&bench).await;
        bench.rows(
            "ALTER TABLE energy_consumption ADD owner text NOT NULL DEFAULT ''; \
             ALTER TABLE energy_consumption ALTER owner DROP DEFAULT",
        );
        bench.feed("energy", next_hundred()).await;
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("column owner is NOT NULL without a default"), "{trouble}");
        bench.rows("ALTER TABLE energy_consumption DROP owner");
        running.nudge().await;
        running.drained().await;
        assert_once_each(&bench, 200).await;
        running.stop().await;
    });
}

#[test]
fn a_table_locked_for_longer_than_the_statement_timeout_is_waited_for() {
    local(async {
        let mut bench = Bench::new().await;
        impatient(&mut bench);
        let running = at_work(&bench).await;
        let other = session(&bench).await;
        other.batch_execute("BEGIN; LOCK TABLE telemetry.energy_consumption").await.unwrap();
        bench.feed("energy", next_hundred()).await;
        let trouble = running.reaches(SinkState::Waiting).await.trouble.unwrap();
        assert!(trouble.contains("57014"), "{trouble}");
        other.batch_execute("COMMIT").await.unwrap();
        running.drained().await;
        assert_once_each(&bench, 200).await;
        running.stop().await;
    });
}

/// Each attempt that is given up on would leave a session behind that goes on waiting for the lock.
#[test]
fn a_locked_cursor_is_waited_for_and_leaves_no_sessions_behind() {
    local(async {
        let mut bench = Bench::new().await;
        impatient(&mut bench);
        let running = at_work(&bench).await;
        running.stop().await;
        let other = session(&bench).await;
        other.batch_execute("BEGIN; LOCK TABLE telemetry.telemetry_cursors").await.unwrap();
        bench.feed("energy", next_hundred()).await;
        let running = bench.start("energy", "energy_consumption");
        let trouble = running.reaches(SinkState::Waiting).await.trouble.unwrap();
        assert!(trouble.contains("read the cursor"), "{trouble}");
        let retries = || running.sink.view().meters.retries.get();
        eventually("it is tried again and again", || retries() >= 5).await;
        let sessions = "SELECT count(*) FROM pg_stat_activity \
                        WHERE application_name = 'telemetry' AND datname = current_database()";
        let sessions: u32 = bench.rows(sessions)[0].parse().unwrap();
        assert!(sessions <= 2, "{sessions} sessions");
        other.batch_execute("COMMIT").await.unwrap();
        running.drained().await;
        assert_once_each(&bench, 200).await;
        running.stop().await;
    });
}

#[test]
fn a_connection_cut_in_the_middle_of_a_copy_leaves_no_row_behind() {
    const ROWS: usize = 5_000;
    local(async {
        let mut bench = Bench::new().await;
        bench.feed("energy", energies(ROWS as i64)).await;
        let proxy = Proxy::start(bench.cluster.port()).unwrap();
        bench.settings.databases["telemetry"].port = proxy.port();
        // A third of what so many rows take.
        proxy.set(Link::Cutting(300_000));
        let mut sink = bench.sink("energy", "energy_consumption");
        Arc::make_mut(&mut sink.table).batch_rows_max = ROWS;
        let running = bench.run(sink);
        let cut_off = || running.sink.view().meters.error(ErrorClass::Transient).get();
        eventually("it is cut off", || cut_off() > 0).await;
        assert_eq!(bench.rows("SELECT count(*) FROM energy_consumption"), ["0"]);
        proxy.set(Link::Fine);
        running.drained().await;
        assert_once_each(&bench, ROWS).await;
        running.stop().await;
    });
}

/// What a person asks for first after an outage: how old is what the table has not.
#[test]
fn the_age_of_what_is_pending_is_told_truly_while_a_backlog_goes() {
    const ROWS: u64 = 300;
    const BATCH: u64 = 50;
    local(async {
        let mut bench = Bench::new().await;
        bench.feed("energy", energies(ROWS as i64)).await;
        let proxy = Proxy::start(bench.cluster.port()).unwrap();
        bench.settings.databases["telemetry"].port = proxy.port();
        // Some tenths of a second for each batch.
        proxy.set(Link::Slow(400_000));
        let mut sink = bench.sink("energy", "energy_consumption");
        Arc::make_mut(&mut sink.table).batch_rows_max = BATCH as usize;
        let running = bench.run(sink);
        let mut told = BTreeSet::new();
        eventually("all is there", || {
            let status = running.status();
            let cursor = status.books.map_or(0, |books| books.cursor.0);
            if let Some(oldest) = status.oldest_pending {
                let position = (oldest.0 - at(0).0) as u64 / 1000;
                assert!(position.abs_diff(cursor) <= BATCH + 1, "{position} while at {cursor}");
                told.insert(position);
            }
            cursor == ROWS && status.oldest_pending.is_none()
        })
        .await;
        assert!(told.len() > 4, "{told:?}");
        running.stop().await;
    });
}

/// Whole batches would be cut off by the time a statement has, one like the other.
#[test]
fn a_link_too_slow_for_a_whole_batch_gets_smaller_ones() {
    const ROWS: usize = 600;
    /// Some 20 kB for a hundred rows: all of them take twice the time there is.
    const BYTES_A_SECOND: usize = 20_000;
    local(async {
        let mut bench = Bench::new().await;
        bench.feed("energy", energies(ROWS as i64)).await;
        let proxy = Proxy::start(bench.cluster.port()).unwrap();
        let database = &mut bench.settings.databases["telemetry"];
        database.port = proxy.port();
        database.statement_timeout = Duration::from_secs(3);
        proxy.set(Link::Slow(BYTES_A_SECOND));
        let mut sink = bench.sink("energy", "energy_consumption");
        Arc::make_mut(&mut sink.table).batch_rows_max = ROWS;
        let running = bench.run(sink);
        let delivered = || running.status().books.map_or(0, |books| books.delivered);
        let cut_off = || running.sink.view().meters.error(ErrorClass::Transient).get() > 0;
        eventually("a whole batch is cut off", || cut_off() || delivered() > 0).await;
        assert_eq!(delivered(), 0, "the link is too fast for this test");
        eventually("a smaller one arrives", || delivered() > 0).await;
        assert!(delivered() < ROWS as u64);
        proxy.set(Link::Fine);
        running.drained().await;
        assert_once_each(&bench, ROWS).await;
        running.stop().await;
    });
}

#[test]
fn a_host_whose_name_is_not_known_is_waited_for_and_named() {
    local(async {
        let mut bench = Bench::new().await;
        bench.feed("energy", energies(1)).await;
        bench.settings.databases["telemetry"].host = "no-such-host.invalid".to_owned();
        let running = bench.start("energy", "energy_consumption");
        let named = || {
            let SinkStatus { state, trouble, .. } = running.status();
            state == SinkState::Waiting
                && trouble.is_some_and(|why| why.contains("no-such-host.invalid"))
        };
        eventually("it waits, and says for whom", named).await;
        assert_eq!(running.sink.dependency().status().up, Some(false));
        assert!(bench.letters().await.is_empty());
        running.stop().await;
    });
}
