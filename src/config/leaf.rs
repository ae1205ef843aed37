//! One value against its kind.

use super::path;
use super::report::did_you_mean;
use super::schema::Kind;
use super::tree::{Node, Raw};
use crate::domain::NodeName;

/// What a value must be and is not.
#[derive(Debug)]
pub struct Wrong {
    pub rule: String,
    pub hint: Option<String>,
}

impl From<String> for Wrong {
    fn from(rule: String) -> Self {
        Wrong { rule, hint: None }
    }
}

/// Is this value one of this kind?
pub fn check(kind: &Kind, node: &Node) -> Result<(), Wrong> {
    let fits = match (kind, &node.raw) {
        (Kind::Boolean, Raw::Boolean(_)) => Ok(()),
        (Kind::Integer(min, max), Raw::Integer(number)) => within(*number, *min, *max),
        (Kind::Number, Raw::Integer(_)) => Ok(()),
        (Kind::Number, Raw::Number(number)) if number.is_finite() => Ok(()),
        (Kind::Scalar, raw) if json(raw).is_some() => Ok(()),
        (Kind::Scalars, Raw::List(items)) => all(items, |item| match json(&item.raw) {
            Some(_) => Ok(()),
            None => Err(format!("{} is no text, number or boolean", item.raw)),
        }),
        (Kind::Texts, Raw::List(items)) => all(items, |item| text_of(item).and_then(not_empty)),
        (Kind::JsonPaths, Raw::List(items)) => {
            all(items, |item| text_of(item).and_then(path::check))
        }
        (Kind::TextMap, Raw::Table(table)) => table.iter().try_for_each(|(key, member)| {
            let problem = |_| format!("{key} must be a text, not {}", member.node.raw.kind());
            text_of(&member.node).map(|_| ()).map_err(problem)
        }),
        (Kind::ScalarMap, Raw::Table(table)) if !table.is_empty() => {
            table.iter().try_for_each(|(key, member)| match json(&member.node.raw) {
                Some(_) => Ok(()),
                None => Err(format!("{key} must be a text, number or boolean")),
            })
        }
        (Kind::Choice(choices), Raw::Text(text)) => return choice(text, choices),
        (_, Raw::Text(text)) => text_rule(kind, text),
        _ => Err(format!("must be {}, not {}", expected(kind), node.raw.kind())),
    };
    fits.map_err(|rule| Wrong { hint: quote_hint(kind, &node.raw), rule })
}

fn within(number: i128, min: i64, max: i64) -> Result<(), String> {
    if (i128::from(min)..=i128::from(max)).contains(&number) {
        Ok(())
    } else {
        Err(format!("must be from {min} to {max}"))
    }
}

fn all(items: &[Node], rule: impl Fn(&Node) -> Result<(), String>) -> Result<(), String> {
    if items.is_empty() { Err("must not be empty".into()) } else { items.iter().try_for_each(rule) }
}

fn text_of(node: &Node) -> Result<&str, String> {
    match &node.raw {
        Raw::Text(text) => Ok(text),
        other => Err(format!("{other} is {}, not a text", other.kind())),
    }
}

fn not_empty(text: &str) -> Result<(), String> {
    if text.is_empty() { Err("must not be empty".into()) } else { Ok(()) }
}

fn choice(text: &str, choices: &[&str]) -> Result<(), Wrong> {
    if choices.contains(&text) {
        return Ok(());
    }
    let rule = format!("must be one of {}", quoted(choices));
    Err(Wrong { rule, hint: did_you_mean(text, choices.iter().copied()) })
}

/// `"a", "b"`.
pub fn quoted(choices: &[&str]) -> String {
    choices.iter().map(|choice| format!("{choice:?}")).collect::<Vec<_>>().join(", ")
}

fn text_rule(kind: &Kind, text: &str) -> Result<(), String> {
    match kind {
        Kind::Name => NodeName::parse(text).map(|_| ()).map_err(|error| error.to_string()),
        Kind::IdentifierOrNone if text.is_empty() => Ok(()),
        Kind::Identifier | Kind::IdentifierOrNone => identifier(text),
        Kind::Address => match text.parse::<std::net::SocketAddr>() {
            Ok(_) => Ok(()),
            Err(_) => Err("must be an IP address and a port, e.g. \"127.0.0.1:9464\"".into()),
        },
        Kind::JsonPath => path::check(text),
        Kind::Text
        | Kind::Path
        | Kind::SecretFile
        | Kind::SecretCredential
        | Kind::SecretEnvironment => not_empty(text),
        _ => Err(format!("must be {}, not a text", expected(kind))),
    }
}

/// A name in SQL: the node quotes it, so case counts.
pub fn identifier(text: &str) -> Result<(), String> {
    const BYTES_MAX: usize = 63;
    let clean = !text.contains(['"', '.']) && !text.contains(char::is_control);
    if clean && (1..=BYTES_MAX).contains(&text.len()) {
        Ok(())
    } else {
        Err(format!("{text:?} is no name in SQL: 1 to {BYTES_MAX} bytes without dots and quotes"))
    }
}

/// For people.
pub fn expected(kind: &Kind) -> &'static str {
    match kind {
        Kind::Integer(..) => "an integer",
        Kind::Number => "a finite number",
        Kind::Boolean => "true or false",
        Kind::Texts | Kind::JsonPaths => "a list of texts",
        Kind::Scalar => "a text, number or boolean",
        Kind::Scalars => "a list of texts, numbers or booleans",
        Kind::TextMap => "a table of texts",
        Kind::ScalarMap => "a table of texts, numbers or booleans",
        Kind::Section(_) | Kind::Sections(..) => "a table",
        _ => "a text in quotes",
    }
}

fn quote_hint(kind: &Kind, raw: &Raw) -> Option<String> {
    match (kind, raw) {
        (Kind::Integer(..), Raw::Text(_)) => {
            Some("write a plain integer; the unit is in the setting's name".into())
        }
        (Kind::Choice(_) | Kind::Text, Raw::Integer(_) | Raw::Number(_) | Raw::Boolean(_)) => {
            Some(format!("write \"{raw}\""))
        }
        (Kind::Texts | Kind::JsonPaths, Raw::Text(_)) => Some(format!("write [{raw}]")),
        _ => None,
    }
}

/// A scalar as JSON; none for anything else.
pub fn json(raw: &Raw) -> Option<serde_json::Value> {
    match raw {
        Raw::Text(text) => Some(text.as_str().into()),
        Raw::Integer(number) => i64::try_from(*number).ok().map(Into::into),
        Raw::Number(number) => serde_json::Number::from_f64(*number).map(Into::into),
        Raw::Boolean(flag) => Some((*flag).into()),
        Raw::Datetime(_) | Raw::List(_) | Raw::Table(_) => None,
    }
}
