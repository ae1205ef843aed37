//! Rows the table refused are replayed once the table takes them; and the node ends in the middle of it.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rig::{Node, until};

use super::{Fault, crash, last, node};
use crate::lab::Lab;

/// After the command has seen it.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const REPLAYED_WITHIN: Duration = Duration::from_secs(20);
/// From before it has locked the state directory to after its end.
const KILLED_AFTER_MS: std::ops::Range<u64> = 0..120;
const REPLAY: [&str; 4] = ["dlq", "replay", "--reason", "database_refused"];

pub static FAULTS: &[Fault] = &[
    Fault::new("replay", "refused rows are replayed", replay).at_rest(),
    Fault::new(
        "replay-stopped",
        "refused rows of a stopped node are replayed, killed in it",
        stopped,
    )
    .at_rest(),
    Fault::new("crash-replay-written", "a replayed row is written, the transaction open", crashed)
        .at_rest(),
    Fault::new("crash-replayed", "a replay is committed, its letter still there", crashed)
        .at_rest(),
];

fn replay(_: &Fault, lab: &mut Lab, _: &mut StdRng) -> Result<bool> {
    let refused = any_refused(&lab.node)?;
    lab.take_poison()?;
    replay_all(&lab.node)?;
    lab.refuse_poison()?;
    Ok(refused)
}

/// A round need not have had any.
fn any_refused(node: &Node) -> Result<bool> {
    let answer = node.command(&["dlq", "list", "--reason", "database_refused", "--json"])?;
    ensure!(answer.status.success(), "dlq list: {}", String::from_utf8_lossy(&answer.stderr));
    Ok(!answer.stdout.is_empty())
}

/// A command at the stopped node is killed at any moment of it; another one, or the node, does the rest.
fn stopped(_: &Fault, lab: &mut Lab, dice: &mut StdRng) -> Result<bool> {
    let refused = any_refused(&lab.node)?;
    lab.take_poison()?;
    node::stop_alone(lab)?;
    let mut begun = lab.node.begin(&REPLAY)?;
    last(dice, KILLED_AFTER_MS);
    begun.kill()?;
    let killed = begun.wait()?.signal().is_some();
    if dice.random_bool(0.5) {
        replay_all(&lab.node)?;
    }
    lab.node.start()?;
    replay_all(&lab.node)?;
    lab.refuse_poison()?;
    Ok(refused && killed)
}

fn crashed(fault: &Fault, lab: &mut Lab, _: &mut StdRng) -> Result<bool> {
    lab.take_poison()?;
    lab.node.kill();
    lab.node.set_failpoints(&crash::point(fault, 0));
    lab.node.start()?;
    let answer = lab.node.command(&REPLAY)?;
    // Without a refused row in this round there is nothing to replay.
    let taken = !answer.status.success();
    if taken {
        let node = lab.node.daemon();
        let status = until(ENDS_WITHIN, "the node to end in the replay", || node.exit_status())?;
        ensure!(status.signal() == Some(crash::ABORTED), "the node ended otherwise: {status}");
    }
    lab.node.set_failpoints("");
    lab.node.kill();
    lab.node.start()?;
    replay_all(&lab.node)?;
    lab.refuse_poison()?;
    Ok(taken)
}

/// Again until nothing is left to replay: the node may have only just begun to live.
fn replay_all(node: &Node) -> Result<()> {
    let mut last = String::new();
    let done = until(REPLAYED_WITHIN, "the refused rows replayed", || {
        let answer = node.command(&REPLAY)?;
        last = String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).into_owned();
        Ok(answer.status.success().then_some(()))
    });
    match done {
        Ok(()) => Ok(()),
        Err(error) => bail!("{error:#}: {last}"),
    }
}
