//! What a broker's `server.properties` and storage say of it and of those beside it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rand::RngCore;

use crate::command::succeeded;
use crate::paths::Folder;
use crate::ports::free_port;
use crate::proxy::Proxy;

/// A broker's place in its cluster.
#[derive(Debug, Clone)]
pub(super) struct Seat {
    cluster_id: String,
    /// Counts from 0; brokers call themselves by the next number.
    number: usize,
    /// Of all of them, by their numbers.
    controllers: Vec<u16>,
}

impl Seat {
    /// All seats of one new cluster.
    pub fn of_cluster(count: usize) -> Vec<Self> {
        let cluster_id = cluster_id();
        let controllers: Vec<u16> = (0..count).map(|_| free_port()).collect();
        let seat = |number| Self {
            cluster_id: cluster_id.clone(),
            number,
            controllers: controllers.clone(),
        };
        (0..count).map(seat).collect()
    }

    fn node_id(&self) -> usize {
        self.number + 1
    }

    /// Copies of what the brokers keep for themselves, and how many of them must have it.
    fn copies(&self) -> (usize, usize) {
        let count = self.controllers.len();
        (count.min(3), if count < 3 { 1 } else { 2 })
    }
}

pub(super) fn properties(port: u16, seat: &Seat, folder: &Folder) -> BTreeMap<String, String> {
    let controller = seat.controllers[seat.number];
    let voters =
        seat.controllers.iter().zip(1..).map(|(port, id)| format!("{id}@127.0.0.1:{port}"));
    let (copies, in_sync) = seat.copies();
    let own = [
        ("process.roles", "broker,controller".into()),
        ("node.id", seat.node_id().to_string()),
        ("controller.quorum.voters", voters.collect::<Vec<_>>().join(",")),
        ("listeners", format!("PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}")),
        ("advertised.listeners", format!("PLAINTEXT://127.0.0.1:{port}")),
        ("controller.listener.names", "CONTROLLER".into()),
        ("listener.security.protocol.map", "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT".into()),
        ("log.dirs", folder.join("data").display().to_string()),
        ("offsets.topic.replication.factor", copies.to_string()),
        ("offsets.topic.num.partitions", "1".into()),
        ("transaction.state.log.replication.factor", copies.to_string()),
        ("transaction.state.log.min.isr", in_sync.to_string()),
        ("min.insync.replicas", in_sync.to_string()),
        ("group.initial.rebalance.delay.ms", "0".into()),
        ("auto.create.topics.enable", "false".into()),
    ];
    own.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Clients that begin there are told to go on there.
pub(super) fn far_listener(properties: &mut BTreeMap<String, String>) -> Result<Proxy> {
    let port = free_port();
    let link = Proxy::start(port)?;
    for (name, more) in [
        ("listeners", format!(",FAR://127.0.0.1:{port}")),
        ("advertised.listeners", format!(",FAR://127.0.0.1:{}", link.port())),
        ("listener.security.protocol.map", ",FAR:PLAINTEXT".to_owned()),
    ] {
        properties.entry(name.to_owned()).or_default().push_str(&more);
    }
    Ok(link)
}

pub(super) fn format_storage(
    class_path: &str,
    properties: &Path,
    seat: &Seat,
    scram_users: impl Iterator<Item = String>,
) -> Result<()> {
    let mut command = Command::new("java");
    command
        .args(["-XX:TieredStopAtLevel=1", "-cp", class_path, "kafka.tools.StorageTool", "format"])
        .args(["-t", &seat.cluster_id, "-c"])
        .arg(properties)
        .args(scram_users.flat_map(|user| ["--add-scram".to_owned(), user]));
    succeeded(&mut command).context("run java (Debian: default-jre-headless)").map(drop)
}

/// 16 random bytes in URL-safe base64 without padding: 22 characters, the last of which carries two bits.
fn cluster_id() -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut bits = rand::rng().next_u64() as u128;
    bits = bits << 64 | rand::rng().next_u64() as u128;
    // A leading dash would be taken for an option.
    let first = DIGITS[(bits & 31) as usize] as char;
    bits >>= 6;
    let rest = (1..22).map(|place| {
        let mask = if place == 21 { 48 } else { 63 };
        let digit = DIGITS[(bits & mask) as usize] as char;
        bits >>= 6;
        digit
    });
    std::iter::once(first).chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::cluster_id;

    #[test]
    fn a_cluster_id_has_22_characters_and_never_starts_like_an_option() {
        for _ in 0..1_000 {
            let id = cluster_id();
            assert_eq!(id.len(), 22, "{id}");
            assert!(!id.starts_with('-'), "{id}");
        }
    }
}
