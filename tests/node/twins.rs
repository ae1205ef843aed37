//! A node and a copy of it, state directory and all, beside each other: only one of them writes.

use std::path::{Path, PathBuf};
use std::process::Command;

use rig::{Node, eventually, free_port};
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World, subscribed};

const FIRST: u64 = 200;
const ALL: u64 = 2_000;

fn publish(world: &World, publisher: &rig::Publisher, counts: std::ops::Range<u64>) {
    for count in counts {
        let payload = json!({"saveeyeDeviceSerialNumber": "SE-1",
            "activeActualConsumption": {"total": 500}, "activeTotalConsumption": {"total": count}});
        publisher.publish("energy", "saveeye/telemetry", payload.to_string());
    }
    publisher.flush(SOON).unwrap();
    let rows = || world.count("telemetry", "energy_consumption");
    eventually(SOON, "every row", || rows() == publisher.ledger().acked_count() as u64);
}

/// What one of the two says of the writer of `energy_consumption`.
fn state(node: &Node) -> String {
    let all = node.streams().unwrap();
    let named = |list: &Value, key: &str, name: &str| {
        list.as_array().unwrap().iter().find(|line| line[key] == name).unwrap().clone()
    };
    let energy = named(&all["streams"], "name", "energy");
    let sink = named(&energy["sinks"], "sink", "energy_consumption");
    sink["status"]["state"].as_str().unwrap_or_default().to_owned()
}

/// The stopped node as a cloned machine has it: the same log; only what must differ on one machine does.
fn copy_of(node: &Node) -> Node {
    let folder = node.config().parent().unwrap();
    let (state, copied) = (folder.join("state"), folder.join("copy"));
    let copying = Command::new("cp").arg("-a").args([&state, &copied]).status().unwrap();
    assert!(copying.success());
    let port = free_port();
    let text = std::fs::read_to_string(node.config()).unwrap();
    let address = |port: u16| format!("127.0.0.1:{port}");
    let mut text = text
        .replace(&quoted(&state), &quoted(&copied))
        .replace(&address(node.http_port()), &address(port));
    for stream in ["energy", "heatpump", "temperature_indoor", "temperature_outdoor", "plug"] {
        let section = format!("[streams.{stream}]\n");
        assert!(text.contains(&section), "{text}");
        text = text.replace(&section, &format!("{section}client_id = \"copy-{stream}\"\n"));
    }
    let config: PathBuf = folder.join("copy.toml");
    std::fs::write(&config, text).unwrap();
    Node::new(env!("CARGO_BIN_EXE_telemetry"), config, port)
}

fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}

#[test]
fn of_a_node_and_its_copy_one_writes_and_the_other_says_so() {
    let mut world = World::start(Changes::default());
    let publisher = world.publisher();
    publish(&world, &publisher, 0..FIRST);
    world.drained(SOON);
    world.node.stop(SOON).unwrap();
    let mut copy = copy_of(&world.node);
    copy.start().unwrap();
    world.node.start().unwrap();
    for node in [&world.node, &copy] {
        subscribed(node);
    }
    publish(&world, &publisher, FIRST..ALL);
    let fenced = |world: &World| [&world.node, &copy].map(|node| state(node) == "fenced");
    eventually(SOON, "one of them is fenced", || fenced(&world).contains(&true));
    assert_ne!(fenced(&world), [true, true], "one goes on");
    let (loser, first_writes) =
        if fenced(&world)[0] { (&world.node, false) } else { (&copy, true) };
    assert!(loser.log_text().contains("sink_fenced"));
    assert!(loser.get("/health").unwrap().body.contains("sink-fenced"), "with its runbook");
    // As the runbook has it: one of the two is stopped, the other goes on.
    copy.stop(SOON).unwrap();
    if !first_writes {
        let order = ["parts", "restart", "writer:energy:energy_consumption"];
        assert!(world.node.command(&order).unwrap().status.success());
    }
    publish(&world, &publisher, ALL..ALL + FIRST);
    world.drained(SOON);
    let sql = "SELECT active_energy_total FROM energy_consumption";
    let rows = world.postgres.query("telemetry", sql).unwrap();
    let rows: Vec<String> = rows.into_iter().flatten().flatten().collect();
    let number = |entry: &rig::Entry| {
        let value: Value = serde_json::from_slice(&entry.payload).unwrap();
        value["activeTotalConsumption"]["total"].to_string()
    };
    let comparison = publisher.ledger().compare(number, rows.iter().map(String::as_str));
    assert!(comparison.is_exact(), "{comparison:?}");
}
