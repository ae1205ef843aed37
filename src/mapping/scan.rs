//! One pass over a payload: the members that fields name are remembered as spans of the text, everything else is
//! skipped. No document tree is built, and after the first messages nothing is allocated.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::path::Segment;
use crate::domain::Reason;

/// Levels of nesting a payload may have; the outermost object is the first.
const DEPTH_MAX: usize = 128;
/// Names of unmapped members remembered by one mapper.
const UNMAPPED_NAMES_MAX: usize = 100;
/// A longer name counts among [`OTHER_NAMES`].
const UNMAPPED_NAME_BYTES_MAX: usize = 128;
/// Where members beyond the bounds are counted.
const OTHER_NAMES: &str = "(other names)";

/// Index of a captured value.
pub(super) type Slot = usize;

/// Where a captured value stands in the text; empty = missing or null.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    start: usize,
    end: usize,
}

/// A member an object may have.
#[derive(Debug)]
struct Member {
    name: Box<str>,
    target: Target,
}

#[derive(Debug, Clone, Copy)]
enum Target {
    Node(usize),
    /// Learned: index into `Scanner::unmapped`.
    Unmapped(usize),
}

/// One place in the tree of all paths.
#[derive(Debug, Default)]
struct Node {
    /// Dotted, for people.
    path: String,
    members: Vec<Member>,
    items: Vec<(usize, usize)>,
    slot: Option<Slot>,
    /// Slots of this node and all below it: forgotten when the member comes a second time.
    slots: Vec<Slot>,
    /// Where the next member is looked for first: devices send their members in one order.
    next: usize,
}

/// The tree of all paths of a mapping, and what the last payload had there.
#[derive(Debug)]
pub(super) struct Scanner {
    nodes: Vec<Node>,
    spans: Vec<Span>,
    unmapped: Vec<(String, u64)>,
}

/// Why a payload is no JSON object we read.
#[derive(Debug, PartialEq)]
pub(super) struct Unreadable {
    pub(super) reason: Reason,
    pub(super) detail: String,
}

impl Scanner {
    pub(super) fn new() -> Self {
        let unmapped = vec![(OTHER_NAMES.to_owned(), 0)];
        Scanner { nodes: vec![Node::default()], spans: Vec::new(), unmapped }
    }

    /// The slot of this path; equal paths share one.
    pub(super) fn slot(&mut self, path: &[Segment]) -> Slot {
        let mut trail = vec![0];
        let mut node = 0;
        for segment in path {
            node = self.child(node, segment);
            trail.push(node);
        }
        if let Some(slot) = self.nodes[node].slot {
            return slot;
        }
        let slot = self.spans.len();
        self.spans.push(Span::default());
        self.nodes[node].slot = Some(slot);
        for node in trail {
            self.nodes[node].slots.push(slot);
        }
        slot
    }

    fn child(&mut self, parent: usize, segment: &Segment) -> usize {
        let id = self.nodes.len();
        let node = &mut self.nodes[parent];
        let path = match segment {
            Segment::Member(name) => {
                let known = node.members.iter().find(|member| *member.name == **name);
                if let Some(Member { target: Target::Node(child), .. }) = known {
                    return *child;
                }
                let target = Target::Node(id);
                node.members.push(Member { name: name.as_str().into(), target });
                dotted(&node.path, name)
            }
            Segment::Item(index) => {
                if let Some((_, child)) = node.items.iter().find(|(at, _)| at == index) {
                    return *child;
                }
                node.items.push((*index, id));
                format!("{}[{index}]", node.path)
            }
        };
        self.nodes.push(Node { path, ..Node::default() });
        id
    }

