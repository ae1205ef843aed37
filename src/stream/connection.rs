//! One connection: a loop that reads all that is there, hands it over as one batch, and writes the acknowledgements of a
//! synced group in one go. Reading and writing never wait for each other.

use std::io;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures_util::FutureExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use super::codec::{Codec, CodecError, Outbound};
use super::dial::ByteStream;
use super::error::StreamError;
use super::inlet::Inlet;
use super::proof::Proof;
use super::session::{Session, SessionSettings, Step};
use super::unacknowledged::{Batch, Intake, Settled};
use crate::config::MqttVersion;
use crate::crash::{crash_point, part_point};
use crate::part::{Control, Phase};

/// Room made for one read.
const READ_BYTES: usize = 64 * 1024;

/// A read that leaves less room than this gets a fresh buffer.
const READ_BYTES_MIN: usize = 16 * 1024;

/// One batch ends here though more may be there.
const BATCH_BYTES_MAX: usize = 256 * 1024;

/// Acknowledgements and pings not yet taken by the socket; above it the socket is not read.
const UNWRITTEN_BYTES_MAX: usize = 256 * 1024;

/// A ping follows at least this often within the acknowledgements that may be unproved.
const PINGS_PER_UNPROVED: usize = 4;

/// What one connection may hold, and speak.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub version: MqttVersion,
    pub packet_bytes_max: usize,
    pub unacknowledged_messages_max: usize,
    pub unacknowledged_bytes_max: usize,
    pub operation_timeout: Duration,
}

/// What the owner of a connection wants to know while it lasts.
pub trait Watcher {
    fn let_in(&mut self, session_present: bool);
    fn subscribed(&mut self, granted_qos: u8);
    /// Called about once a second.
    fn tick<I: Intake>(&mut self, inlet: &Inlet<I>);
}

pub struct Connection<'a, I, W> {
    reader: ReadHalf<Box<dyn ByteStream>>,
    writer: WriteHalf<Box<dyn ByteStream>>,
    input: BytesMut,
    output: BytesMut,
    /// TLS holds written bytes back until flushed.
    flushed: bool,
    /// Since when the socket has not taken what is to be written.
    unwritten_since: Option<Instant>,
    codec: Codec,
    session: Session<'a>,
    settings: &'a SessionSettings,
    limits: Limits,
    proof: Proof,
    ticks: Interval,
    inlet: &'a mut Inlet<I>,
    watcher: &'a mut W,
}

enum Woken {
    Control,
    Written(io::Result<()>),
    Durable(Result<Settled, StreamError>),
    Ready,
    Tick,
    Read(io::Result<usize>),
}

/// How a connection that was not lost ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// The node stops, or the stream is paused.
    Told,
}

/// What a lost connection leaves behind.
#[derive(Debug)]
pub struct Lost {
    pub error: StreamError,
    /// How long the subscription had held.
    pub active_for: Duration,
}

impl Limits {
    /// PUBACKs written and not proved to be read. A broker that goes on sending while its end of the socket is full of
    /// our PUBACKs (measured with Mosquitto while it drains a queue: 170,000) sends all of those again when the
    /// connection ends. So above this the next ones wait for the proof.
    fn unproved_max(&self) -> usize {
        (self.unacknowledged_messages_max / 2).max(1)
    }
}

impl<'a, I: Intake, W: Watcher> Connection<'a, I, W> {
    pub fn new(
        stream: Box<dyn ByteStream>,
        settings: &'a SessionSettings,
        limits: Limits,
        inlet: &'a mut Inlet<I>,
        watcher: &'a mut W,
    ) -> Result<Self, StreamError> {
        let (reader, writer) = tokio::io::split(stream);
        let (session, connect) = Session::begin(settings, Instant::now());
        let mut ticks = interval(tick_period(settings));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut connection = Connection {
            reader,
            writer,
            input: BytesMut::new(),
            output: BytesMut::new(),
            flushed: true,
            unwritten_since: None,
            codec: Codec::new(limits.version, limits.packet_bytes_max),
            session,
            settings,
            limits,
            proof: Proof::default(),
            ticks,
            inlet,
            watcher,
        };
        connection.send(&connect)?;
        Ok(connection)
    }

    /// Runs until it is lost or told to end.
    pub async fn run(mut self, control: &mut Control) -> Result<Ended, Lost> {
        let outcome = self.serve(control).await;
        self.inlet.unacknowledged.forget_packet_ids();
        outcome.map_err(|error| Lost { error, active_for: self.session.active_for(Instant::now()) })
    }

