//! Several brokers that are one cluster: who leads a partition, and how that changes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde_json::json;

use super::follower::Follower;
use super::layout::Seat;
use super::{ASK_WITHIN, Kafka, KafkaOptions, administration, config, first_that_starts};
use crate::proxy::Proxy;
use crate::wait::until;

/// A broker that says nothing is given up, a new leader chosen and made known.
const LED_WITHIN: Duration = Duration::from_secs(40);
const REASSIGN: &str = "org.apache.kafka.tools.reassign.ReassignPartitionsCommand";
/// Quicker than by default, so that what follows from a silent broker follows within seconds; and a broker that is back
/// leads again at once what it led before.
const QUICK: [(&str, &str); 3] = [
    ("broker.session.timeout.ms", "3000"),
    ("broker.heartbeat.interval.ms", "500"),
    ("leader.imbalance.check.interval.seconds", "2"),
];

/// Brokers that each have every partition; writing takes all but one of them.
#[derive(Debug)]
pub struct KafkaCluster {
    nodes: Vec<Kafka>,
}

/// A partition's brokers, each by its place in the cluster.
struct Seats {
    leader: Option<usize>,
    /// The first of them leads while it can.
    replicas: Vec<usize>,
}

impl KafkaCluster {
    /// Starts so many brokers at once. One alone is as [`Kafka::start_with`] starts it.
    ///
    /// # Errors
    /// Names the command of one that did not start, and its log's last lines.
    pub fn start_with(count: usize, options: &KafkaOptions) -> Result<Self> {
        first_that_starts(|| {
            let seats = Seat::of_cluster(count);
            let nodes = seats.iter().zip(1..).map(|(seat, number)| {
                let mut options = options.clone();
                options.folder = options.folder.map(|all| all.join(format!("{number}")));
                if count > 1 {
                    let quick = QUICK.map(|(name, value)| (name.to_owned(), value.to_owned()));
                    options.properties.splice(0..0, quick);
                }
                Kafka::seated(&options, seat)
            });
            let mut cluster = Self { nodes: nodes.collect::<Result<_>>()? };
            Ok(cluster.restart().map(|()| cluster))
        })
    }

    /// Starts all of them, which must be stopped.
    ///
    /// # Errors
    /// When one does not answer in time.
    pub fn restart(&mut self) -> Result<()> {
        let count = self.nodes.len();
        self.nodes.iter_mut().try_for_each(|node| node.daemon.start())?;
        self.nodes.iter_mut().try_for_each(|node| node.wait_ready(count))
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub fn node(&mut self, place: usize) -> &mut Kafka {
        &mut self.nodes[place]
    }

    pub fn nodes(&self) -> &[Kafka] {
        &self.nodes
    }

    /// `host:port` of each, by commas.
    pub fn bootstrap(&self) -> String {
        self.nodes.iter().map(Kafka::bootstrap).collect::<Vec<_>>().join(",")
    }

    /// As [`KafkaCluster::bootstrap`], but through the links, where there are some.
    pub fn far_bootstrap(&self) -> String {
        self.nodes.iter().map(Kafka::far_bootstrap).collect::<Vec<_>>().join(",")
    }

    /// What the network does to the clients of [`KafkaCluster::far_bootstrap`].
    pub fn links(&self) -> Vec<&Proxy> {
        self.nodes.iter().filter_map(Kafka::link).collect()
    }

    /// As [`Kafka::follow`].
    ///
    /// # Errors
    /// As there.
    pub fn follow(&self, topics: &[&str]) -> Result<Follower> {
        Follower::new(&self.bootstrap(), topics)
    }

    /// The place of the broker that leads a partition, once there is one.
    ///
    /// # Errors
    /// When none does in time.
    pub fn leader(&self, topic: &str, partition: i32) -> Result<usize> {
        Ok(self.led(topic, partition)?.0)
    }

    /// The leader's place, and all of the partition's brokers in their order.
    fn led(&self, topic: &str, partition: i32) -> Result<(usize, Vec<usize>)> {
        until(LED_WITHIN, format!("a leader of {topic}/{partition}"), || {
            let seats = self.ask(0, topic, partition)?;
            Ok(seats.and_then(|seats| Some((seats.leader?, seats.replicas))))
        })
    }

    /// Waits until a partition is led by another broker than the one at `former`, which need not answer.
    ///
    /// # Errors
    /// When that does not come about in time.
    pub fn led_by_another(&self, topic: &str, partition: i32, former: usize) -> Result<()> {
        let asked = (former + 1) % self.nodes.len();
        until(LED_WITHIN, format!("another leader of {topic}/{partition}"), || {
            let leader = self.ask(asked, topic, partition)?.and_then(|seats| seats.leader);
            Ok(leader.filter(|leader| *leader != former).map(drop))
        })
    }

    /// Gives a partition to another of its brokers while all of them run.
    ///
    /// # Errors
    /// When Kafka's own programs cannot do it, or it does not come about in time.
    pub fn hand_over(&self, topic: &str, partition: i32) -> Result<()> {
        let (leader, mut replicas) = self.led(topic, partition)?;
        ensure!(replicas.len() > 1, "{topic}/{partition} is on one broker alone");
        let place = replicas.iter().position(|one| *one == leader).unwrap_or_default();
        replicas.rotate_left(place + 1);
        let ids: Vec<usize> = replicas.iter().map(|place| place + 1).collect();
        let order = json!({"version": 1, "partitions":
            [{"topic": topic, "partition": partition, "replicas": ids}]});
        let file = self.nodes[0].folder().join("reassignment.json");
        std::fs::write(&file, order.to_string())
            .with_context(|| format!("write {}", file.display()))?;
        let file = file.display().to_string();
        let order = ["--execute", "--reassignment-json-file", &file];
        administration::run(REASSIGN, &self.bootstrap(), &order)?;
        // The brokers look themselves, every other second, who should lead.
        self.led_by_another(topic, partition, leader)
    }

    /// Asks the broker at a place; `None` when it does not know, or not answer.
    fn ask(&self, asked: usize, topic: &str, partition: i32) -> Result<Option<Seats>> {
        let client: BaseConsumer =
            config(&self.nodes[asked].bootstrap()).create().context("make a client")?;
        let Ok(metadata) = client.fetch_metadata(Some(topic), ASK_WITHIN) else { return Ok(None) };
        let topics = metadata.topics().iter();
        let mut partitions = topics.flat_map(|topic| topic.partitions());
        let place = |id: i32| usize::try_from(id - 1).ok();
        Ok(partitions.find(|one| one.id() == partition).map(|one| Seats {
            leader: place(one.leader()),
            replicas: one.replicas().iter().filter_map(|id| place(*id)).collect(),
        }))
    }
}
