//! The certificate that somebody showed when a connection was made.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// What the other side showed at the last handshake that succeeded. Clones share it. Settings carry it and are the same
/// with and without: any two are equal and look alike.
#[derive(Clone, Default)]
pub struct Presented(Arc<Mutex<Option<Vec<u8>>>>);

impl Presented {
    /// Keeps the certificate, in DER.
    pub fn keep(&self, der: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_deref() != Some(der) {
            *kept = Some(der.to_vec());
        }
    }

    /// `None` before the first handshake.
    pub fn der(&self) -> Option<Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl PartialEq for Presented {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Presented {}

impl fmt::Debug for Presented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Presented")
    }
}
