//! The node ends between two of its own steps: before and after each one that makes something durable.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Result, bail};
use rand::Rng;
use rand::rngs::StdRng;
use rig::until;

use super::Fault;
use crate::lab::Lab;

/// The step must come within this time, under load.
const STEP_WITHIN: Duration = Duration::from_secs(5);
pub const ABORTED: i32 = 6;
/// How often the step may pass before the one that is fatal. Rare steps are fatal at once.
const PASSES: u32 = 12;
const RARE: [&str; 7] = [
    "crash-start-generation-made",
    "crash-generation-made",
    "crash-generation-sealed",
    "crash-drop-noted",
    "crash-dropped",
    "crash-letters-kept",
    "crash-kafka-letters-kept",
];

pub static FAULTS: &[Fault] = &[
    at("crash-received", "a read of the socket is not yet handed over"),
    at("crash-inserted", "a group is in the log's memory"),
    at("crash-written", "sled has written, and not synced"),
    at("crash-synced", "one of sled's own syncs is done"),
    at("crash-flushed", "a group is durable and not yet acknowledged"),
    at("crash-acknowledged", "PUBACKs are in the socket"),
    at("crash-generation-made", "the next generation is made, the last one not sealed"),
    at("crash-generation-sealed", "the last generation is sealed, the next one not in use"),
    at("crash-start-generation-made", "a start made its generation, the last is not sealed"),
    at("crash-drop-noted", "a generation is noted as dropped, its folder still there"),
    at("crash-dropped", "a generation's folder is gone"),
    at("crash-state-written", "cursors or dead letters are in the state store's memory"),
    at("crash-state-flushed", "they are durable and not yet answered"),
    at("crash-letters-kept", "a dead letter is durable, the table's cursor before it"),
    at("crash-kafka-letters-kept", "a dead letter is durable, the topic's cursor before it"),
    at("crash-begin", "a transaction is about to begin"),
    at("crash-copying", "the rows are sent, their COPY not ended"),
    at("crash-copied", "the COPY is answered, the commit on its way"),
    at("crash-latest-written", "latest rows are written, the transaction open"),
    at("crash-cursor", "the cursor is about to move"),
    at("crash-committed", "the commit is answered"),
    at("crash-confirmed", "the buffer knows of the commit"),
    at("crash-report", "Kafka has confirmed a record, the node has not seen it"),
    at("crash-reported", "a confirmation is seen, the cursor not moved"),
    at("crash-cursor-due", "the cursor of a topic has moved and is not saved"),
    at("crash-cursor-saved", "the cursor of a topic is saved"),
];

const fn at(name: &'static str, meaning: &'static str) -> Fault {
    Fault::new(name, meaning, crash)
}

/// As FAILPOINTS says it: fatal after so many times.
pub fn point(fault: &Fault, passes: u32) -> String {
    let name = fault.name.replace('-', "_");
    match passes {
        0 => format!("{name}=return"),
        passes => format!("{name}={passes}*off->return"),
    }
}

fn crash(fault: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let passes = if RARE.contains(&fault.name) { 0 } else { dice.random_range(0..PASSES) };
    // Nothing can be told to a running process.
    lab.node.kill();
    lab.node.set_failpoints(&point(fault, passes));
    lab.node.spawn()?;
    let node = lab.node.daemon();
    let ended = until(STEP_WITHIN, "the node came to this step", || node.exit_status());
    lab.node.set_failpoints("");
    let taken = match ended {
        Ok(status) if status.signal() == Some(ABORTED) => true,
        Ok(status) => bail!("the node ended otherwise: {status}"),
        Err(_) => false,
    };
    lab.node.kill();
    lab.node.start()?;
    Ok(taken)
}
