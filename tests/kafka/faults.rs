//! The producer against librdkafka's mock cluster: one exact fault at one exact moment.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use telemetry::breaker::BreakerState;
use telemetry::buffer::DeadLetterFilter;
use telemetry::config::DeadLetterTopic;
use telemetry::domain::{DeadLetter, ErrorClass, Reason};
use telemetry::kafka::ReplayOutcome;
use telemetry::observe::{SinkState, SinkStatus};

use crate::stage::{CLUSTER, Stage, assert_whole_and_in_order, good, sink_name, stream_name};

impl Stage {
    /// An injected error that nobody has met yet would be met by the next who sends, and this one does not try again.
    async fn assert_no_produce_error_is_left(&self) {
        self.mock.create_topic("elsewhere", 1, 1).unwrap();
        let producer: FutureProducer = rdkafka::ClientConfig::new()
            .set("bootstrap.servers", self.mock.bootstrap_servers())
            .set("retries", "0")
            .create()
            .unwrap();
        let record = FutureRecord::to("elsewhere").key("").payload("");
        producer.send(record, Duration::ZERO).await.expect("the error was met before");
    }

    async fn letters(&self) -> Vec<DeadLetter> {
        self.buffer.state().dead_letters(DeadLetterFilter::default(), None, 1_000).await.unwrap()
    }

    fn assert_balanced(&self, stream: &str) {
        let books = self.status(stream).books.unwrap();
        assert_eq!(books.difference(), 0, "{books:?}");
    }
}

#[tokio::test]
async fn records_arrive_in_order_with_key_time_and_header_and_the_cursor_is_durable() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep_good("energy", 3_000).await;
    stage
        .run(async |_| {
            stage.until_cursor("energy", 3_000).await;
            stage.keep_good("energy", 50).await;
        })
        .await;
    assert_eq!(stage.cursor("energy"), 3_050, "a drain leaves nothing");
    let seen = stage.read("energy", 3_050);
    assert_eq!(seen.len(), 3_050, "nothing twice");
    assert_whole_and_in_order(&seen, 1..=3_050);
    assert_eq!(seen[8].key, "device-1");
    assert_eq!(seen[8].value["fields"]["n"], 8);
    assert!(seen[0].timestamp_ms > 1_700_000_000_000);
    let state = stage.buffer.state();
    let saved = state.books(&stream_name("energy"), &sink_name()).await.unwrap().unwrap();
    assert_eq!((saved.cursor.0, saved.delivered), (3_050, 3_050));
    let status = stage.status("energy");
    assert_eq!(status.state, SinkState::Delivering);
    assert!(status.newest_delivered.is_some() && status.last_success.is_some());
}

#[tokio::test]
async fn a_fresh_producer_goes_on_where_the_last_one_stopped() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep_good("energy", 100).await;
    stage.run(async |_| stage.until_cursor("energy", 100).await).await;
    stage.keep_good("energy", 100).await;
    stage.run(async |_| stage.until_cursor("energy", 200).await).await;
    let seen = stage.read("energy", 200);
    assert_eq!(seen.len(), 200);
    assert_whole_and_in_order(&seen, 1..=200);
}

