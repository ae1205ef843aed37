//! The actix actor around a part's body: it owns the running body, cancels it when told, and always says how it ended.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::FutureExt as _;

use crate::part::{Control, Part, PartResult, Progress};

/// How often an actor shows that its thread gets round to it.
const TURN: Duration = Duration::from_secs(1);

/// How a part's actor ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The phase told it to.
    Finished,
    Failed(String),
    Panicked(String),
    /// Cancelled by [`Cancel`], or its actor died in a way it could not tell of.
    Gone,
}

/// News to the supervisor. `launch` tells this actor from the one that replaced it.
#[derive(Message, Debug, Clone)]
#[rtype(result = "()")]
pub struct PartEnded {
    pub name: String,
    pub launch: u64,
    pub ending: Ending,
}

/// Drop the body at its next await: the order for a part that makes no progress.
#[derive(Message, Debug, Clone, Copy)]
#[rtype(result = "()")]
pub struct Cancel;

/// Tells the supervisor exactly once, at the latest when it is dropped: a panic in a constructor, in `started` or in a
/// timer leaves no other trace.
pub struct EndNotice {
    supervisor: Option<Recipient<PartEnded>>,
    name: String,
    launch: u64,
}

impl EndNotice {
    pub fn new(supervisor: Recipient<PartEnded>, name: String, launch: u64) -> Self {
        EndNotice { supervisor: Some(supervisor), name, launch }
    }

    fn tell(&mut self, ending: Ending) {
        if let Some(supervisor) = self.supervisor.take() {
            let news = PartEnded { name: self.name.clone(), launch: self.launch, ending };
            // The one message that may go round the mailbox bound: it must never be lost, and there is one per life
            // of a part.
            supervisor.do_send(news);
        }
    }
}

impl Drop for EndNotice {
    fn drop(&mut self) {
        self.tell(Ending::Gone);
    }
}

/// One life of a part.
pub struct PartActor<P: Part> {
    body: Option<(P, Control)>,
    progress: Arc<Progress>,
    notice: EndNotice,
}

impl<P: Part> PartActor<P> {
    pub fn new(part: P, control: Control, notice: EndNotice) -> Self {
        let progress = control.progress.clone();
        PartActor { body: Some((part, control)), progress, notice }
    }
}

impl<P: Part> Actor for PartActor<P> {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let Some((part, control)) = self.body.take() else { return };
        context.run_interval(TURN, |actor, _| actor.progress.turn());
        let body = AssertUnwindSafe(async move { part.run(control).await }).catch_unwind();
        let told = body.into_actor(self).map(|outcome, actor, context| {
            actor.notice.tell(ending_of(outcome));
            context.stop();
        });
        context.spawn(told);
    }
}

impl<P: Part> Handler<Cancel> for PartActor<P> {
    type Result = ();

    fn handle(&mut self, _: Cancel, context: &mut Self::Context) {
        context.stop();
    }
}

fn ending_of(outcome: Result<PartResult, Box<dyn Any + Send>>) -> Ending {
    match outcome {
        Ok(Ok(())) => Ending::Finished,
        Ok(Err(error)) => Ending::Failed(format!("{error:#}")),
        Err(panic) => Ending::Panicked(panic_text(panic.as_ref())),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}
