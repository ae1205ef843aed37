//! One raw value to one typed value, by the rule of its field.

use std::borrow::Cow;

use serde_json::Value as Json;

use super::cut;
use super::decimal::{self, Decimal, NotAnInteger};
use super::rule::{Linear, Rule, Scalar, Use, integer_range, type_name};
use crate::config::{FieldType, OutOfRange, Rounding};
use crate::domain::{Arrival, Reason};

/// A value as it came.
#[derive(Debug, Clone, Copy)]
pub(super) enum Raw<'p> {
    /// JSON text, not null.
    Json(&'p str),
    /// A topic level, not empty.
    Topic(&'p str),
}

/// A value as a use gets it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Converted<'p> {
    Null,
    Bool(bool),
    Int(i64),
    /// `raw` is the number as sent, where nothing changed it.
    Float {
        value: f64,
        raw: Option<&'p str>,
    },
    /// `raw` is the JSON string as sent.
    Text {
        value: Cow<'p, str>,
        raw: Option<&'p str>,
    },
    /// Microseconds since 1970.
    Timestamp(i64),
}

/// Marks a message carries beside its values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) device_time_invalid: bool,
    pub(super) out_of_range: bool,
}

impl Flags {
    /// The names joined by commas; `None` when there are none.
    pub(super) fn names(self) -> Option<&'static str> {
        match (self.device_time_invalid, self.out_of_range) {
            (false, false) => None,
            (true, false) => Some("device_time_invalid"),
            (false, true) => Some("out_of_range"),
            (true, true) => Some("device_time_invalid,out_of_range"),
        }
    }
}

/// Why a value breaks its field's rule.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refusal {
    pub(super) reason: Reason,
    /// Field, value and rule.
    pub(super) detail: String,
}

type Conversion<'p> = Result<Converted<'p>, Refusal>;

impl<'p> Converted<'p> {
    pub(super) fn of_scalar(scalar: &'p Scalar) -> Self {
        match scalar {
            Scalar::Null => Converted::Null,
            Scalar::Bool(value) => Converted::Bool(*value),
            Scalar::Int(value) => Converted::Int(*value),
            Scalar::Float(value) => Converted::Float { value: *value, raw: None },
            Scalar::Text(text) => Converted::Text { value: Cow::Borrowed(text), raw: None },
        }
    }
}

impl<'p> Raw<'p> {
    /// As people see it in a detail text.
    pub(super) fn shown(self) -> String {
        let (Raw::Json(text) | Raw::Topic(text)) = self;
        cut(text)
    }

    /// Equality with a scalar of the configuration; numbers by value, so 1 equals 1.0.
    pub(super) fn equals(self, json: &Json) -> bool {
        match (self, json) {
            (Raw::Topic(text), Json::String(other)) => text == other,
            (Raw::Topic(_), _) => false,
            (Raw::Json(raw), Json::Bool(value)) => raw == if *value { "true" } else { "false" },
            (Raw::Json(raw), Json::String(other)) => {
                raw.starts_with('"') && unquoted(raw).is_some_and(|text| text == other.as_str())
            }
            (Raw::Json(raw), Json::Number(number)) => Decimal::parse(raw)
                .is_some_and(|raw| Some(raw) == Decimal::parse(&number.to_string())),
            (Raw::Json(_), _) => false,
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Raw::Topic(_) => "text",
            Raw::Json(raw) => match raw.as_bytes().first() {
                Some(b'"') => "text",
                Some(b'{') => "an object",
                Some(b'[') => "an array",
                Some(b't' | b'f') => "a boolean",
                _ => "a number",
            },
        }
    }
}

/// The text of a JSON string; `None` when an escape in it is half of a surrogate pair.
pub(super) fn unquoted(raw: &str) -> Option<Cow<'_, str>> {
    if raw.contains('\\') {
        return serde_json::from_str(raw).ok().map(Cow::Owned);
    }
    raw.get(1..raw.len().checked_sub(1)?).map(Cow::Borrowed)
}

