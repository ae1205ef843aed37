//! One table sink's writer: waits for the migrations, checks the table, then turns what the buffer holds behind the
//! cursor into rows, one transaction at a time, while the next batch is mapped.
//!
//! A writer is in one of few states, and every error leads through the same door: forget what is in memory, pause,
//! read the cursor row again. So an unknown outcome of a commit, a database that was restored and a second writer are
//! told apart in one place, [`Runner::settle`].

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::batch::Batch;
use super::cursor::Tally;
use super::error::{DatabaseError, postgres};
use super::pace::Pace;
use super::source::{Source, linger_left};
use super::table_sink::TableSink;
use super::target::{Target, Trouble, count};
use super::transaction::{self, ANSWER_MARGIN};
use crate::buffer::{Buffer, BufferError, DeadLetterFilter};
use crate::domain::{Books, DeadLetterKey, Delivered, ErrorClass, Runbook, Sequence};
use crate::mapping::RowMapper;
use crate::observe::{DependencyView, Edge, EdgeMeter, MigrationState, SinkState, SinkView};
use crate::part::{Control, Part, PartResult, Phase};
use crate::retry::Backoff;

/// When told to stop, a running transaction is given this long; the cursor row decides about it at the next start.
const ABANDON_AFTER: Duration = Duration::from_secs(2);
/// A draining writer that finds nothing new for so long has delivered everything.
const DRAIN_QUIET: Duration = Duration::from_millis(250);
/// A draining writer gives up after so many failures: what is pending is safe in the buffer.
const DRAIN_ATTEMPTS: u32 = 3;
/// Between two saves of the books in the state store: a lower bound for a start without the database.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);
/// Dead letters looked at in one go.
const LETTERS_PER_CALL: usize = 500;

/// The part of one table sink.
pub struct BatchWriter {
    sink: TableSink,
    buffer: Buffer,
    gate: watch::Receiver<MigrationState>,
}

impl BatchWriter {
    /// Writes nothing before `gate` says `Done`.
    pub fn new(
        sink: TableSink,
        buffer: Buffer,
        gate: watch::Receiver<MigrationState>,
    ) -> BatchWriter {
        BatchWriter { sink, buffer, gate }
    }
}

impl Part for BatchWriter {
    async fn run(self, control: Control) -> PartResult {
        let halted = halted(control.clone());
        let mut runner = Runner::new(self, control);
        let result = tokio::select! {
            biased;
            result = runner.run() => result,
            () = halted => Ok(()),
        };
        runner.save_books().await;
        result
    }
}

/// Returns when a running transaction must be left alone.
async fn halted(mut control: Control) {
    loop {
        match control.phase() {
            Phase::Running => control.changed().await,
            Phase::Stopping => break,
            Phase::Draining { deadline } => tokio::select! {
                () = tokio::time::sleep_until(deadline.into()) => break,
                () = control.changed() => {}
            },
        }
    }
    sleep(ABANDON_AFTER).await;
}

/// What a turn of the writer ended with.
enum Turn {
    /// The phase says so; nothing is left to do here.
    Ended,
    /// Look at phase, pause and gate again.
    Again,
}

struct Runner {
    sink: TableSink,
    buffer: Buffer,
    gate: watch::Receiver<MigrationState>,
    control: Control,
    view: Arc<SinkView>,
    /// Records of the next transaction.
    gathered: EdgeMeter,
    dependency: Arc<DependencyView>,
    backoff: Backoff,
    pace: Pace,
    /// The best knowledge of the cursor row.
    books: Option<Books>,
    /// `books` came from the database in this life of the part.
    confirmed: bool,
    uncertain: Vec<Sequence>,
    panics_in_a_row: u32,
    /// The last attempt ended in doubt about cursor or table: the next such one pauses.
    in_doubt: bool,
    saved: Option<Books>,
    saved_at: Instant,
    failures_while_draining: u32,
}

impl Runner {
    fn new(writer: BatchWriter, control: Control) -> Runner {
        let BatchWriter { sink, buffer, gate } = writer;
        Runner {
            view: sink.view(),
            gathered: sink.board.sink_edge(
                Edge::Batch,
                &sink.stream.name,
                &sink.table.sink,
                sink.table.batch_rows_max,
            ),
            dependency: sink.dependency(),
            backoff: Backoff::new(sink.database.retry),
            pace: Pace::whole(),
            sink,
            buffer,
            gate,
            control,
            books: None,
            confirmed: false,
            uncertain: Vec::new(),
            panics_in_a_row: 0,
            in_doubt: false,
            saved: None,
            saved_at: Instant::now(),
            failures_while_draining: 0,
        }
    }

