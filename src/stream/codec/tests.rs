use super::*;

const VERSIONS: [MqttVersion; 2] = [MqttVersion::V5, MqttVersion::V311];

/// A PUBLISH as a broker writes it.
fn publish(version: MqttVersion, payload: &[u8]) -> Vec<u8> {
    let properties: &[u8] = if version == MqttVersion::V5 { &[0] } else { &[] };
    let body = [&[0, 3][..], b"a/b", &[0, 9], properties, payload].concat();
    let mut bytes = BytesMut::new();
    bytes.put_u8(0x3B);
    put_remaining_length(&mut bytes, body.len());
    bytes.extend_from_slice(&body);
    bytes.to_vec()
}

fn decode_all(codec: &mut Codec, bytes: &[u8], step: usize) -> Vec<Inbound> {
    let mut buffer = BytesMut::new();
    let mut found = Vec::new();
    for part in bytes.chunks(step) {
        buffer.extend_from_slice(part);
        while let Some(packet) = codec.decode(&mut buffer).unwrap() {
            found.push(packet);
        }
    }
    assert!(buffer.is_empty());
    found
}

#[test]
fn both_versions_yield_the_same_message_however_the_bytes_are_cut() {
    for version in VERSIONS {
        for step in [1, 3, 1000] {
            let bytes = [publish(version, b"one"), publish(version, b"")].concat();
            let found = decode_all(&mut Codec::new(version, 1024), &bytes, step);
            let flags = DeliveryFlags { qos: 1, retain: true, dup: true, truncated: false };
            let expected = ["one", ""].map(|payload| {
                let topic = Bytes::from_static(b"a/b");
                let payload = Bytes::from_static(payload.as_bytes());
                Inbound::Publish(Publish { topic, payload, packet_id: 9, flags })
            });
            assert_eq!(found, expected, "{version:?} in steps of {step}");
        }
    }
}

#[test]
fn a_packet_over_the_limit_is_cut_and_the_next_one_is_read() {
    let large: Vec<u8> = (0..300_000_u32).map(|i| i as u8).collect();
    for version in VERSIONS {
        for step in [1000, 1 << 20] {
            let bytes = [publish(version, &large), publish(version, b"next")].concat();
            let found = decode_all(&mut Codec::new(version, 100_000), &bytes, step);
            let [Inbound::Publish(cut), Inbound::Publish(next)] = found.as_slice() else {
                panic!("two messages, not {}", found.len())
            };
            assert!(cut.flags.truncated && cut.packet_id == 9);
            assert_eq!(cut.payload, large[..TRUNCATED_PAYLOAD_BYTES]);
            assert!(!next.flags.truncated && next.payload == "next");
        }
    }
}

#[test]
fn a_message_over_the_limit_waits_for_its_last_byte() {
    let bytes = publish(MqttVersion::V5, &vec![7; 300_000]);
    let mut codec = Codec::new(MqttVersion::V5, 1024);
    let mut buffer = BytesMut::from(&bytes[..bytes.len() - 1]);
    assert_eq!(codec.decode(&mut buffer), Ok(None));
    assert!(buffer.is_empty(), "what is skipped is not held");
    buffer.extend_from_slice(&bytes[bytes.len() - 1..]);
    assert!(matches!(codec.decode(&mut buffer), Ok(Some(Inbound::Publish(_)))));
}

#[test]
fn malformed_packets_are_errors_not_waits() {
    for (what, bytes) in [
        ("endless length", &[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01][..]),
        ("topic longer than the packet", &[0x32, 4, 0, 9, b'a', b'b']),
        ("no packet id", &[0x32, 3, 0, 1, b'a']),
        ("packet id 0", &[0x32, 6, 0, 1, b'a', 0, 0, 0]),
        ("topic not UTF-8", &[0x30, 5, 0, 1, 0xFF, 0, 0]),
        ("no topic", &[0x30, 4, 0, 0, 0, 0]),
        ("topic alias", &[0x30, 7, 0, 1, b'a', 3, 0x23, 0, 1]),
        ("QoS 3", &[0x36, 6, 0, 1, b'a', 0, 1, 0]),
        ("large packet that is no message", &[0x90, 0xFF, 0x7F]),
        ("packet type 0", &[0x00, 1, 0]),
    ] {
        let mut buffer = BytesMut::from(bytes);
        let outcome = Codec::new(MqttVersion::V5, 1024).decode(&mut buffer);
        assert!(outcome.is_err(), "{what}: {outcome:?}");
    }
}

