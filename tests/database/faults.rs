//! What a database does to its writers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use telemetry::config::LoginSettings;
use telemetry::database::{Pool, TableSink};
use telemetry::domain::{Arrival, Reason, Secret, Stage};
use telemetry::observe::{Board, MigrationState, SinkState};

use crate::bench::{Bench, PATIENCE, at, energies, energy, eventually, local, message};

#[test]
fn refused_rows_become_dead_letters_and_the_others_of_their_batch_rows() {
    local(async {
        let bench = Bench::new().await;
        bench.rows("ALTER TABLE energy_consumption ADD CONSTRAINT sane CHECK (active_power_total % 1000 <> 666)");
        bench.feed("energy", energies(3000)).await;
        let running = bench.start("energy", "energy_consumption");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (2997, 3));
        assert_eq!(bench.rows("SELECT count(*) FROM energy_consumption"), ["2997"]);
        let letters = bench.letters().await;
        let sequences: Vec<u64> = letters.iter().map(|letter| letter.key.sequence.0).collect();
        assert_eq!(sequences, [666, 1666, 2666]);
        let letter = &letters[0];
        assert_eq!((letter.stage, letter.reason), (Stage::Deliver, Reason::DatabaseRefused));
        assert_eq!(letter.sqlstate.as_deref(), Some("23514"));
        assert!(letter.detail.contains("sane"), "{}", letter.detail);
        assert_eq!(letter.arrival, at(666_000));
        running.stop().await;
    });
}

#[test]
fn a_row_that_a_trigger_refuses_as_a_check_would_is_no_missing_partition() {
    local(async {
        let bench = Bench::new().await;
        bench.rows(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF new.active_power_total = 50 THEN \
             RAISE 'power of 50' USING ERRCODE = 'check_violation'; END IF; RETURN new; END $$; \
             CREATE TRIGGER refuse BEFORE INSERT ON energy_consumption \
             FOR EACH ROW EXECUTE FUNCTION refuse()",
        );
        bench.feed("energy", energies(100)).await;
        let running = bench.start("energy", "energy_consumption");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (99, 1));
        assert!(bench.letters().await[0].detail.contains("power of 50"));
        running.stop().await;
    });
}

/// The first says so only when all were written and are committed.
#[test]
fn rows_refused_at_the_commit_and_before_it_are_each_found() {
    local(async {
        let bench = Bench::new().await;
        bench.rows(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF new.active_power_total IN (777, 2900) THEN RAISE 'no such power'; END IF; RETURN NULL; END $$; \
             CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON energy_consumption \
             DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse(); \
             ALTER TABLE energy_consumption ADD CONSTRAINT sane CHECK (active_power_total <> 2000)",
        );
        bench.feed("energy", energies(3000)).await;
        let running = bench.start("energy", "energy_consumption");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (2997, 3));
        let held = "SELECT count(DISTINCT active_power_total), count(*) FROM energy_consumption";
        assert_eq!(bench.rows(held), ["2997 2997"]);
        let letters = bench.letters().await;
        let refused = |sequence, words| {
            let found = letters.iter().find(|letter| letter.key.sequence.0 == sequence);
            found.is_some_and(|letter| letter.detail.contains(words))
        };
        assert!(refused(777, "no such power"), "{letters:?}");
        assert!(refused(2000, "sane"), "{letters:?}");
        assert!(refused(2900, "no such power"), "{letters:?}");
        running.stop().await;
    });
}

