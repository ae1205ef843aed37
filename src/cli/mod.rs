//! (to be written)
pub mod check;
pub mod migrate;
pub mod simulate;