    async fn serve(&mut self, control: &mut Control) -> Result<Ended, StreamError> {
        loop {
            if control.paused() || control.phase() != Phase::Running {
                self.close(control).await?;
                return Ok(Ended::Told);
            }
            let woken = self.wait(control).await;
            control.progress.beat();
            match woken {
                Woken::Control => {}
                Woken::Written(result) => self.on_written(result)?,
                Woken::Durable(settled) => {
                    part_point(|| format!("part_stream_{}", self.settings.connect.client_id)).await;
                    self.acknowledge(settled?)?;
                }
                Woken::Ready => self.inlet.unacknowledged.retry(&self.inlet.intake),
                Woken::Tick => self.on_tick()?,
                Woken::Read(result) => self.on_read(result)?,
            }
        }
    }

    async fn wait(&mut self, control: &mut Control) -> Woken {
        let reading = self.may_read();
        let writing = self.has_output();
        let holding = self.inlet.unacknowledged.is_holding();
        // The proof arrives through the socket: above the bounds, where only acknowledging gets it read again, nothing
        // may wait for it.
        let room = self.proof.unproved() < self.limits.unproved_max() || !self.within_bounds();
        self.session.set_reading(reading, Instant::now());
        if reading && self.input.capacity() - self.input.len() < READ_BYTES_MIN {
            self.input.reserve(READ_BYTES);
        }
        tokio::select! {
            biased;
            () = control.changed() => Woken::Control,
            result = write_some(&mut self.writer, &mut self.output), if writing => {
                Woken::Written(result)
            }
            settled = self.inlet.unacknowledged.next_durable(), if room => Woken::Durable(settled),
            () = self.inlet.intake.ready(), if holding => Woken::Ready,
            _ = self.ticks.tick() => Woken::Tick,
            result = self.reader.read_buf(&mut self.input), if reading => Woken::Read(result),
        }
    }

    /// Above its own bounds it leaves the socket alone, for a broker may send more than was announced. The handshake is
    /// read at any time: it brings little, and a full buffer must not keep the session from living on.
    fn may_read(&self) -> bool {
        !self.session.is_let_in()
            || (!self.inlet.unacknowledged.is_holding()
                && self.within_bounds()
                && self.output.len() < UNWRITTEN_BYTES_MAX)
    }

    fn within_bounds(&self) -> bool {
        let unacknowledged = &self.inlet.unacknowledged;
        unacknowledged.messages() < self.limits.unacknowledged_messages_max
            && unacknowledged.bytes() < self.limits.unacknowledged_bytes_max
    }

    fn has_output(&self) -> bool {
        !self.output.is_empty() || !self.flushed
    }

    fn on_written(&mut self, result: io::Result<()>) -> Result<(), StreamError> {
        result.map_err(|error| StreamError::network(&self.settings.broker, &error))?;
        crash_point("crash_acknowledged");
        self.flushed = self.output.is_empty();
        self.unwritten_since = self.has_output().then(Instant::now);
        Ok(())
    }

    fn acknowledge(&mut self, settled: Settled) -> Result<(), StreamError> {
        let room = self.limits.unproved_max().saturating_sub(self.proof.unproved());
        let written = self.inlet.settle(settled, room, &mut self.output)?;
        self.proof.on_written(written);
        self.wrote_output();
        if self.proof.unpinged() >= (self.limits.unproved_max() / PINGS_PER_UNPROVED).max(1) {
            self.send(&Outbound::PingReq)?;
        }
        Ok(())
    }

    fn wrote_output(&mut self) {
        if !self.output.is_empty() {
            self.flushed = false;
            self.unwritten_since.get_or_insert_with(Instant::now);
        }
    }

    fn send(&mut self, packet: &Outbound) -> Result<(), StreamError> {
        self.codec.encode(packet, &mut self.output).map_err(|error| self.protocol(error))?;
        if *packet == Outbound::PingReq {
            self.proof.on_ping(self.inlet.unacknowledged.acknowledged());
        }
        self.wrote_output();
        Ok(())
    }

    fn protocol(&self, error: CodecError) -> StreamError {
        StreamError::Protocol { broker: self.settings.broker.clone(), problem: error.to_string() }
    }

    fn on_tick(&mut self) -> Result<(), StreamError> {
        let now = Instant::now();
        if let Some(since) = self.unwritten_since
            && now.saturating_duration_since(since) > self.limits.operation_timeout
        {
            let (broker, limit) = (self.settings.broker.clone(), self.limits.operation_timeout);
            return Err(StreamError::TimedOut { doing: "writing", broker, limit });
        }
        if let Some(packet) = self.session.on_tick(now)? {
            self.send(&packet)?;
        }
        self.watcher.tick(self.inlet);
        Ok(())
    }

