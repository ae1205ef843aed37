//! The certificate that somebody showed when a connection was made.

use std::sync::{Arc, Mutex, PoisonError};

/// What the other side showed at the last handshake that succeeded. Clones share it.
#[derive(Debug, Clone, Default)]
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
