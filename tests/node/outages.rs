//! Whatever is outside may be away: the node keeps what it accepted and catches up by itself.

use std::fs::{self, DirEntry};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rig::{Disk, FileSystem, Folder, eventually};
use serde_json::json;

use crate::world::{Changes, SOON, World};

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}})
    .to_string()
}

/// Each publication's counter value, as the table and the topic show it.
fn counters(world: &World) -> Vec<String> {
    let sql = "SELECT active_energy_total FROM energy_consumption";
    let rows = world.postgres.query("telemetry", sql).unwrap();
    rows.into_iter().flatten().flatten().collect()
}

fn assert_once_each(world: &World, publisher: &rig::Publisher) {
    let arrived = counters(world);
    let ledger = publisher.ledger();
    let comparison = ledger.compare(
        |entry| {
            let value: serde_json::Value = serde_json::from_slice(&entry.payload).unwrap();
            value["activeTotalConsumption"]["total"].to_string()
        },
        arrived.iter().map(String::as_str),
    );
    assert!(comparison.is_exact(), "{comparison:?}");
}

/// What the node is not healthy for: a state alone is no reason.
#[track_caller]
fn assert_each_reason_is_given(world: &World) {
    let health = world.node.get("/health").unwrap().json().unwrap();
    for because in health["because"].as_array().unwrap() {
        assert!(!because.as_str().unwrap().trim_end().ends_with(':'), "{because}");
    }
}

#[test]
fn it_starts_with_everything_away_and_catches_up_when_things_come() {
    let mut world = World::prepare(Changes { own_kafka: true, ..Changes::default() });
    world.mosquitto.stop().unwrap();
    world.postgres.stop().unwrap();
    world.own_kafka().stop().unwrap();
    world.node.spawn().unwrap();
    eventually(SOON, "it says that nothing is migrated yet", || {
        let Ok(ready) = world.node.get("/health/ready") else { return false };
        assert_eq!(ready.status, 503, "ready before a database was looked at: {}", ready.body);
        assert_each_reason_is_given(&world);
        ready.body.contains("migrations not applied yet")
    });
    eventually(SOON, "the cluster is said to be away", || {
        assert_each_reason_is_given(&world);
        dependency(&world, "kafka:main")["breaker"]["trips"] == 1
    });
    eventually(SOON, "its sinks say so too", || {
        let trouble = &world.sink("energy", "kafka")["status"]["trouble"];
        trouble.as_str().is_some_and(|words| words.contains("1/1 brokers are down"))
    });
    world.mosquitto.restart().unwrap();
    world.subscribed();
    let publisher = world.publisher();
    for count in 0..100 {
        publisher.publish("energy", "saveeye/telemetry", reading(count));
    }
    publisher.flush(SOON).unwrap();
    world.own_kafka().restart().unwrap();
    eventually(SOON, "the topic has them without a database", || {
        world.kafka_records("homelab-energy-realtime").len() == 100
    });
    world.postgres.restart().unwrap();
    world.drained(SOON);
    assert_once_each(&world, &publisher);
    world.node.wait_ready(SOON).unwrap();
    let log = world.node.log_text();
    let library = log.matches("\"event\":\"kafka_library\"").count();
    assert!(
        library <= 2,
        "{library} lines of the library, which tries several times a second\n{log}"
    );
}

