//! The rule of the latest-state tables, on the server.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use telemetry::buffer::Incoming;
use telemetry::database::{ReplayOutcome, replay};
use telemetry::domain::Reason;
use telemetry::observe::SinkState;

use crate::bench::{Bench, at, local, message};

fn heatpump(payload: &str, micros: i64) -> Incoming {
    let payload = format!(r#"{{"Client_Name": "pump", {payload}}}"#);
    message("thermiq_heatpump/data", payload, at(micros))
}

#[test]
fn partial_equal_and_older_messages_leave_the_row_as_the_rule_says() {
    local(async {
        let bench = Bench::new().await;
        let running = bench.start("heatpump", "settings");
        let settings = || bench.rows("SELECT indoor_target_temp, mode, updated_at FROM settings");
        bench.feed("heatpump", vec![heatpump(r#""d50": 21, "d51": 1"#, 0)]).await;
        running.drained().await;
        assert_eq!(settings(), ["21 1 2026-03-14 07:21:05.412908+00"]);
        // Null and absent leave a value; an equal one moves nothing but what was seen.
        bench.feed("heatpump", vec![heatpump(r#""d50": null, "d51": 2"#, 1)]).await;
        bench.feed("heatpump", vec![heatpump(r#""d50": 21.0, "d51": 2"#, 9)]).await;
        running.drained().await;
        assert_eq!(settings(), ["21 2 2026-03-14 07:21:05.412909+00"]);
        // No setting at all is no settings message.
        bench.feed("heatpump", vec![heatpump(r#""d0": 3"#, 10)]).await;
        let books = running.drained().await;
        assert_eq!(settings(), ["21 2 2026-03-14 07:21:05.412909+00"]);
        assert_eq!((books.delivered, books.unchanged, books.stale, books.filtered), (3, 1, 0, 1));
        running.stop().await;
        // Another log has seen a newer one: which is older, only the arrival says.
        bench.rows(
            "UPDATE homelab_settings.telemetry_latest_seen \
             SET log = 'another', seen_at = seen_at + interval '1s'",
        );
        let running = bench.start("heatpump", "settings");
        bench.feed("heatpump", vec![heatpump(r#""d50": 25"#, 5)]).await;
        let books = running.drained().await;
        assert_eq!(settings(), ["21 2 2026-03-14 07:21:05.412909+00"]);
        assert_eq!((books.delivered, books.stale), (4, 1));
        running.stop().await;
    });
}

#[test]
fn a_clock_that_was_ahead_holds_no_row_and_a_letter_from_then_is_older() {
    local(async {
        let bench = Bench::new().await;
        let running = bench.start("plug", "power_plugs");
        let plugs = || bench.rows("SELECT plug_id, status FROM power_plugs ORDER BY 1");
        let hour = 3_600_000_000;
        let state = |state: &str, micros| {
            let payload = format!(r#"{{"POWER": "{state}"}}"#);
            message("tele/desk/STATE", payload, at(micros))
        };
        bench.feed("plug", vec![state("ON", hour), message("tele//STATE", "{}", at(hour))]).await;
        running.drained().await;
        bench.feed("plug", vec![state("OFF", 1)]).await;
        let books = running.drained().await;
        assert_eq!(plugs(), ["desk f"]);
        assert_eq!((books.delivered, books.stale), (2, 0));
        let mut letter = bench.letters().await.remove(0);
        letter.topic = "tele/desk/STATE".to_owned();
        letter.payload = br#"{"POWER": "ON"}"#.to_vec();
        let sink = bench.sink("plug", "power_plugs");
        assert_eq!(replay(&sink, &letter).await.unwrap(), ReplayOutcome::Delivered);
        assert_eq!(plugs(), ["desk f"], "what was received after it stays");
        assert_eq!(running.drained().await.stale, 1);
        running.stop().await;
    });
}

#[test]
fn one_batch_with_many_messages_of_many_keys_is_exact() {
    local(async {
        let bench = Bench::new().await;
        let mut messages = Vec::new();
        for round in 0..4i64 {
            for plug in 0..1500i64 {
                let state = if round == 3 && plug % 2 == 0 { "OFF" } else { "ON" };
                let payload = format!(r#"{{"POWER": "{state}", "UptimeSec": {}}}"#, round / 2);
                let arrival = at(round * 10_000 + plug);
                messages.push(message(&format!("tele/plug-{plug}/STATE"), payload, arrival));
            }
        }
        bench.feed("plug", messages).await;
        let running = bench.start("plug", "power_plugs");
        let books = running.drained().await;
        // Round 1 repeats round 0, half of round 3 repeats round 2.
        assert_eq!((books.delivered, books.unchanged, books.stale), (6000, 1500 + 750, 0));
        assert_eq!(
            bench.rows(
                "SELECT status, uptime_seconds, count(*), bool_and(name = plug_id) FROM power_plugs \
                 GROUP BY 1, 2 ORDER BY 1"
            ),
            ["f 1 750 t", "t 1 750 t"]
        );
        // A person's name stays, whatever comes.
        bench.rows("UPDATE power_plugs SET name = 'desk' WHERE plug_id = 'plug-7'");
        let later = message("tele/plug-7/STATE", r#"{"POWER": "OFF"}"#, at(1_000_000));
        bench.feed("plug", vec![later]).await;
        running.drained().await;
        assert_eq!(
            bench.rows(
                "SELECT name, status, uptime_seconds FROM power_plugs WHERE plug_id = 'plug-7'"
            ),
            ["desk f 1"]
        );
        running.stop().await;
    });
}

#[test]
fn a_refused_row_of_a_latest_table_is_set_aside_alone() {
    local(async {
        let bench = Bench::new().await;
        bench.rows("ALTER TABLE power_plugs ADD CONSTRAINT sane CHECK (uptime_seconds < 1000)");
        let plug = |id: i64| {
            let payload = format!(r#"{{"POWER": "ON", "UptimeSec": {}}}"#, id * 100);
            message(&format!("tele/plug-{id}/STATE"), payload, at(id))
        };
        bench.feed("plug", (1..=10).map(plug).collect()).await;
        let running = bench.start("plug", "power_plugs");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (9, 1));
        assert_eq!(bench.letters().await[0].key.sequence.0, 10);
        running.stop().await;
    });
}

/// Counts the upserts into the plugs' table and their rows, also of those that are taken back.
async fn counting(bench: &Bench) {
    bench.rows(
        "CREATE SEQUENCE upserts; CREATE SEQUENCE upserted; \
         CREATE FUNCTION counted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         PERFORM nextval('telemetry.' || TG_ARGV[0]); RETURN NEW; END $$; \
         CREATE TRIGGER upserts BEFORE INSERT ON power_plugs FOR EACH STATEMENT EXECUTE FUNCTION counted('upserts'); \
         CREATE TRIGGER upserted BEFORE INSERT ON power_plugs FOR EACH ROW EXECUTE FUNCTION counted('upserted')",
    );
}

#[test]
fn one_refused_message_of_five_thousand_is_found_without_writing_the_others_again() {
    // Plugs, upserts, rows of them.
    for (plugs, upserts, rows) in [(50, 16, 110), (5_000, 33, 5_250)] {
        local(async {
            let bench = Bench::new().await;
            bench.rows("ALTER TABLE power_plugs ADD CONSTRAINT sane CHECK (uptime_seconds < 9000)");
            counting(&bench).await;
            let plug = |id: i64| {
                let uptime = if id == 4_998 { 9_500 } else { id };
                let payload = format!(r#"{{"POWER": "ON", "UptimeSec": {uptime}}}"#);
                message(&format!("tele/plug-{}/STATE", id % plugs), payload, at(id))
            };
            bench.feed("plug", (1..=5_000).map(plug).collect()).await;
            let running = bench.start("plug", "power_plugs");
            let books = running.drained().await;
            assert_eq!((books.delivered, books.dead_lettered), (4_999, 1));
            let letters = bench.letters().await;
            assert_eq!(letters[0].key.sequence.0, 4_998);
            assert_eq!(letters[0].sqlstate.as_deref(), Some("23514"));
            let count = |of: &str| -> u32 {
                bench.rows(&format!("SELECT last_value FROM {of}"))[0].parse().unwrap()
            };
            let counted = (count("upserts"), count("upserted"));
            assert!(counted.0 <= upserts && counted.1 <= rows, "{plugs} plugs: {counted:?}");
            running.stop().await;
        });
    }
}

/// Of several in one batch, of the same key and of others: with good ones before, between and behind.
#[test]
fn refused_messages_of_many_keys_leave_what_the_good_ones_make() {
    const PLUGS: i64 = 120;
    const MESSAGES: i64 = 3_000;
    const BAD: i64 = 5_000;
    local(async {
        let bench = Bench::new().await;
        bench.rows("ALTER TABLE power_plugs ADD CONSTRAINT sane CHECK (uptime_seconds < 5000)");
        let mut random = 7_u64;
        let mut next = |below: i64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) as i64 % below
        };
        let (mut messages, mut last, mut bad) = (Vec::new(), BTreeMap::new(), BTreeSet::new());
        for sequence in 1..=MESSAGES {
            let plug = next(PLUGS);
            // Of the first plugs most are refused, of the last none.
            let uptime = if next(PLUGS) > plug + PLUGS / 2 { BAD + sequence } else { sequence };
            if uptime >= BAD {
                bad.insert(sequence as u64);
            } else {
                last.insert(format!("plug-{plug:03}"), sequence);
            }
            let payload = format!(r#"{{"POWER": "ON", "UptimeSec": {uptime}}}"#);
            messages.push(message(&format!("tele/plug-{plug:03}/STATE"), payload, at(sequence)));
        }
        bench.feed("plug", messages).await;
        let running = bench.start("plug", "power_plugs");
        let books = running.drained().await;
        let letters: BTreeSet<u64> =
            bench.letters().await.iter().map(|letter| letter.key.sequence.0).collect();
        assert!(letters.is_subset(&bad), "{:?}", letters.difference(&bad));
        // A bad one is not seen where a good one of the same plug replaces it before it is written.
        assert!(letters.len() >= 20, "{} of {}", letters.len(), bad.len());
        assert_eq!(books.delivered + books.dead_lettered, MESSAGES as u64);
        assert_eq!(books.dead_lettered, letters.len() as u64);
        let expected: Vec<String> =
            last.iter().map(|(plug, uptime)| format!("{plug} {uptime}")).collect();
        assert_eq!(
            bench.rows("SELECT plug_id, uptime_seconds FROM power_plugs ORDER BY 1"),
            expected
        );
        running.stop().await;
    });
}

/// Written by key they would collide: only one after the other as they came they do not.
#[test]
fn rows_that_one_of_another_key_makes_way_for_are_no_dead_letters() {
    local(async {
        let bench = Bench::new().await;
        bench.rows("ALTER TABLE power_plugs ADD UNIQUE (uptime_seconds)");
        let plug = |id: &str, uptime: i64, micros| {
            let payload = format!(r#"{{"POWER": "ON", "UptimeSec": {uptime}}}"#);
            message(&format!("tele/{id}/STATE"), payload, at(micros))
        };
        bench.feed("plug", vec![plug("a", 1, 1), plug("b", 2, 2), plug("c", 3, 3)]).await;
        let running = bench.start("plug", "power_plugs");
        running.drained().await;
        bench.feed("plug", vec![plug("c", 4, 4), plug("b", 3, 5), plug("a", 2, 6)]).await;
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (6, 0));
        assert_eq!(
            bench.rows("SELECT plug_id, uptime_seconds FROM power_plugs ORDER BY 1"),
            ["a 2", "b 3", "c 4"]
        );
        running.stop().await;
    });
}

/// A mistake of the program, not of a hundred rows: it must not empty the stream into the dead letters.
#[test]
fn a_fold_that_panics_on_row_after_row_holds_its_writer_and_goes_on_once_it_is_mended() {
    const FOLD: &str = "fold_panics-always";
    local(async {
        let mut bench = Bench::new().await;
        let database = bench.settings.databases.get_mut("homelab_settings").unwrap();
        database.retry.max = Duration::from_millis(50);
        let plug = |id: &str, micros| {
            message(&format!("tele/{id}/STATE"), r#"{"POWER": "ON"}"#, at(micros))
        };
        let bad = |micros| plug("panics-always", micros);
        fail::cfg(FOLD, "panic").unwrap();
        // A good one between begins the count anew.
        let first = (0..60).map(bad).chain([plug("desk", 60)]);
        bench.feed("plug", first.chain((61..191).map(bad)).collect()).await;
        let running = bench.start("plug", "power_plugs");
        let held = running.reaches(SinkState::Held).await;
        let trouble = held.trouble.unwrap();
        assert!(trouble.contains("panicked") && trouble.contains("100 rows in a row"), "{trouble}");
        for _ in 0..3 {
            running.nudge().await;
            running.reaches(SinkState::Held).await;
        }
        let books = running.status().books.unwrap();
        assert_eq!((books.delivered, books.dead_lettered, books.cursor.0), (1, 160, 161));
        let letters = bench.letters().await;
        assert_eq!(letters.len(), 160);
        assert!(letters.iter().all(|letter| letter.reason == Reason::Panicked));
        fail::remove(FOLD);
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (31, 160));
        running.stop().await;
    });
}
