//! One MQTT subscription: its own connection and session, a PUBACK only after the message is on stable storage.
//!
//! ```text
//!  bytes ─► codec ─► session (pure) ─► inlet: kept already? ─► unacknowledged ─► buffer
//!  PUBACK ◄──────────── one write per synced group, in order ◄──────┘ durable
//! ```
//!
//! What is unacknowledged when a connection dies still becomes durable, but its packet ids die with the connection: the
//! broker sends it again, and [`redelivery`] recognises it. So a PUBACK can neither be early nor meant for another message.

mod codec;
mod connection;
mod declared;
mod dial;
mod error;
mod heard;
mod inlet;
mod message_id;
mod notes;
mod probe;
mod proof;
mod redelivery;
mod session;
mod signs;
mod unacknowledged;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

pub use error::StreamError;
pub use probe::probe;

use crate::breaker::{Breaker, Resting};
use crate::buffer::{Appender, Buffer};
use crate::config::{BrokerSettings, Password, StreamSettings};
use crate::observe::{Board, DisconnectReason};
use crate::part::{Control, Part, PartResult, Phase};
use crate::retry::Backoff;
use codec::ConnectRequest;
use connection::{Connection, Ended, Limits, Lost};
use heard::Heard;
use inlet::Inlet;
use notes::Notes;
use session::SessionSettings;
use signs::{Contact, Signs};
use unacknowledged::Unacknowledged;

/// A subscription that held this long starts the back-off over.
const STEADY_AFTER: Duration = Duration::from_secs(10);

/// So many times in a row a subscription may be cut off without a word before it held, until another node is suspected.
const QUICK_CLOSES_MAX: u32 = 2;

/// The part that reads one stream. Built anew for each life.
pub struct StreamReader {
    stream: StreamSettings,
    broker: BrokerSettings,
    buffer: Buffer,
    board: Arc<Board>,
}

impl StreamReader {
    pub fn new(
        stream: StreamSettings,
        broker: BrokerSettings,
        buffer: Buffer,
        board: Arc<Board>,
    ) -> Self {
        StreamReader { stream, broker, buffer, board }
    }
}

impl Part for StreamReader {
    async fn run(self, mut control: Control) -> PartResult {
        let view = self.board.stream(&self.stream.name);
        let dependency = self.board.dependency(&format!("mqtt:{}", self.stream.broker));
        let notes = Notes::new(&self.buffer, &self.stream.name);
        let heard = heard::restore(&self.buffer, &self.stream.name).await?;
        view.update(|status| {
            status.unacknowledged_max = self.broker.unacknowledged_messages_max;
            // A later life of this part knows better.
            if let Some(arrival) = heard.filter(|_| status.last_message.is_none()) {
                status.heard_at(arrival);
            }
        });
        let heard = Heard::new(&self.buffer, &self.stream.name, heard);
        let mut signs = Signs::new(&self.stream, view.clone(), dependency.clone(), notes, heard);
        let (repeats, acknowledged) = notes::restore(&self.buffer, &self.stream).await?;
        let unacknowledged = Unacknowledged::starting_at(acknowledged);
        let appender = self.buffer.appender(&self.stream.name);
        let mut inlet = Inlet::new(appender, repeats, unacknowledged, view.clone());
        signs.note(&inlet);
        let breaker = dependency.breaker();
        let outcome = self.serve(&mut inlet, &mut signs, breaker, &mut control).await;
        control.progress.set_work_waiting(false);
        let (repeats, durable) = (&inlet.repeats, inlet.unacknowledged.acknowledged());
        let (notes, heard) = signs.into_notes();
        let limit = self.broker.operation_timeout;
        let last = view.status().last_message;
        tokio::join!(notes.finish(repeats, durable, limit), heard.finish(last, limit));
        Ok(outcome?)
    }
}