    async fn run(&mut self) -> PartResult {
        self.recall().await?;
        loop {
            let turn = match self.turn().await {
                Ok(turn) => turn,
                Err(Trouble::Buffer(error @ BufferError::Stopped { .. })) => {
                    return Err(error.into());
                }
                Err(trouble) => self.suffer(trouble).await,
            };
            if matches!(turn, Turn::Ended) {
                return Ok(());
            }
        }
    }

    /// What the state store knows: the buffer may drop what lies before it, though the database be away.
    async fn recall(&mut self) -> Result<(), BufferError> {
        let (stream, sink) = (&self.sink.stream.name, &self.sink.table.sink);
        let state = self.buffer.state();
        self.books = state.books(stream, sink).await?;
        state.show_dead_letters(stream, sink).await?;
        if let Some(books) = self.books {
            self.buffer.delivered(stream, sink, Delivered(books.cursor));
        }
        self.saved = self.books;
        self.view.update(|status| status.books = self.books);
        Ok(())
    }

    fn interruption(&self) -> Option<Turn> {
        match self.control.phase() {
            Phase::Stopping => return Some(Turn::Ended),
            Phase::Draining { deadline } if deadline <= Instant::now() => return Some(Turn::Ended),
            _ => {}
        }
        self.control.paused().then_some(Turn::Again)
    }

    async fn turn(&mut self) -> Result<Turn, Trouble> {
        if let Some(turn) = self.interruption() {
            if matches!(turn, Turn::Again) {
                self.show(SinkState::Paused, None);
                self.control.progress.set_work_waiting(false);
                self.control.changed().await;
            }
            return Ok(turn);
        }
        if *self.gate.borrow() != MigrationState::Done {
            return Ok(self.wait_for_migrations().await);
        }
        self.control.progress.set_work_waiting(true);
        let (mut source, mut target) = self.resume().await?;
        let result = self.pump(&mut source, &mut target).await;
        self.gathered.set(0);
        self.books = Some(target.books);
        self.uncertain = target.uncertain;
        self.panics_in_a_row = target.panics_in_a_row;
        result
    }

    async fn wait_for_migrations(&mut self) -> Turn {
        if self.draining() {
            return Turn::Ended;
        }
        let name = &self.sink.database_name;
        let (state, why) = match *self.gate.borrow() {
            MigrationState::Failed => {
                let cause = self.dependency.status().trouble;
                let cause = cause.unwrap_or_else(|| "see `telemetry migrate status`".to_owned());
                (SinkState::Held, format!("the migrations of database {name} failed: {cause}"))
            }
            _ => (SinkState::Waiting, format!("waits for the migrations of database {name}")),
        };
        self.show(state, Some(why));
        self.show_oldest().await;
        self.control.progress.set_work_waiting(false);
        tokio::select! {
            opened = self.gate.changed() => if opened.is_err() { self.control.changed().await },
            () = self.control.changed() => {}
            // The cause may be another one by now.
            () = sleep(self.sink.database.retry.max) => {}
        }
        Turn::Again
    }

    fn draining(&self) -> bool {
        matches!(self.control.phase(), Phase::Draining { .. })
    }

    /// Reads the cursor row, checks the table, and begins behind the cursor.
    async fn resume(&mut self) -> Result<(Source, Target), Trouble> {
        let mapper = self.sink.mapper()?;
        let progress = Arc::clone(&self.control.progress);
        let mut lease = progress.waiting(self.sink.pool.get()).await?;
        let limit = self.sink.database.statement_timeout + ANSWER_MARGIN;
        let prepared = progress.waiting(timeout(limit, self.prepare(&lease, &mapper))).await;
        let timed_out = DatabaseError::TimedOut { doing: "read the cursor", limit };
        let prepared = match prepared.unwrap_or(Err(timed_out.into())) {
            Err(Trouble::Buffer(error)) => return Err(error.into()),
            Err(Trouble::Database(error)) => Err(error),
            Ok(prepared) => Ok(prepared),
        };
        lease.learned(&prepared);
        let (books, plan) = prepared?;
        lease.give_back();
        let plan = Arc::new(plan);
        let reader = self.buffer.reader(&self.sink.stream.name);
        let source = Source::new(&self.sink, reader, mapper, Arc::clone(&plan), self.pace);
        let mut target = Target::new(&self.sink, self.buffer.clone(), progress, plan, books);
        target.uncertain.clone_from(&self.uncertain);
        target.panics_in_a_row = self.panics_in_a_row;
        Ok((source, target))
    }