/// How many statements wrote to the table is counted by the server, outside of any transaction.
#[test]
fn one_refused_row_of_five_thousand_costs_its_neighbours_a_few_round_trips() {
    const ROWS: i64 = 5000;
    const REFUSED: i64 = 3210;
    // The server says the first while it reads the row, the second when it has collected a thousand.
    for rule in [
        format!("ADD CONSTRAINT sane CHECK (active_power_total <> {REFUSED} OR node IS NULL)"),
        "ADD UNIQUE (time, device_serial)".to_owned(),
    ] {
        local(async {
            let bench = Bench::new().await;
            // It also makes the partition.
            bench.feed("energy", vec![energy(REFUSED, at(REFUSED * 1000))]).await;
            let first = bench.start("energy", "energy_consumption");
            first.drained().await;
            first.stop().await;
            bench.rows(&format!(
                "UPDATE energy_consumption SET node = NULL; ALTER TABLE energy_consumption {rule}; \
                 CREATE SEQUENCE attempts; \
                 CREATE FUNCTION attempted() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN PERFORM nextval('telemetry.attempts'); RETURN NULL; END $$; \
                 CREATE TRIGGER attempted BEFORE INSERT ON energy_consumption \
                 FOR EACH STATEMENT EXECUTE FUNCTION attempted()",
            ));
            bench.feed("energy", energies(ROWS)).await;
            let running = bench.start("energy", "energy_consumption");
            let books = running.drained().await;
            assert_eq!((books.delivered, books.dead_lettered), (ROWS as u64, 1), "{rule}");
            let attempts: u32 = bench.rows("SELECT last_value FROM attempts")[0].parse().unwrap();
            // The half before it, its own half, those of that before it, it alone, those behind it.
            assert_eq!(attempts, 5, "{rule}");
            running.stop().await;
        });
    }
}

#[test]
fn a_table_that_does_not_fit_holds_its_writer_with_every_mistake_and_its_remedy() {
    local(async {
        let bench = Bench::new().await;
        bench.rows(
            "ALTER TABLE heatpump_status DROP COLUMN hotwater_temp, ALTER runtime_3kw TYPE smallint, \
             ALTER integral SET NOT NULL, ADD owner text NOT NULL",
        );
        let dump = message("t", r#"{"Client_Name": "pump", "d0": -3}"#, at(1000));
        bench.feed("heatpump", vec![dump; 10]).await;
        let running = bench.start("heatpump", "heatpump_status");
        let held = running.reaches(SinkState::Held).await;
        let trouble = held.trouble.unwrap();
        for expected in [
            r#"ALTER TABLE "telemetry"."heatpump_status" ADD COLUMN "hotwater_temp" smallint"#,
            "runtime_3kw is smallint and is too narrow for integer",
            "column integral is NOT NULL, but field integral may be missing",
            "column owner is NOT NULL without a default",
        ] {
            assert!(trouble.contains(expected), "{expected} is not in {trouble}");
        }
        bench.rows(
            "ALTER TABLE heatpump_status ADD hotwater_temp smallint, ALTER runtime_3kw TYPE integer, \
             ALTER integral DROP NOT NULL, DROP owner",
        );
        assert_eq!(running.status().oldest_pending, Some(at(1000)));
        running.nudge().await;
        assert_eq!(running.drained().await.delivered, 10);
        running.reaches(SinkState::Delivering).await;
        running.stop().await;
    });
}

#[test]
fn a_missing_table_is_named_and_the_writer_goes_on_when_it_is_there() {
    local(async {
        let bench = Bench::new().await;
        bench.rows("ALTER TABLE energy_consumption RENAME TO elsewhere");
        bench.feed("energy", energies(1)).await;
        let running = bench.start("energy", "energy_consumption");
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("does not exist"), "{trouble}");
        bench.rows("ALTER TABLE elsewhere RENAME TO energy_consumption");
        running.nudge().await;
        running.drained().await;
        running.stop().await;
    });
}

#[test]
fn no_row_is_lost_or_doubled_while_sessions_are_killed_all_the_time() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("energy", energies(30_000)).await;
        let mut sink = bench.sink("energy", "energy_consumption");
        let mut table = (*sink.table).clone();
        table.batch_rows_max = 100;
        sink.table = Arc::new(table);
        let running = bench.run(sink);
        let kill = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
             WHERE application_name = 'telemetry' AND datname = '{}'",
            bench.database
        );
        let (began, mut kills) = (Instant::now(), 0);
        while kills < 25 {
            assert!(began.elapsed() < PATIENCE, "only {kills} sessions were there to be killed");
            kills += bench.rows(&kill)[0].parse::<u32>().unwrap();
            // Room for a batch or two.
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
        let delivered = running.status().books.unwrap_or_default().delivered;
        assert!(delivered < 30_000, "the kills came while it worked");
        assert_eq!(running.drained().await.delivered, 30_000);
        assert_eq!(
            bench.rows(
                "SELECT count(*), count(DISTINCT active_power_total) FROM energy_consumption"
            ),
            ["30000 30000"]
        );
        running.stop().await;
    });
}

