//! A panic where no part is: in the buffer's threads, in an answer over HTTP.

use std::process::ExitStatus;

use rig::eventually;
use serde_json::json;

use crate::world::{Changes, SOON, World};

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

/// Publishes until the process has ended by itself; gives how, and how many the broker has taken so far.
fn ends(world: &mut World, publisher: &rig::Publisher, point: &str) -> (ExitStatus, u64) {
    // It may end before it answers anything.
    world.node.spawn().unwrap();
    let mut ended = None;
    eventually(SOON, format!("the process ended over {point}"), || {
        publisher.publish("energy", "saveeye/telemetry", reading(publisher.count() as u64));
        ended = world.node.daemon().exit_status().unwrap();
        ended.is_some()
    });
    world.node.kill();
    publisher.flush(SOON).unwrap();
    (ended.unwrap(), publisher.count() as u64)
}

/// Without one of its threads the buffer answers nobody, so the process ends, and the next one finds everything.
#[test]
fn a_panic_of_each_of_the_buffers_threads_ends_the_process_and_loses_nothing() {
    let mut world = World::start(Changes::default());
    let publisher = world.publisher();
    for point in ["buffer_writer", "buffer_reader", "buffer_janitor", "buffer_state"] {
        world.node.stop(SOON).unwrap();
        world.node.set_failpoints(&format!("{point}=1*off->panic(made by a test)"));
        let (status, published) = ends(&mut world, &publisher, point);
        assert_eq!(status.code(), Some(1), "{}", world.node.log_text());
        let why = format!("its thread {} panicked", point.replace('_', "-"));
        assert!(world.node.log_text().contains(&why), "{point}: it says why");
        world.node.set_failpoints("");
        world.node.start().unwrap();
        eventually(SOON, format!("all rows after {point}"), || {
            world.count("telemetry", "energy_consumption") == published
        });
        world.drained(SOON);
    }
}

#[test]
fn answers_that_panic_stop_no_message_and_no_later_answer() {
    let failpoints = "http_request=3*off->20*panic(made by a test)->off".to_owned();
    let mut world = World::prepare(Changes { failpoints, ..Changes::default() });
    world.node.start().unwrap();
    let mut refused = 0;
    eventually(SOON, "answers come again", || {
        let answer = world.node.get("/health/live");
        refused += usize::from(answer.is_err());
        refused == 20 && answer.is_ok()
    });
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the row", || world.count("telemetry", "energy_consumption") == 1);
}
