//! A start that puts dead letters back, killed at one call after the other.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rig::{Folder, Node, eventually, until};
use serde_json::Value;

use super::files::{copy, replace};
use crate::disk::tracer;
use crate::world::{Changes, SOON, World};

const LETTERS: u64 = 30;

/// The node ends under a tracer that kills it at such a call; false when it makes fewer of them, and runs.
fn killed_at(world: &World, folder: &Path, call: &str, when: usize) -> bool {
    let inject = format!("{call}:signal=KILL:when={when}");
    let mut tracer = tracer(&folder.join("calls"), &inject, &[]);
    // With a filter in the kernel strace 6.1 sends no signal.
    tracer.retain(|word| word != "--seccomp-bpf");
    let (binary, config) = (env!("CARGO_BIN_EXE_telemetry"), world.node.config());
    let mut node = Node::new(binary, config, world.node.http_port()).through(tracer);
    node.spawn().unwrap();
    let killed = until(SOON, "it ends or runs", || {
        if node.daemon().exit_status()?.is_some() {
            return Ok(Some(true));
        }
        Ok(node.get("/health/ready").is_ok_and(|answer| answer.status == 200).then_some(false))
    });
    let killed = killed.unwrap();
    node.kill();
    killed
}

fn letters(node: &Node) -> BTreeSet<u64> {
    let listed = node.command(&["dlq", "list", "--json"]).unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let letters = listed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    letters.map(|letter| letter["sequence"].as_u64().unwrap()).collect()
}

#[test]
fn a_start_that_puts_dead_letters_back_may_be_killed_at_any_call() {
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
    let folder = Folder::new(None, "mended").unwrap();
    let state = world.node.config().with_file_name("state");
    let harmed = folder.join("harmed");
    copy(&state, &harmed);
    // Nobody opens the database after this.
    replace(&harmed.join("state/conf"));
    for call in ["rename", "unlinkat", "fsync"] {
        for when in 1.. {
            fs::remove_dir_all(&state).unwrap();
            copy(&harmed, &state);
            let before = world.node.log_text().len();
            if !killed_at(&world, folder.path(), call, when) {
                assert!(when > 1, "{call} is not called");
                break;
            }
            let text = world.node.log_text();
            world.node.start().unwrap();
            world.node.wait_ready(SOON).unwrap();
            assert_eq!(letters(&world.node), all, "{call} {when}");
            assert!(
                !world.node.log_text()[before..].contains("dead_letters_lost"),
                "{call} {when}"
            );
            world.node.kill();
            if text[before..].contains("dead_letters_salvaged") {
                break;
            }
        }
    }
}
