//! What the HTTP listener counts.

use prometheus_client::metrics::counter::Counter;

/// Why the HTTP listener refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpRefusal {
    NoToken,
    WrongToken,
    Scope,
    Rate,
}

impl HttpRefusal {
    pub const ALL: [HttpRefusal; 4] =
        [HttpRefusal::NoToken, HttpRefusal::WrongToken, HttpRefusal::Scope, HttpRefusal::Rate];

    pub fn code(self) -> &'static str {
        match self {
            HttpRefusal::NoToken => "no_token",
            HttpRefusal::WrongToken => "wrong_token",
            HttpRefusal::Scope => "scope",
            HttpRefusal::Rate => "rate",
        }
    }
}

/// What the HTTP listener counts.
#[derive(Debug, Clone, Default)]
pub struct HttpMeters {
    pub(super) refused: [Counter; HttpRefusal::ALL.len()],
    /// Of peers that had too many.
    pub refused_connections: Counter,
}

impl HttpMeters {
    pub fn refused(&self, because: HttpRefusal) -> &Counter {
        &self.refused[because as usize]
    }
}
