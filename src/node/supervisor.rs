//! The one actor that knows every part: it launches them from fresh constructors, restarts what ended, parks what
//! keeps failing, cancels what makes no progress, and carries the phase to all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use tokio::sync::watch;

use super::part_actor::{Cancel, EndNotice, Ending, PartActor, PartEnded};
use super::restart::{Decision, RestartPolicy};
use super::thread::Thread;
use crate::config::SupervisionSettings;
use crate::domain::Runbook;
use crate::observe::{Board, PartState};
use crate::part::{Control, OrderPart, Part, PartOrder, Phase, Progress};

/// How often stalls are looked for.
const TICK: Duration = Duration::from_secs(1);

/// After a cancel, how long the actor may take to end before its thread counts as blocked.
const CANCEL_GRACE: Duration = Duration::from_secs(5);

/// Whoever has a listener restarted by way of that listener gets the answer first.
const ANSWER_GRACE: Duration = Duration::from_millis(200);

/// Which phase a part follows: intake ends before delivery does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Intake,
    Delivery,
    /// Tells of the others, and ends last. A pause could not be taken back where nobody answers, so there is none.
    Answers,
}

type Launch =
    Arc<dyn Fn(&ArbiterHandle, Control, EndNotice) -> Recipient<Cancel> + Send + Sync + 'static>;

/// What the supervisor needs to give life to a part, as often as it takes.
pub struct PartSpec {
    pub name: String,
    pub side: Side,
    thread: Thread,
    launch: Launch,
}

impl PartSpec {
    /// `build` runs on the part's own thread, once per life.
    pub fn new<P: Part>(
        name: String,
        side: Side,
        thread: Thread,
        build: impl Fn() -> P + Send + Sync + 'static,
    ) -> Self {
        let build = Arc::new(build);
        let launch = move |arbiter: &ArbiterHandle, control: Control, notice: EndNotice| {
            let build = build.clone();
            let address = PartActor::start_in_arbiter(arbiter, move |_| {
                PartActor::new(build(), control, notice)
            });
            address.recipient()
        };
        PartSpec { name, side, thread, launch: Arc::new(launch) }
    }
}

struct Supervised {
    spec: PartSpec,
    policy: RestartPolicy,
    /// Its side's, unless it is retired.
    phase: watch::Sender<Phase>,
    /// Tells its lives, and those of its predecessors, apart: news may be late.
    launch: u64,
    paused: watch::Sender<bool>,
    life: Option<Life>,
    state: PartState,
}

struct Life {
    progress: Arc<Progress>,
    cancel: Recipient<Cancel>,
    cancelled_at: Option<Instant>,
}

/// See the module's text.
pub struct Supervisor {
    settings: SupervisionSettings,
    board: Arc<Board>,
    parts: BTreeMap<String, Supervised>,
    launches: u64,
    intake: Phase,
    delivery: Phase,
    answers: Phase,
}

impl Supervisor {
    pub fn new(settings: SupervisionSettings, board: Arc<Board>) -> Self {
        Supervisor {
            settings,
            board,
            parts: BTreeMap::new(),
            launches: 0,
            intake: Phase::Running,
            delivery: Phase::Running,
            answers: Phase::Running,
        }
    }

    fn phase_of(&mut self, side: Side) -> &mut Phase {
        match side {
            Side::Intake => &mut self.intake,
            Side::Delivery => &mut self.delivery,
            Side::Answers => &mut self.answers,
        }
    }

    fn launch(&mut self, name: &str, context: &mut Context<Self>) {
        let Some(part) = self.parts.get_mut(name) else { return };
        let phase = part.phase.subscribe();
        if *phase.borrow() != Phase::Running {
            return self.set_state(name, PartState::Finished, None);
        }
        self.launches += 1;
        part.launch = self.launches;
        let progress = Arc::new(Progress::default());
        let control = Control::new(phase, part.paused.subscribe(), progress.clone());
        let notice = EndNotice::new(context.address().recipient(), name.to_owned(), part.launch);
        let cancel = (part.spec.launch)(&part.spec.thread.arbiter(), control, notice);
        part.life = Some(Life { progress, cancel, cancelled_at: None });
        let paused = *part.paused.borrow();
        self.set_state(name, if paused { PartState::Paused } else { PartState::Running }, None);
    }

    fn set_state(&mut self, name: &str, state: PartState, failure: Option<String>) {
        if let Some(part) = self.parts.get_mut(name) {
            part.state = state;
        }
        self.board.update_part(name, |status| {
            status.state = state;
            if failure.is_some() {
                status.last_failure = failure;
            }
        });
    }