impl StreamReader {
    /// One connection after the other, until told to end or the buffer fails.
    async fn serve(
        &self,
        inlet: &mut Inlet<Appender>,
        signs: &mut Signs,
        breaker: &Arc<Breaker>,
        control: &mut Control,
    ) -> Result<(), StreamError> {
        let mut backoff = Backoff::new(self.broker.reconnect);
        let mut quick_closes = 0;
        loop {
            if control.phase() != Phase::Running {
                return Ok(());
            }
            if control.paused() {
                signs.paused();
                control.changed().await;
                continue;
            }
            let permit = match breaker.pass() {
                Ok(permit) => permit,
                Err(Resting { retry_in }) => {
                    signs.resting();
                    pause(control, breaker, retry_in).await;
                    continue;
                }
            };
            match self.connect(inlet, signs, control).await {
                Ok(Ended::Told) => signs.ended(),
                Err(Lost { error, .. }) if error.ends_part() => return Err(error),
                Err(Lost { error, active_for }) => {
                    if active_for >= STEADY_AFTER {
                        backoff.reset();
                    }
                    let error = suspect(error, active_for, &mut quick_closes);
                    match signs.lost(&error) {
                        Contact::Nothing => permit.failed(),
                        Contact::Refusal => permit.succeeded(),
                        // Told when it was let in; that it was lost since is no failed call.
                        Contact::Welcome => drop(permit),
                    }
                    inlet.settle_unconnected()?;
                    signs.note(inlet);
                    let next = pause_after(&error, &mut backoff, self.broker.reconnect.max);
                    match error.reason() {
                        DisconnectReason::Takeover => drop(control.sleep(next).await),
                        _ => pause(control, breaker, breaker.rest().unwrap_or(next)).await,
                    }
                }
            }
        }
    }

    /// One connection from dialling to its end.
    async fn connect(
        &self,
        inlet: &mut Inlet<Appender>,
        signs: &mut Signs,
        control: &mut Control,
    ) -> Result<Ended, Lost> {
        let lost = |error| Lost { error, active_for: Duration::ZERO };
        // Each time anew: the password may have been corrected.
        let settings = &session_settings(&self.stream, &self.broker);
        let stream = tokio::select! {
            stream = dial::dial(&self.broker) => stream.map_err(lost)?,
            () = control.changed() => return Ok(Ended::Told),
        };
        let limits = limits(&self.broker);
        let connection = Connection::new(stream, settings, limits, inlet, signs).map_err(lost)?;
        // While it is connected the loop itself is the work: it beats at least once a second.
        control.progress.set_work_waiting(true);
        let outcome = connection.run(control).await;
        control.progress.set_work_waiting(false);
        outcome
    }
}

/// Less than `pause` when the broker lets any stream in before, or the phase changes.
async fn pause(control: &mut Control, breaker: &Breaker, pause: Duration) {
    tokio::select! {
        _ = control.sleep(pause) => {}
        () = breaker.recovered() => {}
    }
}

/// Tells a takeover from a lost connection where the broker does not.
fn suspect(error: StreamError, active_for: Duration, quick_closes: &mut u32) -> StreamError {
    let StreamError::Closed { broker, client_id } = error else { return error };
    if active_for.is_zero() || active_for >= STEADY_AFTER {
        *quick_closes = 0;
    } else {
        *quick_closes += 1;
    }
    if *quick_closes < QUICK_CLOSES_MAX {
        return StreamError::Closed { broker, client_id };
    }
    StreamError::ProbablyTakenOver { broker, client_id }
}

/// Two nodes with one client id take the session from each other in turn; the one that lost waits far longer than any
/// lost connection would, so that they do not fight.
fn pause_after(error: &StreamError, backoff: &mut Backoff, longest: Duration) -> Duration {
    let pause = backoff.next_pause();
    if error.reason() == DisconnectReason::Takeover {
        return longest.mul_f64(1.0 + rand::random::<f64>());
    }
    pause
}

fn session_settings(stream: &StreamSettings, broker: &BrokerSettings) -> SessionSettings {
    SessionSettings {
        broker: dial::address(broker),
        connect: ConnectRequest {
            client_id: stream.client_id.clone(),
            fresh: false,
            keepalive: broker.keepalive,
            username: broker.username.clone(),
            password: broker.password.as_ref().map(Password::current),
            session_expiry: broker.session_expiry,
            receive_maximum: broker.receive_maximum,
        },
        filter: stream.topic_filter.clone(),
        qos: stream.qos,
        connect_timeout: broker.connect_timeout,
        operation_timeout: broker.operation_timeout,
    }
}

fn limits(broker: &BrokerSettings) -> Limits {
    Limits {
        version: broker.version,
        packet_bytes_max: broker.packet_bytes_max,
        unacknowledged_messages_max: broker.unacknowledged_messages_max,
        unacknowledged_bytes_max: broker.unacknowledged_bytes_max,
        operation_timeout: broker.operation_timeout,
    }
}
