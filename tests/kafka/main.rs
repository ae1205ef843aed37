//! The producer against librdkafka's mock cluster, and the node against a real Apache Kafka.

mod copies;
mod faults;
mod outages;
mod security;
mod site;
mod stage;
#[allow(dead_code, reason = "shared with the tests of the node")]
#[path = "../node/world.rs"]
mod world;
