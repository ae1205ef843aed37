//! The books of one stream's Kafka sink: one owner, saved together with the cursor, shown on the board.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::window::Passed;
use crate::buffer::{Buffer, BufferError, State};
use crate::crash::crash_point;
use crate::domain::{
    Arrival, Books, DeadLetter, Delivered, Runbook, Sequence, SequenceRange, SinkName, StreamName,
};
use crate::mapping::Observed;
use crate::observe::{SinkState, SinkView, StreamView};

/// Replays told to a lane and not yet entered; a replay waits for room, as long as an operation may take.
pub(super) const CORRECTIONS_MAX: usize = 256;

/// A dead letter of this sink was delivered after all, and counted so in the state store.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replayed;

/// What a ledger is made from.
pub(super) struct LedgerParts {
    pub stream: StreamName,
    pub sink: SinkName,
    pub buffer: Buffer,
    pub view: Arc<SinkView>,
    pub stream_view: Arc<StreamView>,
    pub replayed: mpsc::Receiver<Replayed>,
}

/// The only writer of this sink's books.
pub(super) struct Ledger {
    stream: StreamName,
    sink: SinkName,
    buffer: Buffer,
    state: State,
    view: Arc<SinkView>,
    stream_view: Arc<StreamView>,
    replayed: mpsc::Receiver<Replayed>,
    /// As they are saved.
    books: Books,
    /// Letters delivered by a replay, counted durably beside the books as each one left.
    replays: u64,
    changed: watch::Sender<Books>,
}

impl Ledger {
    /// Reads the durable cursor. A sink without one begins with the oldest record the log still holds.
    pub async fn open(parts: LedgerParts) -> Result<Self, BufferError> {
        let LedgerParts { stream, sink, buffer, view, stream_view, replayed } = parts;
        let state = buffer.state();
        let saved = state.books(&stream, &sink).await?;
        let base = Sequence(buffer.oldest(&stream).0.saturating_sub(1));
        let books = saved.unwrap_or_else(|| Books::starting_at(base));
        let replays = state.replayed(&stream, &sink).await?;
        buffer.delivered(&stream, &sink, Delivered(books.cursor));
        state.show_dead_letters(&stream, &sink).await?;
        view.update(|status| status.books = Some(books.with_replayed(replays)));
        let changed = watch::Sender::new(books);
        Ok(Ledger {
            stream,
            sink,
            buffer,
            state,
            view,
            stream_view,
            replayed,
            books,
            replays,
            changed,
        })
    }

    /// The books with what was replayed.
    fn shown(&self) -> Books {
        self.books.with_replayed(self.replays)
    }

    pub fn cursor(&self) -> Sequence {
        self.books.cursor
    }

    pub fn stream(&self) -> &StreamName {
        &self.stream
    }

    pub fn sink(&self) -> &SinkName {
        &self.sink
    }

    pub fn view(&self) -> &SinkView {
        &self.view
    }

    /// Enters what the cursor passed, counts it and shows it.
    pub fn enter(&mut self, passed: Passed, oldest_pending: Option<Arrival>) {
        let corrected = self.enter_replays();
        if passed.records == 0 && !corrected {
            return;
        }
        crash_point("crash_reported");
        passed.enter(&mut self.books);
        let meters = &self.view.meters;
        meters.delivered_messages.inc_by(passed.delivered);
        meters.filtered_messages.inc_by(passed.filtered);
        meters.incomplete_messages.inc_by(passed.incomplete);
        meters.dead_lettered_messages.inc_by(passed.dead_lettered);
        let now = Arrival::now();
        if let Some((first, last)) = passed.delivered_arrivals {
            meters.batch_messages.observe(passed.delivered as f64);
            // The two ends stand for the batch.
            for arrival in [first, last] {
                let age = now.as_micros().saturating_sub(arrival.as_micros()).max(0);
                meters.end_to_end_duration.observe(age as f64 / 1e6);
            }
        }
        self.view.update(|status| {
            status.books = Some(self.shown());
            status.oldest_pending = oldest_pending;
            if let Some((_, last)) = passed.delivered_arrivals {
                status.newest_delivered = Some(last);
                status.last_success = Some(now);
            }
        });
        self.changed.send_replace(self.books);
    }