#[tokio::test]
async fn what_is_no_record_is_counted_or_set_aside_and_passed() {
    let stage = Stage::new(&["energy"], |settings| {
        settings.clusters[CLUSTER].message_bytes_max = 2_000;
    });
    let long = format!(r#"{{"id": "d", "text": "{}"}}"#, "x".repeat(3_000));
    let skipped = r#"{"id": "d", "skip": true}"#.to_owned();
    let payloads = [good(1), "no json".to_owned(), skipped, long, good(2)];
    stage.keep("energy", payloads).await;
    stage.run(async |_| stage.until_cursor("energy", 5).await).await;
    let books = stage.status("energy").books.unwrap();
    assert_eq!((books.delivered, books.filtered, books.dead_lettered), (2, 1, 2));
    stage.assert_balanced("energy");
    assert_whole_and_in_order(&stage.read("energy", 2), [1, 5]);
    let reasons: Vec<_> = stage.letters().await.iter().map(|letter| letter.reason).collect();
    assert_eq!(reasons, [Reason::NotJson, Reason::KafkaTooLarge]);
    assert_eq!(stage.status("energy").dead_letters, 2);
}

/// One produce request is answered with `error`; nothing else is wrong.
async fn survives(error: RDKafkaRespErr) -> Stage {
    let stage = Stage::new(&["energy", "climate"], |_| {});
    stage.keep_good("climate", 200).await;
    stage.keep_good("energy", 1_000).await;
    stage.mock.request_errors(RDKafkaApiKey::Produce, &[error]);
    stage
        .run(async |_| {
            stage.until_cursor("energy", 1_000).await;
            stage.until_cursor("climate", 200).await;
        })
        .await;
    stage.assert_no_produce_error_is_left().await;
    assert_whole_and_in_order(&stage.read("energy", 1_000), 1..=1_000);
    assert_whole_and_in_order(&stage.read("climate", 200), 1..=200);
    for stream in ["energy", "climate"] {
        stage.assert_balanced(stream);
        assert_eq!(stage.status(stream).dead_letters, 0, "every record is good");
    }
    stage
}

#[tokio::test]
async fn a_batch_called_too_large_is_sent_again_one_by_one() {
    survives(RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE).await;
}

#[tokio::test]
async fn a_record_refused_as_too_large_on_its_own_is_set_aside_and_the_rest_delivered() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep_good("energy", 500).await;
    let too_large = RDKafkaRespErr::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
    stage.mock.request_errors(RDKafkaApiKey::Produce, &[too_large, too_large]);
    stage.run(async |_| stage.until_cursor("energy", 500).await).await;
    let letters = stage.letters().await;
    let set_aside: Vec<_> = letters.iter().map(|l| (l.key.sequence.0, l.reason)).collect();
    assert_eq!(set_aside, [(1, Reason::KafkaTooLarge)]);
    assert_whole_and_in_order(&stage.read("energy", 499), 2..=500);
    stage.assert_balanced("energy");
}

#[tokio::test]
async fn rights_revoked_while_running_hold_the_stream_until_they_are_back() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep_good("energy", 10).await;
    stage
        .run(async |_| {
            stage.until_cursor("energy", 10).await;
            let revoked = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
            stage.mock.request_errors(RDKafkaApiKey::Produce, &[revoked; 3]);
            stage.keep_good("energy", 10).await;
            let held = |stage: &Stage| stage.status("energy").state == SinkState::Held;
            stage.until("the stream is held", held).await;
            stage.until_cursor("energy", 20).await;
        })
        .await;
    assert_eq!(stage.status("energy").state, SinkState::Delivering);
    assert_whole_and_in_order(&stage.read("energy", 20), 1..=20);
}

#[tokio::test]
async fn an_authorization_refused_once_leaves_no_hole() {
    survives(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED).await;
}

#[tokio::test]
async fn a_producer_in_its_fatal_state_is_replaced() {
    let stage = survives(RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER).await;
    let view = stage.board.sink(&stream_name("energy"), &sink_name());
    let climate = stage.board.sink(&stream_name("climate"), &sink_name());
    assert!(view.meters.retries.get() + climate.meters.retries.get() > 0, "it was fatal");
}

#[tokio::test]
async fn an_error_that_passes_is_librdkafkas_own_affair() {
    survives(RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION).await;
}

#[tokio::test]
async fn a_missing_topic_holds_its_own_stream_and_says_what_to_do() {
    let stage = Stage::new(&["energy", "climate"], |_| {});
    let missing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    stage.mock.topic_error("energy", missing).unwrap();
    stage.keep_good("energy", 10).await;
    stage.keep_good("climate", 10).await;
    stage
        .run(async |_| {
            stage.until_cursor("climate", 10).await;
            let held = |stage: &Stage| stage.status("energy").state == SinkState::Held;
            stage.until("the stream is held", held).await;
            let trouble = stage.status("energy").trouble.unwrap();
            assert!(trouble.contains("create it"), "{trouble}");
            assert_eq!(stage.cursor("energy"), 0);
            let healed = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;
            stage.mock.topic_error("energy", healed).unwrap();
            stage.until_cursor("energy", 10).await;
        })
        .await;
    assert_eq!(stage.status("energy").state, SinkState::Delivering);
    assert_whole_and_in_order(&stage.read("energy", 10), 1..=10);
}

