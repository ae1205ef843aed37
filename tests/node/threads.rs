//! A panic where no part is: in the buffer's threads, in an answer over HTTP.

use rig::eventually;
use serde_json::json;

use crate::world::{Changes, SOON, World};

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

/// Publishes until the process has ended by itself, over the panic of this thread.
fn ends(world: &mut World, publisher: &rig::Publisher, thread: &str) {
    // It may end before it answers anything.
    world.node.spawn().unwrap();
    let mut ended = None;
    eventually(SOON, format!("the process ended over {thread}"), || {
        publisher.publish("energy", "saveeye/telemetry", reading(publisher.count() as u64));
        ended = world.node.daemon().exit_status().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "{}", world.node.log_text());
    let why = format!("\"event\":\"panic\",\"thread\":\"{thread}\"");
    assert!(world.node.log_text().contains(&why), "{why}");
    world.node.kill();
}

/// Without one of its threads the buffer answers nobody, so the process ends, and the next one finds everything.
#[test]
fn a_panic_of_each_of_the_buffers_threads_ends_the_process_and_loses_nothing() {
    let mut world = World::start(Changes::default());
    world.node.stop(SOON).unwrap();
    let publisher = world.publisher();
    // What the first of these lives made durable waits for its sink, so that the second has to read it.
    for (point, action) in [
        ("buffer_writer", "5*off->panic(made by a test)"),
        ("buffer_reader", "panic(made by a test)"),
        ("buffer_janitor", "panic(made by a test)"),
        ("buffer_state", "panic(made by a test)"),
    ] {
        world.node.set_failpoints(&format!("part_writer_energy=1*return;{point}={action}"));
        ends(&mut world, &publisher, &point.replace('_', "-"));
    }
    world.node.set_failpoints("");
    world.node.start().unwrap();
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all rows", || {
        world.count("telemetry", "energy_consumption") == publisher.count() as u64
    });
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), publisher.count() as u64);
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
