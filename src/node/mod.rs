//! The only place that knows every part: builds them, supervises them, stops them in order.

mod assembly;
mod blueprint;
mod clock;
mod disk;
mod part_actor;
mod reload;
mod replay;
mod restart;
mod run;
mod service;
mod stopped;
mod supervisor;
mod thread;
mod watch;

pub use reload::Loader;
pub use run::run;
pub use stopped::StoppedNode;