    fn on_read(&mut self, result: io::Result<usize>) -> Result<(), StreamError> {
        let broker = &self.settings.broker;
        if result.map_err(|error| StreamError::network(broker, &error))? == 0 {
            let client_id = self.settings.connect.client_id.clone();
            return Err(StreamError::Closed { broker: broker.clone(), client_id });
        }
        self.session.on_bytes(Instant::now());
        self.read_what_is_there();
        let arrival = self.inlet.arrival();
        let mut batch = Batch::new();
        let outcome = self.take_packets(&mut batch, arrival);
        // Also when a packet was bad: those before it count as kept from here on.
        self.inlet.hand_over(batch, arrival);
        outcome
    }

    /// A read that filled the buffer was not the last of what is there. An error or the end shows again at the next read.
    fn read_what_is_there(&mut self) {
        while self.input.len() == self.input.capacity() && self.input.len() < BATCH_BYTES_MAX {
            self.input.reserve(READ_BYTES);
            match self.reader.read_buf(&mut self.input).now_or_never() {
                Some(Ok(count)) if count > 0 => {}
                _ => return,
            }
        }
    }

    fn take_packets(
        &mut self,
        batch: &mut Batch,
        arrival: crate::domain::Arrival,
    ) -> Result<(), StreamError> {
        let now = Instant::now();
        loop {
            let packet = match self.codec.decode(&mut self.input) {
                Ok(Some(packet)) => packet,
                Ok(None) => return Ok(()),
                Err(error) => return Err(self.protocol(error)),
            };
            match self.session.on_packet(packet, now)? {
                Step::Message(publish) => self.inlet.take(publish, arrival, batch),
                Step::LetIn { session_present, send } => {
                    let durable = self.inlet.unacknowledged.sequence();
                    self.inlet.repeats.on_let_in(session_present, durable);
                    self.watcher.let_in(session_present);
                    self.send(&send)?;
                }
                Step::Subscribed { granted_qos } => self.watcher.subscribed(granted_qos),
                Step::PingAnswered => {
                    if let Some(upto) = self.proof.on_answer() {
                        self.inlet.repeats.on_proved(upto);
                    }
                }
            }
        }
    }

    /// Stops reading, waits for what the buffer has to become durable, acknowledges it and takes leave. What is not done
    /// in time stays with the broker and comes again.
    async fn close(&mut self, control: &mut Control) -> Result<(), StreamError> {
        let limit = match control.phase() {
            Phase::Draining { deadline } => deadline
                .saturating_duration_since(std::time::Instant::now())
                .min(self.limits.operation_timeout),
            _ => self.limits.operation_timeout,
        };
        if control.phase() != Phase::Running {
            self.inlet.unacknowledged.drop_held();
        }
        match tokio::time::timeout(limit, self.take_leave()).await {
            Ok(result) => result,
            Err(_) => Ok(()),
        }
    }

    async fn take_leave(&mut self) -> Result<(), StreamError> {
        let lost = |error: io::Error| StreamError::network(&self.settings.broker, &error);
        while !self.inlet.unacknowledged.is_empty() && !self.inlet.unacknowledged.is_holding() {
            let settled = self.inlet.unacknowledged.next_durable().await?;
            self.inlet.settle(settled, usize::MAX, &mut self.output)?;
            self.writer.write_all_buf(&mut self.output).await.map_err(lost)?;
            self.writer.flush().await.map_err(lost)?;
        }
        self.codec
            .encode(&Outbound::Disconnect, &mut self.output)
            .map_err(|error| self.protocol(error))?;
        self.writer.write_all_buf(&mut self.output).await.map_err(lost)?;
        self.writer.shutdown().await.map_err(lost)
    }
}

/// Writes part of `output`, and flushes once it is empty. Dropping the future loses nothing: what was written is gone from
/// `output`, and a flush that was cut short is asked for again.
async fn write_some(
    writer: &mut WriteHalf<Box<dyn ByteStream>>,
    output: &mut BytesMut,
) -> io::Result<()> {
    if output.has_remaining() && writer.write_buf(output).await? == 0 {
        return Err(io::ErrorKind::WriteZero.into());
    }
    if !output.has_remaining() {
        writer.flush().await?;
    }
    Ok(())
}

/// Often enough for every limit, and at least once a second.
fn tick_period(settings: &SessionSettings) -> Duration {
    let limits = [settings.connect.keepalive, settings.operation_timeout, settings.connect_timeout];
    let shortest = limits.into_iter().min().unwrap_or_default();
    (shortest / 4).clamp(Duration::from_millis(10), Duration::from_secs(1))
}
