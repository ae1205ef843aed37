//! A disk that fails under the running node: calls of the real binary answer with an error, one at a time. And places
//! it must not write to: another user's, another node's, none at all.

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt, chown};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};

use rig::{Disk, FileSystem, Folder, Node, eventually, until};
use serde_json::json;

use crate::world::{Changes, SOON, World};

const SETTINGS: &str = "[buffer]\ngeneration_bytes = 1048576\ntail_bytes_max = 1048576\n";
/// Debian's `nobody`.
const STRANGER: u32 = 65_534;

fn reading(count: u64) -> String {
    json!({"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {"total": 500},
        "activeTotalConsumption": {"total": count}, "pad": noise(count)})
    .to_string()
}

/// Text that no compression makes small.
fn noise(seed: u64) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        format!("{state:016x}")
    };
    (0..60).map(|_| next()).collect()
}

/// Calls on these files, or on any.
pub fn tracer(log: &Path, inject: &str, files: &[PathBuf]) -> Vec<String> {
    let call = inject.split(':').next().unwrap();
    let log = log.display().to_string();
    // -D: the node stays our child. Only the one call stops it.
    let words = ["strace", "-D", "-f", "--seccomp-bpf", "-y", "-qq", "-o", &log];
    let filters = ["-e", &format!("trace={call}"), "-e", &format!("inject={inject}")];
    let files = files.iter().flat_map(|file| ["-P".to_owned(), file.display().to_string()]);
    words.iter().chain(filters.iter()).map(|word| (*word).to_owned()).chain(files).collect()
}

/// The calls on the file whose call failed first, from that one on.
fn after_the_failure(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).unwrap();
    let mut lines = text.lines().skip_while(|line| !line.contains("(INJECTED)")).peekable();
    let file = lines.peek().and_then(|line| line.split_once('<')?.1.split_once('>'));
    let file = file.expect("a call was made to fail").0.to_owned();
    lines.filter(|line| line.contains(&format!("<{file}>"))).map(str::to_owned).collect()
}

fn judge(world: &World, publisher: &rig::Publisher, count: u64) {
    publisher.flush(SOON).unwrap();
    eventually(SOON, "all rows", || world.count("telemetry", "energy_consumption") >= count);
    world.drained(SOON);
    let rows = "SELECT active_energy_total::bigint FROM energy_consumption";
    let rows = world.postgres.query("telemetry", rows).unwrap();
    let arrived: Vec<String> = rows.into_iter().flatten().flatten().collect();
    let number = |entry: &rig::Entry| {
        let value: serde_json::Value = serde_json::from_slice(&entry.payload).unwrap();
        value["activeTotalConsumption"]["total"].to_string()
    };
    let comparison = publisher.ledger().compare(number, arrived.iter().map(String::as_str));
    assert!(comparison.is_exact(), "{comparison:?}");
}

#[test]
fn the_first_write_or_sync_that_fails_ends_the_process_and_is_never_retried() {
    let folder = Folder::new(None, "disk").unwrap();
    for inject in [
        "fdatasync:error=EIO:when=40",
        "fsync:error=EIO:when=40",
        "pwritev:error=EIO:when=60",
        "pwritev:error=ENOSPC:when=60",
    ] {
        let log = folder.join("calls");
        let mut world =
            World::prepare(Changes { extra: SETTINGS.to_owned(), ..Changes::default() });
        // Once, that the broker knows the node. Calls are counted by thread: a start makes fewer than these, so that it is
        // the writer's that fails.
        world.node.start().unwrap();
        world.node.wait_ready(SOON).unwrap();
        world.subscribed();
        world.node.kill();
        let (binary, config) = (env!("CARGO_BIN_EXE_telemetry"), world.node.config().to_owned());
        let port = world.node.http_port();
        let mut failing = Node::new(binary, &config, port).through(tracer(&log, inject, &[]));
        failing.spawn().unwrap();
        let publisher = world.publisher();
        let mut count = 0;
        let ended = until(SOON, "the node to end over its disk", || {
            for _ in 0..20 {
                publisher.publish("energy", "saveeye/telemetry", reading(count));
                count += 1;
            }
            failing.daemon().exit_status()
        });
        let status = ended.unwrap_or_else(|error| panic!("{inject}: {error:#}"));
        assert_eq!(status.code(), Some(1), "{inject}: {status}");
        assert!(failing.log_text().contains("buffer_failed"), "{inject}");
        if inject.contains("sync") {
            let calls = after_the_failure(&log);
            let again = calls.iter().skip(1).find(|line| line.ends_with(" = 0"));
            assert_eq!(again, None, "{inject}: synced again after {}", calls[0]);
        }
        world.node.start().unwrap();
        world.subscribed();
        judge(&world, &publisher, count);
    }
}

