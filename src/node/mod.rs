//! The only place that knows every part: builds them, supervises them, stops them in order.

mod assembly;
mod clock;
mod disk;
mod part_actor;
mod replay;
mod restart;
mod run;
mod service;
mod supervisor;

pub use run::run;
