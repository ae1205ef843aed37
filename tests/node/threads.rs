//! A panic where no part is: in the buffer's threads, in a callback of Kafka's library, in an answer over HTTP.

use std::collections::HashSet;

use rig::eventually;
use serde_json::json;

use crate::world::{Changes, SOON, World};

const READINGS: u64 = 200;

fn publish(publisher: &rig::Publisher) {
    for count in 0..READINGS {
        let reading = json!({"saveeyeDeviceSerialNumber": "SE-1",
            "activeActualConsumption": {"total": 500}, "activeTotalConsumption": {"total": count}});
        publisher.publish("energy", "saveeye/telemetry", reading.to_string());
    }
}

/// Without one of its threads the buffer answers nobody, so the process ends, and the next one finds everything.
fn ends_and_keeps_everything(failpoints: &str) {
    let changes = Changes { failpoints: failpoints.to_owned(), ..Changes::default() };
    let mut world = World::prepare(changes);
    // It may end before it answers anything.
    world.node.spawn().unwrap();
    let publisher = world.publisher();
    let status = {
        let mut ended = None;
        eventually(SOON, format!("the process ended over {failpoints}"), || {
            if world.node.streams().is_ok_and(|all| all.to_string().contains("\"subscribed\":true"))
            {
                publisher.publish("energy", "saveeye/telemetry", "{}");
            }
            ended = world.node.daemon().exit_status().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    };
    assert_eq!(status.code(), Some(1), "{}", world.node.log_text());
    assert!(world.node.log_text().contains("panicked"), "it says why");
    world.node.kill();
    world.node.set_failpoints("");
    world.node.start().unwrap();
    world.subscribed();
    publish(&publisher);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all rows", || world.count("telemetry", "energy_consumption") == READINGS);
    world.drained(SOON);
}

#[test]
fn a_panic_of_the_buffers_writer_ends_the_process_and_loses_nothing() {
    ends_and_keeps_everything("buffer_writer=2*off->panic(made by a test)");
}

#[test]
fn a_panic_of_the_buffers_reader_ends_the_process_and_loses_nothing() {
    ends_and_keeps_everything("buffer_reader=panic(made by a test)");
}

#[test]
fn a_panic_of_the_buffers_janitor_ends_the_process_and_loses_nothing() {
    ends_and_keeps_everything("buffer_janitor=1*off->panic(made by a test)");
}

#[test]
fn a_panic_of_the_buffers_state_store_ends_the_process_and_loses_nothing() {
    ends_and_keeps_everything("buffer_state=1*off->panic(made by a test)");
}

/// A report that was lost is a record nobody knows of: the stream sends again from its cursor, in order.
#[test]
fn a_panic_in_a_delivery_report_leaves_no_hole_and_stops_nothing() {
    let failpoints = "kafka_report=20*off->3*panic(made by a test)->off".to_owned();
    let mut world = World::prepare(Changes { kafka: true, failpoints, ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publish(&publisher);
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    let records = world.kafka_records("homelab-energy-realtime");
    let ids: HashSet<_> = records.iter().filter_map(|one| one.header("telemetry-id")).collect();
    assert_eq!(ids.len() as u64, READINGS);
    let log = world.node.log_text();
    assert!(log.contains("kafka_callback_panicked"), "{log}");
    assert!(
        log.contains("\"event\":\"kafka_producer_replaced\"") || records.len() as u64 > READINGS
    );
}

#[test]
fn answers_that_panic_stop_no_message() {
    let failpoints = "http_request=panic(made by a test)".to_owned();
    let mut world = World::prepare(Changes { failpoints, ..Changes::default() });
    world.node.spawn().unwrap();
    eventually(SOON, "it listens and every answer panics", || {
        world.node.log_text().contains("made by a test") || world.node.streams().is_ok()
    });
    assert!(world.node.streams().is_err());
    let publisher = world.publisher();
    eventually(SOON, "the stream is subscribed", || {
        publisher.publish("energy", "saveeye/telemetry", "{}");
        world.node.streams().unwrap_err();
        world.node.log_text().contains("mqtt_connected")
    });
    publish(&publisher);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all rows", || {
        world.postgres.count("telemetry", "energy_consumption").is_ok_and(|rows| rows == READINGS)
    });
    assert!(world.node.daemon().is_running());
}
