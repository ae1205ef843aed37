//! What both mappers do: compile the fields, read a message, and decide whether it counts before any value is
//! converted. The order is size, UTF-8 and JSON, filter, device id, required fields, conversion, range.

use std::borrow::Cow;

use super::convert::{Converted, Flags, Raw, Refusal, convert, unquoted};
use super::rule::{Filter, Problems, Rule, Source, Use};
use super::scan::{Scanner, Unreadable};
use super::{Fault, Observed};
use crate::config::{FieldType, FilterTest, MappingSettings};
use crate::domain::{Arrival, Reason, Record, Stage};

/// The compiled mapping of one stream for one use.
#[derive(Debug)]
pub(super) struct Plan {
    scanner: Scanner,
    payload_bytes_max: usize,
    filter: Option<Filter>,
    /// Index into `rules`.
    device_id: usize,
    /// Indexes into `rules`; empty = no such condition in this use.
    require_any: Vec<usize>,
    /// Every field of the mapping, in the order of the file.
    pub(super) rules: Vec<Rule>,
    mapped: u64,
    device_time_invalid: u64,
    out_of_range: u64,
}

/// A message that counts, ready for its values to be converted.
#[derive(Debug)]
pub(super) struct Message<'p> {
    pub(super) text: &'p str,
    topic: &'p str,
    arrival: Arrival,
    pub(super) device_id: Cow<'p, str>,
}

/// Why a message yields nothing for this use.
#[derive(Debug, PartialEq)]
pub(super) enum Stop {
    Filtered,
    Incomplete,
    Dead(Fault),
}

impl Plan {
    pub(super) fn compile(
        mapping: &MappingSettings,
        this_use: Use,
        problems: &mut Problems,
    ) -> Self {
        let mut scanner = Scanner::new();
        let rules: Vec<Rule> = mapping
            .fields
            .iter()
            .map(|(name, field)| Rule::compile(name, field, this_use, &mut scanner, problems))
            .collect();
        let filter = mapping.filter.as_ref();
        let filter = filter.map(|filter| Filter::compile(filter, &mut scanner, problems));
        let device_id = mapping.fields.get_index_of(&mapping.device_id).unwrap_or_else(|| {
            problems.add(&mapping.device_id, "is the device id, but no field has this name");
            0
        });
        if let Some(rule) = rules.get(device_id) {
            check_device_id(rule, problems);
        }
        let mut require_any = Vec::new();
        for name in &mapping.require_any {
            match mapping.fields.get_index_of(name) {
                Some(index) => require_any.push(index),
                None => problems.add(name, "stands in require_any, but no field has this name"),
            }
        }
        Plan {
            scanner,
            payload_bytes_max: mapping.payload_bytes_max,
            filter,
            device_id,
            require_any,
            rules,
            mapped: 0,
            device_time_invalid: 0,
            out_of_range: 0,
        }
    }

    /// Keeps of `require_any` only what this use contains; the record needs only the device id.
    pub(super) fn restrict_require_any(&mut self, contains: impl Fn(usize) -> bool) {
        if !self.require_any.iter().any(|index| contains(*index)) {
            self.require_any.clear();
        }
    }

    /// Reads the message, applies the filter and finds the device id.
    pub(super) fn admit<'p>(&mut self, record: &'p Record<'_>) -> Result<Message<'p>, Stop> {
        let text = self.read(record)?;
        let mut message = Message {
            text,
            topic: record.topic,
            arrival: record.arrival,
            device_id: Cow::Borrowed(""),
        };
        self.passes_filter(&message)?;
        message.device_id = self.device_id(&message)?;
        Ok(message)
    }

    fn read<'p>(&mut self, record: &'p Record<'_>) -> Result<&'p str, Stop> {
        let payload = record.payload;
        let unreadable = |Unreadable { reason, detail }| {
            Stop::Dead(Fault { stage: Stage::Decode, reason, field: None, detail })
        };
        let refused = |reason, detail: String| Err(unreadable(Unreadable { reason, detail }));
        let max = self.payload_bytes_max;
        match payload.len() {
            0 => refused(Reason::Empty, "payload is empty".to_owned()),
            _ if record.flags.truncated => refused(
                Reason::TooLarge,
                "payload was larger than the broker's packet bound".into(),
            ),
            size if size > max => {
                refused(Reason::TooLarge, format!("payload has {size} bytes; the bound is {max}"))
            }
            _ => self.scanner.scan(payload).map_err(unreadable),
        }
    }

    fn passes_filter(&self, message: &Message<'_>) -> Result<(), Stop> {
        let Some(filter) = &self.filter else {
            return Ok(());
        };
        let raw = self.raw(&filter.source, message);
        let among = |values: &[serde_json::Value]| match raw {
            Some(raw) => values.iter().any(|value| raw.equals(value)),
            None => values.iter().any(serde_json::Value::is_null),
        };
        match (&filter.test, raw) {
            (FilterTest::OneOf(values), _) if among(values) => Ok(()),
            // Without the member that tells its kind a message is not of another kind, it is incomplete.
            (FilterTest::OneOf(_), None) => Err(Stop::Incomplete),
            (FilterTest::NoneOf(values), _) if !among(values) => Ok(()),
            (FilterTest::Exists, Some(_)) => Ok(()),
            _ => Err(Stop::Filtered),
        }
    }