    async fn prepare(
        &mut self,
        client: &tokio_postgres::Client,
        mapper: &RowMapper,
    ) -> Result<(Books, super::source::Plan), Trouble> {
        // In a transaction of its own: the server would go on with what nobody waits for any more.
        let begin = transaction::begin(&self.sink.database);
        client.batch_execute(&begin).await.map_err(postgres("begin"))?;
        let cursor = self.sink.cursor();
        let found = match cursor.read(client).await? {
            Some(books) => books,
            None => {
                cursor.create(client, &self.beginning()).await?;
                cursor.read(client).await?.ok_or_else(|| vanished(&cursor.sink))?
            }
        };
        let books = self.settle(found)?;
        self.forget_letters_behind(books.cursor).await?;
        let plan = self.sink.plan(client, mapper).await?;
        client.batch_execute("COMMIT").await.map_err(postgres("commit"))?;
        Ok((books, plan))
    }

    /// Where a sink without a cursor row begins: where its state says, else with the oldest record there is.
    fn beginning(&self) -> Books {
        let oldest = self.buffer.oldest(&self.sink.stream.name);
        let first = Books::starting_at(Sequence(oldest.0.saturating_sub(1)));
        self.books.filter(|books| books.cursor >= first.cursor).unwrap_or(first)
    }

    /// Makes sense of the cursor row: is it where this writer left it?
    fn settle(&mut self, found: Books) -> Result<Books, DatabaseError> {
        let stream = &self.sink.stream.name;
        if found.cursor > self.buffer.durable(stream).0 {
            return Err(DatabaseError::Standing {
                problem: format!(
                    "the database has record {} of this log, which ends here at {}: this is an older copy of the buffer",
                    found.cursor,
                    self.buffer.durable(stream).0
                ),
                remedy: "give this node the newest copy of its state_dir, or a fresh one"
                    .to_owned(),
            });
        }
        if let (true, Some(known)) = (self.confirmed, self.books) {
            if found.cursor > known.cursor && !self.uncertain.contains(&found.cursor) {
                let cursor = self.sink.cursor();
                return Err(DatabaseError::Fenced {
                    stream: cursor.stream,
                    sink: cursor.sink,
                    log: cursor.log,
                });
            }
            if found.cursor < known.cursor {
                tracing::error!(
                    event = "database_went_back",
                    stream = %stream,
                    sink = %self.sink.table.sink,
                    from = known.cursor.0,
                    to = found.cursor.0,
                    "the database forgot committed rows (restored, or failed over); what the buffer still holds is written again"
                );
            } else if found.cursor > known.cursor {
                // A commit whose answer was lost.
                count(&self.view, Tally::between(&known, &found));
            }
        }
        self.confirmed = true;
        self.books = Some(found);
        self.view.update(|status| {
            let shown = status.books.filter(|shown| shown.cursor <= found.cursor);
            status.books = Some(found.or_later(shown));
        });
        let sink = &self.sink.table.sink;
        self.buffer.delivered(stream, sink, Delivered(found.cursor));
        Ok(found)
    }

    /// A letter beyond the cursor was stored by a batch that was never committed: its record comes again, and may fare
    /// better now.
    async fn forget_letters_behind(&self, cursor: Sequence) -> Result<(), BufferError> {
        let (stream, sink) = (&self.sink.stream.name, &self.sink.table.sink);
        let state = self.buffer.state();
        let filter = DeadLetterFilter {
            stream: Some(stream.clone()),
            sink: Some(sink.clone()),
            ..DeadLetterFilter::default()
        };
        let after = DeadLetterKey { sink: sink.clone(), stream: stream.clone(), sequence: cursor };
        loop {
            let letters =
                state.dead_letters(filter.clone(), Some(after.clone()), LETTERS_PER_CALL).await?;
            let keys: Vec<DeadLetterKey> = letters
                .into_iter()
                .map(|letter| letter.key)
                .filter(|key| key.sequence > cursor)
                .collect();
            if keys.is_empty() {
                return Ok(());
            }
            state.remove_dead_letters(keys).await?;
        }
    }

