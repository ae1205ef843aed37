//! The producer against librdkafka's mock cluster, and the node against a real Apache Kafka.

mod faults;
mod stage;
