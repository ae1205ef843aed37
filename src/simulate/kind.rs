//! What the five kinds of device send: names, ranges, counters, constants.

use std::time::Duration;

use jiff::Timestamp;
use rand::Rng;
use rand::rngs::StdRng;

use super::faults::Fault;

/// A kind of device; its name is the name of the stream it feeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Energy,
    Heatpump,
    TemperatureIndoor,
    TemperatureOutdoor,
    Plug,
}

impl Kind {
    pub const ALL: [Kind; 5] = [
        Kind::Energy,
        Kind::Heatpump,
        Kind::TemperatureIndoor,
        Kind::TemperatureOutdoor,
        Kind::Plug,
    ];

    /// The kind that feeds a stream of this name.
    pub fn of_stream(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.stream() == name)
    }

    pub fn stream(self) -> &'static str {
        match self {
            Kind::Energy => "energy",
            Kind::Heatpump => "heatpump",
            Kind::TemperatureIndoor => "temperature_indoor",
            Kind::TemperatureOutdoor => "temperature_outdoor",
            Kind::Plug => "plug",
        }
    }

    /// The topics such devices publish to, where no configuration says otherwise.
    pub fn topic_filter(self) -> &'static str {
        match self {
            Kind::Energy => "saveeye/telemetry",
            Kind::Heatpump => "thermiq_heatpump/data",
            Kind::TemperatureIndoor => "+/events/rpc",
            Kind::TemperatureOutdoor => "homelab/temperature/outdoor",
            Kind::Plug => "tele/+/STATE",
        }
    }

    /// Between two messages of one device.
    pub fn natural_interval(self) -> Duration {
        Duration::from_secs(match self {
            Kind::Energy => 1,
            Kind::Heatpump => 5,
            Kind::TemperatureIndoor => 30,
            Kind::TemperatureOutdoor | Kind::Plug => 60,
        })
    }

    /// The name of the n-th device, counted from 0. An outdoor sensor has none of its own.
    pub fn device_name(self, n: usize) -> String {
        match self {
            Kind::Energy => format!("SE-{}-K", 4471 + n),
            Kind::Heatpump => format!("ThermIQ_{:012X}", 0x0A1B_2C3D_4E5F_u64 + n as u64),
            Kind::TemperatureIndoor => {
                format!("shellyhtg3-{:012x}", 0x5EC0_FFEE_0001_u64 + n as u64)
            }
            Kind::TemperatureOutdoor => "outdoor-sensor".to_owned(),
            Kind::Plug if n == 0 => "plug-desk".to_owned(),
            Kind::Plug => format!("plug-{n}"),
        }
    }
}

/// One device and what it counts.
#[derive(Debug, Clone)]
pub(super) struct Device {
    kind: Kind,
    pub(super) name: String,
    counter: u64,
    second_counter: u64,
}

impl Device {
    pub(super) fn new(kind: Kind, n: usize) -> Self {
        let (counter, second_counter) = match kind {
            Kind::Energy => (100_000_000, 80),
            Kind::Plug => (277_000, 0),
            _ => (30, 0),
        };
        Device { kind, name: kind.device_name(n), counter, second_counter }
    }

    /// The payload of the next message. A fault that changes a value or a clock shows here.
    pub(super) fn next(
        &mut self,
        random: &mut StdRng,
        at: Timestamp,
        fault: Option<Fault>,
    ) -> String {
        let clock = match fault {
            Some(Fault::WrongClock) => wrong_clock(random, at),
            _ => at,
        };
        let bad = fault == Some(Fault::BadValue);
        match self.kind {
            Kind::Energy => self.energy(random, clock, bad),
            Kind::Heatpump => self.heatpump(random, bad),
            Kind::TemperatureIndoor => self.indoor(random, clock, bad),
            Kind::TemperatureOutdoor => outdoor(random, bad),
            Kind::Plug => self.plug(random, clock, bad),
        }
    }

    fn energy(&mut self, random: &mut StdRng, clock: Timestamp, bad: bool) -> String {
        self.counter += random.random_range(1..=20_u64);
        self.second_counter += random.random_range(0..=1_u64);
        let mut within = |low: i64, high: i64| random.random_range(low..=high);
        let total = within(200, 1300);
        let l1 = if bad { 3_370_000_000 } else { within(100, 800) };
        format!(
            concat!(
                r#"{{"saveeyeDeviceSerialNumber": "{}", "meterType": "three-phase", "#,
                r#""meterSerialNumber": "18402217", "timestamp": "{}", "wifiRssi": {}, "#,
                r#""reactiveActualConsumption": {{"total": {}}}, "#,
                r#""activeActualConsumption": {{"total": {}, "L1": {}, "L2": {}, "L3": {}}}, "#,
                r#""activeActualProduction": {{"total": 0, "L1": 0, "L2": 0, "L3": 0}}, "#,
                r#""activeTotalConsumption": {{"total": {}}}, "#,
                r#""activeTotalProduction": {{"total": {}}}, "#,
                r#""rmsVoltage": {{"L1": {}, "L2": {}, "L3": {}}}, "#,
                r#""rmsCurrent": {{"L1": {}, "L2": {}, "L3": {}}}, "#,
                r#""powerFactor": {{"total": {}}}}}"#
            ),
            self.name,
            clock.strftime("%Y-%m-%dT%H:%M:%S"),
            within(-45, -30),
            within(0, 20),
            total,
            l1,
            within(50, 300),
            within(50, 200),
            self.counter,
            self.second_counter,
            within(236, 240),
            within(236, 240),
            within(236, 240),
            within(500, 3000),
            within(200, 1500),
            within(200, 1000),
            within(95, 100),
        )
    }

