//! Every route, and what a caller must be allowed to ask for it.

use serde::{Deserialize, Serialize};

/// What a token allows; the later includes the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Questions: health, metrics, streams.
    Read,
    /// Orders too, and what messages contained.
    Operate,
}

impl Scope {
    pub fn code(self) -> &'static str {
        match self {
            Scope::Read => "read",
            Scope::Operate => "operate",
        }
    }
}

/// Who may ask on the TCP listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Anyone,
    /// A token where tokens are demanded, see [`crate::config::HttpSettings::guarded`].
    Token(Scope),
}

const ANYONE: Access = Access::Anyone;
const READ: Access = Access::Token(Scope::Read);
const OPERATE: Access = Access::Token(Scope::Operate);

/// (method, pattern, access) of all there is.
pub const ROUTES: [(&str, &str, Access); 13] = [
    ("GET", "/health/live", ANYONE),
    ("GET", "/ping", ANYONE),
    ("GET", "/health/ready", ANYONE),
    ("GET", "/ready", ANYONE),
    ("GET", "/health", READ),
    ("GET", "/metrics", READ),
    ("GET", "/streams", READ),
    ("GET", "/parts", READ),
    ("POST", "/parts/{name:.*}/{order}", OPERATE),
    ("POST", "/reload", OPERATE),
    ("POST", "/dlq/list", OPERATE),
    ("POST", "/dlq/replay", OPERATE),
    ("POST", "/dlq/purge", OPERATE),
];

/// What is not in the list, wrong methods and paths that lead nowhere included, is for operators: whoever adds a route
/// and forgets the list has not opened it.
pub fn access(method: &str, pattern: Option<&str>) -> Access {
    let known = ROUTES.iter().find(|(of, path, _)| *of == method && Some(*path) == pattern);
    known.map_or(OPERATE, |(.., access)| *access)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_is_for_operators() {
        assert_eq!(access("GET", Some("/ping")), Access::Anyone);
        assert_eq!(access("POST", Some("/ping")), OPERATE);
        assert_eq!(access("GET", Some("/new")), OPERATE);
        assert_eq!(access("GET", None), OPERATE);
        assert!(Scope::Operate > Scope::Read);
    }
}