    /// Delivers one batch after the other while the next is filled.
    async fn pump(&mut self, source: &mut Source, target: &mut Target) -> Result<Turn, Trouble> {
        let mut filling = Batch::behind(target.books.cursor);
        loop {
            if let Some(turn) = self.gather(source, target, &mut filling).await? {
                return Ok(turn);
            }
            let batch = source.close(&mut filling);
            self.view.update(|status| status.oldest_pending = batch.oldest);
            deliver_and_fill(source, target, batch, &mut filling).await?;
            self.books = Some(target.books);
            self.pace.in_time();
            source.keep_pace(self.pace);
            self.well();
            if self.saved_at.elapsed() >= SAVE_INTERVAL {
                self.save_books().await;
            }
        }
    }

    /// Waits until the batch is worth a transaction: full, or everything there is and old enough.
    async fn gather(
        &mut self,
        source: &mut Source,
        target: &Target,
        filling: &mut Batch,
    ) -> Result<Option<Turn>, Trouble> {
        let linger = self.sink.table.batch_linger;
        loop {
            if let Some(turn) = self.interruption() {
                return Ok(Some(turn));
            }
            source.catch_up(filling).await?;
            self.gathered.set(filling.records);
            if source.is_full(filling) {
                return Ok(None);
            }
            if filling.is_empty() {
                if let Some(turn) = self.idle(source, target, filling).await? {
                    return Ok(Some(turn));
                }
                continue;
            }
            let Some(left) = linger_left(filling, linger) else {
                return Ok(None);
            };
            tokio::select! {
                news = source.news(filling) => news?,
                () = sleep(left) => {}
                () = self.control.changed() => {}
            }
        }
    }

    /// Everything durable is delivered: waits for more.
    async fn idle(
        &mut self,
        source: &mut Source,
        target: &Target,
        filling: &Batch,
    ) -> Result<Option<Turn>, Trouble> {
        self.well();
        self.control.progress.set_work_waiting(false);
        self.view.update(|status| status.oldest_pending = None);
        let draining = self.draining();
        let unsaved = self.saved != Some(target.books);
        let quiet = if draining { DRAIN_QUIET } else { SAVE_INTERVAL };
        tokio::select! {
            biased;
            news = source.news(filling) => {
                news?;
                self.control.progress.set_work_waiting(true);
            }
            () = self.control.changed() => {}
            () = sleep(quiet), if draining || unsaved => {
                if draining {
                    return Ok(Some(Turn::Ended));
                }
                self.save_books().await;
            }
        }
        Ok(None)
    }

    /// Delivering (or idle with nothing to deliver).
    fn well(&mut self) {
        self.backoff.reset();
        self.in_doubt = false;
        if self.view.status().state == SinkState::Delivering {
            return;
        }
        self.show(SinkState::Delivering, None);
        if let Some(correlation_id) = self.view.hold.end() {
            tracing::info!(
                event = "sink_released",
                %correlation_id,
                stream = %self.sink.stream.name,
                sink = %self.sink.table.sink,
                "the sink delivers again"
            );
        }
    }

    fn show(&self, state: SinkState, trouble: Option<String>) {
        self.view.update(|status| {
            status.state = state;
            status.trouble = trouble;
        });
    }

    /// Shows since when records wait: the age of the data is what a person asks for first.
    async fn show_oldest(&self) {
        let stream = &self.sink.stream.name;
        let position = self.books.map_or(Sequence::ZERO, |books| books.cursor);
        let pending = self.buffer.durable(stream).0 > position;
        let oldest = if pending {
            Source::first_after(&mut self.buffer.reader(stream), position).await
        } else {
            None
        };
        self.view.update(|status| status.oldest_pending = oldest);
    }

    /// One failed attempt: says so where it is news, and pauses.
    async fn suffer(&mut self, trouble: Trouble) -> Turn {
        self.control.progress.beat();
        self.control.progress.set_work_waiting(false);
        if let Trouble::Database(DatabaseError::CursorMoved | DatabaseError::PlanInDoubt) = trouble
        {
            // Reading the row tells a lost answer from another writer; the table is checked with it.
            if std::mem::replace(&mut self.in_doubt, true) {
                self.control.sleep(self.backoff.next_pause()).await;
            }
            return Turn::Again;
        }
        if let Trouble::Database(DatabaseError::Resting { retry_in }) = trouble {
            return self.rest(retry_in).await;
        }
        let class = match &trouble {
            Trouble::Database(error) => error.class(),
            Trouble::Buffer(error) => error.class(),
        };
        self.view.meters.error(class).inc();
        self.view.meters.retries.inc();
        if matches!(&trouble, Trouble::Database(error) if error.ran_out_of_time()) {
            self.pace.ran_out_of_time();
        }
        if let Trouble::Database(error @ DatabaseError::Fenced { .. }) = &trouble {
            return self.fenced(error).await;
        }
        let pause = match class {
            ErrorClass::Transient => self.wait_out(&trouble),
            ErrorClass::Standing | ErrorClass::Data => self.hold(&trouble),
        };
        self.show_oldest().await;
        if self.draining() {
            self.failures_while_draining += 1;
            if class == ErrorClass::Standing || self.failures_while_draining >= DRAIN_ATTEMPTS {
                return Turn::Ended;
            }
        }
        self.pause(pause).await;
        Turn::Again
    }

