//! A field of the configuration, compiled for one use.

use serde_json::Value as Json;

use super::clock::DeviceClock;
use super::decimal::Decimal;
use super::path;
use super::scan::{Scanner, Slot};
use super::{MappingError, cut};
use crate::config::{
    FieldSettings, FieldSource, FieldType, FilterSettings, FilterTest, OutOfRange, Rounding,
};

/// Which of the two forms of a field is made: the width of a column binds the row, not the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Record,
    Table,
}

/// Where a value comes from, with paths resolved to slots.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Slots(Vec<Slot>),
    TopicLevel(usize),
    Constant(Scalar),
    Arrival,
    Flags,
}

/// A value the configuration itself gives: a constant, a default, an entry of a value map.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scalar {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

/// Scale and offset, exact and as doubles for the rare value that needs more digits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Linear {
    pub(super) scale: f64,
    pub(super) offset: f64,
    pub(super) exact: Option<(Decimal, Decimal)>,
}

#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) source: Source,
    /// The type in this use.
    pub(super) field_type: FieldType,
    pub(super) this_use: Use,
    pub(super) required: bool,
    pub(super) rounding: Rounding,
    pub(super) min: Option<f64>,
    pub(super) max: Option<f64>,
    pub(super) out_of_range: OutOfRange,
    pub(super) default: Option<Scalar>,
    pub(super) linear: Option<Linear>,
    pub(super) bit: Option<u8>,
    pub(super) values: Option<Vec<(String, Scalar)>>,
    pub(super) boolean_as_number: bool,
    pub(super) text_as_number: bool,
    pub(super) clock: DeviceClock,
}

/// The condition that decides whether a message counts at all.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    pub(super) source: Source,
    pub(super) test: FilterTest,
}

/// Collects the problems of one stream, each with the field it belongs to.
#[derive(Debug, Default)]
pub(super) struct Problems(pub(super) Vec<MappingError>);

impl Problems {
    pub(super) fn add(&mut self, field: &str, problem: impl Into<String>) {
        self.0.push(MappingError { field: field.to_owned(), problem: problem.into() });
    }
}

impl Rule {
    pub(super) fn compile(
        name: &str,
        settings: &FieldSettings,
        this_use: Use,
        scanner: &mut Scanner,
        problems: &mut Problems,
    ) -> Self {
        check(name, settings, problems);
        let field_type = match this_use {
            Use::Record => settings.record_type.unwrap_or(settings.field_type),
            Use::Table => settings.field_type,
        };
        let scalar = |json: &Json, problems: &mut Problems| {
            Scalar::of(json, field_type).unwrap_or_else(|problem| {
                problems.add(name, problem);
                Scalar::Null
            })
        };
        let values = settings.values.as_ref().map(|values| {
            values.iter().map(|(key, json)| (key.clone(), scalar(json, problems))).collect()
        });
        Rule {
            name: name.to_owned(),
            default: settings.default.as_ref().map(|json| scalar(json, problems)),
            source: Source::compile(name, &settings.source, Some(field_type), scanner, problems),
            field_type,
            this_use,
            required: settings.required,
            rounding: settings.rounding,
            min: settings.min,
            max: settings.max,
            out_of_range: settings.out_of_range,
            linear: Linear::of(settings),
            bit: settings.bit,
            values,
            boolean_as_number: settings.boolean_as_number,
            text_as_number: settings.text_as_number,
            clock: DeviceClock::new(&settings.timestamp),
        }
    }

    /// Whether this use never has NULL here; `admitted` = the message passed the required fields.
    pub(super) fn never_null(&self) -> bool {
        let can_become_null = self.out_of_range == OutOfRange::Null && self.is_numeric()
            || self.values.iter().flatten().any(|(_, value)| *value == Scalar::Null);
        match &self.source {
            Source::Constant(_) | Source::Arrival => true,
            Source::Flags => false,
            _ => (self.required || self.default.is_some()) && !can_become_null,
        }
    }

    pub(super) fn is_numeric(&self) -> bool {
        !matches!(self.field_type, FieldType::Boolean | FieldType::Text | FieldType::Timestamp)
    }
}

impl Linear {
    fn of(settings: &FieldSettings) -> Option<Self> {
        let (scale, offset) = (settings.scale, settings.offset);
        if scale == 1.0 && offset == 0.0 {
            return None;
        }
        let exact = Decimal::from_f64(scale).zip(Decimal::from_f64(offset));
        Some(Linear { scale, offset, exact })
    }
}

impl Source {
    fn compile(
        name: &str,
        source: &FieldSource,
        field_type: Option<FieldType>,
        scanner: &mut Scanner,
        problems: &mut Problems,
    ) -> Self {
        match source {
            FieldSource::Paths(paths) => {
                if paths.is_empty() {
                    problems.add(name, "has no path");
                }
                let mut slots = Vec::with_capacity(paths.len());
                for text in paths {
                    match path::parse(text) {
                        Ok(path) => slots.push(scanner.slot(&path)),
                        Err(problem) => problems.add(name, problem),
                    }
                }
                Source::Slots(slots)
            }
            FieldSource::TopicLevel(0) => {
                problems.add(name, "topic levels are counted from 1");
                Source::TopicLevel(1)
            }
            FieldSource::TopicLevel(level) => Source::TopicLevel(*level),
            FieldSource::Constant(json) => {
                let scalar = Scalar::of(json, field_type.unwrap_or(FieldType::Text));
                Source::Constant(scalar.and_then(Scalar::not_null).unwrap_or_else(|problem| {
                    problems.add(name, problem);
                    Scalar::Null
                }))
            }
            FieldSource::Arrival => Source::Arrival,
            FieldSource::Flags => Source::Flags,
        }
    }

