//! What others lose while parts fail: the pace and the delay of their rows, by the times at which the table got them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rig::eventually;
use serde_json::Value;

use crate::world::{Changes, SOON, World};

/// Far below what a busy machine carries: the publisher sets the pace.
const PER_SECOND: u64 = 500;
/// So long that one part in a hundred of it is more than a busy machine delays a row.
const STRETCH: Duration = Duration::from_secs(40);
/// Of what fails beside them.
const EVERY: Duration = Duration::from_millis(20);
/// The share of the pace of publishing at which rows come.
const KEPT: f64 = 0.99;
/// All rows but one in a hundred have come within this many seconds of being published.
const LATEST: f64 = 1.0;
const NEIGHBOURS: &str = "temperature_outdoor";

/// Parts that panic or hang in every life of theirs as soon as they have work, and how often at least within the stretch.
const FAILING: [(&str, &str, u64); 6] = [
    ("writer:energy:energy_consumption", "part_writer_energy=panic", 30),
    ("stream:plug", "part_stream_homelab-1-plug=panic", 20),
    ("migrator:homelab_settings", "part_migrator_homelab_settings=panic", 30),
    ("watch:clock", "part_watch_clock=panic", 10),
    ("stream:heatpump", "part_stream_homelab-1-heatpump=return", 3),
    ("kafka:main", "part_kafka_energy=return", 3),
];

/// In seconds since 1970, in the order of the messages.
struct Times {
    published: Vec<f64>,
    arrived: Vec<f64>,
}

impl Times {
    /// As a share of the pace at which they were published.
    fn pace(&self) -> f64 {
        span(&self.published) / span(&self.arrived)
    }

    /// That all but one in a hundred were not above, and the longest.
    fn delays(&self) -> (f64, f64) {
        let both = self.published.iter().zip(&self.arrived);
        let mut delays: Vec<_> = both.map(|(published, arrived)| arrived - published).collect();
        delays.sort_by(f64::total_cmp);
        (delays[delays.len() * 99 / 100], delays[delays.len() - 1])
    }
}

/// From the first tenth to the last one, of which the means count: one late row at either end is not the pace.
fn span(times: &[f64]) -> f64 {
    let tenth = times.len() / 10;
    let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len() as f64;
    mean(&times[times.len() - tenth..]) - mean(&times[..tenth])
}

/// Publishes for the neighbours at their pace, and work for those who fail.
fn stretch(world: &World) -> Times {
    let over = AtomicBool::new(false);
    let published = std::thread::scope(|scope| {
        scope.spawn(|| others(world, &over));
        let published = neighbours(world);
        over.store(true, Ordering::Release);
        published
    });
    eventually(SOON, "every row of the neighbours", || {
        world.count("telemetry", "temperature_sensors") == 1 + published.len() as u64
    });
    let arrived = "SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin)) \
                   FROM temperature_sensors ORDER BY time OFFSET 1";
    let rows = world.postgres.query("telemetry", arrived).unwrap();
    let seconds = rows.into_iter().map(|row| row[0].as_deref().unwrap().parse().unwrap());
    Times { published, arrived: seconds.collect() }
}

/// Gives when each was published. They begin once the way is open: the first row of all waits for a partition.
fn neighbours(world: &World) -> Vec<f64> {
    let publisher = world.publisher_named("neighbours");
    let publish = |number: u64| {
        let payload = format!(r#"{{"temperature_c": {}}}"#, number % 40);
        publisher.publish(NEIGHBOURS, "homelab/temperature/outdoor", payload);
    };
    publish(0);
    eventually(SOON, "the first row", || {
        world.postgres.count("telemetry", "temperature_sensors").is_ok_and(|rows| rows == 1)
    });
    let (began, step) = (Instant::now(), Duration::from_secs(1) / PER_SECOND as u32);
    let count = PER_SECOND * STRETCH.as_secs();
    let mut published = Vec::new();
    for number in 0..count {
        let due = step * number as u32;
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        published.push(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64());
        publish(number);
    }
    publisher.flush(SOON).unwrap();
    published
}

fn others(world: &World, over: &AtomicBool) {
    let publisher = world.publisher_named("others");
    let began = Instant::now();
    while !over.load(Ordering::Acquire) && began.elapsed() < 2 * STRETCH {
        let reading =
            r#"{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500}}"#;
        publisher.publish("energy", "saveeye/telemetry", reading);
        publisher.publish("plug", "tele/desk/STATE", r#"{"POWER": "ON"}"#);
        publisher.publish(
            "heatpump",
            "thermiq_heatpump/data",
            r#"{"Client_Name": "pump", "d50": 21}"#,
        );
        std::thread::sleep(EVERY);
    }
    publisher.flush(SOON).unwrap();
}

fn restarts(world: &World, part: &str) -> u64 {
    let health: Value = world.node.get("/health").unwrap().json().unwrap();
    health["parts"][part]["restarts"].as_u64().unwrap_or_default()
}

#[test]
fn while_parts_panic_and_hang_again_and_again_the_others_keep_their_pace() {
    let points = FAILING.map(|(_, point, _)| point).join(";");
    let mut world = World::prepare(Changes {
        kafka: true,
        // One that saves after each message would set the pace.
        flooded: true,
        database_settings: &[("track_commit_timestamp", "on")],
        failpoints: points,
        extra: "[supervision]\nrestarts_max = 1000\nbackoff_min_ms = 50\nbackoff_max_ms = 100\n\
                stall_timeout_seconds = 5\n"
            .to_owned(),
        ..Changes::default()
    });
    world.node.start().unwrap();
    world.subscribed();
    let before = FAILING.map(|(part, ..)| restarts(&world, part));
    let times = stretch(&world);
    let (pace, (late, latest)) = (times.pace(), times.delays());
    println!("pace {pace:.4}, 99 of 100 rows within {late:.3} s, all within {latest:.3} s");
    for ((part, _, least), before) in FAILING.iter().zip(before) {
        let failures = restarts(&world, part) - before;
        assert!(failures >= *least, "{part} failed {failures} times");
    }
    for part in ["stream:temperature_outdoor", "writer:temperature_outdoor:temperature_sensors"] {
        assert_eq!(restarts(&world, part), 0, "{part}");
    }
    assert!(pace >= KEPT, "rows come at {pace} of the pace");
    assert!(late <= LATEST, "{late} s late");
}
