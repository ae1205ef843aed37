//! The outside of the node: real brokers and databases of the test's own, publishers that remember what was
//! acknowledged, and the node as a process. Nothing here knows the node's code; it is judged by what it does.
//!
//! Every call blocks and may be used from plain tests and from async ones alike. Whatever is started belongs to the
//! value that started it: dropping the value ends the process, and so does the end of the program, however it ends.

#[cfg(not(target_os = "linux"))]
compile_error!("the rig works on Linux only");

mod background;
mod certificates;
mod command;
mod config;
mod container;
mod daemon;
mod disk;
mod homelab;
mod http;
mod kafka;
mod ledger;
mod mosquitto;
mod mqtt;
mod node;
mod paths;
mod ports;
mod postgres;
mod proxy;
mod publisher;
mod signals;
mod stage;
mod status;
mod wait;

pub use background::{block_on, spawn};
pub use certificates::{CertificateFiles, Certificates};
pub use command::succeeded;
pub use config::render;
pub use container::Container;
pub use daemon::Daemon;
pub use disk::{Disk, FileSystem, Filling, Frozen};
pub use homelab::{Homelab, TableSink};
pub use http::{Response, get, request, request_as};
pub use kafka::{Follower, KAFKA_RIGHTS, Kafka, KafkaCluster, KafkaOptions, KafkaSecurity, Record};
pub use ledger::{Comparison, Entry, Ledger};
pub use mosquitto::{Mosquitto, MosquittoOptions};
pub use mqtt::{Mqtt, MqttOptions};
pub use node::Node;
pub use paths::{Folder, repository, target};
pub use ports::free_port;
pub use postgres::{PASSWORD, Postgres, PostgresOptions, SUPERUSER};
pub use proxy::{Link, Proxy};
pub use publisher::{Publisher, PublisherOptions};
pub use rustix::process::Signal;
pub use signals::on_signal;
pub use stage::{Scene, Step, on_stage, play};
pub use status::{Books, SinkState, StreamState, Streams};
pub use wait::{eventually, until};
