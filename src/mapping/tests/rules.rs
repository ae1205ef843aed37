//! Each rule of the mapping by its edge cases.

use serde_json::json;

use super::streams::{constant, energy, field, id, plant, plug, required, stream, tag};
use super::*;
use crate::config::{
    FieldSource, FieldType, FilterTest, OutOfRange, Rounding, TimestampFormat, TimestampSettings,
};

fn int(value: i64) -> Value<'static> {
    Value::Int(value)
}

fn rounded(rounding: Rounding) -> FieldSettings {
    FieldSettings { rounding, ..field("v", FieldType::Int4) }
}

#[test]
fn widths_by_column() {
    for (raw, int2, int4, int8) in [
        ("32767", Some(32767), Some(32767), Some(32767)),
        ("32768", None, Some(32768), Some(32768)),
        ("33700", None, Some(33700), Some(33700)),
        ("-32768", Some(-32768), Some(-32768), Some(-32768)),
        ("-32769", None, Some(-32769), Some(-32769)),
        ("2147483648", None, None, Some(2_147_483_648)),
        ("9223372036854775807", None, None, Some(i64::MAX)),
        ("9223372036854775808", None, None, None),
    ] {
        for (field_type, expected) in
            [(FieldType::Int2, int2), (FieldType::Int4, int4), (FieldType::Int8, int8)]
        {
            match (column(field("v", field_type), raw), expected) {
                (Outcome::Mapped(value), Some(expected)) => assert_eq!(value, int(expected)),
                (Outcome::Dead(fault), None) => assert_eq!(fault.reason, Reason::OutOfRange),
                (other, expected) => panic!("{raw} {field_type:?}: {other:?}, not {expected:?}"),
            }
        }
    }
}

#[test]
fn a_fault_names_field_value_and_rule() {
    let payload = br#"{"id": "a", "v": 33700}"#;
    let stream = one_field(field("v", FieldType::Int2));
    let fault = row(&stream, "t", "x", payload).dead();
    assert_eq!(
        fault.detail,
        "v: 33700 does not fit int2 (-32768..=32767); widen the column and the mapping's type"
    );
    assert_eq!(fault.field.as_deref(), Some("v"));
    assert_eq!(fault.stage, crate::domain::Stage::Map);
    // The width of a column binds the row, not the record.
    assert_eq!(member(field("v", FieldType::Int2), "33700"), Outcome::Mapped("33700".into()));
    let long = column(field("v", FieldType::Int4), &format!("\"{}\"", "ü".repeat(500))).dead();
    assert!(long.detail.chars().count() < 200, "{}", long.detail);
}

#[test]
fn fractions_by_rule() {
    for (raw, floor, nearest) in
        [("90.05044555664062", 90, 90), ("-0.4", -1, 0), ("1e3", 1000, 1000), ("-2.5", -3, -3)]
    {
        assert_eq!(column(rounded(Rounding::Floor), raw).mapped(), int(floor));
        assert_eq!(column(rounded(Rounding::Nearest), raw).mapped(), int(nearest));
    }
    assert_eq!(column(rounded(Rounding::Reject), "1.5").reason(), Reason::FractionRefused);
    assert_eq!(column(rounded(Rounding::Reject), "6.0").mapped(), int(6));
    assert_eq!(column(rounded(Rounding::Reject), "0.6e1").mapped(), int(6));
}

#[test]
fn text_and_boolean_numbers_only_if_declared() {
    for field_type in [FieldType::Int4, FieldType::Float8] {
        let strict = || field("v", field_type);
        for raw in ["\"237\"", "true", "{}", "[1]"] {
            assert_eq!(column(strict(), raw).reason(), Reason::WrongType, "{raw}");
        }
    }
    let lenient = || FieldSettings {
        text_as_number: true,
        boolean_as_number: true,
        ..field("v", FieldType::Int4)
    };
    assert_eq!(column(lenient(), "\"237\"").mapped(), int(237));
    assert_eq!(column(lenient(), "\"2.37e2\"").mapped(), int(237));
    assert_eq!(column(lenient(), "true").mapped(), int(1));
    assert_eq!(column(lenient(), "false").mapped(), int(0));
    for raw in ["\"\"", "\" 237\"", "\"237 W\"", "\"NaN\"", "\"0x10\""] {
        assert_eq!(column(lenient(), raw).reason(), Reason::WrongType, "{raw}");
    }
    for raw in ["0", "1", "\"true\"", "\"on\""] {
        let outcome = column(field("v", FieldType::Boolean), raw);
        assert_eq!(outcome.reason(), Reason::WrongType, "{raw}");
    }
    assert_eq!(column(field("v", FieldType::Text), "7").reason(), Reason::WrongType);
}

