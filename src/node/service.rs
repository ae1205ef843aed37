//! What the service manager is told: ready, alive, stopping, how long it may take, and one line for people. Without
//! systemd there is nobody to tell.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use sd_notify::NotifyState;

use crate::observe::{Board, SinkState};

/// How often the line is looked at, and sent when it has changed.
const LOOK: Duration = Duration::from_secs(1);

/// How often a recovery is looked at.
const RECOVERY_LOOK: Duration = Duration::from_secs(5);

/// A recovery that has done a step since the last look gets this much more time to start in.
const RECOVERY_EXTENSION: Duration = Duration::from_secs(120);

/// The buffer's fill is told in steps, so that the line is sent when it says something new.
const FILL_STEP_PERCENT: u64 = 10;

/// `READY=1`: the buffer is open and streams may accept.
pub fn ready(board: &Board) {
    notify(&[NotifyState::Ready, NotifyState::Status(&line(board))]);
}

/// `RELOADING=1`; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// `WATCHDOG=1`. Only for real progress.
pub fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// `STOPPING=1`, with the time after which the node ends whatever happens.
pub fn stopping(within: Duration) {
    notify(&[NotifyState::Stopping, NotifyState::Status("draining"), extend(within)]);
}

/// Runs `open`, which recovers the buffer, and asks for more time while that goes on: one that hangs gets none.
pub fn while_recovering<T>(board: &Board, open: impl FnOnce() -> T) -> T {
    let (opening, ended) = channel::<()>();
    std::thread::scope(move |scope| {
        scope.spawn(move || {
            let mut known = 0;
            while ended.recv_timeout(RECOVERY_LOOK) == Err(RecvTimeoutError::Timeout) {
                let status = board.buffer();
                if status.opening_steps > known {
                    let read = status.generations;
                    let line = format!("recovering the buffer, generations read: {read}");
                    notify(&[extend(RECOVERY_EXTENSION), NotifyState::Status(&line)]);
                    known = status.opening_steps;
                }
            }
        });
        let opened = open();
        drop(opening);
        opened
    })
}

/// Keeps the line for people up to date; never returns.
pub async fn keep_telling(board: &Board) {
    let mut told = String::new();
    loop {
        let now = line(board);
        if now != told {
            notify(&[NotifyState::Status(&now)]);
            told = now;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What `systemctl status telemetry` shows, e.g. "accepting; 5 of 5 streams subscribed; 2 sinks waiting".
fn line(board: &Board) -> String {
    let buffer = board.buffer();
    let intake = match (buffer.accepting, buffer.refusing_because) {
        (true, _) => "accepting".to_owned(),
        (false, None) => "not accepting".to_owned(),
        (false, Some(why)) => format!("not accepting: {why}"),
    };
    let streams = board.streams();
    let subscribed = streams.iter().filter(|(_, view)| view.status().subscribed).count();
    let streams = streams.len();
    let mut words = vec![intake, format!("{subscribed} of {streams} streams subscribed")];
    let mut idle: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, _, view) in board.sinks() {
        let state = view.status().state;
        if state != SinkState::Delivering {
            *idle.entry(state.code()).or_default() += 1;
        }
    }
    words.extend(idle.into_iter().map(|(state, count)| {
        format!("{count} {} {state}", if count == 1 { "sink" } else { "sinks" })
    }));
    let percent = buffer.bytes.saturating_mul(100) / buffer.quota_bytes.max(1);
    if percent >= FILL_STEP_PERCENT {
        words.push(format!("buffer {} % full", percent / FILL_STEP_PERCENT * FILL_STEP_PERCENT));
    }
    words.join("; ")
}

fn extend(by: Duration) -> NotifyState<'static> {
    NotifyState::ExtendTimeoutUsec(u32::try_from(by.as_micros()).unwrap_or(u32::MAX))
}

fn notify(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{SinkName, StreamName};

    fn board() -> std::sync::Arc<Board> {
        let example = std::path::Path::new("examples/homelab/telemetry.toml");
        Board::new(&crate::config::load(example, &|_| None).unwrap().settings)
    }

    #[test]
    fn the_line_says_what_waits_and_how_full_the_buffer_is() {
        let board = board();
        assert_eq!(line(&board), "not accepting; 0 of 5 streams subscribed; 11 sinks waiting");
        board.update_buffer(|buffer| buffer.accepting = true);
        board.streams().iter().for_each(|(_, view)| view.update(|status| status.subscribed = true));
        let delivering =
            |status: &mut crate::observe::SinkStatus| status.state = SinkState::Delivering;
        board.sinks().iter().for_each(|(_, _, view)| view.update(delivering));
        assert_eq!(line(&board), "accepting; 5 of 5 streams subscribed");
        let (stream, sink) =
            (StreamName::parse("plug").unwrap(), SinkName::parse("kafka").unwrap());
        board.sink(&stream, &sink).update(|status| status.state = SinkState::Held);
        board.update_buffer(|buffer| {
            buffer.bytes = buffer.quota_bytes / 100 * 37;
            buffer.accepting = false;
            buffer.refusing_because = Some("the disk is full".to_owned());
        });
        let expected = "not accepting: the disk is full; 5 of 5 streams subscribed; 1 sink held; buffer 30 % full";
        assert_eq!(line(&board), expected);
    }
}