    fn heatpump(&mut self, random: &mut StdRng, bad: bool) -> String {
        let mut within = |low: i64, high: i64| random.random_range(low..=high);
        let supply_line = if bad { 70_000 } else { within(30, 40) };
        format!(
            concat!(
                r#"{{"Client_Name": "{}", "app_info": "v2.68", "rssi": -60, "d0": {}, "d5": {}, "#,
                r#""d6": {}, "d7": {}, "d8": {}, "d9": {}, "d13": 0, "d16": 6, "d25": -180, "#,
                r#""d30": 50, "d50": 21, "d51": 1, "d52": 36, "d53": 10, "d54": 45, "d55": 2, "#,
                r#""d56": 0, "d57": -1, "d58": 17, "d73": 4, "d104": {}, "d106": {}, "#,
                r#""d108": {}, "d114": 470, "INDR_T": {}.{}, "EVU": 0}}"#
            ),
            self.name,
            within(-10, 10),
            supply_line,
            within(35, 45),
            within(45, 60),
            within(-2, 5),
            within(-5, 2),
            within(40_000, 50_000),
            within(450, 460),
            within(3100, 3200),
            within(19, 22),
            within(0, 9),
        )
    }

    fn indoor(&mut self, random: &mut StdRng, clock: Timestamp, bad: bool) -> String {
        self.counter += 30;
        let celsius: f64 = random.random_range(19.8..=22.0);
        let shown = if bad { "\"n/a\"".to_owned() } else { format!("{celsius:.1}") };
        let hardware = self.name.rsplit('-').next().unwrap_or_default().to_uppercase();
        format!(
            concat!(
                r#"{{"src": "{name}", "dst": "{name}/events", "method": "NotifyFullStatus", "#,
                r#""params": {{"ts": {ts:.2}, "#,
                r#""temperature:0": {{"id": 0, "tC": {celsius}, "tF": {fahrenheit:.1}}}, "#,
                r#""humidity:0": {{"id": 0, "rh": {humidity:.1}}}, "#,
                r#""devicepower:0": {{"id": 0, "battery": {{"V": 5.86, "percent": 83}}, "#,
                r#""external": {{"present": false}}}}, "#,
                r#""wifi": {{"sta_ip": "192.0.2.63", "status": "got ip", "rssi": -55}}, "#,
                r#""sys": {{"mac": "{hardware}", "uptime": {uptime}, "ram_size": 255800, "#,
                r#""ram_free": {ram_free}}}}}}}"#
            ),
            name = self.name,
            ts = clock.as_microsecond() as f64 / 1e6,
            celsius = shown,
            fahrenheit = celsius * 1.8 + 32.0,
            humidity = random.random_range(40.0..=50.0),
            hardware = hardware,
            uptime = self.counter,
            ram_free = random.random_range(160_000..=170_000),
        )
    }

    fn plug(&mut self, random: &mut StdRng, clock: Timestamp, bad: bool) -> String {
        self.counter += 60;
        let power = match (bad, random.random::<bool>()) {
            (true, _) => "TOGGLE",
            (false, true) => "ON",
            (false, false) => "OFF",
        };
        format!(
            r#"{{"Time": "{}", "UptimeSec": {}, "POWER": "{power}", "Wifi": {{"RSSI": {}, "SSId": "example"}}}}"#,
            clock.strftime("%Y-%m-%dT%H:%M:%S"),
            self.counter,
            random.random_range(40..=100),
        )
    }
}

fn outdoor(random: &mut StdRng, bad: bool) -> String {
    let celsius: f64 = random.random_range(-10.0..=30.0);
    let shown = if bad { "\"n/a\"".to_owned() } else { format!("{celsius:.1}") };
    format!(
        r#"{{"temperature_c": {shown}, "humidity_pct": {}, "wind_speed_ms": {:.1}, "pressure_hpa": {:.1}}}"#,
        random.random_range(30..=90),
        random.random_range(0.0..=20.0),
        random.random_range(980.0..=1030.0),
    )
}

/// 1970, 2031 or a few hours off.
fn wrong_clock(random: &mut StdRng, at: Timestamp) -> Timestamp {
    let seconds = match random.random_range(0..3_u8) {
        0 => random.random_range(0..100_000),
        1 => 1_924_992_000,
        _ => at.as_second() - random.random_range(3_600..36_000),
    };
    Timestamp::from_second(seconds).unwrap_or(at)
}