    /// A value of the message itself, not of the configuration or the node.
    pub(super) fn is_of_message(&self) -> bool {
        matches!(self, Source::Slots(_) | Source::TopicLevel(_))
    }
}

impl Scalar {
    /// The JSON value of the configuration as this type; the error names both.
    fn of(json: &Json, field_type: FieldType) -> Result<Self, String> {
        let value = match (json, field_type) {
            (Json::Null, _) => Some(Scalar::Null),
            (Json::Bool(value), FieldType::Boolean) => Some(Scalar::Bool(*value)),
            (Json::String(text), FieldType::Text) => Some(Scalar::Text(text.clone())),
            (Json::Number(number), FieldType::Float8) => number.as_f64().map(Scalar::Float),
            (Json::Number(number), _) => integer_range(field_type).and_then(|range| {
                let integer = Decimal::parse(&number.to_string())?;
                let integer = integer.to_integer(Rounding::Reject).ok()?;
                range.contains(&integer).then_some(Scalar::Int(integer))
            }),
            _ => None,
        };
        value.ok_or_else(|| format!("{} is no {}", cut(&json.to_string()), type_name(field_type)))
    }

    fn not_null(self) -> Result<Self, String> {
        if self == Scalar::Null {
            return Err("a constant needs a value".to_owned());
        }
        Ok(self)
    }
}

impl Filter {
    pub(super) fn compile(
        settings: &FilterSettings,
        scanner: &mut Scanner,
        problems: &mut Problems,
    ) -> Self {
        let source = Source::compile("filter", &settings.source, None, scanner, problems);
        if !source.is_of_message() {
            problems.add("filter", "asks for something every message has; use a path");
        }
        if let FilterTest::OneOf(values) | FilterTest::NoneOf(values) = &settings.test {
            for value in values.iter().filter(|value| value.is_array() || value.is_object()) {
                problems.add("filter", format!("{} is no scalar", cut(&value.to_string())));
            }
        }
        Filter { source, test: settings.test.clone() }
    }
}

/// Combinations of settings that contradict each other.
fn check(name: &str, settings: &FieldSettings, problems: &mut Problems) {
    let integer = integer_range(settings.field_type).is_some();
    let numeric = integer || settings.field_type == FieldType::Float8;
    let kind = type_name(settings.field_type);
    if settings.bit.is_some() && settings.field_type != FieldType::Boolean {
        problems.add(name, format!("a bit is a boolean, not {kind}"));
    }
    if settings.bit.is_some_and(|bit| bit > 62) {
        problems.add(name, "bits are counted from 0 to 62");
    }
    if settings.bit.is_some() && settings.values.is_some() {
        problems.add(name, "has a bit and a value map; give one of them");
    }
    if !numeric {
        let mut numeric_only = |set: bool, what: &str| {
            if set {
                problems.add(name, format!("{what} needs a numeric type, not {kind}"));
            }
        };
        numeric_only(settings.scale != 1.0 || settings.offset != 0.0, "scale or offset");
        numeric_only(settings.min.is_some() || settings.max.is_some(), "min or max");
        numeric_only(settings.boolean_as_number, "boolean_as_number");
        numeric_only(settings.text_as_number, "text_as_number");
    }
    if !settings.scale.is_finite() || !settings.offset.is_finite() || settings.scale == 0.0 {
        problems.add(name, "scale and offset are finite and scale is not 0");
    }
    if settings.min.zip(settings.max).is_some_and(|(min, max)| min > max) {
        problems.add(name, "min is greater than max");
    }
    let may_vanish = settings.out_of_range == OutOfRange::Null;
    if settings.required && may_vanish && numeric {
        problems.add(name, "is required, so out_of_range cannot be null");
    }
    let timeless = settings.field_type != FieldType::Timestamp;
    if settings.source == FieldSource::Arrival && timeless {
        problems.add(name, format!("the arrival is a timestamp, not {kind}"));
    }
    if settings.source == FieldSource::Flags && settings.field_type != FieldType::Text {
        problems.add(name, format!("flags are text, not {kind}"));
    }
    if settings.source == FieldSource::Flags && settings.required {
        problems.add(name, "flags are null when there are none, so they cannot be required");
    }
}

/// The values an integer type holds; `None` for other types.
pub(super) fn integer_range(field_type: FieldType) -> Option<std::ops::RangeInclusive<i64>> {
    match field_type {
        FieldType::Int2 => Some(i64::from(i16::MIN)..=i64::from(i16::MAX)),
        FieldType::Int4 => Some(i64::from(i32::MIN)..=i64::from(i32::MAX)),
        FieldType::Int8 => Some(i64::MIN..=i64::MAX),
        _ => None,
    }
}

/// The name used in the configuration.
pub(super) fn type_name(field_type: FieldType) -> &'static str {
    match field_type {
        FieldType::Int2 => "int2",
        FieldType::Int4 => "int4",
        FieldType::Int8 => "int8",
        FieldType::Float8 => "float8",
        FieldType::Boolean => "boolean",
        FieldType::Text => "text",
        FieldType::Timestamp => "timestamp",
    }
}
