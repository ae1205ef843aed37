//! Validated names. A name that exists is a name that fits a file, a metric label, a client id and a topic.

use std::fmt;
use std::sync::Arc;

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no name: use 1 to 64 of a-z, 0-9, '-', '_', beginning with a letter or digit")]
pub struct NameError {
    text: String,
}

fn checked(text: &str) -> Result<Arc<str>, NameError> {
    let fits = (1..=64).contains(&text.len())
        && !text.starts_with(['-', '_'])
        && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'));
    if fits { Ok(text.into()) } else { Err(NameError { text: text.to_owned() }) }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks the rule of [`NameError`].
            pub fn parse(text: &str) -> Result<Self, NameError> {
                checked(text).map(Self)
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &self.0)
            }
        }
    };
}

name!(
    /// This node, as it signs rows (`node` column), cursors and MQTT client ids (`<node>-<stream>`).
    NodeName
);
name!(
    /// One MQTT subscription and the log that belongs to it.
    StreamName
);
name!(
    /// One destination of a stream: `kafka`, or the key of a table sink in the configuration.
    SinkName
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_plain_and_does_not_begin_with_a_mark() {
        for good in ["energy", "a", "temperature_indoor", "node-1", "0a"] {
            assert!(StreamName::parse(good).is_ok(), "{good}");
        }
        let long = "a".repeat(65);
        for bad in ["", "-a", "_a", "Energy", "a b", "a/b", "ü", long.as_str()] {
            assert!(StreamName::parse(bad).is_err(), "{bad}");
        }
    }
}
