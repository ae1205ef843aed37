//! Drafts apply cleanly.