#[tokio::test]
async fn an_absent_cluster_is_waited_for() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.mock.broker_down(1).unwrap();
    stage.keep_good("energy", 500).await;
    let dependency = stage.board.dependency("kafka:main");
    stage
        .run(async |_| {
            let trouble = || stage.status("energy").trouble;
            stage.until("its lane begins", |stage| stage.status("energy").books.is_some()).await;
            assert!(trouble().is_some_and(|words| !words.is_empty()), "it says what it waits for");
            stage.until("it is noticed", |_| dependency.status().up == Some(false)).await;
            assert_eq!(stage.status("energy").state, SinkState::Waiting);
            stage.until("so says the sink", |_| trouble() == dependency.status().trouble).await;
            let breaker = || dependency.status().breaker;
            stage.until("it is left alone", |_| breaker().state == BreakerState::Open).await;
            stage.mock.broker_up(1).unwrap();
            stage.until_cursor("energy", 500).await;
            assert_eq!(dependency.status().up, Some(true));
            assert_eq!((breaker().state, breaker().trips), (BreakerState::Closed, 1));
            // Away again, with records on their way.
            stage.mock.broker_down(1).unwrap();
            stage.keep_good("energy", 500).await;
            stage.until("it is noticed", |_| dependency.status().up == Some(false)).await;
            stage.mock.broker_up(1).unwrap();
            stage.until_cursor("energy", 1_000).await;
        })
        .await;
    assert_whole_and_in_order(&stage.read("energy", 1_000), 1..=1_000);
    stage.assert_balanced("energy");
}

#[tokio::test]
async fn a_replayed_letter_is_delivered_with_its_own_time_and_moves_in_the_books() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep("energy", [good(1), "no json".to_owned()]).await;
    stage
        .run(async |replayer| {
            stage.until_cursor("energy", 2).await;
            let mut letter = stage.letters().await.remove(0);
            let still_bad = replayer.replay(&letter).await.unwrap();
            assert!(matches!(still_bad, ReplayOutcome::Dead(_)), "{still_bad:?}");
            letter.payload = good(2).into_bytes();
            letter.arrival.0 -= 3_600_000_000;
            assert_eq!(replayer.replay(&letter).await.unwrap(), ReplayOutcome::Delivered);
            stage
                .until("the books follow", |stage| {
                    stage.status("energy").books.unwrap().dead_lettered == 0
                })
                .await;
            let seen = stage.read("energy", 2);
            let replayed = seen.iter().find(|record| record.sequence == 2).unwrap();
            assert_eq!(replayed.timestamp_ms, letter.arrival.as_micros() / 1000);
        })
        .await;
    stage.assert_balanced("energy");
    assert_eq!(stage.status("energy").books.unwrap().delivered, 2);
}

#[tokio::test]
async fn a_pause_holds_what_is_new_and_ends() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep_good("energy", 10).await;
    stage
        .run_with_pause(async |_, paused| {
            let began = Instant::now();
            stage.until_cursor("energy", 10).await;
            let takes = began.elapsed();
            paused.send_replace(true);
            let is_paused = |stage: &Stage| stage.status("energy").state == SinkState::Paused;
            stage.until("the sink is paused", is_paused).await;
            stage.keep_good("energy", 10).await;
            // Long enough for a sink that does not heed it.
            tokio::time::sleep(2 * takes).await;
            assert_eq!(stage.cursor("energy"), 10);
            assert_eq!(stage.read("energy", 10).len(), 10, "none was sent");
            paused.send_replace(false);
            stage.until_cursor("energy", 20).await;
        })
        .await;
    assert_whole_and_in_order(&stage.read("energy", 20), 1..=20);
}

#[tokio::test]
async fn a_drain_without_a_cluster_ends_at_its_deadline_and_loses_nothing() {
    let stage = Stage::new(&["energy"], |settings| {
        settings.clusters[CLUSTER].operation_timeout = Duration::from_millis(200);
    });
    stage.mock.broker_down(1).unwrap();
    stage.keep_good("energy", 100).await;
    stage.run_until_deadline(Duration::from_millis(500)).await;
    assert_eq!(stage.cursor("energy"), 0);
    stage.mock.broker_up(1).unwrap();
    stage.run(async |_| stage.until_cursor("energy", 100).await).await;
    assert_whole_and_in_order(&stage.read("energy", 100), 1..=100);
}