/// What a killed process wrote and had not synced is there for the next one as if it were on the disk. It recognizes in it
/// what the broker sends again, and acknowledges that.
#[test]
fn what_a_killed_node_had_not_synced_is_on_the_disk_before_it_counts_as_kept() {
    for filesystem in [FileSystem::Ext4, FileSystem::Xfs] {
        let folder = Folder::new(None, "unsynced").unwrap();
        let disk = Disk::open(&folder.join("disk"), filesystem).unwrap();
        let extra = "[buffer]\nfree_bytes_min = 8000000\nballast_bytes = 0\n".to_owned();
        let mut world = World::prepare(Changes { extra, ..Changes::default() });
        world.put_state_on(&disk);
        world.node.start().unwrap();
        world.node.wait_ready(SOON).unwrap();
        world.subscribed();
        // Whatever a table has is not lost with the disk.
        world.postgres.stop().unwrap();
        let publisher = world.publisher();
        let mut count = 0;
        // A sync may be of another file, or find nothing that was written.
        let seen_again = (60..70).any(|passes| {
            end_before_a_sync(&mut world, &publisher, passes, &mut count);
            world.metric("telemetry_redelivered_messages_total{stream=\"energy\",kind=\"dup\"}")
                > 0.0
        });
        assert!(seen_again, "what was not synced came again");
        disk.lose_power().unwrap();
        world.node.kill();
        disk.restore_power().unwrap();
        world.postgres.restart().unwrap();
        world.node.start().unwrap();
        world.subscribed();
        judge(&world, &publisher, count);
        world.node.stop(SOON).unwrap();
    }
}

/// After so many syncs; then it is started again, and acknowledges all there is.
fn end_before_a_sync(world: &mut World, publisher: &rig::Publisher, passes: u64, count: &mut u64) {
    world.node.kill();
    world.node.set_failpoints(&format!("crash_written={passes}*off->return"));
    world.node.spawn().unwrap();
    let ended = until(SOON, "the node to end between a write and its sync", || {
        for _ in 0..20 {
            publisher.publish("energy", "saveeye/telemetry", reading(*count));
            *count += 1;
        }
        world.node.daemon().exit_status()
    });
    assert_eq!(ended.unwrap().signal(), Some(6));
    world.node.set_failpoints("");
    publisher.flush(SOON).unwrap();
    world.node.start().unwrap();
    let waiting = "telemetry_edge_depth{edge=\"unacknowledged\",stream=\"energy\"}";
    eventually(SOON, "all is kept and acknowledged", || {
        let kept = world.stream("energy")["status"]["sequence"].as_u64();
        kept >= Some(*count) && world.metric(waiting) == 0.0
    });
}

/// Where the space ends differs: in the log, in what proves how far it was acknowledged, in cursors and dead letters, and
/// before the node has opened anything.
#[test]
fn wherever_the_space_ends_the_process_says_so_and_nothing_acknowledged_is_lost() {
    let folder = Folder::new(None, "disk").unwrap();
    let mut world = World::prepare(Changes { extra: SETTINGS.to_owned(), ..Changes::default() });
    world.node.start().unwrap();
    world.node.wait_ready(SOON).unwrap();
    world.subscribed();
    world.node.kill();
    let publisher = world.publisher();
    let state = world.node.config().with_file_name("state");
    let generation = |number| state.join(format!("buffer/generation-{number:06}/db"));
    let log = (1..100).map(generation).collect::<Vec<_>>();
    let mut count = 0;
    for (step, inject, files) in [
        ("append", "pwritev:error=ENOSPC:when=12", log),
        ("acknowledgement", "pwritev:error=ENOSPC:when=6", vec![state.join("buffer/reached")]),
        ("cursor", "pwritev:error=ENOSPC:when=6", vec![state.join("state/db")]),
        ("open", "pwritev:error=ENOSPC:when=1", vec![state.join("state/db")]),
    ] {
        let calls = folder.join(step);
        let (binary, config) = (env!("CARGO_BIN_EXE_telemetry"), world.node.config().to_owned());
        let port = world.node.http_port();
        let said_before = world.node.log_text().len();
        let mut failing = Node::new(binary, &config, port).through(tracer(&calls, inject, &files));
        failing.spawn().unwrap();
        let ended = until(SOON, "the node to end over its disk", || {
            for _ in 0..20 {
                // Dead letters among them, which the state database takes.
                let text = if count % 20 == 0 { "{".to_owned() } else { reading(count) };
                publisher.publish("energy", "saveeye/telemetry", text);
                count += 1;
            }
            failing.daemon().exit_status()
        });
        let status = ended.unwrap_or_else(|error| panic!("{step}: {error:#}"));
        assert_eq!(status.code(), Some(1), "{step}: {status}");
        let said = failing.log_text()[said_before..].to_owned();
        assert!(said.contains("no space left at"), "{step}: {said}");
        assert!(fs::read_to_string(&calls).unwrap().contains("(INJECTED)"), "{step}");
    }
    // No room for the copy of the state database with which a start looks for lost dead letters.
    let calls = folder.join("copy");
    let inject = "copy_file_range:error=ENOSPC";
    let tracer = tracer(&calls, inject, &[state.join("state.trial/db")]);
    let (binary, config) = (env!("CARGO_BIN_EXE_telemetry"), world.node.config().to_owned());
    let mut node = Node::new(binary, &config, world.node.http_port()).through(tracer);
    node.spawn().unwrap();
    world.subscribed();
    assert!(fs::read_to_string(&calls).unwrap().contains("(INJECTED)"));
    publisher.flush(SOON).unwrap();
    let readings = count - count.div_ceil(20);
    eventually(SOON, "all rows", || world.count("telemetry", "energy_consumption") >= readings);
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), readings);
    let distinct = "SELECT count(DISTINCT active_energy_total) FROM energy_consumption";
    assert_eq!(world.postgres.value("telemetry", distinct).unwrap(), readings.to_string());
    assert_eq!(world.books("energy", "energy_consumption", "dead_lettered"), count - readings);
    assert!(!state.join("buffer/quarantine").exists(), "a full disk is no damage");
    let letters = node.command(&["dlq", "list", "--json"]).unwrap();
    let letters = String::from_utf8(letters.stdout).unwrap().lines().count() as u64;
    assert_eq!(letters, count - readings, "no dead letter is lost");
}

