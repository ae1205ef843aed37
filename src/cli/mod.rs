//! (to be written)
pub mod migrate;