/// Applies the rule. Missing values do not come here.
pub(super) fn convert<'p>(
    rule: &'p Rule,
    raw: Raw<'p>,
    arrival: Arrival,
    flags: &mut Flags,
) -> Conversion<'p> {
    if let Some(bit) = rule.bit {
        return bit_of(rule, raw, bit);
    }
    if let Some(values) = &rule.values {
        return looked_up(rule, values, raw);
    }
    match rule.field_type {
        FieldType::Int2 | FieldType::Int4 | FieldType::Int8 => integer(rule, raw, flags),
        FieldType::Float8 => float(rule, raw, flags),
        FieldType::Boolean => match raw {
            Raw::Json("true") => Ok(Converted::Bool(true)),
            Raw::Json("false") => Ok(Converted::Bool(false)),
            _ => Err(wrong_type(rule, raw)),
        },
        FieldType::Text => text(rule, raw),
        FieldType::Timestamp => timestamp(rule, raw, arrival, flags),
    }
}

fn refusal(rule: &Rule, reason: Reason, raw: Raw<'_>, why: &str) -> Refusal {
    Refusal { reason, detail: format!("{}: {} {why}", rule.name, raw.shown()) }
}

fn wrong_type(rule: &Rule, raw: Raw<'_>) -> Refusal {
    let wanted = type_name(rule.field_type);
    let mut why = format!("is {}, not {wanted}", raw.kind());
    match raw.kind() {
        "text" if rule.is_numeric() => why.push_str("; declare text_as_number to accept it"),
        "a boolean" if rule.is_numeric() => {
            why.push_str("; declare boolean_as_number to accept it");
        }
        _ => {}
    }
    refusal(rule, Reason::WrongType, raw, &why)
}

fn bit_of<'p>(rule: &Rule, raw: Raw<'p>, bit: u8) -> Conversion<'p> {
    let Some(number) = number_text(raw).and_then(Decimal::parse) else {
        let why = format!("is {}, not an integer with bits", raw.kind());
        return Err(refusal(rule, Reason::WrongType, raw, &why));
    };
    match number.to_integer(Rounding::Reject) {
        Ok(integer) if integer >= 0 => Ok(Converted::Bool(integer >> bit & 1 == 1)),
        Ok(_) => Err(refusal(rule, Reason::OutOfRange, raw, "is negative and has no bits")),
        Err(NotAnInteger::Fraction) => {
            Err(refusal(rule, Reason::FractionRefused, raw, "has a fraction and no bits"))
        }
        Err(NotAnInteger::TooLarge) => {
            Err(refusal(rule, Reason::OutOfRange, raw, "is no integer of 64 bits"))
        }
    }
}

fn looked_up<'p>(rule: &Rule, values: &'p [(String, Scalar)], raw: Raw<'p>) -> Conversion<'p> {
    let key = match raw {
        Raw::Topic(text) => Some(Cow::Borrowed(text)),
        Raw::Json(json) if json.starts_with('"') => unquoted(json),
        Raw::Json(json) => Some(Cow::Borrowed(json)),
    };
    let found = key.and_then(|key| values.iter().find(|(name, _)| *name == *key));
    match found {
        Some((_, value)) => Ok(Converted::of_scalar(value)),
        None => {
            let known: Vec<&str> = values.iter().map(|(name, _)| name.as_str()).collect();
            let why = format!("is not in the value map ({})", cut(&known.join(", ")));
            Err(refusal(rule, Reason::NotInValueMap, raw, &why))
        }
    }
}

/// The text of a JSON number, or nothing.
fn number_text(raw: Raw<'_>) -> Option<&str> {
    match raw {
        Raw::Json(text) if text.starts_with(|c: char| c == '-' || c.is_ascii_digit()) => Some(text),
        _ => None,
    }
}

