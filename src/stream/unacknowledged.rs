//! What is received and not yet acknowledged: groups in the order of their arrival, each waiting for the buffer's word that it
//! is durable. It outlives connections: a group whose connection died still becomes durable, only its packet ids are void.

use std::collections::VecDeque;
use std::time::Instant;

use tokio::sync::oneshot;

use super::error::StreamError;
use super::redelivery::{Acknowledged, Fingerprint};
use crate::buffer::{Appender, Incoming};
use crate::domain::{Durable, Sequence};

/// The way into the buffer, as narrow as the connection needs it.
pub trait Intake {
    /// See [`Appender::try_append`].
    fn try_append(&self, batch: Vec<Incoming>)
    -> Result<oneshot::Receiver<Durable>, Vec<Incoming>>;

    /// See [`Appender::ready`].
    fn ready(&self) -> impl Future<Output = ()>;
}

impl Intake for Appender {
    fn try_append(
        &self,
        batch: Vec<Incoming>,
    ) -> Result<oneshot::Receiver<Durable>, Vec<Incoming>> {
        Appender::try_append(self, batch)
    }

    async fn ready(&self) {
        Appender::ready(self).await;
    }
}

/// What one read brought, judged.
#[derive(Debug)]
pub struct Batch {
    /// To be kept.
    pub incoming: Vec<Incoming>,
    /// Of those to be kept.
    pub fingerprints: Vec<Fingerprint>,
    /// To be acknowledged, in the order of arrival, repeats included.
    pub packet_ids: Vec<u16>,
    /// All messages.
    pub messages: usize,
    pub bytes: usize,
    /// [`Acknowledged::taken`] once this batch is acknowledged.
    pub taken: u64,
    pub received: Instant,
}

impl Batch {
    pub fn new() -> Self {
        Batch {
            incoming: Vec::new(),
            fingerprints: Vec::new(),
            packet_ids: Vec::new(),
            messages: 0,
            bytes: 0,
            taken: 0,
            received: Instant::now(),
        }
    }

    fn extend(&mut self, later: Batch) {
        self.incoming.extend(later.incoming);
        self.fingerprints.extend(later.fingerprints);
        self.packet_ids.extend(later.packet_ids);
        self.messages += later.messages;
        self.bytes += later.bytes;
        self.taken = later.taken;
    }
}

#[derive(Debug)]
struct Group {
    /// `None`: repeats only, done as soon as everything before it is.
    durable: Option<oneshot::Receiver<Durable>>,
    batch: Batch,
}

/// A group that may be acknowledged.
#[derive(Debug)]
pub struct Settled {
    /// Empty when the connection they came over is gone.
    pub packet_ids: Vec<u16>,
    pub fingerprints: Vec<Fingerprint>,
    pub received: Instant,
}

/// Bounded by the connection, which stops reading above its limits.
#[derive(Debug, Default)]
pub struct Unacknowledged {
    groups: VecDeque<Group>,
    /// What the full buffer gave back: behind all groups, and nothing goes before it.
    held: Option<Batch>,
    messages: usize,
    bytes: usize,
    acknowledged: Acknowledged,
}

impl Unacknowledged {
    /// Everything up to `sequence` was kept in an earlier life, `taken` of it remembered.
    pub fn starting_at(acknowledged: Acknowledged) -> Self {
        Unacknowledged { acknowledged, ..Unacknowledged::default() }
    }

    pub fn messages(&self) -> usize {
        self.messages
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.held.is_none()
    }

    pub fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// How far acknowledgements have been handed out by [`Unacknowledged::next_durable`].
    pub fn acknowledged(&self) -> Acknowledged {
        self.acknowledged
    }

    /// The last durable record.
    pub fn sequence(&self) -> Sequence {
        self.acknowledged.sequence
    }

    /// What was last taken for a topic among what is not yet durable.
    pub fn last_of(&self, topic: u64) -> Option<u64> {
        let groups = self.groups.iter().rev().map(|group| &group.batch);
        let batches = self.held.iter().chain(groups);
        last_of(batches.flat_map(|batch| batch.fingerprints.iter().rev()), topic)
    }

    /// Takes a batch in and hands it to the buffer; when the buffer is full it is held.
    pub fn push(&mut self, intake: &impl Intake, batch: Batch) {
        self.messages += batch.messages;
        self.bytes += batch.bytes;
        match &mut self.held {
            Some(held) => held.extend(batch),
            None => self.hand_over(intake, batch),
        }
    }

    /// Tries the held batch again.
    pub fn retry(&mut self, intake: &impl Intake) {
        if let Some(batch) = self.held.take() {
            self.hand_over(intake, batch);
        }
    }

    fn hand_over(&mut self, intake: &impl Intake, mut batch: Batch) {
        let incoming = std::mem::take(&mut batch.incoming);
        if incoming.is_empty() {
            self.groups.push_back(Group { durable: None, batch });
            return;
        }
        match intake.try_append(incoming) {
            Ok(receiver) => self.groups.push_back(Group { durable: Some(receiver), batch }),
            Err(refused) => {
                batch.incoming = refused;
                self.held = Some(batch);
            }
        }
    }

    /// The connection is gone: the packet ids mean nothing on the next one.
    pub fn forget_packet_ids(&mut self) {
        for batch in self.groups.iter_mut().map(|group| &mut group.batch).chain(&mut self.held) {
            batch.packet_ids.clear();
        }
    }

    /// Gives up what the buffer has not taken: it stays with the broker, and this memory ends with the part.
    pub fn drop_held(&mut self) {
        self.held = None;
    }

    /// The oldest group, once it is durable. Pends while there is none. Dropping the future loses nothing.
    pub async fn next_durable(&mut self) -> Result<Settled, StreamError> {
        let Some(group) = self.groups.front_mut() else { return std::future::pending().await };
        let durable = match &mut group.durable {
            None => None,
            Some(receiver) => Some(receiver.await.map_err(|_| StreamError::BufferGone)?),
        };
        Ok(self.settle(durable))
    }

    /// Like [`Unacknowledged::next_durable`], for what is durable by now.
    pub fn try_next_durable(&mut self) -> Result<Option<Settled>, StreamError> {
        let Some(group) = self.groups.front_mut() else { return Ok(None) };
        let durable = match &mut group.durable {
            None => None,
            Some(receiver) => match receiver.try_recv() {
                Ok(durable) => Some(durable),
                Err(oneshot::error::TryRecvError::Empty) => return Ok(None),
                Err(oneshot::error::TryRecvError::Closed) => return Err(StreamError::BufferGone),
            },
        };
        Ok(Some(self.settle(durable)))
    }

    fn settle(&mut self, durable: Option<Durable>) -> Settled {
        let Group { batch, .. } = self.groups.pop_front().expect("the caller saw the front");
        self.messages -= batch.messages;
        self.bytes -= batch.bytes;
        self.acknowledged.taken = batch.taken;
        if let Some(Durable(sequence)) = durable {
            self.acknowledged.sequence = sequence;
        }
        let Batch { packet_ids, fingerprints, received, .. } = batch;
        Settled { packet_ids, fingerprints, received }
    }
}

/// The first of these (newest first) that is of the topic.
pub fn last_of<'f>(
    mut newest_first: impl Iterator<Item = &'f Fingerprint>,
    topic: u64,
) -> Option<u64> {
    newest_first.find(|fingerprint| fingerprint.topic == topic).map(|found| found.message)
}