#[test]
fn a_message_that_panics_the_mapping_is_a_dead_letter_and_the_others_are_rows() {
    local(async {
        let bench = Bench::new().await;
        fail::cfg("map_row_panics", "panic").unwrap();
        let mut messages = energies(3);
        let payload = messages[1].payload.clone();
        messages[1] = message("panics", payload, at(2000));
        bench.feed("energy", messages).await;
        let running = bench.start("energy", "energy_consumption");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (2, 1));
        let letters = bench.letters().await;
        assert_eq!((letters[0].stage, letters[0].reason), (Stage::Map, Reason::Panicked));
        assert_eq!((letters[0].key.sequence.0, letters[0].arrival), (2, at(2000)));
        fail::remove("map_row_panics");
        let outcome = telemetry::database::replay(&running.sink, &letters[0]).await.unwrap();
        assert_eq!(outcome, telemetry::database::ReplayOutcome::Delivered);
        assert_eq!(
            bench.rows("SELECT active_power_total FROM energy_consumption ORDER BY 1"),
            ["1", "2", "3"]
        );
        running.stop().await;
    });
}

#[test]
fn an_arrival_of_a_clock_that_was_wrong_makes_one_partition_and_stops_nothing() {
    local(async {
        let bench = Bench::new().await;
        let mut messages = energies(3);
        messages[0].arrival = Arrival(0);
        messages[2].arrival = Arrival(7_258_118_400_000_000);
        bench.feed("energy", messages).await;
        let running = bench.start("energy", "energy_consumption");
        assert_eq!(running.drained().await.delivered, 3);
        assert_eq!(
            bench.rows("SELECT time FROM energy_consumption ORDER BY 1"),
            ["1970-01-01 00:00:00+00", "2026-03-14 07:21:05.414908+00", "2200-01-01 00:00:00+00"]
        );
        let partitions = bench.rows("SELECT count(*) FROM pg_inherits");
        assert!(partitions[0].parse::<u32>().unwrap() < 20, "{partitions:?}");
        running.stop().await;
    });
}

#[test]
fn a_writer_that_may_make_nothing_has_the_migrator_make_its_partitions() {
    local(async {
        let bench = Bench::new().await;
        let writer = format!("writer_of_{}", bench.database);
        bench.cluster.create_role(&writer, "a word").unwrap();
        bench.rows(&format!(
            "GRANT USAGE ON SCHEMA telemetry TO {writer}; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA telemetry TO {writer}"
        ));
        let mut sink = bench.sink("energy", "energy_consumption");
        let mut separate = (*sink.database).clone();
        let owner = LoginSettings { user: separate.user, password: separate.password };
        separate.user = writer;
        separate.password = Some(Secret::new("a word".to_owned()).into());

        // Without a migrator it cannot, and says so.
        sink.database = Arc::new(separate.clone());
        sink.pool = Pool::new(&separate, sink.dependency());
        let refused = sink.make_partitions(vec![0]).await.unwrap_err();
        assert_eq!(refused.sqlstate(), Some("42501"), "{refused}");

        separate.migrator = Some(owner);
        sink.database = Arc::new(separate);
        let mut messages = energies(3);
        messages[0].arrival = Arrival(0);
        bench.feed("energy", messages).await;
        let running = bench.run(sink);
        assert_eq!(running.drained().await.delivered, 3);
        assert_eq!(
            bench.rows("SELECT min(time) FROM energy_consumption"),
            ["1970-01-01 00:00:00+00"]
        );
        running.stop().await;
    });
}

