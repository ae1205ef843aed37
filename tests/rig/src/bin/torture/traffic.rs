//! What is published: readings whose every value is known, and among them what no sink can take.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rand::Rng;
use rand::distr::Alphanumeric;
use rand::rngs::StdRng;
use rig::Publisher;
use serde_json::{Value, json};

/// The value the table refuses.
pub const POISON: u32 = 666;
const VALUES: std::ops::Range<u32> = 0..500;
const DEVICES: u32 = 4;
/// Numbers of one round begin at its multiple of this.
pub const NUMBERS_A_ROUND: u64 = 1_000_000;
const BURST_MAX: u32 = 40;
/// Once there are many: however long the faults last, there is always something on its way.
const LATE_BURST_MAX: u32 = 2;
const PAUSE_MAX_MS: u64 = 50;
const MANY_MESSAGES: usize = 2_000;
const MESSAGES_MIN: usize = 300;
/// Makes a generation fill up within a second or two.
const PADDING: usize = 500;

/// A stream of the homelab that takes part.
#[derive(Debug)]
pub struct Stream {
    pub name: &'static str,
    /// The only one of these streams whose repeats, should the broker make any, are kept: the others declare how a
    /// message is known.
    pub keeps_repeats: bool,
    pub tables: &'static [Table],
    /// Where the Kafka record has device, number and value.
    pub record: [&'static str; 3],
}

#[derive(Debug)]
pub struct Table {
    pub name: &'static str,
    pub database: &'static str,
    /// A row per device instead of one per message.
    pub latest: bool,
    /// Columns of device, number and value.
    pub columns: [&'static str; 3],
    /// Column of the arrival.
    pub time: &'static str,
}

pub static STREAMS: [Stream; 4] = [
    Stream {
        name: "energy",
        keeps_repeats: true,
        tables: &[Table {
            name: "energy_consumption",
            database: "telemetry",
            latest: false,
            columns: ["device_serial", "active_energy_total", "active_power_total"],
            time: "time",
        }],
        record: [
            "/tags/device_serial",
            "/fields/active_energy_total",
            "/fields/active_power_total",
        ],
    },
    Stream {
        name: "temperature_indoor",
        keeps_repeats: false,
        tables: &[Table {
            name: "temperature_sensors",
            database: "telemetry",
            latest: false,
            columns: ["device_id", "uptime", "temperature_c"],
            time: "time",
        }],
        record: ["/tags/device_id", "/fields/uptime", "/fields/temperature_c"],
    },
    Stream {
        name: "heatpump",
        keeps_repeats: false,
        tables: &[
            Table {
                name: "heatpump_status",
                database: "telemetry",
                latest: false,
                columns: ["device_id", "runtime_compressor", "outdoor_temp"],
                time: "time",
            },
            Table {
                name: "settings",
                database: "homelab_settings",
                latest: true,
                columns: ["device_id", "mode", "curve"],
                time: "updated_at",
            },
        ],
        record: ["/tags/device_id", "/fields/runtime_compressor", "/fields/outdoor_temp"],
    },
    Stream {
        name: "plug",
        keeps_repeats: false,
        tables: &[Table {
            name: "power_plugs",
            database: "homelab_settings",
            latest: true,
            columns: ["plug_id", "uptime_seconds", "wifi_rssi"],
            time: "updated_at",
        }],
        record: ["/tags/plug_id", "/fields/uptime_seconds", "/fields/wifi_rssi"],
    },
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Reading,
    /// The table refuses the row; Kafka takes the record.
    Poison,
    /// No JSON: dead at every sink.
    Malformed,
    /// Left out by the stream's filter.
    Filtered,
    /// Without a field the table requires; Kafka takes the record.
    Incomplete,
}

/// One publication.
#[derive(Debug, Clone)]
pub struct Message {
    pub number: u64,
    pub stream: &'static Stream,
    pub device: String,
    pub value: u32,
    pub kind: Kind,
    pub payload: String,
}

impl Message {
    pub fn drawn(round: u64, place: u64, dice: &mut StdRng) -> Self {
        let stream = &STREAMS[dice.random_range(0..STREAMS.len())];
        let kind = match (stream.name, dice.random_range(0..200)) {
            (_, 0) => Kind::Malformed,
            ("energy", 1..4) => Kind::Poison,
            ("energy", 4..6) => Kind::Incomplete,
            ("temperature_indoor", 1..10) => Kind::Filtered,
            _ => Kind::Reading,
        };
        let number = round * NUMBERS_A_ROUND + place;
        let device = format!("r{round}-{}", dice.random_range(0..DEVICES));
        let value = if kind == Kind::Poison { POISON } else { dice.random_range(VALUES) };
        // Of chance, so that nothing is won by compressing it.
        let padding = dice.sample_iter(Alphanumeric).take(PADDING).map(char::from).collect();
        let payload = payload(stream.name, &device, number, value, kind, padding);
        Message { number, stream, device, value, kind, payload }
    }