    fn failed(&mut self, name: &str, why: String, context: &mut Context<Self>) {
        let Some(part) = self.parts.get_mut(name) else { return };
        part.life = None;
        let (state, pause) = match part.policy.failed(Instant::now()) {
            Decision::RestartAfter(pause) => {
                tracing::warn!(event = "part_failed", part = name, error = %why,
                    restart_in_ms = pause.as_millis() as u64, "a part failed and is started afresh");
                (PartState::Restarting, pause)
            }
            Decision::Park { retry_after } => {
                tracing::error!(event = "part_parked",
 runbook = Runbook::PartParked.page(), part = name, error = %why,
                    retry_in_seconds = retry_after.as_secs(),
                    "a part failed too often and is parked; everything else goes on");
                (PartState::Parked, retry_after)
            }
        };
        self.set_state(name, state, Some(why));
        self.board.update_part(name, |status| status.restarts += 1);
        let (launch, name) = (part_launch(&self.parts, name), name.to_owned());
        context.run_later(pause, move |supervisor, context| {
            // A restart by hand may have been quicker.
            if part_launch(&supervisor.parts, &name) == launch
                && supervisor.parts.get(&name).is_some_and(|part| part.life.is_none())
            {
                supervisor.launch(&name, context);
            }
        });
    }

    /// Cancels what has work and makes no progress. A part that does not even take the cancel sits on a blocked thread.
    fn look_for_stalls(&mut self, context: &mut Context<Self>) {
        fail::fail_point!("supervisor");
        let limit = self.settings.stall_timeout;
        let mut blocked = Vec::new();
        for (name, part) in &mut self.parts {
            let Some(life) = &mut part.life else { continue };
            match life.cancelled_at {
                None if life.progress.hung_for() > limit => {
                    tracing::error!(event = "part_stalled",
 runbook = Runbook::PartStalled.page(), part = %name,
                        after_seconds = limit.as_secs(), "a part makes no progress");
                    self.board.update_part(name, |status| status.stalls += 1);
                    life.cancelled_at = Some(Instant::now());
                    // A full mailbox means the thread is blocked: the grace below deals with it.
                    let _ = life.cancel.try_send(Cancel);
                }
                Some(at) if at.elapsed() > CANCEL_GRACE => blocked.push(name.clone()),
                _ => {}
            }
        }
        for name in blocked {
            self.leave_thread_of(&name, context);
        }
    }

    /// All that live on the blocked thread of `name` get another one: what has no work does not stall, and would not
    /// notice when some comes.
    fn leave_thread_of(&mut self, name: &str, context: &mut Context<Self>) {
        let Some(part) = self.parts.get(name).filter(|part| part.life.is_some()) else { return };
        let thread = part.spec.thread.clone();
        thread.renew();
        let stuck: Vec<_> = self
            .parts
            .iter()
            .filter(|(_, part)| part.life.is_some() && part.spec.thread.is(&thread))
            .map(|(name, _)| name.clone())
            .collect();
        for name in stuck {
            if let Some(part) = self.parts.get_mut(&name) {
                self.launches += 1;
                part.launch = self.launches;
            }
            self.failed(&name, "its thread is blocked".to_owned(), context);
        }
    }
}

fn part_launch(parts: &BTreeMap<String, Supervised>, name: &str) -> u64 {
    parts.get(name).map_or(0, |part| part.launch)
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.run_interval(TICK, |supervisor, context| supervisor.look_for_stalls(context));
    }
}

/// Order: take this part on and launch it. One of the same name, which has ended, is replaced; a pause outlasts that.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AddPart(pub PartSpec);

impl Handler<AddPart> for Supervisor {
    type Result = ();

    fn handle(&mut self, AddPart(spec): AddPart, context: &mut Self::Context) {
        let name = spec.name.clone();
        let paused = self.parts.get(&name).is_some_and(|before| *before.paused.borrow());
        let part = Supervised {
            policy: RestartPolicy::new(self.settings.clone()),
            phase: watch::Sender::new(*self.phase_of(spec.side)),
            spec,
            launch: 0,
            paused: watch::Sender::new(paused),
            life: None,
            state: PartState::Running,
        };
        self.parts.insert(name.clone(), part);
        self.launch(&name, context);
    }
}

impl Handler<PartEnded> for Supervisor {
    type Result = ();

    fn handle(&mut self, news: PartEnded, context: &mut Self::Context) {
        let Some(part) = self.parts.get_mut(&news.name) else { return };
        if part.launch != news.launch {
            return;
        }
        let phase = *part.phase.borrow();
        let why = match news.ending {
            Ending::Finished | Ending::Gone if phase != Phase::Running => {
                if let Some(part) = self.parts.get_mut(&news.name) {
                    part.life = None;
                }
                return self.set_state(&news.name, PartState::Finished, None);
            }
            Ending::Finished => "it ended without being told to".to_owned(),
            Ending::Failed(why) => why,
            Ending::Panicked(text) => format!("panic: {text}"),
            Ending::Gone => "its actor is gone".to_owned(),
        };
        self.failed(&news.name, why, context);
    }
}

