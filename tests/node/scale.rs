//! Many streams, many devices, many messages with nobody to take them: what the node uses stays within its bounds.

use std::fs;
use std::time::{Duration, Instant};

use rig::eventually;

use crate::world::{Changes, SOON, World};

const STREAMS: usize = 200;
/// `drain_timeout_seconds` of the example, and what may pass after it.
const STOP_LIMIT: Duration = Duration::from_secs(20 + 5);
/// As docs/operations.md shows it for a drop-in, at `MemoryHigh=`.
const MEMORY_MIB: u64 = 384;

/// A bound of the unit file.
fn unit(setting: &str) -> u64 {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/telemetry.service");
    let unit = fs::read_to_string(path).unwrap();
    let line = unit.lines().find_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("the unit has no {setting}")).parse().unwrap()
}

/// What the kernel says of the node.
#[derive(Debug, Clone, Copy)]
struct Used {
    threads: u64,
    files: u64,
    /// At most so far.
    mib: u64,
}

impl Used {
    fn by(world: &mut World) -> Self {
        let pid = world.node.daemon().pid().expect("the node runs");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let number = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
        Used { threads: number("Threads:"), files, mib: number("VmHWM:") / 1024 }
    }

    #[track_caller]
    fn assert_within_the_unit(self) {
        assert!(self.threads < unit("TasksMax"), "{self:?}");
        assert!(self.files < unit("LimitNOFILE"), "{self:?}");
        assert!(self.mib < MEMORY_MIB, "{self:?}");
    }
}

/// As TOML: each with a topic filter of its own, one table and one Kafka topic for all.
fn many_streams(kafka_topic: &str) -> String {
    let stream = |n: usize| {
        format!(
            r#"
[streams.many_{n}]
broker = "home"
topic_filter = "many/{n}/+"
silent_warning_after_seconds = 3600
kafka = {{ cluster = "main", topic = "{kafka_topic}", ensure = {{ partitions = 1 }} }}
[streams.many_{n}.fields]
device_id = {{ topic_level = 3, device_id = true, tag = true }}
location = {{ constant = "many", tag = true }}
temperature_c = {{ path = "t", type = "float8", required = true }}
[streams.many_{n}.tables.readings]
database = "telemetry"
table = "temperature_sensors"
kind = "append"
"#
        )
    };
    (0..STREAMS).map(stream).collect()
}

#[test]
fn two_hundred_streams_start_deliver_and_stop_within_the_bounds_of_the_unit() {
    const EACH: usize = 5;
    let extra = many_streams(&format!("many-{}", std::process::id()));
    let mut world = World::start(Changes { kafka: true, extra, ..Changes::default() });
    Used::by(&mut world).assert_within_the_unit();
    let publisher = world.publisher();
    for n in 0..EACH {
        for stream in 0..STREAMS {
            let topic = format!("many/{stream}/device-{n}");
            publisher.publish(&format!("many_{stream}"), &topic, format!(r#"{{"t": {n}.5}}"#));
        }
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "every row of every stream", || {
        world.count("telemetry", "temperature_sensors") == (EACH * STREAMS) as u64
    });
    world.drained(SOON);
    let used = Used::by(&mut world);
    used.assert_within_the_unit();
    let stopping = Instant::now();
    let status = world.node.stop(STOP_LIMIT).unwrap();
    let log = world.node.log_text();
    assert!(status.success(), "{status}");
    assert!(!log.contains("parts_left") && !log.contains("part_failed"), "{log}");
    println!("{STREAMS} streams: {used:?}, stopped after {:?}", stopping.elapsed());
}

#[test]
fn ten_thousand_devices_behind_one_wildcard_cost_neither_series_nor_memory() {
    const MESSAGES: usize = 20_000;
    /// Noise of the allocator, and what debug builds add.
    const GROWTH_MIB: u64 = 32;
    let mut world = World::start(Changes { flooded: true, ..Changes::default() });
    let series = |world: &World| {
        let page = world.node.get("/metrics").unwrap().body;
        assert!(!page.contains("dev-"), "a label comes from a message");
        page.lines().filter(|line| !line.starts_with('#')).count()
    };
    let send = |world: &World, devices: usize| {
        let publisher = world.publisher();
        for n in 0..MESSAGES {
            let device = n % devices;
            let payload = format!(r#"{{"POWER": "ON", "UptimeSec": {n}, "own-{device}": 1}}"#);
            publisher.publish("plug", &format!("tele/dev-{device}/STATE"), payload);
        }
        publisher.flush(SOON * 2).unwrap();
        world.drained(SOON * 2);
    };
    send(&world, 100);
    let (before, first) = (Used::by(&mut world), series(&world));
    send(&world, 10_000);
    let (after, second) = (Used::by(&mut world), series(&world));
    assert_eq!(world.count("homelab_settings", "power_plugs"), 10_000);
    assert_eq!(first, second, "series");
    assert!(after.mib < before.mib + GROWTH_MIB, "{before:?} {after:?}");
    let streams = world.node.streams().unwrap();
    let plug = streams["streams"].as_array().unwrap().iter().find(|line| line["name"] == "plug");
    let unmapped = plug.unwrap()["status"]["unmapped"].as_object().unwrap().len();
    assert!((1..=100).contains(&unmapped), "{unmapped} names of members");
    println!("10,000 devices: {second} series, {before:?} then {after:?}");
}

/// The long form, with 3 million pending, is a line of `make bench`.
#[test]
fn memory_stays_within_its_bound_while_no_sink_is_there() {
    const PENDING: usize = 100_000;
    let changes = Changes { own_kafka: true, flooded: true, ..Changes::default() };
    let mut world = World::start(changes);
    world.own_kafka().kill();
    world.postgres.kill();
    let publisher = world.publisher();
    let reading = |n: usize| {
        format!(
            r#"{{"saveeyeDeviceSerialNumber": "SE-{}", "activeActualConsumption": {{"total": 500}}, "activeTotalConsumption": {{"total": {n}}}}}"#,
            n % 50
        )
    };
    for n in 0..PENDING {
        publisher.publish("energy", "saveeye/telemetry", reading(n));
    }
    publisher.flush(SOON * 2).unwrap();
    let sequence = |world: &World| {
        let all = world.node.streams().unwrap();
        let streams = all["streams"].as_array().cloned().unwrap_or_default();
        let energy = streams.into_iter().find(|line| line["name"] == "energy").unwrap();
        energy["status"]["sequence"].as_u64().unwrap()
    };
    eventually(SOON * 2, "all is kept", || sequence(&world) == PENDING as u64);
    let used = Used::by(&mut world);
    used.assert_within_the_unit();
    world.postgres.restart().unwrap();
    world.own_kafka().restart().unwrap();
    world.drained(SOON * 3);
    assert_eq!(world.count("telemetry", "energy_consumption"), PENDING as u64);
    let draining = Used::by(&mut world);
    draining.assert_within_the_unit();
    println!("{PENDING} pending: {used:?}, after draining {draining:?}");
}