    /// Reads one payload; afterwards [`Scanner::raw`] answers from it.
    pub(super) fn scan<'p>(&mut self, payload: &'p [u8]) -> Result<&'p str, Unreadable> {
        self.spans.fill(Span::default());
        let text = std::str::from_utf8(payload).map_err(|error| {
            let detail = format!("payload: byte {} is not UTF-8", error.valid_up_to());
            Unreadable { reason: Reason::NotUtf8, detail }
        })?;
        check_depth(payload)?;
        let not_json = |error: serde_json::Error| Unreadable {
            reason: Reason::NotJson,
            detail: format!("payload is not JSON: {error}"),
        };
        if text.trim_start_matches([' ', '\t', '\n', '\r']).starts_with('{') {
            let mut json = serde_json::Deserializer::from_str(text);
            let walk = Walk { scanner: self, node: 0, base: text.as_ptr() as usize };
            walk.deserialize(&mut json).map_err(not_json)?;
            json.end().map_err(not_json)?;
            return Ok(text);
        }
        serde_json::from_str::<IgnoredAny>(text).map_err(not_json)?;
        let detail = format!("payload {} is no JSON object", super::cut(text.trim()));
        Err(Unreadable { reason: Reason::NotAnObject, detail })
    }

    /// The raw JSON text of a value of the last payload; `None` when missing or null.
    pub(super) fn raw<'p>(&self, slot: Slot, text: &'p str) -> Option<&'p str> {
        let span = self.spans[slot];
        text.get(span.start..span.end).filter(|raw| !raw.is_empty())
    }

    /// The member of `node` called `name`, learning a name nothing maps.
    fn find(&mut self, node: usize, name: &str) -> Target {
        let place = &mut self.nodes[node];
        let (before, from) = place.members.split_at(place.next.min(place.members.len()));
        let found = from.iter().position(|member| *member.name == *name);
        let found = match found {
            Some(at) => Some(at + before.len()),
            None => before.iter().position(|member| *member.name == *name),
        };
        if let Some(at) = found {
            place.next = at + 1;
            return place.members[at].target;
        }
        if self.unmapped.len() > UNMAPPED_NAMES_MAX || name.len() > UNMAPPED_NAME_BYTES_MAX {
            return Target::Unmapped(0);
        }
        let target = Target::Unmapped(self.unmapped.len());
        self.unmapped.push((dotted(&place.path, name), 0));
        place
            .members
            .insert(place.next.min(place.members.len()), Member { name: name.into(), target });
        place.next += 1;
        target
    }

    /// Remembers a value, and what the paths below it name.
    fn capture<E: serde::de::Error>(
        &mut self,
        id: usize,
        raw: &RawValue,
        base: usize,
    ) -> Result<(), E> {
        let node = &self.nodes[id];
        for slot in &node.slots {
            self.spans[*slot] = Span::default();
        }
        let text = raw.get();
        if let Some(slot) = node.slot
            && text != "null"
        {
            let start = text.as_ptr() as usize - base;
            self.spans[slot] = Span { start, end: start + text.len() };
        }
        let into_members = text.starts_with('{') && !node.members.is_empty();
        let into_items = text.starts_with('[') && !node.items.is_empty();
        if into_members || into_items {
            let mut json = serde_json::Deserializer::from_str(text);
            Walk { scanner: self, node: id, base }.deserialize(&mut json).map_err(E::custom)?;
        }
        Ok(())
    }

    /// Members no path names since the last call, with their counts.
    pub(super) fn take_unmapped(&mut self) -> Vec<(String, u64)> {
        let seen = self.unmapped.iter_mut().filter(|(_, count)| *count > 0);
        seen.map(|(path, count)| (path.clone(), std::mem::take(count))).collect()
    }
}

fn dotted(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}

/// serde_json skips values without counting levels, so the bound is ours. Few payloads have that many brackets at all.
fn check_depth(payload: &[u8]) -> Result<(), Unreadable> {
    let opening = payload.iter().filter(|byte| matches!(byte, b'{' | b'[')).count();
    if opening <= DEPTH_MAX {
        return Ok(());
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in payload {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => depth += 1,
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEPTH_MAX {
            let detail = format!("payload is nested more than {DEPTH_MAX} levels deep");
            return Err(Unreadable { reason: Reason::TooDeep, detail });
        }
    }
    Ok(())
}

/// Walks one object or array, whose value is known to begin with its bracket.
struct Walk<'s> {
    scanner: &'s mut Scanner,
    node: usize,
    /// Address of the payload's first byte, to turn a slice into a span.
    base: usize,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.scanner.nodes[self.node].next = 0;
        while let Some(target) =
            map.next_key_seed(Name { scanner: self.scanner, node: self.node })?
        {
            match target {
                Target::Node(child) => {
                    let raw: &'de RawValue = map.next_value()?;
                    self.scanner.capture(child, raw, self.base)?;
                }
                Target::Unmapped(at) => {
                    self.scanner.unmapped[at].1 += 1;
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut index = 0;
        while let Some(raw) = seq.next_element::<&'de RawValue>()? {
            let items = &self.scanner.nodes[self.node].items;
            if let Some((_, child)) = items.iter().find(|(at, _)| *at == index) {
                self.scanner.capture(*child, raw, self.base)?;
            }
            index += 1;
        }
        Ok(())
    }
}

/// Looks a member's name up while it is still in the parser's hands.
struct Name<'s> {
    scanner: &'s mut Scanner,
    node: usize,
}

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = Target;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Target, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = Target;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Target, E> {
        Ok(self.scanner.find(self.node, name))
    }
}

#[cfg(test)]
mod tests {
    use super::super::path;
    use super::*;