/// Order: carry this phase to one side.
#[derive(Message, Debug, Clone, Copy)]
#[rtype(result = "()")]
pub struct SetPhase(pub Side, pub Phase);

impl Handler<SetPhase> for Supervisor {
    type Result = ();

    fn handle(&mut self, SetPhase(side, phase): SetPhase, _: &mut Self::Context) {
        *self.phase_of(side) = phase;
        for part in self.parts.values().filter(|part| part.spec.side == side) {
            part.phase.send_replace(phase);
        }
    }
}

/// Order: this part ends for good, by its own phase. Answers whether it still lives: ask again until it does not.
#[derive(Message, Debug, Clone)]
#[rtype(result = "bool")]
pub struct RetirePart {
    pub name: String,
    pub phase: Phase,
    /// It had its time: drop its body at the next await.
    pub cancel: bool,
}

impl Handler<RetirePart> for Supervisor {
    type Result = bool;

    fn handle(&mut self, order: RetirePart, _: &mut Self::Context) -> bool {
        let Some(part) = self.parts.get_mut(&order.name) else { return false };
        part.phase.send_if_modified(|current| {
            let news = *current != order.phase;
            *current = order.phase;
            news
        });
        let Some(life) = &mut part.life else { return false };
        if order.cancel && life.cancelled_at.is_none() {
            life.cancelled_at = Some(Instant::now());
            let _ = life.cancel.try_send(Cancel);
        }
        true
    }
}

/// Order: drop what is left of a retired part.
#[derive(Message, Debug, Clone)]
#[rtype(result = "()")]
pub struct ForgetPart(pub String);

impl Handler<ForgetPart> for Supervisor {
    type Result = ();

    fn handle(&mut self, ForgetPart(name): ForgetPart, _: &mut Self::Context) {
        self.parts.remove(&name);
        self.board.forget_part(&name);
    }
}

/// Question: which parts of a side have not finished?
#[derive(Message, Debug, Clone, Copy)]
#[rtype(result = "Vec<String>")]
pub struct GetUnfinished(pub Side);

impl Handler<GetUnfinished> for Supervisor {
    type Result = MessageResult<GetUnfinished>;

    fn handle(
        &mut self,
        GetUnfinished(side): GetUnfinished,
        _: &mut Self::Context,
    ) -> Self::Result {
        let unfinished = self.parts.iter().filter(|(_, part)| part.spec.side == side);
        let unfinished = unfinished.filter(|(_, part)| part.life.is_some());
        MessageResult(unfinished.map(|(name, _)| name.clone()).collect())
    }
}

/// Question for the watchdog: is any part stalled beyond its limit?
#[derive(Message, Debug, Clone, Copy)]
#[rtype(result = "bool")]
pub struct GetAlive;

impl Handler<GetAlive> for Supervisor {
    type Result = bool;

    fn handle(&mut self, _: GetAlive, _: &mut Self::Context) -> bool {
        // A stalled part is cancelled and restarted within its limit and the grace; only when even that does not help
        // is the process of no use.
        let limit = self.settings.stall_timeout + CANCEL_GRACE * 2;
        let mut lives = self.parts.values().filter_map(|part| part.life.as_ref());
        lives.all(|life| life.progress.hung_for() <= limit)
    }
}

impl Handler<OrderPart> for Supervisor {
    type Result = bool;

    fn handle(
        &mut self,
        OrderPart { name, order, correlation_id }: OrderPart,
        context: &mut Self::Context,
    ) -> bool {
        let Some(part) = self.parts.get_mut(&name) else { return false };
        if order == PartOrder::Pause && part.spec.side == Side::Answers {
            return false;
        }
        tracing::info!(event = "part_ordered", %correlation_id, part = %name, ?order, "an order from a person");
        match order {
            PartOrder::Pause | PartOrder::Resume => {
                part.paused.send_replace(order == PartOrder::Pause);
                let paused = order == PartOrder::Pause;
                let state = if paused { PartState::Paused } else { PartState::Running };
                if part.life.is_some() {
                    self.set_state(&name, state, None);
                }
            }
            PartOrder::Restart => {
                part.policy.forgive();
                match &part.life {
                    // It ends as `Gone` and is started afresh after the first, short pause.
                    Some(life) => {
                        let cancel = life.cancel.clone();
                        let answered = if part.spec.side == Side::Answers {
                            ANSWER_GRACE
                        } else {
                            Duration::ZERO
                        };
                        context.run_later(answered, move |_, _| drop(cancel.try_send(Cancel)));
                    }
                    None => self.launch(&name, context),
                }
            }
        }
        true
    }
}
