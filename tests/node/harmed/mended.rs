//! A start that puts dead letters back. What a kill at any of its calls leaves: `buffer::salvage::tests::kills`.

use std::collections::BTreeSet;
use std::fs;

use rig::{Folder, Node, eventually, until};
use serde_json::Value;

use super::files::flip;
use crate::disk::tracer;
use crate::world::{Changes, SOON, World};

const LETTERS: u64 = 30;

/// Those that `telemetry buffer inspect` calls lost.
fn lost(node: &Node) -> BTreeSet<u64> {
    let said = node.command(&["buffer", "inspect", "--json"]).unwrap();
    let inspection: Value = serde_json::from_slice(&said.stdout).unwrap();
    let losses = inspection["letter_losses"].as_array().unwrap();
    let ranges = losses.iter().flat_map(|loss| loss["sequences"].as_array().unwrap());
    let ends = |range: &Value| ["first", "last"].map(|end| range[end].as_u64().unwrap());
    ranges.map(ends).flat_map(|[first, last]| first..=last).collect()
}

fn letters(node: &Node) -> BTreeSet<u64> {
    let listed = node.command(&["dlq", "list", "--json"]).unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let letters = listed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    letters.map(|letter| letter["sequence"].as_u64().unwrap()).collect()
}

/// A stopped node that has set these aside.
fn with_letters() -> (World, BTreeSet<u64>) {
    let mut world = World::start(Changes::default());
    let publisher = world.publisher();
    for number in 0..LETTERS {
        publisher.publish("energy", "saveeye/telemetry", format!("{{ {number}"));
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all are set aside", || {
        world.books("energy", "energy_consumption", "dead_lettered") == LETTERS
    });
    let all = letters(&world.node);
    assert_eq!(all.len() as u64, LETTERS);
    world.node.stop(SOON).unwrap();
    (world, all)
}

#[test]
fn a_start_without_room_for_the_new_database_ends_and_leaves_the_harmed_one_as_it_is() {
    let (mut world, all) = with_letters();
    let folder = Folder::new(None, "mended").unwrap();
    let state = world.node.config().with_file_name("state");
    let (database, made) = (state.join("state/db"), state.join("state.made"));
    flip(&database);
    let harmed = fs::read(&database).unwrap();
    // There is no room, and there was some a moment ago.
    for (call, path) in [("fallocate", made.join("room")), ("pwritev", made.join("db"))] {
        let full = tracer(&folder.join(call), &format!("{call}:error=ENOSPC"), &[path]);
        let (binary, config) = (env!("CARGO_BIN_EXE_telemetry"), world.node.config());
        let mut node = Node::new(binary, config, world.node.http_port()).through(full);
        let said_before = node.log_text().len();
        node.spawn().unwrap();
        let status = until(SOON, "it ends", || node.daemon().exit_status()).unwrap();
        assert_eq!(status.code(), Some(1), "{call}");
        let said = &node.log_text()[said_before..];
        assert!(said.contains(&format!("no space left at {}", made.display())), "{said}");
        assert!(fs::read(&database).unwrap() == harmed, "{call}: it was written to");
        // Where a write fails the process ends at once, and the next start removes them.
        let left = ["state.made", "state.trial"].map(|name| state.join(name).exists());
        assert!(call == "pwritev" || left == [false, false], "{left:?}");
    }
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    let (found, gone) = (letters(&world.node), lost(&world.node));
    assert!(found.is_disjoint(&gone) && gone.len() <= 1, "{gone:?}");
    assert_eq!(&found | &gone, all);
}