    fn scanned<'p>(paths: &[&str], payload: &'p str) -> Vec<Option<&'p str>> {
        let mut scanner = Scanner::new();
        let slots: Vec<Slot> =
            paths.iter().map(|text| scanner.slot(&path::parse(text).unwrap())).collect();
        let text = scanner.scan(payload.as_bytes()).unwrap();
        slots.into_iter().map(|slot| scanner.raw(slot, text)).collect()
    }

    #[test]
    fn values_are_slices_of_the_payload() {
        let payload = r#" {"a": {"b": 1.50, "x": [10, {"y": "z"}]}, "c": null, "n.m": true} "#;
        assert_eq!(
            scanned(&["a.b", "a.x[1].y", "c", "['n.m']", "n.m", "a", "a.b.q", "a.x[7]"], payload),
            [
                Some("1.50"),
                Some("\"z\""),
                None,
                Some("true"),
                None,
                Some(r#"{"b": 1.50, "x": [10, {"y": "z"}]}"#),
                None,
                None
            ]
        );
    }

    #[test]
    fn of_a_member_twice_the_last_counts_with_all_below_it() {
        assert_eq!(scanned(&["a"], r#"{"a": 1, "a": 2}"#), [Some("2")]);
        assert_eq!(scanned(&["a"], r#"{"a": 1, "a": null}"#), [None]);
        assert_eq!(
            scanned(&["a.b", "a.c"], r#"{"a": {"b": 1, "c": 2}, "a": {"c": 3}}"#),
            [None, Some("3")]
        );
        assert_eq!(scanned(&["a.b"], r#"{"a": {"b": 1}, "a": 7}"#), [None]);
        assert_eq!(scanned(&["a"], r#"{"\u0061": 5}"#), [Some("5")]);
    }

    #[test]
    fn a_value_in_the_way_of_a_path_is_not_looked_into() {
        for in_the_way in ["1e999", "\"\\ud800\"", "[1]", "true"] {
            assert_eq!(scanned(&["a.b"], &format!(r#"{{"a": {in_the_way}}}"#)), [None]);
        }
    }

    #[test]
    fn unmapped_members_are_counted_by_path_and_bounded() {
        let mut scanner = Scanner::new();
        scanner.slot(&path::parse("a.b").unwrap());
        for _ in 0..3 {
            scanner.scan(br#"{"x": 1, "a": {"b": 1, "y": {"deep": 2}}, "x": 3}"#).unwrap();
        }
        let seen = [("x".to_owned(), 6), ("a.y".to_owned(), 3)];
        assert_eq!(scanner.take_unmapped(), seen);
        assert_eq!(scanner.take_unmapped(), []);
        let many: Vec<String> = (0..10_000).map(|n| format!("\"n{n}\": 0")).collect();
        scanner.scan(format!("{{{}}}", many.join(",")).as_bytes()).unwrap();
        let seen = scanner.take_unmapped();
        assert!(seen.len() <= UNMAPPED_NAMES_MAX + 1, "{}", seen.len());
        assert_eq!(seen.iter().map(|(_, count)| count).sum::<u64>(), 10_000);
    }

    fn reason(payload: &[u8]) -> Option<Reason> {
        let mut scanner = Scanner::new();
        scanner.slot(&path::parse("a").unwrap());
        scanner.scan(payload).err().map(|unreadable| unreadable.reason)
    }

    #[test]
    fn each_unreadable_payload_has_its_own_reason() {
        assert_eq!(reason(b"{}"), None);
        assert_eq!(reason(b" {} \n"), None);
        assert_eq!(reason(b"\xff"), Some(Reason::NotUtf8));
        assert_eq!(reason(b"[]"), Some(Reason::NotAnObject));
        assert_eq!(reason(b"1e999"), Some(Reason::NotAnObject));
        for text in [
            " ",
            "{",
            "{} x",
            "{}{}",
            "\u{feff}{}",
            "{\"a\": NaN}",
            "{\"a\": 01}",
            "{'a': 1}",
            "{\"a\": 1,}",
            "{\"b\": \"\u{1}\"}",
            "{\"a\": tru}",
        ] {
            assert_eq!(reason(text.as_bytes()), Some(Reason::NotJson), "{text}");
        }
    }

    #[test]
    fn depth_is_bounded_also_in_values_nobody_reads() {
        let nested = |levels: usize| {
            let (open, close) = ("[".repeat(levels - 1), "]".repeat(levels - 1));
            format!("{{\"b\": {open}{close}}}").into_bytes()
        };
        assert_eq!(reason(&nested(128)), None);
        assert_eq!(reason(&nested(129)), Some(Reason::TooDeep));
        assert_eq!(reason(&nested(10_000)), Some(Reason::TooDeep));
        let brackets = format!(r#"{{"b": "\"{}"}}"#, "[".repeat(500));
        assert_eq!(reason(brackets.as_bytes()), None);
    }
}