    /// Less than `pause` when the database answers anybody before, or the phase changes.
    async fn pause(&mut self, pause: Duration) {
        let breaker = Arc::clone(self.dependency.breaker());
        tokio::select! {
            _ = self.control.sleep(pause) => {}
            () = breaker.recovered() => {}
        }
    }

    /// The breaker is open and another part's trial will tell.
    async fn rest(&mut self, retry_in: Duration) -> Turn {
        let before = self.view.status();
        if before.state != SinkState::Held {
            let cause = self.dependency.status().trouble;
            self.show(SinkState::Waiting, cause.or(before.trouble));
        }
        self.show_oldest().await;
        if self.draining() {
            return Turn::Ended;
        }
        self.pause(retry_in).await;
        Turn::Again
    }

    fn wait_out(&mut self, trouble: &Trouble) -> Duration {
        let text = trouble.to_string();
        let lost = matches!(trouble, Trouble::Database(error) if error.is_connection_trouble());
        if lost {
            self.dependency.unreachable(&text);
        } else if self.view.status().state == SinkState::Delivering {
            tracing::warn!(
                event = "sink_waiting",
                stream = %self.sink.stream.name,
                sink = %self.sink.table.sink,
                error = %text,
                "the batch is tried again"
            );
        }
        self.show(SinkState::Waiting, Some(text));
        let pause = self.backoff.next_pause();
        self.dependency.breaker().rest().unwrap_or(pause)
    }

    fn hold(&mut self, trouble: &Trouble) -> Duration {
        let text = trouble.to_string();
        if matches!(trouble, Trouble::Database(error) if error.is_connection_trouble()) {
            self.dependency.unreachable(&text);
        }
        let before = self.view.status();
        if before.state != SinkState::Held || before.trouble.as_deref() != Some(text.as_str()) {
            tracing::error!(
                event = "sink_held",
                runbook = Runbook::SinkHeld.page(),
                correlation_id = %self.view.hold.id(),
                stream = %self.sink.stream.name,
                sink = %self.sink.table.sink,
                error = %text,
                "the sink holds until this is mended; its stream is kept"
            );
        }
        self.show(SinkState::Held, Some(text));
        self.backoff.next_pause()
    }

    /// Two writers of one log would double every row: this one writes no more until it is started anew.
    async fn fenced(&mut self, error: &DatabaseError) -> Turn {
        tracing::error!(
                   event = "sink_fenced",
        runbook = Runbook::SinkFenced.page(),
                   stream = %self.sink.stream.name,
                   sink = %self.sink.table.sink,
                   error = %error,
                   "another writer has taken over this sink"
               );
        self.show(SinkState::Fenced, Some(error.to_string()));
        while matches!(self.control.phase(), Phase::Running) {
            self.control.changed().await;
        }
        Turn::Ended
    }

    /// A lower bound for the next start. A failed save costs nothing but that.
    async fn save_books(&mut self) {
        self.saved_at = Instant::now();
        let Some(books) = self.books.filter(|books| self.saved != Some(*books)) else { return };
        let (stream, sink) = (&self.sink.stream.name, &self.sink.table.sink);
        match self.buffer.state().save_books(stream, sink, books).await {
            Ok(()) => self.saved = Some(books),
            Err(error) => tracing::debug!(%error, "the books were not saved"),
        }
    }
}

/// The next batch is mapped while the server works on this one.
async fn deliver_and_fill(
    source: &mut Source,
    target: &mut Target,
    batch: Batch,
    filling: &mut Batch,
) -> Result<(), Trouble> {
    let mut delivery = pin!(target.deliver(batch));
    let mut full = false;
    loop {
        tokio::select! {
            biased;
            delivered = &mut delivery => return delivered,
            filled = source.fill(filling), if !full => {
                filled?;
                full = true;
            }
        }
    }
}

fn vanished(sink: &str) -> DatabaseError {
    DatabaseError::Standing {
        problem: format!("the cursor row of sink {sink} was made and is not there"),
        remedy: "look for a trigger or row security on telemetry_cursors".to_owned(),
    }
}