/// The number a numeric field is given, with what was declared for booleans and texts.
fn declared_number<'p>(rule: &Rule, raw: Raw<'p>) -> Result<Cow<'p, str>, Refusal> {
    if let Some(text) = number_text(raw) {
        return Ok(Cow::Borrowed(text));
    }
    let declared = match raw {
        Raw::Json("true") if rule.boolean_as_number => Some(Cow::Borrowed("1")),
        Raw::Json("false") if rule.boolean_as_number => Some(Cow::Borrowed("0")),
        Raw::Json(json) if rule.text_as_number && json.starts_with('"') => unquoted(json),
        Raw::Topic(text) if rule.text_as_number => Some(Cow::Borrowed(text)),
        _ => None,
    };
    declared.filter(|text| decimal::is_json_number(text)).ok_or_else(|| wrong_type(rule, raw))
}

fn integer<'p>(rule: &Rule, raw: Raw<'p>, flags: &mut Flags) -> Conversion<'p> {
    let text = declared_number(rule, raw)?;
    let plain = if rule.linear.is_none() { decimal::plain_integer(&text) } else { None };
    let value = match plain {
        Some(value) => value,
        None => match scaled(&text, rule.linear).to_integer(rule.rounding) {
            Ok(value) => value,
            Err(NotAnInteger::Fraction) => {
                return Err(refusal(rule, Reason::FractionRefused, raw, "has a fraction"));
            }
            Err(NotAnInteger::TooLarge) => return beyond_type(rule, raw, text.starts_with('-')),
        },
    };
    if !within(rule, value as f64) {
        return out_of_range(rule, raw, Converted::Int(value), flags);
    }
    fitting(rule, raw, value)
}

/// Range-checks an integer against the width of its column.
fn fitting<'p>(rule: &Rule, raw: Raw<'p>, value: i64) -> Conversion<'p> {
    let narrow = rule.this_use == Use::Table
        && integer_range(rule.field_type).is_some_and(|range| !range.contains(&value));
    if narrow { beyond_type(rule, raw, value < 0) } else { Ok(Converted::Int(value)) }
}

/// The value is outside what the type holds: nothing can be kept there, so a flag alone does not help.
fn beyond_type<'p>(rule: &Rule, raw: Raw<'p>, negative: bool) -> Conversion<'p> {
    let full = i64::MIN..=i64::MAX;
    let (name, range) = match rule.this_use {
        Use::Table => (type_name(rule.field_type), integer_range(rule.field_type).unwrap_or(full)),
        Use::Record => (type_name(FieldType::Int8), full),
    };
    match rule.out_of_range {
        OutOfRange::Null => Ok(Converted::Null),
        OutOfRange::Clamp => {
            // A cast from a double saturates, so bounds beyond 64 bits are no bounds.
            let low = rule.min.map_or(i64::MIN, |min| min.ceil() as i64).max(*range.start());
            let high = rule.max.map_or(i64::MAX, |max| max.floor() as i64).min(*range.end());
            Ok(Converted::Int(if negative { low } else { high }))
        }
        OutOfRange::DeadLetter | OutOfRange::Flag => {
            let mut why = format!("does not fit {name} ({}..={})", range.start(), range.end());
            if name != "int8" {
                why.push_str("; widen the column and the mapping's type");
            }
            Err(refusal(rule, Reason::OutOfRange, raw, &why))
        }
    }
}

fn float<'p>(rule: &Rule, raw: Raw<'p>, flags: &mut Flags) -> Conversion<'p> {
    let text = declared_number(rule, raw)?;
    let value = match rule.linear {
        None => text.parse().unwrap_or(f64::NAN),
        Some(_) => scaled(&text, rule.linear).to_f64(),
    };
    if !value.is_finite() {
        return Err(refusal(rule, Reason::NotFinite, raw, "is beyond a finite double"));
    }
    let as_sent = if rule.linear.is_none() { number_text(raw) } else { None };
    let converted = Converted::Float { value, raw: as_sent };
    if within(rule, value) { Ok(converted) } else { out_of_range(rule, raw, converted, flags) }
}

fn scaled(text: &str, linear: Option<Linear>) -> Number {
    let number = Decimal::parse(text);
    let Some(Linear { scale, offset, exact }) = linear else {
        return number.map_or(Number::Double(f64::NAN), Number::Exact);
    };
    let product =
        number.zip(exact).and_then(|(number, (scale, offset))| number.linear(scale, offset));
    match product {
        Some(product) => Number::Exact(product),
        None => Number::Double(text.parse::<f64>().unwrap_or(f64::NAN) * scale + offset),
    }
}