/// The node may die between the confirmation of a replayed letter and its removal, or a person may ask twice.
#[tokio::test]
async fn a_replay_that_is_repeated_moves_the_books_once_also_across_a_restart() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep("energy", [good(1), "no json".to_owned(), "nor this".to_owned(), good(2)]).await;
    let counted = || {
        let books = stage.status("energy").books.unwrap();
        (books.delivered, books.dead_lettered)
    };
    let mut letters = Vec::new();
    stage
        .run(async |replayer| {
            stage.until_cursor("energy", 4).await;
            letters = stage.letters().await;
            for letter in &mut letters {
                letter.payload = good(9).into_bytes();
            }
            for _ in 0..3 {
                let outcome = replayer.replay(&letters[0]).await.unwrap();
                assert_eq!(outcome, ReplayOutcome::Delivered);
            }
            stage.until("the books follow", |_| counted() == (3, 1)).await;
        })
        .await;
    assert_eq!(counted(), (3, 1));
    assert_eq!(stage.letters().await.len(), 1, "it left with its entry in the books");
    stage
        .run(async |replayer| {
            stage.until_cursor("energy", 4).await;
            assert_eq!(counted(), (3, 1), "the next life knows of it");
            for letter in &letters {
                replayer.replay(letter).await.unwrap();
            }
            stage.until("the books follow", |_| counted() == (4, 0)).await;
        })
        .await;
    stage.assert_balanced("energy");
    assert!(stage.letters().await.is_empty());
}

/// A lane that is paused enters nothing into its books, which take so many replays and no more.
#[tokio::test]
async fn a_replay_for_which_a_paused_stream_has_no_room_ends_and_is_taken_once_it_goes_on() {
    const ROOM: usize = 256;
    let stage = Stage::new(&["energy"], |settings| {
        settings.clusters[CLUSTER].operation_timeout = Duration::from_millis(300);
    });
    stage.keep("energy", (0..=ROOM).map(|_| "no json".to_owned())).await;
    stage
        .run_with_pause(async |replayer, paused| {
            stage.until_cursor("energy", ROOM as u64 + 1).await;
            let mut letters = stage.letters().await;
            for letter in &mut letters {
                letter.payload = good(9).into_bytes();
            }
            paused.send_replace(true);
            let is_paused = |stage: &Stage| stage.status("energy").state == SinkState::Paused;
            stage.until("the sink is paused", is_paused).await;
            for letter in &letters[..ROOM] {
                let outcome = replayer.replay(letter).await.unwrap();
                assert_eq!(outcome, ReplayOutcome::Delivered);
            }
            let full = replayer.replay(&letters[ROOM]).await.unwrap_err();
            assert!(full.to_string().contains("it is paused or cannot deliver"), "{full}");
            assert_eq!(full.class(), ErrorClass::Transient);
            paused.send_replace(false);
            let replayed = |stage: &Stage| stage.status("energy").books.unwrap().delivered;
            stage.until("the books follow", |stage| replayed(stage) == ROOM as u64).await;
            let outcome = replayer.replay(&letters[ROOM]).await.unwrap();
            assert_eq!(outcome, ReplayOutcome::Delivered);
            stage.until("the books follow", |stage| replayed(stage) == ROOM as u64 + 1).await;
        })
        .await;
    stage.assert_balanced("energy");
    assert!(stage.letters().await.is_empty());
}

/// A broker asks for the right to write when a producer wants its identity, and the library then ends the producer.
const NO_RIGHT: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED;
const RIGHT: &str = "allow this user to Write topic \"energy\"";