/// A running node whose table is there, and whose database has stopped.
fn left_by_its_database(settings: &str) -> World {
    let mut world = World::prepare(Changes { extra: settings.to_owned(), ..Changes::default() });
    world.node.start().unwrap();
    world.subscribed();
    eventually(SOON, "the table is there", || {
        world.postgres.count("telemetry", "energy_consumption").is_ok()
    });
    world.postgres.stop().unwrap();
    world
}

/// Waits until so many are durable.
#[track_caller]
fn kept(world: &World, count: u64) {
    eventually(SOON, "all kept", || {
        let all = world.node.streams().unwrap_or_default();
        let streams = all["streams"].as_array().cloned().unwrap_or_default();
        streams.iter().any(|line| line["name"] == "energy" && line["status"]["sequence"] == count)
    });
}

#[test]
fn a_read_that_fails_once_costs_nothing() {
    let folder = Folder::new(None, "disk").unwrap();
    let mut world = left_by_its_database(SETTINGS);
    let publisher = world.publisher();
    let count = 4_000;
    for number in 0..count {
        publisher.publish("energy", "saveeye/telemetry", reading(number));
    }
    publisher.flush(SOON).unwrap();
    kept(&world, count);
    world.node.kill();
    world.postgres.restart().unwrap();
    let (binary, config) = (env!("CARGO_BIN_EXE_telemetry"), world.node.config().to_owned());
    let port = world.node.http_port();
    let state = world.node.config().with_file_name("state");
    let number = |number| state.join(format!("buffer/generation-{number:06}/db"));
    let files: Vec<_> = (1..20).map(number).filter(|file| file.exists()).collect();
    assert!(files.len() > 2, "{files:?}");
    // Every third of each thread: of the start, and of the thread that reads. sled, which takes a read that fails for the
    // end of its file, opens none of them.
    let tracer = tracer(&folder.join("calls"), "preadv:error=EIO:when=1+3", &files);
    world.node = Node::new(binary, config, port).through(tracer);
    world.node.start().unwrap();
    world.subscribed();
    judge(&world, &publisher, count);
    assert!(!state.join("buffer/quarantine").exists(), "nothing is unreadable");
    assert!(fs::read_to_string(folder.join("calls")).unwrap().contains("(INJECTED)"));
}