    /// The device id, never an invented one.
    fn device_id<'p>(&self, message: &Message<'p>) -> Result<Cow<'p, str>, Stop> {
        let Some(rule) = self.rules.get(self.device_id) else {
            return Ok(Cow::Borrowed(""));
        };
        let fault = |reason, detail| {
            let field = Some(rule.name.clone());
            Stop::Dead(Fault { stage: Stage::Map, reason, field, detail })
        };
        let mut flags = Flags::default();
        let id = match self.raw(&rule.source, message) {
            Some(Raw::Topic(text)) => Some(Cow::Borrowed(text)),
            Some(raw @ Raw::Json(json)) => {
                convert(rule, raw, message.arrival, &mut flags)
                    .map_err(|refusal| fault(refusal.reason, refusal.detail))?;
                unquoted(json)
            }
            None => match &rule.source {
                Source::Constant(super::rule::Scalar::Text(text)) => Some(text.clone().into()),
                _ => None,
            },
        };
        id.filter(|id| !id.is_empty()).ok_or_else(|| {
            let detail = format!("{}: the device id is missing, null or empty", rule.name);
            fault(Reason::NoDeviceId, detail)
        })
    }

    /// Whether the fields this use requires are there.
    pub(super) fn is_complete(
        &self,
        message: &Message<'_>,
        mut fields: impl Iterator<Item = usize>,
    ) -> bool {
        let present = |index: &usize| self.is_present(*index, message);
        fields.all(|index| {
            let rule = &self.rules[index];
            !rule.required || rule.default.is_some() || present(&index)
        }) && (self.require_any.is_empty() || self.require_any.iter().any(present))
    }

    /// Whether the message itself has a value for this field.
    pub(super) fn is_present(&self, index: usize, message: &Message<'_>) -> bool {
        let source = &self.rules[index].source;
        !source.is_of_message() || self.raw(source, message).is_some()
    }

    /// The first of the source's values that is present.
    pub(super) fn raw<'p>(&self, source: &Source, message: &Message<'p>) -> Option<Raw<'p>> {
        match source {
            Source::Slots(slots) => {
                let found = slots.iter().find_map(|slot| self.scanner.raw(*slot, message.text));
                found.map(Raw::Json)
            }
            Source::TopicLevel(level) => {
                let level = message.topic.split('/').nth(level - 1);
                level.filter(|text| !text.is_empty()).map(Raw::Topic)
            }
            Source::Constant(_) | Source::Arrival | Source::Flags => None,
        }
    }

    /// The value of one field. Flags are known only after the others: see [`Plan::flags_value`].
    pub(super) fn value<'p>(
        &'p self,
        index: usize,
        message: &Message<'p>,
        flags: &mut Flags,
    ) -> Result<Converted<'p>, Refusal> {
        let rule = &self.rules[index];
        match &rule.source {
            Source::Constant(scalar) => Ok(Converted::of_scalar(scalar)),
            Source::Arrival => Ok(Converted::Timestamp(message.arrival.0)),
            Source::Flags => Ok(Converted::Null),
            source => match (self.raw(source, message), &rule.default) {
                (Some(raw), _) => convert(rule, raw, message.arrival, flags),
                (None, Some(default)) => Ok(Converted::of_scalar(default)),
                (None, None) => Ok(Converted::Null),
            },
        }
    }

    /// What a field of [`Source::Flags`] holds.
    pub(super) fn flags_value(flags: Flags) -> Converted<'static> {
        match flags.names() {
            None => Converted::Null,
            Some(names) => Converted::Text { value: Cow::Borrowed(names), raw: None },
        }
    }

    /// Books one mapped message.
    pub(super) fn count(&mut self, flags: Flags) {
        self.mapped += 1;
        self.device_time_invalid += u64::from(flags.device_time_invalid);
        self.out_of_range += u64::from(flags.out_of_range);
    }

    pub(super) fn observed(&mut self) -> Observed {
        Observed {
            unmapped: self.scanner.take_unmapped(),
            device_time_invalid: std::mem::take(&mut self.device_time_invalid),
            out_of_range: std::mem::take(&mut self.out_of_range),
            mapped: std::mem::take(&mut self.mapped),
        }
    }
}

fn check_device_id(rule: &Rule, problems: &mut Problems) {
    if rule.field_type != FieldType::Text {
        problems.add(&rule.name, "is the device id, so its type is text");
    }
    if rule.default.is_some() {
        problems.add(&rule.name, "is the device id, so it has no default: an id is never invented");
    }
    if rule.values.is_some() {
        problems.add(&rule.name, "is the device id, so it has no value map");
    }
    if matches!(rule.source, Source::Arrival | Source::Flags) {
        problems
            .add(&rule.name, "is the device id: take it from a path, a topic level or a constant");
    }
}
