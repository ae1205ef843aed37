//! The path of a declared message id: an RFC 9535 singular path without the leading `$.`, such as `params.ts`,
//! `params['temperature:0'].id` or `list[0]`.

use serde_json::Value;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Member(String),
    Index(usize),
}

/// A compiled path. What cannot be read as a path names a member as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MessageIdPath(Vec<Segment>);

impl MessageIdPath {
    pub fn parse(text: &str) -> Self {
        let plain = text.strip_prefix('$').unwrap_or(text);
        match segments(plain) {
            Some(segments) if !segments.is_empty() => MessageIdPath(segments),
            _ => MessageIdPath(vec![Segment::Member(text.to_owned())]),
        }
    }

    /// The value at the path; `None` when it ends before.
    pub fn find<'v>(&self, document: &'v Value) -> Option<&'v Value> {
        self.0.iter().try_fold(document, |value, segment| match segment {
            Segment::Member(name) => value.as_object()?.get(name),
            Segment::Index(index) => value.as_array()?.get(*index),
        })
    }
}

fn segments(mut rest: &str) -> Option<Vec<Segment>> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let (segment, after) = bracket(inner)?;
            found.push(segment);
            rest = after;
        } else {
            let name = rest.strip_prefix('.').unwrap_or(rest);
            let end = name.find(['.', '[']).unwrap_or(name.len());
            let (name, after) = name.split_at(end);
            if name.is_empty() {
                return None;
            }
            found.push(Segment::Member(name.to_owned()));
            rest = after;
        }
    }
    Some(found)
}

fn bracket(inner: &str) -> Option<(Segment, &str)> {
    for quote in ['\'', '"'] {
        if let Some(quoted) = inner.strip_prefix(quote) {
            let (name, after) = quoted.split_once(quote)?;
            return Some((Segment::Member(name.to_owned()), after.strip_prefix(']')?));
        }
    }
    let (index, after) = inner.split_once(']')?;
    Some((Segment::Index(index.parse().ok()?), after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_members_quoted_members_and_elements() {
        let document = serde_json::json!({"a": {"b:0": [7, {"c.d": 8}]}, "x.y[": 9});
        for (path, value) in [
            ("a['b:0'][0]", Some(7)),
            ("$.a[\"b:0\"][1]['c.d']", Some(8)),
            ("x.y[", Some(9)),
            ("a.b", None),
            ("a['b:0'][2]", None),
        ] {
            let found = MessageIdPath::parse(path).find(&document).and_then(Value::as_i64);
            assert_eq!(found, value, "{path}");
        }
    }
}
