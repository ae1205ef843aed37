//! What ends up in a time series.

use std::sync::Arc;
use std::time::Duration;

use telemetry::observe::SinkState;
use telemetry::part::Phase;

use crate::bench::{Bench, at, energies, energy, eventually, local, message};

#[test]
fn a_message_becomes_one_row_with_its_arrival_and_the_nodes_name() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("energy", vec![energy(1284, at(0))]).await;
        let running = bench.start("energy", "energy_consumption");
        let books = running.drained().await;
        assert_eq!((books.delivered, books.cursor.0), (1, 1));
        assert_eq!(
            bench.rows("SELECT * FROM energy_consumption"),
            [
                "2026-03-14 07:21:05.412908+00 SE-4471-K three-phase -41 1284 612 389 283 0 104233871 83 237 238 236 \
              2583 1634 - 98 homelab-1"
            ]
        );
        let status = running.status();
        assert_eq!(status.state, SinkState::Delivering);
        assert_eq!(status.newest_delivered, Some(at(0)));
        running.stop().await;
    });
}

#[test]
fn what_is_no_row_is_in_the_books_all_the_same() {
    local(async {
        let bench = Bench::new().await;
        let topic = "shelly/events/rpc";
        let full = r#"{"src": "s1", "method": "NotifyFullStatus", "params": {"temperature:0": {"tC": 21.4}}}"#;
        let other = r#"{"src": "s1", "method": "NotifyEvent", "params": {}}"#;
        let without = r#"{"src": "s1", "method": "NotifyFullStatus", "params": {}}"#;
        let payloads = [full, other, without, "{", full];
        bench.feed("temperature_indoor", payloads.map(|p| message(topic, p, at(0))).to_vec()).await;
        let running = bench.start("temperature_indoor", "temperature_sensors");
        let books = running.drained().await;
        assert_eq!(
            (books.delivered, books.filtered, books.incomplete, books.dead_lettered),
            (2, 1, 1, 1)
        );
        let letters = bench.letters().await;
        assert_eq!(letters.len(), 1);
        assert_eq!((letters[0].payload.as_slice(), letters[0].arrival), (&b"{"[..], at(0)));
        // Counted after the books.
        eventually("the letter counted", || running.status().dead_letters == 1).await;
        assert_eq!(bench.rows("SELECT count(*) FROM temperature_sensors"), ["2"]);
        running.stop().await;
    });
}

#[test]
fn a_new_writer_goes_on_where_the_last_one_stopped() {
    local(async {
        let bench = Bench::new().await;
        for round in 1..=3 {
            bench.feed("energy", energies(5000)).await;
            let running = bench.start("energy", "energy_consumption");
            if round < 3 {
                // Anywhere: before, in or after a transaction.
                tokio::time::sleep(Duration::from_millis(30 * round)).await;
                running.task.abort();
            } else {
                assert_eq!(running.drained().await.delivered, 15_000);
                running.stop().await;
            }
        }
        assert_eq!(bench.rows("SELECT count(*) FROM energy_consumption"), ["15000"]);
    });
}

#[test]
fn a_draining_writer_delivers_what_there_is_and_ends() {
    local(async {
        let bench = Bench::new().await;
        bench.feed("energy", energies(20_000)).await;
        let running = bench.start("energy", "energy_consumption");
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        running.phase.send_replace(Phase::Draining { deadline });
        running.task.await.unwrap().unwrap();
        assert_eq!(bench.rows("SELECT count(*) FROM energy_consumption"), ["20000"]);
        let (stream, sink) = (&running.sink.stream.name, &running.sink.table.sink);
        let saved = bench.buffer.state().books(stream, sink).await.unwrap().unwrap();
        assert_eq!(saved.delivered, 20_000);
    });
}

#[test]
fn columns_of_a_person_and_quoted_names_are_no_obstacle() {
    local(async {
        let bench = Bench::new().await;
        bench.rows(
            r#"ALTER TABLE temperature_sensors RENAME TO "Sensors; of ""home""";
               ALTER TABLE "Sensors; of ""home""" ADD note text DEFAULT 'none', ADD id bigserial"#,
        );
        let sink = bench.sink("temperature_outdoor", "temperature_sensors");
        let mut table = (*sink.table).clone();
        table.table = r#"Sensors; of "home""#.to_owned();
        let sink = telemetry::database::TableSink { table: Arc::new(table), ..sink };
        let payload = r#"{"temperature_c": 6.4}"#;
        bench.feed("temperature_outdoor", vec![message("t", payload, at(0))]).await;
        let running = bench.run(sink);
        running.drained().await;
        assert_eq!(
            bench.rows(
                r#"SELECT temperature_c, location, note, id > 0 FROM "Sensors; of ""home""""#
            ),
            ["6.4 outdoor none t"]
        );
        running.stop().await;
    });
}