#[test]
fn a_disconnect_needs_no_property_length() {
    for (bytes, reason) in [
        (&[0xE0, 0][..], 0),
        (&[0xE0, 1, 0x8E], 0x8E),
        (&[0xE0, 2, 0x8B, 0], 0x8B),
        (&[0xE0, 1, 0x77], 0x77),
    ] {
        let found = decode_all(&mut Codec::new(MqttVersion::V5, 1024), bytes, 10);
        assert_eq!(found, [Inbound::Disconnect { reason }]);
    }
}

#[test]
fn a_connack_is_read_in_both_dialects() {
    let connack = |session_present, answer, keepalive: Option<u64>| {
        let keepalive = keepalive.map(Duration::from_secs);
        [Inbound::ConnAck(ConnAck {
            session_present,
            answer,
            keepalive,
            limits: BrokerLimits::default(),
        })]
    };
    let v5 = |bytes: &[u8]| decode_all(&mut Codec::new(MqttVersion::V5, 1024), bytes, 1);
    let v311 = |bytes: &[u8]| decode_all(&mut Codec::new(MqttVersion::V311, 1024), bytes, 1);
    assert_eq!(v5(&[0x20, 3, 1, 0, 0]), connack(true, Ok(()), None));
    assert_eq!(v5(&[0x20, 6, 0, 0, 3, 0x13, 0, 7]), connack(false, Ok(()), Some(7)));
    assert_eq!(v311(&[0x20, 2, 1, 0]), connack(true, Ok(()), None));
    let wrong = connack(false, Err(Refusal::BadCredentials), None);
    assert_eq!(v5(&[0x20, 3, 0, 0x86, 0]), wrong);
    assert_eq!(v311(&[0x20, 2, 0, 4]), wrong);
    let old_broker = connack(false, Err(Refusal::Version), None);
    assert_eq!(v5(&[0x20, 2, 0, 1]), old_broker);
}

#[test]
fn the_session_is_asked_for_again_and_retained_copies_only_once() {
    let request = ConnectRequest {
        client_id: "node-energy".to_owned(),
        fresh: false,
        keepalive: Duration::from_secs(30),
        username: Some("node".to_owned()),
        password: Some(Secret::new("secret".to_owned())),
        session_expiry: Duration::from_secs(3600),
        receive_maximum: 100,
    };
    let mut out = BytesMut::new();
    let codec = Codec::new(MqttVersion::V5, 4096);
    codec.encode(&Outbound::Connect(Box::new(request)), &mut out).unwrap();
    let v5::Packet::Connect(connect, None, Some(login)) = v5::Packet::read(&mut out, None).unwrap()
    else {
        panic!("a CONNECT with a login")
    };
    assert!(!connect.clean_start);
    assert_eq!((login.username.as_str(), login.password.as_str()), ("node", "secret"));
    let properties = connect.properties.unwrap();
    assert_eq!(properties.session_expiry_interval, Some(3600));
    assert_eq!(properties.receive_maximum, Some(100));
    assert_eq!(properties.max_packet_size, None, "a larger one would be dropped in silence");
    assert_eq!(properties.topic_alias_max, None);

    let subscribe = Outbound::Subscribe { packet_id: 1, filter: "a/#".to_owned(), qos: 1 };
    codec.encode(&subscribe, &mut out).unwrap();
    let v5::Packet::Subscribe(subscribe) = v5::Packet::read(&mut out, None).unwrap() else {
        panic!("a SUBSCRIBE")
    };
    let rule = &subscribe.filters[0].retain_forward_rule;
    assert_eq!(*rule, v5::RetainForwardRule::OnNewSubscribe);
}