/// The node sees a list of hosts of its own, and a name server that says nothing for longer than `NEAR_WITHIN`.
#[test]
fn names_that_cannot_be_resolved_are_waited_for_and_looked_up_again() {
    const NEAR_WITHIN: Duration = Duration::from_secs(8);
    let mut world = World::prepare(Changes { kafka: true, ..Changes::default() });
    let config = world.node.config().to_owned();
    let text = fs::read_to_string(&config).unwrap();
    let bootstrap = world.bootstrap();
    let silent =
        std::net::UdpSocket::bind("127.7.7.7:53").expect("no name server of this machine has that");
    let near = format!("[brokers.near]\nhost = \"localhost\"\nport = {}\n", world.mosquitto.port());
    let text = text
        .replace("[streams.heatpump]\nbroker = \"home\"", "[streams.heatpump]\nbroker = \"near\"");
    let named = (text + &near)
        .replace("host = \"127.0.0.1\"", "host = \"outside.test\"")
        .replace(&bootstrap, &bootstrap.replace("127.0.0.1", "outside.test"));
    let names = named.matches("outside.test").count();
    assert_eq!(names, 4, "a broker, two databases and a cluster\n{named}");
    fs::write(&config, named).unwrap();
    let (hosts, resolver) = (config.with_file_name("hosts"), config.with_file_name("resolv.conf"));
    fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    fs::write(&resolver, "nameserver 127.7.7.7\noptions timeout:12 attempts:1\n").unwrap();
    let mounts = format!(
        "mount --bind {} /etc/hosts && mount --bind {} /etc/resolv.conf && exec \"$@\"",
        hosts.display(),
        resolver.display()
    );
    let port = world.node.http_port();
    let through = ["unshare", "--mount", "sh", "-c", &mounts, "sh"].map(str::to_owned).to_vec();
    world.node = rig::Node::new(env!("CARGO_BIN_EXE_telemetry"), config, port).through(through);
    world.node.start().unwrap();
    eventually(NEAR_WITHIN, "a look-up that takes its time holds up no other stream", || {
        world.stream("heatpump")["status"]["subscribed"] == true
    });
    for name in ["mqtt:home", "postgresql:telemetry", "kafka:main"] {
        eventually(SOON, format!("{name} is said to be away, by its name"), || {
            let dependency = dependency(&world, name);
            dependency["up"] == false && dependency["trouble"].to_string().contains("outside.test")
        });
    }
    drop(silent);
    // In place: the file is what is mounted.
    fs::write(&hosts, "127.0.0.1 localhost outside.test\n").unwrap();
    world.subscribed();
    world.node.wait_ready(SOON).unwrap();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    assert_once_each(&world, &publisher);
    assert_eq!(world.kafka_records("homelab-energy-realtime").len(), 1);
}

#[test]
fn a_database_away_under_load_costs_nothing() {
    let mut world = World::start(Changes::default());
    let publisher = world.publisher();
    let send = |from: u64| {
        (from..from + 1000).for_each(|count| {
            publisher.publish("energy", "saveeye/telemetry", reading(count));
        })
    };
    send(0);
    world.postgres.kill();
    send(1000);
    publisher.flush(SOON).unwrap();
    eventually(SOON, "it says that it waits", || {
        world.sink("energy", "energy_consumption")["status"]["state"] == "waiting"
    });
    world.postgres.restart().unwrap();
    send(2000);
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    assert_once_each(&world, &publisher);
    assert_eq!(world.count("telemetry", "energy_consumption"), 3000);
    let dead = world.books("energy", "energy_consumption", "dead_lettered");
    assert_eq!(dead, 0, "an outage is never a dead letter");
}

#[test]
fn a_broker_restart_is_followed_by_a_new_subscription_even_without_its_session_store() {
    let mut world = World::start(Changes::default());
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    world.mosquitto.stop().unwrap();
    eventually(SOON, "it says so", || {
        world.node.get("/health").unwrap().body.contains("not subscribed")
    });
    let store = world.mosquitto.folder().join("data/mosquitto.db");
    if store.exists() {
        fs::remove_file(store).unwrap();
    }
    eventually(SOON, "the streams stop knocking", || {
        dependency(&world, "mqtt:home")["breaker"]["trips"] == 1
    });
    let outage = dependency(&world, "mqtt:home")["correlation_id"].clone();
    world.mosquitto.restart().unwrap();
    world.subscribed();
    assert_eq!(dependency(&world, "mqtt:home")["breaker"]["state"], "closed");
    publisher.publish("energy", "saveeye/telemetry", reading(2));
    publisher.flush(SOON).unwrap();
    eventually(SOON, "the second reading", || counters(&world).len() == 2);
    assert_eq!(dependency(&world, "mqtt:home")["correlation_id"], json!(null), "it is over");
    let told = world.told(outage.as_str().unwrap());
    let count = |event: &str| told.iter().filter(|told| *told == event).count();
    assert_eq!(told[0], "dependency_lost", "{told:?}");
    for event in ["dependency_lost", "breaker_opened", "dependency_reached", "session_new"] {
        assert_eq!(count(event), 1, "{event} in {told:?}");
    }
    assert_eq!(count("stream_input_active"), 10, "five went and five came: {told:?}");
    assert_eq!(told.len(), 14, "{told:?}");
}