#[tokio::test]
async fn a_producer_without_the_right_to_write_holds_the_stream_until_it_is_given() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.mock.request_errors(RDKafkaApiKey::InitProducerId, &[NO_RIGHT; 4]);
    stage.keep_good("energy", 500).await;
    let mut states = Vec::new();
    stage
        .run(async |_| {
            while stage.cursor("energy") < 500 {
                let SinkStatus { state, trouble, .. } = stage.status("energy");
                if states.last() != Some(&(state, trouble.clone())) {
                    states.push((state, trouble));
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    let held = states.iter().position(|(state, _)| *state == SinkState::Held).expect("it is held");
    let words = states[held].1.as_ref().unwrap();
    assert!(words.contains(RIGHT), "{words}");
    let after = &states[held..];
    let waits = after.iter().any(|(state, _)| *state == SinkState::Waiting);
    assert!(!waits, "what is refused is no outage: {after:?}");
    assert_eq!(stage.status("energy").state, SinkState::Delivering);
    let seen = stage.read("energy", 500);
    assert_eq!(seen.len(), 500, "nothing twice");
    assert_whole_and_in_order(&seen, 1..=500);
    stage.assert_balanced("energy");
}

#[tokio::test]
async fn a_stream_with_nothing_to_send_tells_of_the_missing_right_and_that_it_was_given() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.mock.request_errors(RDKafkaApiKey::InitProducerId, &[NO_RIGHT; 2]);
    stage
        .run(async |_| {
            let is = |state| move |stage: &Stage| stage.status("energy").state == state;
            stage.until("the stream is held", is(SinkState::Held)).await;
            let trouble = stage.status("energy").trouble.unwrap();
            assert!(trouble.contains(RIGHT), "{trouble}");
            stage.until("it is released", is(SinkState::Delivering)).await;
            stage.keep_good("energy", 10).await;
            stage.until_cursor("energy", 10).await;
        })
        .await;
    assert_whole_and_in_order(&stage.read("energy", 10), 1..=10);
}

/// A service has a limit of threads, and a producer some four.
#[tokio::test]
async fn a_hundred_streams_without_the_right_to_write_are_tried_with_one_producer() {
    let names: Vec<String> = (0..100).map(|number| format!("stream_{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let stage = Stage::new(&names, |settings| {
        settings.clusters[CLUSTER].operation_timeout = Duration::from_millis(100);
        settings.clusters[CLUSTER].retry.max = Duration::from_secs(1);
    });
    stage.mock.request_errors(RDKafkaApiKey::InitProducerId, &[NO_RIGHT; 3_000]);
    stage
        .run(async |_| {
            let held = |name: &&str| stage.status(name).state == SinkState::Held;
            let all_held = |_: &Stage| names.iter().all(held);
            stage.until("all are held", all_held).await;
            let (held_since, mut most) = (Instant::now(), 0);
            while held_since.elapsed() < Duration::from_secs(4) {
                most = most.max(threads());
                assert!(all_held(&stage), "a trial is told by nobody");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // That there are trials shows in their end.
            stage.mock.clear_request_errors(RDKafkaApiKey::InitProducerId);
            let released = |name: &&str| stage.status(name).state == SinkState::Delivering;
            stage.until("all are released", |_| names.iter().all(released)).await;
            // Those of the tests beside this one are among them.
            assert!(most < 200, "{most} threads");
        })
        .await;
}

/// Of this process.
fn threads() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Threads:")).unwrap();
    line.trim().parse().unwrap()
}

#[tokio::test]
async fn a_replay_without_the_right_to_write_says_so_and_the_next_one_is_tried_anew() {
    let stage = Stage::new(&["energy"], |_| {});
    stage.keep("energy", [good(1), "no json".to_owned()]).await;
    stage
        .run(async |replayer| {
            stage.until_cursor("energy", 2).await;
            let mut letter = stage.letters().await.remove(0);
            letter.payload = good(2).into_bytes();
            stage.mock.request_errors(RDKafkaApiKey::InitProducerId, &[NO_RIGHT]);
            let refused = replayer.replay(&letter).await.unwrap_err();
            assert!(refused.to_string().contains(RIGHT), "{refused}");
            assert_eq!(refused.class(), ErrorClass::Standing);
            assert_eq!(replayer.replay(&letter).await.unwrap(), ReplayOutcome::Delivered);
        })
        .await;
    stage.assert_balanced("energy");
}

#[tokio::test]
async fn copies_without_the_right_to_write_are_told_as_held_and_made_once_it_is_given() {
    let topic = "copies".to_owned();
    let stage = Stage::new(&["energy", "copies"], |settings| {
        settings.clusters[CLUSTER].dead_letters = Some(DeadLetterTopic { topic, ensure: None });
    });
    stage.buffer.state().copy_dead_letters_to(vec![CLUSTER.to_owned()]).await.unwrap();
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let _logged = tracing::subscriber::set_default(subscriber);
    stage
        .run(async |_| {
            stage.keep_good("energy", 1).await;
            stage.until_cursor("energy", 1).await;
            stage.mock.request_errors(RDKafkaApiKey::InitProducerId, &[NO_RIGHT; 2]);
            stage.keep("energy", ["no json".to_owned()]).await;
            stage.until("it is told", |_| log.text().contains("dead_letter_copies_held")).await;
            assert!(log.text().contains("allow this user to Write topic"), "{}", log.text());
            stage.until("copies are made", |_| log.text().contains("copying again")).await;
        })
        .await;
}

/// What this thread logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
