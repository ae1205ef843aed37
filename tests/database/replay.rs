//! Dead letters, a second time.

use std::sync::Arc;

use telemetry::config::{FieldSource, FilterSettings, FilterTest};
use telemetry::database::{ReplayOutcome, replay};
use telemetry::domain::Sequence;

use crate::bench::{Bench, at, energies, local, message};

#[test]
fn a_letter_is_replayed_once_at_its_own_arrival_time_and_the_books_follow() {
    local(async {
        let bench = Bench::new().await;
        bench.rows(
            "ALTER TABLE energy_consumption ADD CONSTRAINT sane CHECK (active_power_total <> 2)",
        );
        bench.feed("energy", energies(3)).await;
        let running = bench.start("energy", "energy_consumption");
        running.drained().await;
        let letter = bench.letters().await.remove(0);
        let sink = bench.sink("energy", "energy_consumption");
        let refused = replay(&sink, &letter).await.unwrap();
        assert!(matches!(refused, ReplayOutcome::StillDead(_)), "{refused:?}");
        bench.rows("ALTER TABLE energy_consumption DROP CONSTRAINT sane");
        assert_eq!(replay(&sink, &letter).await.unwrap(), ReplayOutcome::Delivered);
        assert_eq!(replay(&sink, &letter).await.unwrap(), ReplayOutcome::AlreadyReplayed);
        assert_eq!(
            bench.rows("SELECT active_power_total, time FROM energy_consumption WHERE active_power_total = 2"),
            ["2 2026-03-14 07:21:05.414908+00"]
        );
        // When the writer next reads its cursor, it finds more delivered than it knew of.
        running.nudge().await;
        bench.feed("energy", energies(1)).await;
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (4, 0));
        let meters = &sink.view().meters;
        let counted = (meters.delivered_messages.get(), meters.replayed_messages.get());
        assert_eq!(counted, (3, 1), "each is counted once");
        running.stop().await;
    });
}

#[test]
fn a_letter_that_its_sink_has_not_passed_is_left_to_its_writer() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("plug", vec![message("tele//STATE", "{}", at(0))]).await;
        let running = bench.start("plug", "power_plugs");
        running.drained().await;
        running.stop().await;
        let mut letter = bench.letters().await.remove(0);
        letter.topic = "tele/desk/STATE".to_owned();
        letter.payload = br#"{"POWER": "ON"}"#.to_vec();
        let sink = bench.sink("plug", "power_plugs");
        let mut unpassed = letter.clone();
        unpassed.key.sequence = Sequence(2);
        assert_eq!(replay(&sink, &unpassed).await.unwrap(), ReplayOutcome::NotPassed);
        assert_eq!(bench.rows("SELECT count(*) FROM power_plugs"), ["0"]);
        assert_eq!(replay(&sink, &letter).await.unwrap(), ReplayOutcome::Delivered);
        assert_eq!(bench.rows("SELECT name, status FROM power_plugs"), ["desk t"]);
    });
}

#[test]
fn a_letter_that_the_mapping_leaves_out_stays_one_until_a_mapping_takes_it() {
    local(async {
        let bench = Bench::new().await;
        bench.rows(
            "ALTER TABLE energy_consumption ADD CONSTRAINT sane CHECK (active_power_total <> 2)",
        );
        bench.feed("energy", energies(3)).await;
        let running = bench.start("energy", "energy_consumption");
        running.drained().await;
        running.stop().await;
        bench.rows("ALTER TABLE energy_consumption DROP CONSTRAINT sane");
        let letter = bench.letters().await.remove(0);
        let mut sink = bench.sink("energy", "energy_consumption");
        let right = sink.stream.clone();
        let mut wrong = (*right).clone();
        for (member, outcome) in [
            ("saveeyeDeviceSerialNumber", ReplayOutcome::Filtered),
            ("no_such_member", ReplayOutcome::Incomplete),
        ] {
            wrong.mapping.filter = Some(FilterSettings {
                source: FieldSource::Paths(vec![member.to_owned()]),
                test: FilterTest::OneOf(vec!["nobody".into()]),
            });
            sink.stream = Arc::new(wrong.clone());
            assert_eq!(replay(&sink, &letter).await.unwrap(), outcome);
        }
        sink.stream = right;
        assert_eq!(replay(&sink, &letter).await.unwrap(), ReplayOutcome::Delivered);
        let rows = "SELECT count(*) FROM energy_consumption WHERE active_power_total = 2";
        assert_eq!(bench.rows(rows), ["1"]);
        let running = bench.start("energy", "energy_consumption");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered, books.filtered), (3, 0, 0));
        running.stop().await;
    });
}

#[test]
fn a_letter_beyond_the_cursor_is_forgotten_when_its_record_comes_again() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("plug", vec![message("tele//STATE", "{}", at(0))]).await;
        let running = bench.start("plug", "power_plugs");
        running.drained().await;
        running.stop().await;
        let mut ahead = bench.letters().await.remove(0);
        ahead.key.sequence = Sequence(2);
        bench.buffer.state().put_dead_letters(vec![ahead]).await.unwrap();
        let good = message("tele/desk/STATE", r#"{"POWER": "ON"}"#, at(1));
        bench.feed("plug", vec![good]).await;
        let running = bench.start("plug", "power_plugs");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.dead_lettered), (1, 1));
        assert_eq!(bench.letters().await.len(), 1);
        assert_eq!(running.status().dead_letters, 1);
        running.stop().await;
    });
}