/// What the node says of something outside.
fn dependency(world: &World, name: &str) -> serde_json::Value {
    world.node.get("/health").unwrap().json().unwrap()["dependencies"][name].clone()
}

#[test]
fn a_breaker_is_shown_everywhere_and_a_database_that_is_back_is_used_within_seconds() {
    let mut world = World::prepare(Changes::default());
    let config = world.node.config().to_owned();
    // Far slower than the breaker, so that what is measured is the breaker's pace.
    let slow = fs::read_to_string(&config).unwrap().replace("retry_max_ms = 1000", "");
    fs::write(&config, slow).unwrap();
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    world.subscribed();
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    world.postgres.kill();
    for count in 2..100 {
        publisher.publish("energy", "saveeye/telemetry", reading(count));
    }
    publisher.flush(SOON).unwrap();
    let name = "postgresql:telemetry";
    eventually(SOON, "the breaker opens", || dependency(&world, name)["breaker"]["trips"] == 1);
    let metrics = world.node.get("/metrics").unwrap().body;
    for line in [
        r#"telemetry_breaker_trips_total{dependency="postgresql:telemetry"} 1"#,
        r#"telemetry_breaker_trips_total{dependency="mqtt:home"} 0"#,
        r#"telemetry_breaker_state{dependency="postgresql:telemetry",state="closed"} 0"#,
        r#"telemetry_breaker_state{dependency="mqtt:home",state="closed"} 1"#,
        r#"telemetry_breaker_next_trial_timestamp_seconds{dependency="mqtt:home"} 0.0"#,
    ] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
    let because = world.node.get("/health").unwrap().json().unwrap()["because"].to_string();
    assert!(because.contains("its breaker is open"), "{because}");
    let status = world.node.command(&["status"]).unwrap();
    let shown = String::from_utf8(status.stdout).unwrap();
    assert!(shown.contains("postgresql:telemetry is away, breaker"), "{shown}");
    // By then the back-off alone would be far longer than the cool-down.
    let mut trials = std::collections::BTreeSet::new();
    eventually(SOON, "several trials have failed", || {
        trials.extend(
            dependency(&world, name)["breaker"]["next_trial"].as_i64().map(|at| at / 500_000),
        );
        trials.len() >= 10
    });
    assert_eq!(dependency(&world, name)["breaker"]["trips"], 1, "failed trials are no trips");
    world.postgres.restart().unwrap();
    let back = Instant::now();
    world.drained(SOON);
    let seconds = back.elapsed().as_secs_f64();
    eprintln!("caught up {seconds:.1} s after the database was back");
    assert!(seconds < 6.0, "{seconds}");
    assert_eq!(dependency(&world, name)["breaker"]["state"], "closed");
    assert_once_each(&world, &publisher);
}

/// Of the outage below: 20, or OUTAGE_SECONDS of the environment, for one as long as they are in life.
fn outage_seconds() -> u64 {
    let given = std::env::var("OUTAGE_SECONDS").ok();
    given.map_or(20, |text| text.parse().expect("OUTAGE_SECONDS is a number"))
}

/// Lines of the log. Streams that get no message here are silent in the end, rightly.
fn said(world: &World) -> Vec<String> {
    let log = world.node.log_text();
    log.lines().filter(|line| !line.contains("stream_silent")).map(str::to_owned).collect()
}

