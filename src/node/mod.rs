//! The only place that knows every part: builds them, supervises them, stops them in order.

mod assembly;
mod clock;
mod part_actor;
mod replay;
mod restart;
mod run;
mod service;
mod supervisor;
mod thread;

pub use run::run;
