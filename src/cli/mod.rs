//! (to be written)
pub mod buffer;