#[test]
fn places_that_go_bad_in_the_generation_being_written_end_the_process_once_and_are_told() {
    // Whatever its cache is said to hold, sled gives up a page only where two share one of its 256 shards, and late: of
    // 2,000 such records a sink that lags reads two to four pages from the disk, and may miss every bad place (2 of 19
    // times); of these it reads half.
    const COUNT: u64 = 3_500;
    let one_generation = "[buffer]\ngeneration_bytes = 134217728\ntail_bytes_max = 1048576\n";
    let mut world = left_by_its_database(one_generation);
    let publisher = world.publisher();
    for number in 0..COUNT {
        let large: String = (0..8).map(|part| noise(number * 8 + part)).collect();
        let reading =
            reading(number).replacen("\"pad\"", &format!("\"more\":\"{large}\",\"pad\""), 1);
        publisher.publish("energy", "saveeye/telemetry", reading);
    }
    publisher.flush(SOON).unwrap();
    kept(&world, COUNT);
    let state = world.node.config().with_file_name("state");
    let file = state.join("buffer/generation-000001/db");
    let mut bytes = fs::read(&file).unwrap();
    // Wherever the values stand that count: of many the file holds older ones too. Its end is in memory.
    bytes.truncate(bytes.len() / 4 * 3);
    (1 << 20..bytes.len()).step_by(64 << 10).for_each(|place| bytes[place] ^= 0x10);
    fs::File::options().write(true).open(&file).unwrap().write_all_at(&bytes, 0).unwrap();
    world.postgres.restart().unwrap();
    let ended = until(SOON, "the node to end", || world.node.daemon().exit_status());
    let ended = ended.unwrap_or_else(|error| {
        panic!("{error}: {:#}", world.sink("energy", "energy_consumption"))
    });
    assert_eq!(ended.code(), Some(1));
    assert!(world.node.log_text().contains("buffer_failed"));

    world.node.start().unwrap();
    world.drained(SOON);
    let rows = "SELECT count(*), count(DISTINCT active_energy_total) FROM energy_consumption";
    let rows = world.postgres.query("telemetry", rows).unwrap().remove(0);
    let books = world.sink("energy", "energy_consumption")["status"]["books"].clone();
    let lost = books["lost"].as_u64().unwrap();
    assert!((1..COUNT / 2).contains(&lost), "{books}");
    let delivered = (COUNT - lost).to_string();
    assert_eq!(rows, [Some(delivered.clone()), Some(delivered)], "{books}");
    let page = world.node.get("/metrics").unwrap().body;
    // With those that were delivered from memory before the first bad place was read.
    let told = page.split("telemetry_buffer_lost_messages{stream=\"energy\"} ").nth(1).unwrap();
    let told: u64 = told.split('\n').next().unwrap().parse().unwrap();
    assert!((lost..COUNT / 2).contains(&told), "{told} told, {lost} of them not delivered");
}

fn give(path: &Path, owner: u32) {
    chown(path, Some(owner), Some(owner)).unwrap();
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path(), owner));
    }
}

/// Ends with 1 and says this.
fn assert_refuses(node: &mut Node, said: &[&str]) {
    let before = node.log_text().len();
    node.spawn().unwrap();
    let ended = until(SOON, "the node to refuse", || node.daemon().exit_status()).unwrap();
    let log = node.log_text()[before..].to_owned();
    assert_eq!(ended.code(), Some(1), "{log}");
    let last = log.lines().last().unwrap_or_default();
    assert!(said.iter().all(|said| last.contains(said)), "{last}");
}

#[test]
fn files_of_another_user_are_refused_by_name_and_left_alone() {
    let mut world = World::prepare(Changes::default());
    give(&world.node.config().with_file_name("database-password"), STRANGER);
    let state = world.node.config().with_file_name("state");
    let (binary, config) = (env!("CARGO_BIN_EXE_telemetry"), world.node.config().to_owned());
    let user = STRANGER.to_string();
    let port = world.node.http_port();
    world.node = Node::new(binary, config, port).privileges(&[
        "--reuid",
        &user,
        "--regid",
        &user,
        "--clear-groups",
    ]);
    // The folder above is root's: it cannot be made.
    assert_refuses(&mut world.node, &["state", "Permission denied"]);
    fs::create_dir(&state).unwrap();
    assert_refuses(&mut world.node, &["state", "Permission denied", "owner"]);
    give(&state, STRANGER);
    world.node.start().unwrap();
    world.subscribed();
    assert!(world.node.stop(SOON).unwrap().success());
    for file in ["state/db", "buffer/marks", "buffer/reached", "buffer/generation-000001/db"] {
        let file: PathBuf = state.join(file);
        chown(&file, Some(0), Some(0)).unwrap();
        fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        assert_refuses(&mut world.node, &["Permission denied", "owner"]);
        assert!(!state.join("buffer/quarantine").exists(), "{}: no damage", file.display());
        give(&file, STRANGER);
    }
    world.node.start().unwrap();
    world.subscribed();
}

#[test]
fn a_second_node_on_the_same_directory_ends_and_the_first_goes_on() {
    let world = World::start(Changes::default());
    let second = world.node.command(&["run"]).unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&[second.stdout, second.stderr].concat()).into_owned();
    assert!(said.contains("held by another process"), "{said}");
    let publisher = world.publisher();
    publisher.publish("energy", "saveeye/telemetry", reading(1));
    judge(&world, &publisher, 1);
}