    /// What a record says in the member of this name; null where the message said nothing of it.
    pub fn says(&self, member: &str) -> Value {
        let [device, number, value] = self.stream.record;
        let is = |pointer: &str| pointer.rsplit('/').next() == Some(member);
        match (self.stream.name, member) {
            _ if is(device) => self.device.clone().into(),
            _ if is(number) => self.number.into(),
            _ if is(value) && self.kind == Kind::Incomplete => Value::Null,
            _ if is(value) => self.value.into(),
            ("temperature_indoor", "location") => "indoor".into(),
            ("heatpump", "mode") => self.number.into(),
            ("heatpump", "curve") => self.value.into(),
            ("plug", "status") => self.value.is_multiple_of(2).into(),
            _ => Value::Null,
        }
    }

    pub fn topic(&self) -> String {
        match self.stream.name {
            "energy" => "saveeye/telemetry".to_owned(),
            "temperature_indoor" => format!("{}/events/rpc", self.device),
            "heatpump" => "thermiq_heatpump/data".to_owned(),
            _ => format!("tele/{}/STATE", self.device),
        }
    }
}

fn payload(
    stream: &str,
    device: &str,
    number: u64,
    value: u32,
    kind: Kind,
    padding: String,
) -> String {
    let mut payload = match stream {
        "energy" => json!({
            "saveeyeDeviceSerialNumber": device,
            "activeActualConsumption": {"total": value},
            "activeTotalConsumption": {"total": number},
        }),
        "temperature_indoor" => json!({
            "src": device,
            "method": if kind == Kind::Filtered { "NotifyStatus" } else { "NotifyFullStatus" },
            "params": {"temperature:0": {"tC": value}, "sys": {"uptime": number}},
        }),
        "heatpump" => json!({
            "Client_Name": device, "d0": value, "d104": number, "d51": number, "d52": value,
        }),
        _ => json!({
            "POWER": if value.is_multiple_of(2) { "ON" } else { "OFF" },
            "UptimeSec": number,
            "Wifi": {"RSSI": value},
        }),
    };
    if kind == Kind::Incomplete {
        payload["activeActualConsumption"] = json!({});
    }
    payload["padding"] = padding.into();
    let text = payload.to_string();
    match kind {
        // What is left over begins with the number, by which the letter is known again.
        Kind::Malformed => format!("{{\"number\":{number},{}", &text[1..text.len() / 2]),
        _ => format!("{{\"number\":{number},{}", &text[1..]),
    }
}

/// The number a payload of ours begins with.
pub fn number_in(payload: &str) -> Option<u64> {
    payload.strip_prefix("{\"number\":")?.split(',').next()?.parse().ok()
}

/// Publishes until it is told to end.
pub struct Load {
    publisher: Arc<Publisher>,
    messages: Arc<Mutex<Vec<Message>>>,
    /// Held while the broker must not be in the middle of anything.
    pub gate: Arc<Mutex<()>>,
    ending: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Load {
    pub fn start(port: u16, round: u64, mut dice: StdRng) -> Self {
        let publisher = Arc::new(Publisher::new(port, &format!("publisher-{round}")));
        let messages = Arc::new(Mutex::new(Vec::new()));
        let ending = Arc::new(AtomicBool::new(false));
        let gate = Arc::new(Mutex::new(()));
        let thread = {
            let (publisher, messages) = (publisher.clone(), messages.clone());
            let (ending, gate) = (ending.clone(), gate.clone());
            std::thread::spawn(move || {
                let count = || messages.lock().expect("no holder panics").len();
                while !ending.load(Ordering::SeqCst) || count() < MESSAGES_MIN {
                    let late = count() > MANY_MESSAGES;
                    let burst = if late { LATE_BURST_MAX } else { BURST_MAX };
                    let open = gate.lock().expect("no holder panics");
                    for _ in 0..dice.random_range(1..=burst) {
                        let message = Message::drawn(round, count() as u64, &mut dice);
                        let (topic, payload) = (message.topic(), message.payload.clone());
                        messages.lock().expect("no holder panics").push(message.clone());
                        publisher.publish(message.stream.name, &topic, payload);
                    }
                    drop(open);
                    std::thread::sleep(Duration::from_millis(dice.random_range(1..PAUSE_MAX_MS)));
                }
            })
        };
        Load { publisher, messages, gate, ending, thread }
    }

    /// Everything published, in order: a message's place is its id in the publisher's ledger.
    pub fn end(self) -> (Arc<Publisher>, Vec<Message>) {
        self.ending.store(true, Ordering::SeqCst);
        self.thread.join().expect("the publishing thread does not panic");
        let messages = std::mem::take(&mut *self.messages.lock().expect("no holder panics"));
        (self.publisher, messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_in_every_payload_and_only_malformed_ones_are_no_json() {
        for stream in &STREAMS {
            for kind in [Kind::Reading, Kind::Malformed] {
                let text = payload(stream.name, "r1-2", 77, 3, kind, "x".repeat(PADDING));
                assert_eq!(number_in(&text), Some(77));
                let json = serde_json::from_str::<serde_json::Value>(&text);
                assert_eq!(json.is_ok(), kind == Kind::Reading, "{text}");
            }
        }
    }
}
