//! From messages to acknowledgements: judges what arrives, hands it to the buffer, and tells what may be acknowledged. One
//! per stream, over all its connections.

use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;

use super::codec::{Publish, put_puback};
use super::error::StreamError;
use super::redelivery::{Fingerprint, Repeats};
use super::unacknowledged::{Batch, Intake, Settled, Unacknowledged, last_of};
use crate::buffer::Incoming;
use crate::crash::crash_point;
use crate::domain::Arrival;
use crate::observe::StreamView;

/// A wall clock that goes back by less than this is held; by more, it was set, and is believed.
const CLOCK_STEP_MICROS: i64 = 1_000_000;

pub struct Inlet<I> {
    pub intake: I,
    pub repeats: Repeats,
    pub unacknowledged: Unacknowledged,
    view: Arc<StreamView>,
    last_arrival: Option<Arrival>,
}

impl<I: Intake> Inlet<I> {
    pub fn new(
        intake: I,
        repeats: Repeats,
        unacknowledged: Unacknowledged,
        view: Arc<StreamView>,
    ) -> Self {
        Inlet { intake, repeats, unacknowledged, view, last_arrival: None }
    }

    /// One arrival time for one read, never before the previous one unless the clock was set.
    pub fn arrival(&mut self) -> Arrival {
        let now = Arrival::now();
        let arrival = match self.last_arrival {
            Some(last) if now < last && last.0 - now.0 < CLOCK_STEP_MICROS => last,
            _ => now,
        };
        self.last_arrival = Some(arrival);
        arrival
    }

    /// Judges a message into `batch`.
    pub fn take(&mut self, publish: Publish, arrival: Arrival, batch: &mut Batch) {
        let fingerprint = Fingerprint::of(&publish.topic, &publish.payload);
        let (unacknowledged, fingerprints) = (&self.unacknowledged, &batch.fingerprints);
        let verdict = self.repeats.judge(&publish, fingerprint, arrival, |topic| {
            last_of(fingerprints.iter().rev(), topic).or_else(|| unacknowledged.last_of(topic))
        });
        batch.messages += 1;
        batch.bytes += publish.topic.len() + publish.payload.len();
        self.view.meters.received_bytes.inc_by(publish.payload.len() as u64);
        if publish.packet_id != 0 {
            batch.packet_ids.push(publish.packet_id);
        }
        if let Some(kind) = verdict {
            self.view.meters.redelivered(kind).inc();
            return;
        }
        batch.fingerprints.push(fingerprint);
        batch.incoming.push(Incoming {
            topic: publish.topic,
            payload: publish.payload,
            arrival,
            flags: publish.flags,
            packet_id: publish.packet_id,
        });
    }

    /// Everything one read brought goes to the buffer as one batch. Whatever was judged must come here, for it counts as
    /// kept from now on.
    pub fn hand_over(&mut self, mut batch: Batch, arrival: Arrival) {
        if batch.messages == 0 {
            return;
        }
        crash_point("crash_received");
        batch.taken = self.repeats.taken();
        self.view.meters.received_messages.inc_by(batch.messages as u64);
        self.unacknowledged.push(&self.intake, batch);
        let unacknowledged = self.unacknowledged.messages();
        let now = Instant::now();
        self.view.update(|status| {
            status.last_message = Some(arrival);
            status.heard = Some(now);
            status.unacknowledged = unacknowledged;
        });
    }

    /// Without a connection there is nothing to acknowledge, yet what has become durable is to be known.
    pub fn settle_unconnected(&mut self) -> Result<(), StreamError> {
        match self.unacknowledged.try_next_durable()? {
            Some(settled) => self.settle(settled, usize::MAX, &mut BytesMut::new()).map(drop),
            None => Ok(()),
        }
    }

    /// Writes the acknowledgements of a durable group, and of those that became durable with it until about `room` are
    /// written. Answers how many.
    pub fn settle(
        &mut self,
        first: Settled,
        room: usize,
        out: &mut BytesMut,
    ) -> Result<usize, StreamError> {
        let mut written = 0;
        let mut next = Some(first);
        while let Some(settled) = next {
            written += settled.packet_ids.len();
            for packet_id in settled.packet_ids {
                put_puback(out, packet_id);
            }
            for fingerprint in &settled.fingerprints {
                self.repeats.on_durable(*fingerprint);
            }
            self.view.meters.accepted_messages.inc_by(settled.fingerprints.len() as u64);
            self.view.meters.accept_duration.observe(settled.received.elapsed().as_secs_f64());
            next = match written < room {
                true => self.unacknowledged.try_next_durable()?,
                false => None,
            };
        }
        let unacknowledged = self.unacknowledged.messages();
        self.view.update(|status| status.unacknowledged = unacknowledged);
        Ok(written)
    }
}