/// Attempts come as often in these seconds as in minutes of a real outage: what is said must not grow with them.
#[test]
fn an_outage_under_load_is_told_in_a_few_lines() {
    const RATE: u64 = 100;
    let mut world = World::start(Changes { kafka: false, ..Changes::default() });
    let publisher = world.publisher();
    let quiet_from = said(&world).len();
    world.postgres.kill();
    let begun = Instant::now();
    let mut count = 0;
    let mut early = None;
    let mut trials = std::collections::BTreeSet::new();
    let lasting = outage_seconds();
    let within = Duration::from_secs(lasting) + SOON;
    eventually(within, "some trials failed, and it went on for a while", || {
        while begun.elapsed().as_secs_f64() * RATE as f64 > count as f64 {
            publisher.publish("energy", "saveeye/telemetry", reading(count));
            count += 1;
        }
        if early.is_none() && begun.elapsed() > Duration::from_secs(6) {
            early = Some(said(&world).len());
        }
        let breaker = dependency(&world, "postgresql:telemetry")["breaker"].clone();
        trials.extend(breaker["next_trial"].as_i64().map(|at| at / 500_000));
        count >= lasting * RATE && trials.len() >= 8
    });
    let all = said(&world);
    assert_eq!(all.len(), early.unwrap(), "after a few seconds nothing more is said\n{all:#?}");
    publisher.flush(SOON).unwrap();
    world.postgres.restart().unwrap();
    world.drained(SOON);
    assert_once_each(&world, &publisher);
    let lines = said(&world).split_off(quiet_from);
    assert!(lines.len() < 30, "{} lines:\n{}", lines.len(), lines.join("\n"));
    let counts = |line: &String| line.contains("away_seconds") && line.contains("attempts");
    assert!(lines.iter().any(counts), "with counts\n{}", lines.join("\n"));
    eprintln!("{} lines for {count} messages during the outage", lines.len());
}

#[test]
fn stop_and_start_under_load_lose_and_double_nothing() {
    let mut world = World::start(Changes { kafka: true, ..Changes::default() });
    let publisher = world.publisher();
    let mut count = 0;
    for _ in 0..3 {
        for _ in 0..2000 {
            publisher.publish("energy", "saveeye/telemetry", reading(count));
            count += 1;
        }
        let status = world.node.stop(SOON).unwrap();
        assert!(status.success(), "{status}");
        world.node.start().unwrap();
    }
    publisher.flush(SOON).unwrap();
    world.drained(SOON);
    eventually(SOON, "all rows", || world.count("telemetry", "energy_consumption") == count);
    assert_once_each(&world, &publisher);
    let records = world.kafka_records("homelab-energy-realtime");
    let ids: std::collections::HashSet<_> =
        records.iter().filter_map(|record| record.header("telemetry-id")).collect();
    assert_eq!(ids.len() as u64, count, "a clean stop repeats nothing either");
    assert_eq!(records.len() as u64, count);
}

/// Text that compression only halves.
fn noise(seed: u64, characters: usize) -> String {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        char::from_digit((state >> 60) as u32, 16).expect("four bits")
    };
    (0..characters).map(|_| next()).collect()
}

/// As the files are, with the small ones that nobody counts.
fn generations_bytes(buffer: &Path) -> u64 {
    let is_generation = |entry: &DirEntry| entry.file_name().as_bytes().starts_with(b"generation-");
    let generations = fs::read_dir(buffer).unwrap().flatten().filter(is_generation);
    let files = generations.flat_map(|entry| fs::read_dir(entry.path()).unwrap().flatten());
    files.map(|file| file.metadata().map_or(0, |file| file.len())).sum()
}

