//! RFC 9535 singular paths: `a.b`, `a['temperature:0'].tC`, `a[0]`, each with or without the leading `$`.

use std::str::Chars;

/// Deeper than any message we have seen, and far below the depth a payload may have.
const SEGMENTS_MAX: usize = 32;

/// One step from a value to a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    Member(String),
    Item(usize),
}

/// Reads a singular path; the error says what to write instead.
pub(super) fn parse(text: &str) -> Result<Vec<Segment>, String> {
    let mut rest = text.strip_prefix('$').unwrap_or(text).chars();
    let rooted = text.starts_with('$');
    let mut segments = Vec::new();
    loop {
        let before = rest.clone();
        match rest.next() {
            None => break,
            Some('[') => segments.push(bracket(text, &mut rest)?),
            Some('.') if rooted || !segments.is_empty() => segments.push(name(text, &mut rest)?),
            Some(_) if segments.is_empty() && !rooted => {
                rest = before;
                segments.push(name(text, &mut rest)?);
            }
            Some(other) => {
                return Err(format!("path {text:?}: {other:?} where '.' or '[' belongs"));
            }
        }
    }
    match segments.len() {
        0 => Err(format!("path {text:?} names no member")),
        count if count > SEGMENTS_MAX => {
            Err(format!("path {text:?} has {count} steps; at most {SEGMENTS_MAX} are possible"))
        }
        _ => Ok(segments),
    }
}

/// Writes `value` where a singular path leads, making members on the way that are not there.
pub fn write_at(
    document: &mut serde_json::Value,
    path: &str,
    value: serde_json::Value,
) -> Result<(), String> {
    use serde_json::Value;
    let mut place = document;
    for segment in parse(path)? {
        if place.is_null() && matches!(segment, Segment::Member(_)) {
            *place = Value::Object(serde_json::Map::new());
        }
        place = match (place, segment) {
            (Value::Object(members), Segment::Member(name)) => {
                members.entry(name).or_insert(Value::Null)
            }
            (Value::Array(items), Segment::Item(index)) => {
                let count = items.len();
                let missing =
                    || format!("path {path:?}: [{index}] is not there, it has {count} items");
                items.get_mut(index).ok_or_else(missing)?
            }
            (_, Segment::Member(name)) => {
                return Err(format!(
                    "path {path:?}: {name:?} would be a member of what is no object"
                ));
            }
            (_, Segment::Item(index)) => {
                return Err(format!(
                    "path {path:?}: [{index}] would be an item of what is no array"
                ));
            }
        };
    }
    *place = value;
    Ok(())
}

fn name(path: &str, rest: &mut Chars<'_>) -> Result<Segment, String> {
    let text = rest.as_str();
    let end = text.find(['.', '[']).unwrap_or(text.len());
    let (name, behind) = text.split_at(end);
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii();
    if name == "*" || name.is_empty() {
        return Err(format!("path {path:?}: each step names exactly one member"));
    }
    if name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) {
        let quoted = name.replace('\\', r"\\").replace('\'', r"\'");
        return Err(format!("path {path:?}: put the name {name:?} in quotes: ['{quoted}']"));
    }
    *rest = behind.chars();
    Ok(Segment::Member(name.to_owned()))
}

fn bracket(path: &str, rest: &mut Chars<'_>) -> Result<Segment, String> {
    let text = rest.as_str();
    let segment = match text.chars().next() {
        Some(quote @ ('\'' | '"')) => {
            rest.next();
            quoted(path, quote, rest)?
        }
        _ => {
            let end = text.find(']').unwrap_or(text.len());
            let (digits, behind) = text.split_at(end);
            *rest = behind.chars();
            Segment::Item(index(path, digits)?)
        }
    };
    match rest.next() {
        Some(']') => Ok(segment),
        _ => Err(format!("path {path:?}: ']' is missing")),
    }
}

fn index(path: &str, digits: &str) -> Result<usize, String> {
    let canonical = digits == "0" || !digits.starts_with(['0', '+']);
    match digits.parse() {
        Ok(index) if canonical => Ok(index),
        _ => Err(format!(
            "path {path:?}: [{digits}] is neither a quoted name nor an index counted from 0"
        )),
    }
}

fn quoted(path: &str, quote: char, rest: &mut Chars<'_>) -> Result<Segment, String> {
    let mut name = String::new();
    loop {
        match rest.next() {
            Some(c) if c == quote => return Ok(Segment::Member(name)),
            Some('\\') => match rest.next() {
                Some(c @ ('\'' | '"' | '\\' | '/')) => name.push(c),
                Some('n') => name.push('\n'),
                Some('t') => name.push('\t'),
                Some('r') => name.push('\r'),
                Some('b') => name.push('\u{8}'),
                Some('f') => name.push('\u{c}'),
                _ => {
                    return Err(format!(
                        "path {path:?}: write the character itself instead of this escape"
                    ));
                }
            },
            Some(c) => name.push(c),
            None => return Err(format!("path {path:?}: the closing {quote} is missing")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str) -> Segment {
        Segment::Member(name.to_owned())
    }

    #[test]
    fn singular_paths_with_and_without_the_root() {
        for (text, expected) in [
            ("a", vec![member("a")]),
            ("$.a", vec![member("a")]),
            ("a.b.c", vec![member("a"), member("b"), member("c")]),
            (
                "params['temperature:0'].tC",
                vec![member("params"), member("temperature:0"), member("tC")],
            ),
            ("$[\"x y\"][0]", vec![member("x y"), Segment::Item(0)]),
            ("a[12].b", vec![member("a"), Segment::Item(12), member("b")]),
            (r"['it\'s']", vec![member("it's")]),
            ("['a.b']", vec![member("a.b")]),
            ("größe", vec![member("größe")]),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn whatever_is_not_singular_is_refused() {
        for text in [
            "",
            "$",
            ".a",
            "a.",
            "a..b",
            "a[*]",
            "*",
            "a[-1]",
            "a[01]",
            "a[",
            "a['b",
            "a['b'",
            "a]b",
            "temperature:0",
            "a b",
            "a[0]b",
            "$a",
            "0a",
            "a[1:2]",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("temperature:0").unwrap_err().contains("['temperature:0']"));
    }
}