    /// True when there were any.
    fn enter_replays(&mut self) -> bool {
        let before = self.replays;
        while let Ok(Replayed) = self.replayed.try_recv() {
            self.replays += 1;
        }
        self.replays > before
    }

    /// The disk lost these records; the cursor stands right before them.
    pub fn lost(&mut self, range: SequenceRange) {
        self.books.lost += range.last.since(self.books.cursor);
        self.books.cursor = self.books.cursor.max(range.last);
        self.view.update(|status| status.books = Some(self.shown()));
        self.changed.send_replace(self.books);
        tracing::error!(
                   event = "sink_passed_lost_records",
        runbook = Runbook::DataLost.page(),
                   stream = %self.stream,
                   sink = %self.sink,
                   first = range.first.0,
                   last = range.last.0,
                   "the buffer could not read these records; they were not delivered"
               );
    }

    /// Stores dead letters durably; only then may the cursor pass them.
    pub async fn set_aside(&self, letters: Vec<DeadLetter>) -> Result<(), BufferError> {
        for letter in &letters {
            self.view.set_aside(letter);
        }
        self.state.put_dead_letters(letters).await?;
        crash_point("crash_kafka_letters_kept");
        Ok(())
    }

    /// What the mapper saw beside its values.
    pub fn observed(&self, observed: Observed) {
        let meters = &self.view.meters;
        meters.flagged_device_time_invalid.inc_by(observed.device_time_invalid);
        meters.flagged_out_of_range.inc_by(observed.out_of_range);
        self.stream_view.unmapped_seen(&self.sink, &observed.unmapped);
    }

    /// Shows the sink's state; says so in the log when it begins or ends to be held.
    pub fn show(&self, state: SinkState, trouble: Option<String>) {
        let before = self.view.status();
        if before.state == state && before.trouble == trouble {
            return;
        }
        let (stream, sink) = (&self.stream, &self.sink);
        match (before.state, state) {
            (old, SinkState::Held) if old != SinkState::Held => {
                let why = trouble.as_deref().unwrap_or_default();
                tracing::error!(event = "sink_held",
 runbook = Runbook::SinkHeld.page(), correlation_id = %self.view.hold.id(), %stream, %sink, why, "a person must act");
            }
            _ => tracing::debug!(event = "sink_state", %stream, %sink, state = state.code()),
        }
        if state == SinkState::Delivering
            && let Some(correlation_id) = self.view.hold.end()
        {
            tracing::info!(event = "sink_released", %correlation_id, %stream, %sink, "delivering again");
        }
        self.view.update(|status| {
            status.state = state;
            status.trouble = trouble;
        });
    }

    /// Saves changed books at most once per `interval` until dropped; ends only with an error. What is saved may be
    /// dropped by the buffer.
    pub fn keep_saving(&self, interval: Duration) -> impl Future<Output = BufferError> + use<> {
        let mut changed = self.changed.subscribe();
        let (stream, sink) = (self.stream.clone(), self.sink.clone());
        let (buffer, state) = (self.buffer.clone(), self.state.clone());
        async move {
            while changed.changed().await.is_ok() {
                let books = *changed.borrow_and_update();
                crash_point("crash_cursor_due");
                if let Err(error) = state.save_books(&stream, &sink, books).await {
                    return error;
                }
                crash_point("crash_cursor_saved");
                buffer.delivered(&stream, &sink, Delivered(books.cursor));
                tokio::time::sleep(interval).await;
            }
            std::future::pending().await
        }
    }

    /// Saves the books now.
    pub async fn save(&mut self) -> Result<(), BufferError> {
        self.enter(Passed::default(), self.view.status().oldest_pending);
        self.state.save_books(&self.stream, &self.sink, self.books).await?;
        self.buffer.delivered(&self.stream, &self.sink, Delivered(self.books.cursor));
        Ok(())
    }
}
