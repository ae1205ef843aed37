//! What holds for any input.

use proptest::prelude::*;

use super::reference::ENERGY;
use super::streams::{energy, field, heatpump, indoor, outdoor, plant, plug};
use super::*;
use crate::config::FieldType;

fn all_streams() -> [StreamSettings; 6] {
    [energy(), heatpump(), indoor(), outdoor(), plug(), plant()]
}

/// Maps for every use of every stream; a record that is made is JSON.
fn map_everywhere(topic: &str, payload: &[u8]) {
    for stream in all_streams() {
        if let Outcome::Mapped((json, key)) = kafka(&stream, topic, payload) {
            assert!(serde_json::from_str::<Json>(&json).is_ok(), "{json}");
            assert!(!key.is_empty());
        }
        for table in stream.tables.keys() {
            row(&stream, table.as_str(), topic, payload);
        }
        super::super::explain(&stream, &record(topic, payload)).unwrap();
    }
}

/// JSON in which the reference streams find some of what they look for.
fn json_value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        ".{0,8}".prop_map(Json::from),
        Just(Json::from("ON")),
    ];
    let name = prop_oneof![
        Just("total"),
        Just("L1"),
        Just("d0"),
        Just("d16"),
        Just("POWER"),
        Just("activeActualConsumption"),
        Just("saveeyeDeviceSerialNumber"),
        Just("Client_Name"),
        Just("timestamp"),
        Just("soil_moisture"),
        Just("other"),
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            proptest::collection::vec((name.clone(), inner), 0..8).prop_map(|members| {
                members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
            }),
        ]
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_end_in_a_verdict(payload: Vec<u8>, topic in "[a-z/]{0,12}") {
        map_everywhere(&topic, &payload);
    }

    #[test]
    fn arbitrary_json_ends_in_a_verdict(json in json_value(), topic in "[a-z]{0,3}(/[a-z]{0,3}){0,3}") {
        map_everywhere(&topic, json.to_string().as_bytes());
    }

    #[test]
    fn a_damaged_message_ends_in_a_verdict(at in 0..ENERGY.len(), byte: u8) {
        let mut payload = ENERGY.as_bytes().to_vec();
        payload[at] = byte;
        map_everywhere("a/b/c", &payload);
        payload.truncate(at);
        map_everywhere("a/b/c", &payload);
    }

    #[test]
    fn what_serde_json_takes_as_an_object_is_read_and_nothing_else(text in r#"[{}\[\]:,"a01.e\\ -]{0,12}"#) {
        let object = |text: &str| {
            serde_json::from_str::<Json>(text).is_ok_and(|json| json.is_object())
        };
        let fault = kafka(&energy(), "x", text.as_bytes()).dead();
        let read = fault.reason == Reason::NoDeviceId;
        // Numbers and surrogates nobody looks at are not judged, so serde_json may be the stricter one.
        prop_assert!(read || !object(&text), "{text}: {fault:?}");
        if read {
            let skipped = serde_json::from_str::<serde::de::IgnoredAny>(&text);
            prop_assert!(skipped.is_ok(), "{text}");
        }
    }

    #[test]
    fn every_integer_arrives_unchanged(value: i64) {
        let int8 = || field("v", FieldType::Int8);
        prop_assert_eq!(column(int8(), &value.to_string()).mapped(), Value::Int(value));
        prop_assert_eq!(member(int8(), &value.to_string()).mapped(), value.to_string());
    }

    #[test]
    fn every_double_arrives_unchanged(value in proptest::num::f64::NORMAL | proptest::num::f64::ZERO) {
        let raw = Json::from(value).to_string();
        let float8 = || field("v", FieldType::Float8);
        prop_assert_eq!(column(float8(), &raw).mapped(), Value::Float(value));
        prop_assert_eq!(member(float8(), &raw).mapped().parse::<f64>().unwrap(), value);
    }

    #[test]
    fn the_order_of_members_does_not_matter(seed in any::<prop::sample::Index>(), step in 1_usize..10) {
        let Json::Object(source) = parsed(ENERGY) else { unreachable!() };
        let mut members: Vec<String> = source
            .iter()
            .map(|(name, value)| format!("{}:{value}", Json::from(name.as_str())))
            .collect();
        let middle = seed.index(members.len());
        members.rotate_left(middle);
        members.sort_by_key(|text| (text.len() * 7) % step);
        let shuffled = format!("{{{}}}", members.join(","));
        let of = |text: &str| row(&energy(), "energy_consumption", "x", text.as_bytes()).mapped();
        prop_assert_eq!(of(&shuffled), of(ENERGY));
    }

    #[test]
    fn of_duplicate_members_the_last_wins(values in proptest::collection::vec(-9_i64..9, 1..5)) {
        let members: Vec<String> = values.iter().map(|value| format!("\"v\": {value}")).collect();
        let payload = format!("{{\"id\": \"a\", {}}}", members.join(", "));
        let row = row(&one_field(field("v", FieldType::Int2)), "t", "x", payload.as_bytes()).mapped();
        prop_assert_eq!(&row["v"], &Value::Int(*values.last().unwrap()));
    }
}
