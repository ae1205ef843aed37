//! From files to [`Settings`]: read raw, checked whole, every mistake in one report.

mod settings;

pub use settings::*;