/// A number after scaling: exact wherever 38 digits are enough.
enum Number {
    Exact(Decimal),
    Double(f64),
}

impl Number {
    fn to_integer(&self, rounding: Rounding) -> Result<i64, NotAnInteger> {
        let exact = match self {
            Number::Exact(exact) => Some(*exact),
            Number::Double(value) => Decimal::from_f64(*value),
        };
        exact.ok_or(NotAnInteger::TooLarge)?.to_integer(rounding)
    }

    fn to_f64(&self) -> f64 {
        match self {
            Number::Exact(exact) => exact.to_f64(),
            Number::Double(value) => *value,
        }
    }
}

fn within(rule: &Rule, value: f64) -> bool {
    rule.min.is_none_or(|min| value >= min) && rule.max.is_none_or(|max| value <= max)
}

/// The value is outside `min..=max`: the rule decides.
fn out_of_range<'p>(
    rule: &Rule,
    raw: Raw<'p>,
    converted: Converted<'p>,
    flags: &mut Flags,
) -> Conversion<'p> {
    let (min, max) = (rule.min.unwrap_or(f64::NEG_INFINITY), rule.max.unwrap_or(f64::INFINITY));
    match (rule.out_of_range, converted) {
        (OutOfRange::DeadLetter, _) => {
            let why = format!("is outside {min}..={max}");
            Err(refusal(rule, Reason::OutOfRange, raw, &why))
        }
        (OutOfRange::Null, _) => Ok(Converted::Null),
        (OutOfRange::Clamp, Converted::Int(value)) => {
            // The nearest integer inside the bounds.
            let bound = if (value as f64) < min { min.ceil() } else { max.floor() };
            fitting(rule, raw, bound as i64)
        }
        (OutOfRange::Clamp, Converted::Float { value, .. }) => {
            Ok(Converted::Float { value: value.clamp(min, max), raw: None })
        }
        (OutOfRange::Flag, converted) => {
            flags.out_of_range = true;
            match converted {
                Converted::Int(value) => fitting(rule, raw, value),
                other => Ok(other),
            }
        }
        (OutOfRange::Clamp, other) => Ok(other),
    }
}

fn text<'p>(rule: &Rule, raw: Raw<'p>) -> Conversion<'p> {
    let value = match raw {
        Raw::Topic(text) => Cow::Borrowed(text),
        Raw::Json(json) if json.starts_with('"') => unquoted(json).ok_or_else(|| {
            refusal(rule, Reason::WrongType, raw, "is not Unicode (half of a surrogate pair)")
        })?,
        Raw::Json(_) => return Err(wrong_type(rule, raw)),
    };
    if rule.this_use == Use::Table && value.contains('\0') {
        let why = "contains U+0000, which PostgreSQL cannot hold";
        return Err(refusal(rule, Reason::NulInText, raw, why));
    }
    let json = match raw {
        Raw::Json(json) => Some(json),
        Raw::Topic(_) => None,
    };
    Ok(Converted::Text { value, raw: json })
}

fn timestamp<'p>(rule: &Rule, raw: Raw<'p>, arrival: Arrival, flags: &mut Flags) -> Conversion<'p> {
    let micros = match (raw, raw.kind()) {
        (Raw::Topic(text), _) => rule.clock.read_text(text, arrival.0),
        (Raw::Json(json), "text") => {
            unquoted(json).and_then(|text| rule.clock.read_text(&text, arrival.0))
        }
        (Raw::Json(json), "a number") => {
            Decimal::parse(json).and_then(|number| rule.clock.read_number(number, arrival.0))
        }
        _ => {
            let why = format!("is {}, not a time", raw.kind());
            return Err(refusal(rule, Reason::BadTimestamp, raw, &why));
        }
    };
    flags.device_time_invalid |= micros.is_none();
    Ok(Converted::Timestamp(micros.unwrap_or(arrival.0)))
}