#[test]
fn a_database_that_is_away_is_said_to_be_and_taken_up_when_it_comes() {
    local(async {
        let bench = Bench::new().await;
        let mut sink = bench.sink("energy", "energy_consumption");
        let mut away = (*sink.database).clone();
        away.port = rig::free_port();
        let port = away.port;
        sink.pool = telemetry::database::Pool::new(&away, sink.dependency());
        bench.feed("energy", energies(3)).await;
        let running = bench.run(sink);
        let dependency = running.sink.dependency();
        eventually("unreachable", || dependency.status().up == Some(false)).await;
        let status = running.reaches(SinkState::Waiting).await;
        assert_eq!(status.oldest_pending, Some(at(1000)));
        let trouble = status.trouble.unwrap();
        assert!(trouble.contains("refused"), "{trouble}");
        // The way to it appears: a plain relay.
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let target = bench.cluster.port();
        tokio::task::spawn_local(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                tokio::task::spawn_local(async move {
                    let mut far =
                        tokio::net::TcpStream::connect(("127.0.0.1", target)).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        assert_eq!(running.drained().await.delivered, 3);
        assert_eq!(dependency.status().up, Some(true));
        running.stop().await;
    });
}

#[test]
fn a_second_writer_is_fenced_and_writes_nothing_twice() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("energy", energies(10)).await;
        let running = bench.start("energy", "energy_consumption");
        running.drained().await;
        bench.rows("UPDATE telemetry_cursors SET sequence = 12");
        bench.feed("energy", energies(20)).await;
        let fenced = running.reaches(SinkState::Fenced).await;
        assert!(fenced.trouble.unwrap().contains("another node"));
        assert_eq!(bench.rows("SELECT count(*) FROM energy_consumption"), ["10"]);
        running.stop().await;
    });
}

#[test]
fn of_two_writers_of_one_log_one_stops_and_no_row_is_doubled() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("energy", energies(100)).await;
        // As in two nodes, each shows its own state.
        let both = [(); 2].map(|()| {
            let board = Board::new(&bench.settings);
            bench.run(TableSink { board, ..bench.sink("energy", "energy_consumption") })
        });
        let state = |n: usize| both[n].status().state;
        for round in 2..50_i64 {
            let more = energies(round * 100).split_off((round as usize - 1) * 100);
            bench.feed("energy", more).await;
            let fenced = |n| state(n) == SinkState::Fenced;
            let delivered = || {
                let rows = bench.rows("SELECT count(*) FROM energy_consumption");
                rows[0] == (round * 100).to_string()
            };
            eventually("delivered, by whichever", || delivered() || fenced(0) && fenced(1)).await;
            if fenced(0) || fenced(1) {
                break;
            }
        }
        let loser = usize::from(state(1) == SinkState::Fenced);
        let fenced = both[loser].reaches(SinkState::Fenced).await;
        assert!(fenced.trouble.unwrap().contains("another node"));
        both[1 - loser].drained().await;
        let rows = bench
            .rows("SELECT count(*) - count(DISTINCT active_power_total) FROM energy_consumption");
        assert_eq!(rows, ["0"], "rows that are there twice");
        for writer in both {
            writer.stop().await;
        }
    });
}

#[test]
fn an_older_copy_of_the_buffer_does_not_write() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("energy", energies(10)).await;
        let running = bench.start("energy", "energy_consumption");
        running.drained().await;
        running.stop().await;
        bench.rows("UPDATE telemetry_cursors SET sequence = 500");
        let running = bench.start("energy", "energy_consumption");
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("older copy of the buffer"), "{trouble}");
        running.stop().await;
    });
}

#[test]
fn nothing_is_written_before_the_migrations_are_done() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("energy", vec![energy(1, at(0))]).await;
        let running = bench.start("energy", "energy_consumption");
        running.drained().await;
        running.stop().await;
        bench.feed("energy", vec![energy(2, at(1))]).await;
        let running = bench.start("energy", "energy_consumption");
        running.gate.send_replace(MigrationState::Failed);
        let trouble = running.reaches(SinkState::Held).await.trouble.unwrap();
        assert!(trouble.contains("migrate status"), "{trouble}");
        assert_eq!(running.status().oldest_pending, Some(at(1)));
        running.gate.send_replace(MigrationState::Done);
        assert_eq!(running.drained().await.delivered, 2);
        running.stop().await;
    });
}