#[test]
fn at_its_quota_it_stops_acknowledging_and_resumes_by_itself() {
    const QUOTA_BYTES: u64 = 16 << 20;
    const TAIL_BYTES: u64 = 1 << 20;
    let extra = format!(
        "[buffer]\nquota_bytes = {QUOTA_BYTES}\ngeneration_bytes = 1048576\nfree_bytes_min = 1048576\n\
         tail_bytes_max = {TAIL_BYTES}\n"
    );
    let mut world = World::start(Changes { extra, ..Changes::default() });
    world.postgres.stop().unwrap();
    let publisher = world.publisher();
    let padded = |count: u64| {
        json!({"saveeyeDeviceSerialNumber": "SE-1", "pad": noise(count + 1, 2000),
            "activeActualConsumption": {"total": 500}, "activeTotalConsumption": {"total": count}})
        .to_string()
    };
    let mut count = 0;
    let buffer = || world.node.get("/health").unwrap().json().unwrap()["buffer"].clone();
    let sequence = || world.stream("energy")["status"]["sequence"].as_u64().unwrap();
    let shown = || buffer()["bytes"].as_u64().unwrap();
    let taken = || generations_bytes(&world.node.config().with_file_name("state/buffer"));
    eventually(Duration::from_secs(60), "the quota is reached and said", || {
        // A thousand take a third of the quota, and it is looked at once a second: from here on so few at once that it is
        // seen on its way between the two warnings.
        let near = shown() > QUOTA_BYTES * 4 / 10;
        for _ in 0..if near { 200 } else { 1000 } {
            publisher.publish("energy", "saveeye/telemetry", padded(count));
            count += 1;
        }
        publisher.flush(SOON).unwrap();
        // That the broker has them all does not mean that the node has.
        let full = || buffer()["accepting"] == false;
        eventually(SOON, "they are kept", || sequence() == count || full());
        // Not at their beginning: then twice as many would come before the next look.
        eventually(SOON, "it is looked at", || shown() * 102 / 100 >= taken() || full());
        full()
    });
    for _ in 0..500 {
        publisher.publish("energy", "saveeye/telemetry", padded(count));
        count += 1;
    }
    publisher.flush(SOON).unwrap();
    let ready = world.node.get("/health/ready").unwrap();
    assert_eq!(ready.status, 503, "{}", ready.body);
    let page = world.node.get("/metrics").unwrap().body;
    let tail = "telemetry_edge_depth{edge=\"tail\"} ";
    let tail = page.lines().find_map(|line| line.strip_prefix(tail)?.parse::<u64>().ok()).unwrap();
    assert!((TAIL_BYTES / 2..=TAIL_BYTES).contains(&tail), "{tail} bytes in memory");
    assert!(sequence() < count, "the broker holds the rest");
    let warned = || -> Vec<u64> {
        let log = world.node.log_text();
        let lines = log.lines().filter_map(|line| serde_json::from_str(line).ok());
        let filling = lines.filter(|line: &serde_json::Value| line["event"] == "buffer_filling");
        filling.filter_map(|line| line["percent"].as_u64()).collect()
    };
    eventually(SOON, "it has warned twice", || warned().len() >= 2);
    assert!((80..95).contains(&warned()[0]) && warned()[1] >= 95, "{:?}", warned());
    world.postgres.restart().unwrap();
    eventually(Duration::from_secs(60), "all rows", || {
        world.postgres.count("telemetry", "energy_consumption").is_ok_and(|rows| rows == count)
    });
    world.drained(SOON);
    assert_once_each(&world, &publisher);
}

#[test]
fn with_less_space_than_it_wants_free_it_stops_acknowledging_and_resumes_by_itself() {
    const FREE_BYTES_MIN: u64 = 16 << 20;
    let folder = Folder::new(None, "space").unwrap();
    let disk = Disk::open(folder.path(), FileSystem::Ext4).unwrap();
    let extra = format!("[buffer]\nfree_bytes_min = {FREE_BYTES_MIN}\nballast_bytes = 0\n");
    let mut world = World::prepare(Changes { extra, ..Changes::default() });
    world.put_state_on(&disk);
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    world.subscribed();
    let publisher = world.publisher();
    let publish = |counts: std::ops::Range<u64>| {
        for count in counts {
            publisher.publish("energy", "saveeye/telemetry", reading(count));
        }
        publisher.flush(SOON).unwrap();
    };
    publish(0..100);
    world.drained(SOON);
    let filling = disk.fill(FREE_BYTES_MIN / 2).unwrap();
    publish(100..200);
    let buffer = || world.node.get("/health").unwrap().json().unwrap()["buffer"].clone();
    eventually(SOON, "it takes nothing more, and says why", || {
        buffer()["accepting"] == false
            && buffer()["refusing_because"].to_string().contains("bytes free, the minimum is")
    });
    assert_eq!(world.node.get("/health/ready").unwrap().status, 503);
    assert_eq!(world.count("telemetry", "energy_consumption"), 100, "the broker holds the rest");
    drop(filling);
    eventually(SOON, "all rows", || world.count("telemetry", "energy_consumption") == 200);
    world.drained(SOON);
    assert_once_each(&world, &publisher);
    let log = world.node.log_text();
    let told = |event: &str| log.matches(&format!("\"event\":\"{event}\"")).count();
    assert_eq!((told("buffer_full"), told("buffer_accepting")), (1, 1), "{log}");
    world.node.stop(SOON).unwrap();
}