#[test]
fn floats_are_finite_and_as_sent() {
    let float = || field("v", FieldType::Float8);
    assert_eq!(column(float(), "1e999").reason(), Reason::NotFinite);
    assert_eq!(column(float(), &"9".repeat(400)).reason(), Reason::NotFinite);
    assert_eq!(column(float(), "-0.0").mapped(), Value::Float(0.0));
    for raw in ["6", "6.0", "0.6e1", "-0.0", "21.4", "1E-7"] {
        assert_eq!(member(float(), raw), Outcome::Mapped(raw.to_owned()));
    }
    let long = format!("0.{}", "3".repeat(400));
    assert_eq!(member(float(), &long), Outcome::Mapped("0.3333333333333333".to_owned()));
}

#[test]
fn a_number_nobody_maps_may_be_anything() {
    let payload = br#"{"id": "a", "v": 1, "w": 1e999, "x": {"y": 1e999}}"#;
    row(&one_field(field("v", FieldType::Int2)), "t", "x", payload).mapped();
}

#[test]
fn missing_and_null_are_the_same() {
    let stream = |settings| one_field(settings);
    let optional = || field("v", FieldType::Int2);
    for payload in [r#"{"id": "a"}"#, r#"{"id": "a", "v": null}"#] {
        let payload = payload.as_bytes();
        let row_of = |settings| match row(&stream(settings), "t", "x", payload) {
            Outcome::Mapped(row) => Some(row["v"].clone()),
            Outcome::Incomplete => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(row_of(optional()), Some(Value::Null));
        assert_eq!(row_of(required(optional())), None);
        let default = || FieldSettings { default: Some(json!(7)), ..optional() };
        assert_eq!(row_of(default()), Some(int(7)));
        assert_eq!(row_of(required(default())), Some(int(7)));
        let record = kafka(&stream(required(optional())), "x", payload).mapped().0;
        assert!(record.ends_with(r#""fields":{"v":null}}"#), "{record}");
    }
}

#[test]
fn text_is_stored_as_sent() {
    let text_field = || field("v", FieldType::Text);
    for (raw, expected) in [
        (r#""  a ü 😀 ""#, "  a ü 😀 "),
        (r#""\u0041\n\"\\\/""#, "A\n\"\\/"),
        (r#""\ud83d\ude00""#, "😀"),
        (r#""""#, ""),
    ] {
        assert_eq!(column(text_field(), raw).mapped(), text(expected));
        assert_eq!(member(text_field(), raw), Outcome::Mapped(raw.to_owned()));
    }
    assert_eq!(column(text_field(), r#""a\u0000b""#).reason(), Reason::NulInText);
    assert_eq!(member(text_field(), r#""a\u0000b""#), Outcome::Mapped(r#""a\u0000b""#.into()));
    assert_eq!(column(text_field(), r#""\ud800""#).reason(), Reason::WrongType);
}

#[test]
fn bits_of_an_integer() {
    let bit = |bit| FieldSettings { bit: Some(bit), ..field("v", FieldType::Boolean) };
    assert_eq!(column(bit(1), "6").mapped(), Value::Bool(true));
    assert_eq!(column(bit(0), "6.0").mapped(), Value::Bool(false));
    assert_eq!(column(bit(62), "9223372036854775807").mapped(), Value::Bool(true));
    assert_eq!(column(bit(1), "null").mapped(), Value::Null);
    assert_eq!(column(bit(1), "-1").reason(), Reason::OutOfRange);
    assert_eq!(column(bit(1), "6.5").reason(), Reason::FractionRefused);
    for raw in ["true", "\"6\"", "{}"] {
        assert_eq!(column(bit(1), raw).reason(), Reason::WrongType, "{raw}");
    }
}

#[test]
fn value_maps_take_texts_numbers_and_booleans() {
    let values = [("auto", json!(1)), ("0", json!(2)), ("true", json!(3))];
    let values = values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let mapped = FieldSettings { values: Some(values), ..field("v", FieldType::Int2) };
    for (raw, expected) in [("\"auto\"", 1), ("0", 2), ("\"0\"", 2), ("true", 3)] {
        assert_eq!(column(mapped.clone(), raw).mapped(), int(expected), "{raw}");
    }
    for raw in ["\"AUTO\"", "1", "false", "\"\"", "[]"] {
        assert_eq!(column(mapped.clone(), raw).reason(), Reason::NotInValueMap, "{raw}");
    }
}

#[test]
fn scale_and_offset_come_before_rounding() {
    let scaled = |scale, offset, field_type| FieldSettings {
        scale,
        offset,
        rounding: Rounding::Floor,
        ..field("v", field_type)
    };
    assert_eq!(column(scaled(100.0, 0.0, FieldType::Int4), "0.29").mapped(), int(29));
    assert_eq!(column(scaled(0.1, -40.0, FieldType::Int4), "637").mapped(), int(23));
    assert_eq!(member(scaled(0.1, 0.0, FieldType::Float8), "237").mapped(), "23.7");
    assert_eq!(column(scaled(1e300, 0.0, FieldType::Float8), "1e300").reason(), Reason::NotFinite);
    assert_eq!(column(scaled(1e300, 0.0, FieldType::Int8), "1e300").reason(), Reason::OutOfRange);
}

#[test]
fn out_of_range_by_rule() {
    let bounded = |out_of_range, field_type| FieldSettings {
        min: Some(-1.5),
        max: Some(100.5),
        out_of_range,
        ..field("v", field_type)
    };
    let of = |rule, raw| column(bounded(rule, FieldType::Int2), raw);
    assert_eq!(of(OutOfRange::DeadLetter, "100").mapped(), int(100));
    let fault = of(OutOfRange::DeadLetter, "101").dead();
    assert_eq!(fault.detail, "v: 101 is outside -1.5..=100.5");
    assert_eq!(of(OutOfRange::Null, "101").mapped(), Value::Null);
    assert_eq!(of(OutOfRange::Clamp, "101").mapped(), int(100));
    assert_eq!(of(OutOfRange::Clamp, "-7").mapped(), int(-1));
    assert_eq!(of(OutOfRange::Flag, "101").mapped(), int(101));
    // A flag cannot make a value fit its column.
    assert_eq!(of(OutOfRange::Flag, "40000").reason(), Reason::OutOfRange);
    assert_eq!(of(OutOfRange::Clamp, "1e400").mapped(), int(100));
    let float = |rule, raw| column(bounded(rule, FieldType::Float8), raw);
    assert_eq!(float(OutOfRange::Clamp, "101").mapped(), Value::Float(100.5));
    assert_eq!(member(bounded(OutOfRange::Clamp, FieldType::Float8), "101").mapped(), "100.5");
}

#[test]
fn timestamps_never_lose_a_message() {
    let time = || field("v", FieldType::Timestamp);
    for (raw, expected) in [
        ("\"2026-03-14T08:21:05+01:00\"", ARRIVAL - 412_908),
        ("\"2026-03-14T07:21:05\"", ARRIVAL - 412_908),
        ("1773472865", ARRIVAL - 412_908),
        ("1773472865000", ARRIVAL - 412_908),
        ("1773472865000000", ARRIVAL - 412_908),
        ("4520117", ARRIVAL),
        ("0", ARRIVAL),
        ("\"2031-01-01T00:00:00Z\"", ARRIVAL),
        ("\"+294277-01-01T00:00:00Z\"", ARRIVAL),
        ("\"noon\"", ARRIVAL),
        ("1e999", ARRIVAL),
    ] {
        assert_eq!(column(time(), raw).mapped(), Value::Timestamp(expected), "{raw}");
    }
    assert_eq!(column(time(), "true").reason(), Reason::BadTimestamp);
    let millis = TimestampSettings { format: TimestampFormat::EpochMillis, ..time().timestamp };
    let millis = FieldSettings { timestamp: millis, ..time() };
    assert_eq!(column(millis, "1773472865").mapped(), Value::Timestamp(ARRIVAL));
}

#[test]
fn device_ids_are_never_invented() {
    let stream = one_field(field("v", FieldType::Int2));
    for payload in [r#"{"v": 1}"#, r#"{"id": null, "v": 1}"#, r#"{"id": "", "v": 1}"#] {
        let fault = row(&stream, "t", "x", payload.as_bytes()).dead();
        assert_eq!(fault.reason, Reason::NoDeviceId);
        assert_eq!(kafka(&stream, "x", payload.as_bytes()).reason(), Reason::NoDeviceId);
    }
    let number = row(&stream, "t", "x", br#"{"id": 7, "v": 1}"#);
    assert_eq!(number.reason(), Reason::WrongType);
    for topic in ["devices//telemetry", "devices", ""] {
        let outcome = row(&plant(), "telemetry", topic, br#"{"temperature": 1}"#);
        assert_eq!(outcome.reason(), Reason::NoDeviceId, "{topic}");
    }
}

#[test]
fn the_device_id_comes_before_required_and_both_before_conversion() {
    let fields =
        vec![("id", id("id")), ("a", required(field("a", FieldType::Int2))), ("b", tag("b"))];
    let stream = stream("plain", "x", "id", fields).table("t", &["id", "a", "b"]).build();
    assert_eq!(row(&stream, "t", "x", b"{}").reason(), Reason::NoDeviceId);
    assert_eq!(row(&stream, "t", "x", br#"{"id": "x", "b": 7}"#), Outcome::Incomplete);
    let faulty = row(&stream, "t", "x", br#"{"id": "x", "b": 7, "a": 1}"#);
    assert_eq!(faulty.reason(), Reason::WrongType);
}

#[test]
fn sizes() {
    let stream = one_field(field("v", FieldType::Int2));
    let sized = |size: usize| {
        let head = r#"{"id": "a", "x": ""#;
        format!("{head}{}\"}}", "y".repeat(size - head.len() - 2)).into_bytes()
    };
    assert_eq!(row(&stream, "t", "x", b"").reason(), Reason::Empty);
    assert_eq!(row(&stream, "t", "x", b"7").reason(), Reason::NotAnObject);
    for size in [256, 64 * 1024, 256 * 1024] {
        row(&stream, "t", "x", &sized(size)).mapped();
    }
    for size in [256 * 1024 + 1, 5 << 20] {
        assert_eq!(row(&stream, "t", "x", &sized(size)).reason(), Reason::TooLarge);
    }
    let payload = sized(256);
    let mut cut_off = record("x", &payload);
    cut_off.flags.truncated = true;
    let mut mapper = RecordMapper::compile(&stream).unwrap();
    let outcome = mapper.map(&cut_off, &mut Vec::new(), &mut Vec::new());
    assert_eq!(outcome.reason(), Reason::TooLarge);
}

#[test]
fn filters() {
    let filtered = |test: FilterTest| {
        stream("plain", "x", "id", vec![("id", id("id"))])
            .table("t", &["id"])
            .filter("kind", test)
            .build()
    };
    let verdict = |test: FilterTest, kind: &str| {
        let payload = format!(r#"{{"id": "a", "kind": {kind}}}"#);
        match row(&filtered(test), "t", "x", payload.as_bytes()) {
            Outcome::Mapped(_) => "mapped",
            Outcome::Filtered => "filtered",
            Outcome::Incomplete => "incomplete",
            Outcome::Dead(_) => "dead",
        }
    };
    let one_of = || FilterTest::OneOf(vec![json!("a"), json!(1), json!(true)]);
    for (kind, expected) in [
        (r#""a""#, "mapped"),
        (r#""\u0061""#, "mapped"),
        ("1.0", "mapped"),
        ("true", "mapped"),
        (r#""1""#, "filtered"),
        ("{}", "filtered"),
        ("null", "incomplete"),
    ] {
        assert_eq!(verdict(one_of(), kind), expected, "{kind}");
    }
    let none_of = || FilterTest::NoneOf(vec![json!("a")]);
    for (kind, expected) in [(r#""a""#, "filtered"), (r#""b""#, "mapped"), ("null", "mapped")] {
        assert_eq!(verdict(none_of(), kind), expected, "{kind}");
    }
    assert_eq!(verdict(FilterTest::Exists, "0"), "mapped");
    assert_eq!(verdict(FilterTest::Exists, "null"), "filtered");
}

#[test]
fn the_source_document_can_be_merged_into_the_record() {
    let mut stream = one_field(field("v", FieldType::Int2));
    stream.kafka.as_mut().unwrap().raw_root = true;
    let payload = br#"{"id": "a", "ts": 1, "w": 1, "tags": 2, "w": {"x": [1, 2]}, "v": 3}"#;
    let json = kafka(&stream, "x", payload).mapped().0;
    let expected = r#""fields":{"v":3},"id":"a","w":{"x": [1, 2]},"v":3}"#;
    assert!(json.ends_with(expected), "{json}");
    assert_eq!(parsed(&json)["tags"], json!({ "id": "a" }));
}

#[test]
fn records_without_tags_or_fields_keep_their_shape() {
    let plain = FieldSettings { tag: false, ..id("id") };
    for (id, expected) in [
        (plain, r#""tags":{},"fields":{"id":"a"}}"#),
        (id("id"), r#""tags":{"id":"a"},"fields":{}}"#),
    ] {
        let stream = stream("plain", "x", "id", vec![("id", id)]).build();
        let json = kafka(&stream, "x", br#"{"id": "a"}"#).mapped().0;
        assert!(json.ends_with(expected), "{json}");
    }
}

#[test]
fn names_are_quoted_in_the_record() {
    let stream = stream(
        "plain",
        "x",
        "id",
        vec![("id", id("id")), ("a\"; DROP\n", field("['\"']", FieldType::Int2))],
    )
    .build();
    let json = kafka(&stream, "x", br#"{"id": "a", "\"": 5}"#).mapped().0;
    assert_eq!(parsed(&json)["fields"]["a\"; DROP\n"], json!(5));
}

#[test]
fn what_was_seen_is_handed_over_once() {
    let stream = plant();
    let mut mapper = RowMapper::compile(&stream, &stream.tables[0]).unwrap();
    let payload = br#"{"timestamp": 1, "soil_moisture": 101, "new": {"x": 1}, "odd": 0}"#;
    for _ in 0..2 {
        mapper.map(&record("devices/a/telemetry", payload)).mapped();
    }
    let seen = mapper.observed();
    assert_eq!(seen.unmapped, [("new".to_owned(), 2), ("odd".to_owned(), 2)]);
    assert_eq!((seen.mapped, seen.device_time_invalid, seen.out_of_range), (2, 2, 2));
    let nothing = mapper.observed();
    assert_eq!((nothing.unmapped.len(), nothing.mapped), (0, 0));
}

#[test]
fn columns_say_what_never_is_null() {
    let stream = plug();
    let mapper = RowMapper::compile(&stream, &stream.tables[0]).unwrap();
    let required: Vec<(&str, bool)> =
        mapper.columns().iter().map(|column| (column.name.as_str(), column.required)).collect();
    let expected = [
        ("plug_id", true),
        ("status", true),
        ("wifi_rssi", false),
        ("uptime_seconds", false),
        ("name", true),
    ];
    assert_eq!(required, expected);
    assert_eq!(mapper.columns()[4].field, "plug_id");
}

#[test]
fn every_problem_is_reported_at_once() {
    let mut stream = energy();
    let fields = &mut stream.mapping.fields;
    fields["meter_type"].bit = Some(1);
    fields["voltage_l1"].source = FieldSource::Paths(vec!["rmsVoltage..L1".into()]);
    fields["voltage_l2"].default = Some(json!(40_000));
    fields["voltage_l3"].scale = 0.0;
    fields["current_l1"].min = Some(2.0);
    fields["current_l1"].max = Some(1.0);
    fields.insert("broken".into(), constant(json!("x"), FieldType::Int2));
    stream.mapping.require_any.push("ghost".into());
    stream.tables[0].columns.insert("phantom".into(), "phantom".into());
    let problems = RowMapper::compile(&stream, &stream.tables[0]).unwrap_err();
    let named: Vec<&str> = problems.iter().map(|problem| problem.field.as_str()).collect();
    let expected = [
        "meter_type",
        "voltage_l1",
        "voltage_l2",
        "voltage_l3",
        "current_l1",
        "broken",
        "ghost",
        "phantom",
    ];
    assert_eq!(named, expected);
    stream.mapping.device_id = "nobody".into();
    let problems = super::super::explain(&stream, &record("x", b"{}")).unwrap_err();
    assert_eq!(problems.len(), expected.len() + 1, "{problems:?}");
}

#[test]
fn an_explanation_shows_each_use_and_field() {
    let payload = br#"{"POWER": "ON", "UptimeSec": 1.5, "Wifi": {"RSSI": "good"}}"#;
    let explained = super::super::explain(&plug(), &record("tele/desk/STATE", payload)).unwrap();
    let sinks: Vec<&str> = explained.uses.iter().map(|each| each.sink.as_str()).collect();
    assert_eq!(sinks, ["kafka", "power_plugs"]);
    assert_eq!(explained.uses[1].verdict, "dead");
    let shown = explained.to_string();
    for expected in ["topic level 2", "\"ON\"", "true", "int4", "text_as_number"] {
        assert!(shown.contains(expected), "{expected} is not in\n{shown}");
    }
    let fine = super::super::explain(&plug(), &record("tele/desk/STATE", br#"{"POWER": "ON"}"#));
    let fine = serde_json::to_value(fine.unwrap()).unwrap();
    assert_eq!(fine["uses"][0]["record"]["fields"]["status"], json!(true));
    assert_eq!(fine["uses"][1]["row"][4], json!(["name", "desk"]));
}
