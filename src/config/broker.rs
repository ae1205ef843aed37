//! `[brokers.<name>]`.

use super::Context;
use super::access::{
    self, PASSWORD_CREDENTIAL, PASSWORD_ENV, PASSWORD_FILE, PASSWORD_REFUSED, TLS,
};
use super::node::{BREAKER_COOL_DOWN, BREAKER_FAILURES, backoff, breaker};
use super::schema::*;
use super::section::Section;
use super::settings::*;

pub static BROKER: Group = Group {
    doc: "An MQTT broker. Each stream has a connection of its own to it.",
    settings: &[
        required("host", Kind::Text, "Name or address."),
        optional("port", Kind::Integer(1, 65_535), "1883, with TLS 8883", "Port."),
        text(
            "version",
            Kind::Choice(&["5", "3.1.1"]),
            "5",
            "MQTT version. 3.1.1 has no session expiry and no receive maximum: the broker's own limits \
             count.",
        ),
        optional_section("tls", &TLS, "no TLS"),
        optional("username", Kind::Text, "no user", "User."),
        PASSWORD_FILE,
        PASSWORD_CREDENTIAL,
        PASSWORD_ENV,
        integer(
            "keepalive_seconds",
            (5, 65_535),
            30,
            "A ping leaves after every half of it, and a connection silent for one and a half is \
             given up. Longer finds a dead one later, and routers drop idle connections.",
        ),
        integer(
            "session_expiry_seconds",
            (60, 4_294_967_295),
            7 * DAY_SECONDS,
            "The broker keeps the session of an absent node this long. After a longer \
             absence what was published meanwhile is lost.",
        ),
        integer(
            "connect_timeout_seconds",
            (1, 3600),
            10,
            "For the connection with TLS, and as long again for the broker's welcome.",
        ),
        integer(
            "operation_timeout_seconds",
            (1, 3600),
            30,
            "For the broker's answer to a subscription, and for one write.",
        ),
        integer(
            "reconnect_min_ms",
            (10, HOUR_MS),
            1000,
            "First pause before connecting again; it doubles.",
        ),
        integer(
            "reconnect_max_ms",
            (10, HOUR_MS),
            60_000,
            "Longest pause before connecting again, and up to 30 % more.",
        ),
        BREAKER_FAILURES,
        BREAKER_COOL_DOWN,
        integer(
            "receive_maximum",
            (1, 65_535),
            4096,
            "Announced to the broker: how many messages it may send before the first is \
             acknowledged. Small limits the rate.",
        ),
        integer(
            "unacknowledged_messages_max",
            (1, 10_000_000),
            20_000,
            "What is received and not yet on disk, per stream. Above it the node stops reading.",
        ),
        integer(
            "unacknowledged_bytes_max",
            (64 * KIB, 4 * GIB),
            32 * MIB,
            "The same in bytes: memory per stream.",
        ),
        integer(
            "packet_bytes_max",
            (KIB, 256 * MIB),
            8 * MIB,
            "A larger message is kept cut off and becomes a dead letter. The broker does not learn of it: it \
             would drop such a message in silence.",
        ),
    ],
    refused: &[
        PASSWORD_REFUSED,
        (
            "clean_session",
            "the session is always persistent: a clean one loses what is published while \
             the node is away",
        ),
        ("client_id", "belongs to a stream: [streams.<name>] client_id"),
    ],
};

pub fn broker(section: &Section, context: &mut Context<'_>) -> BrokerSettings {
    let tls = section.section("tls").map(|tls| access::tls(tls, context));
    let standard: u16 = if tls.is_some() { 8883 } else { 1883 };
    let host = section.text("host");
    let password = access::password(section, context);
    let username = section.optional_text("username");
    if password.is_some() && username.is_none() {
        context.problems.error(section.itself(), "a password without a username");
    }
    if password.is_some() && tls.is_none() && !access::is_local(&host) {
        let rule = "the password travels in clear text; add TLS";
        context.problems.warn(section.at("host"), rule);
    }
    let settings = BrokerSettings {
        host,
        port: section.optional_integer("port").unwrap_or(standard),
        version: section.pick("version", &[("5", MqttVersion::V5), ("3.1.1", MqttVersion::V311)]),
        tls,
        username,
        password,
        keepalive: section.duration("keepalive_seconds"),
        session_expiry: section.duration("session_expiry_seconds"),
        connect_timeout: section.duration("connect_timeout_seconds"),
        operation_timeout: section.duration("operation_timeout_seconds"),
        reconnect: backoff(section, "reconnect_min_ms", "reconnect_max_ms", &mut context.problems),
        breaker: breaker(section),
        receive_maximum: section.integer("receive_maximum"),
        unacknowledged_messages_max: section.integer("unacknowledged_messages_max"),
        unacknowledged_bytes_max: section.integer("unacknowledged_bytes_max"),
        packet_bytes_max: section.integer("packet_bytes_max"),
    };
    section.derive("port", settings.port);
    if settings.packet_bytes_max > settings.unacknowledged_bytes_max {
        let name = if section.has("packet_bytes_max") {
            "packet_bytes_max"
        } else {
            "unacknowledged_bytes_max"
        };
        let rule = "packet_bytes_max must not be above unacknowledged_bytes_max";
        context.problems.error(section.at(name), rule);
    }
    settings
}
