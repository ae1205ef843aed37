//! What a person does about dead letters, on a running and on a stopped node.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rig::eventually;
use serde_json::{Value, json};

use crate::world::{Changes, SOON, World};

fn energy(power: &str, count: u64) -> String {
    format!(
        r#"{{"saveeyeDeviceSerialNumber": "SE-1", "activeActualConsumption": {{"total": {power}}}, "activeTotalConsumption": {{"total": {count}}}}}"#
    )
}

fn dlq(world: &World, arguments: &[&str]) -> Output {
    world.node.command(&[&["dlq"], arguments].concat()).unwrap()
}

/// What the command printed; it must have ended well.
#[track_caller]
fn printed(output: &Output) -> String {
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{error}");
    out
}

/// What it says to a person who gives this answer.
fn at_a_terminal(world: &World, arguments: &[&str], answer: &str) -> String {
    let config = world.node.config().display().to_string();
    let telemetry = env!("CARGO_BIN_EXE_telemetry");
    let command = format!("{telemetry} dlq {} --config {config}", arguments.join(" "));
    let mut terminal = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    terminal.stdin.take().unwrap().write_all(format!("{answer}\n").as_bytes()).unwrap();
    text(&terminal.wait_with_output().unwrap().stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn letters(world: &World, arguments: &[&str]) -> Vec<Value> {
    let shown = printed(&dlq(world, &[&["list", "--json"], arguments].concat()));
    shown.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Publishes and waits until every reading is judged.
fn publish(world: &World, payloads: impl IntoIterator<Item = String>) {
    let publisher = world.publisher();
    let before = world.books("energy", "energy_consumption", "cursor");
    let mut count = 0;
    for payload in payloads {
        publisher.publish("energy", "saveeye/telemetry", payload);
        count += 1;
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "every reading is judged", || {
        world.books("energy", "energy_consumption", "cursor") == before + count
    });
}

#[test]
fn a_letter_is_corrected_checked_and_delivered_at_its_original_time() {
    let world = World::start(Changes::default());
    publish(&world, [energy("\"1\"", 1), energy("\"2\"", 2), "{\"broken\": ".to_owned()]);
    let found = letters(&world, &[]);
    assert_eq!(found.len(), 3);
    let key = |index: usize| found[index]["letter"].as_str().unwrap().to_owned();

    let shown = printed(&dlq(&world, &["show", &key(0)]));
    let payload = energy("\"1\"", 1);
    for word in [
        "current mapping",
        "energy_consumption: dead",
        "active_power_total",
        "wrong_type",
        key(0).as_str(),
        "saveeye/telemetry",
        payload.as_str(),
    ] {
        assert!(shown.contains(word), "{word} in\n{shown}");
    }

    // A correction the mapping does not take changes nothing.
    let refused = dlq(&world, &["fix", &key(0), "--set", "activeActualConsumption.total=word"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("wrong_type"), "{}", text(&refused.stderr));
    let dry = ["fix", &key(0), "--set", "activeActualConsumption.total=77", "--dry-run"];
    assert!(printed(&dlq(&world, &dry)).contains("mapped"));
    assert_eq!(letters(&world, &[]).len(), 3);

    let set = ["fix", &key(0), "--set", "activeActualConsumption.total=77"];
    printed(&dlq(&world, &set));
    let patch = r#"[{"op": "replace", "path": "/activeActualConsumption/total", "value": 78}]"#;
    printed(&dlq(&world, &["fix", &key(1), "--patch", patch]));
    // What is no JSON needs an editor; this one writes the file anew.
    let no_json = dlq(&world, &["fix", &key(2), "--set", "a=1"]);
    assert!(text(&no_json.stderr).contains("no JSON"), "{}", text(&no_json.stderr));
    let script = format!("printf %s '{}' >", energy("79", 3));
    let edited = Command::new(env!("CARGO_BIN_EXE_telemetry"))
        .args(["dlq", "fix", &key(2), "--config"])
        .arg(world.node.config())
        .env_remove("VISUAL")
        .env("EDITOR", format!("sh -c '{}\"$1\"' editor", script.replace('\'', "'\\''")))
        .output()
        .unwrap();
    printed(&edited);

    assert!(letters(&world, &[]).is_empty());
    for (index, power) in [(0, 77), (1, 78), (2, 79)] {
        let arrival = found[index]["arrival"].as_str().unwrap();
        let row = format!(
            "SELECT 1 AS kept FROM energy_consumption WHERE active_power_total = {power} AND time = '{arrival}'"
        );
        assert!(world.row("telemetry", &row).is_some(), "the row of {arrival}");
    }
    eventually(SOON, "the books follow", || {
        world.books("energy", "energy_consumption", "delivered") == 3
            && world.sink("energy", "energy_consumption")["difference"] == 0
    });
    let log = world.node.log_text();
    assert_eq!(log.matches("dead_letter_fixed").count(), 3, "each has its line\n{log}");
    assert!(log.contains("uid "), "and says who\n{log}");
}

#[test]
fn letters_are_filtered_by_time_exported_and_purged_running_and_stopped() {
    let mut world = World::start(Changes::default());
    publish(&world, [energy("\"1\"", 1), energy("\"2\"", 2)]);
    let first = letters(&world, &[]);
    let mark = first[1]["dead_at"].as_str().unwrap().to_owned();
    // A letter set aside within the same microsecond would be no second one.
    eventually(SOON, "later", || {
        publish(&world, [energy("\"3\"", 3)]);
        letters(&world, &["--since", &mark]).iter().any(|letter| letter["dead_at"] != mark)
    });
    let before = letters(&world, &["--until", &mark]);
    let after = letters(&world, &["--since", &mark]);
    let all = letters(&world, &["--since", "1h"]);
    assert!(before.len() == 1 && !after.is_empty(), "{before:?}\n{after:?}");
    assert_eq!(before.len() + after.len(), all.len());
    assert!(letters(&world, &["--until", "1h"]).is_empty());
    assert!(!dlq(&world, &["list", "--since", "yesterday"]).status.success());

    let file = world.node.config().with_file_name("dead.jsonl");
    let name = file.display().to_string();
    printed(&dlq(&world, &["export", "--output", &name]));
    let exported = std::fs::read_to_string(&file).unwrap();
    assert_eq!(exported.lines().count(), all.len());
    assert!(exported.contains("saveeyeDeviceSerialNumber"), "{exported}");
    assert!(!dlq(&world, &["export", "--output", &name]).status.success(), "it overwrites nothing");

    let one = &all[0]["letter"].as_str().unwrap().to_owned();
    let unasked = dlq(&world, &["purge", "--until", &mark]);
    assert_eq!(unasked.status.code(), Some(1), "nobody is there to ask");
    assert!(text(&unasked.stderr).contains("--yes"), "{}", text(&unasked.stderr));
    assert_eq!(letters(&world, &[]).len(), all.len());
    printed(&dlq(&world, &["purge", "--until", &mark, "--yes"]));
    assert_eq!(letters(&world, &[]).len(), after.len());
    let shown = world.sink("energy", "energy_consumption")["status"]["dead_letters"].clone();
    assert_eq!(shown, after.len(), "the node counts them so too");
    let log = world.node.log_text();
    let audit = log.lines().find(|line| line.contains("dead_letters_purged"));
    let purged = format!("\"purged\":{}", before.len());
    let told = audit.is_some_and(|line| line.contains("uid ") && line.contains(&purged));
    assert!(told, "who, and how many\n{log}");

    world.node.stop(SOON).unwrap();
    let key = after[0]["letter"].as_str().unwrap();
    assert_eq!(letters(&world, &[]).len(), after.len(), "a stopped node has them too");
    assert!(printed(&dlq(&world, &["show", key])).contains("current mapping"));
    assert_eq!(printed(&dlq(&world, &["export"])).lines().count(), after.len());
    let purged = dlq(&world, &["purge", "--yes"]);
    printed(&purged);
    let said = text(&purged.stderr);
    assert!(said.contains("dead_letters_purged") && said.contains("uid "), "{said}");
    assert!(letters(&world, &[]).is_empty());
    world.node.start().unwrap();
    eventually(SOON, "the node agrees", || {
        world.sink("energy", "energy_consumption")["status"]["dead_letters"] == 0
    });
    assert!(!dlq(&world, &["show", one]).status.success());
}

#[test]
fn letters_are_chosen_by_stream_sink_and_reason_and_replayed_all_by_filter_or_one() {
    let world = World::start(Changes::default());
    publish(&world, [energy("\"1\"", 1), energy("\"2\"", 2), "{\"broken\": ".to_owned()]);
    let publisher = world.publisher();
    let outdoor = "homelab/temperature/outdoor";
    for text in [r#"{"temperature_c": 900000}"#, r#"{"temperature_c": 900001}"#] {
        publisher.publish("temperature_outdoor", outdoor, text);
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "rows of the outdoor sensor", || {
        world.count("telemetry", "temperature_sensors") == 2
    });
    // Two more are refused by the table, which is then widened.
    let rule =
        "ALTER TABLE temperature_sensors ADD CONSTRAINT sane CHECK (temperature_c < 100) NOT VALID";
    world.postgres.execute("telemetry", rule).unwrap();
    for text in [r#"{"temperature_c": 101}"#, r#"{"temperature_c": 102}"#] {
        publisher.publish("temperature_outdoor", outdoor, text);
    }
    publisher.flush(SOON).unwrap();
    eventually(SOON, "five letters", || letters(&world, &[]).len() == 5);
    for (filter, expected) in [
        (&["--stream", "energy"][..], 3),
        (&["--stream", "temperature_outdoor"], 2),
        (&["--sink", "temperature_sensors"], 2),
        (&["--reason", "wrong_type"], 2),
        (&["--reason", "not_json", "--stream", "energy"], 1),
        (&["--reason", "not_json", "--sink", "temperature_sensors"], 0),
    ] {
        assert_eq!(letters(&world, filter).len(), expected, "{filter:?}");
    }
    let table = printed(&dlq(&world, &["list"]));
    let counts = "5 dead letters: database_refused 2, not_json 1, wrong_type 2";
    assert!(table.contains(counts), "{table}");

    let dry = printed(&dlq(&world, &["replay", "--reason", "database_refused", "--dry-run"]));
    assert_eq!(dry.lines().filter(|line| line.starts_with("would replay ")).count(), 2, "{dry}");
    assert_eq!(letters(&world, &[]).len(), 5, "a dry run changes nothing");
    let refused = dlq(&world, &["replay"]);
    assert_eq!(refused.status.code(), Some(1), "nothing is mended yet");
    assert_eq!(text(&refused.stdout).matches("still dead").count(), 5);

    let mended = "ALTER TABLE temperature_sensors DROP CONSTRAINT sane";
    world.postgres.execute("telemetry", mended).unwrap();
    let one = letters(&world, &["--reason", "database_refused"])[0]["letter"].clone();
    printed(&dlq(&world, &["replay", one.as_str().unwrap()]));
    assert_eq!(world.count("telemetry", "temperature_sensors"), 3);
    printed(&dlq(&world, &["replay", "--stream", "temperature_outdoor"]));
    assert_eq!(world.count("telemetry", "temperature_sensors"), 4);
    for (answer, left) in [("no", 3), ("yes", 2)] {
        let asked = at_a_terminal(&world, &["purge", "--reason", "not_json"], answer);
        assert!(asked.contains("1 dead letters will be gone for good"), "{asked}");
        assert_eq!(letters(&world, &[]).len(), left, "after {answer:?}: {asked}");
    }
    assert!(world.node.log_text().contains("dead_letters_replayed"));
}

#[test]
fn a_full_store_is_announced_holds_the_sink_and_drops_nothing() {
    let extra = "[buffer]\ndead_letter_quota_bytes = 1048576\n".to_owned();
    let world = World::start(Changes { extra, ..Changes::default() });
    let publisher = world.publisher();
    let bad = |count: u64| {
        json!({"saveeyeDeviceSerialNumber": "SE-1", "pad": "x".repeat(200_000),
            "activeActualConsumption": {"total": "1"}, "activeTotalConsumption": {"total": count}})
        .to_string()
    };
    for count in 0..8 {
        publisher.publish("energy", "saveeye/telemetry", bad(count));
        publisher.flush(SOON).unwrap();
        if count < 5 {
            eventually(SOON, "one letter at a time", || {
                world.books("energy", "energy_consumption", "cursor") == count + 1
            });
        }
    }
    publisher.publish("energy", "saveeye/telemetry", energy("500", 100));
    publisher.publish(
        "temperature_outdoor",
        "homelab/temperature/outdoor",
        r#"{"temperature_c": 1}"#,
    );
    publisher.flush(SOON).unwrap();
    let state = || world.sink("energy", "energy_consumption")["status"].clone();
    eventually(SOON, "the sink holds", || state()["state"] == "held");
    let trouble = state()["trouble"].to_string();
    assert!(trouble.contains("dead letters"), "{trouble}");
    eventually(SOON, "the other stream flows", || {
        world.count("telemetry", "temperature_sensors") == 1
    });
    let log = world.node.log_text();
    for level in [70, 90, 100] {
        let line = log.lines().filter(|line| {
            line.contains("dead_letters_filling") && line.contains(&format!("\"percent\":{level}"))
        });
        assert_eq!(line.count(), 1, "{level} % is said once\n{log}");
    }
    // Room is made: what was held is judged, and nothing of it is missing.
    let kept = letters(&world, &[]).len() as u64;
    printed(&dlq(&world, &["purge", "--yes"]));
    eventually(SOON, "it resumes by itself", || state()["state"] == "delivering");
    world.drained(SOON);
    assert_eq!(world.count("telemetry", "energy_consumption"), 1);
    assert_eq!(world.books("energy", "energy_consumption", "dead_lettered"), 8);
    assert_eq!(letters(&world, &[]).len() as u64 + kept, 8);
}

#[test]
fn a_replay_killed_half_way_and_repeated_writes_each_row_once() {
    const LETTERS: u64 = 400;
    // So slow that no replay is over before it is seen and killed.
    let failpoints = "crash_replay_written=sleep(20)".to_owned();
    let mut world = World::start(Changes { failpoints, ..Changes::default() });
    world
        .postgres
        .execute(
            "telemetry",
            "ALTER TABLE energy_consumption ADD CONSTRAINT sane CHECK (active_power_total < 0)",
        )
        .unwrap();
    publish(&world, (0..LETTERS).map(|count| energy("5", count)));
    assert_eq!(letters(&world, &[]).len() as u64, LETTERS);
    let refused = dlq(&world, &["replay"]);
    assert_eq!(text(&refused.stdout).matches("still dead").count() as u64, LETTERS);
    let progress = ["100 of 400", "200 of 400", "300 of 400", "400 of 400"];
    assert_eq!(text(&refused.stderr).lines().collect::<Vec<_>>(), progress);
    world
        .postgres
        .execute("telemetry", "ALTER TABLE energy_consumption DROP CONSTRAINT sane")
        .unwrap();
    let mut kills = 0;
    loop {
        let before = world.count("telemetry", "energy_consumption");
        let mut replay = Command::new(env!("CARGO_BIN_EXE_telemetry"))
            .args(["dlq", "replay", "--config"])
            .arg(world.node.config())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        if kills == 4 {
            assert!(replay.wait().unwrap().success());
            break;
        }
        eventually(SOON, "the replay is under way", || {
            world.count("telemetry", "energy_consumption") >= before + 20
        });
        world.node.kill();
        kills += 1;
        assert!(!replay.wait().unwrap().success(), "the command says that it was cut off");
        world.node.start().unwrap();
        world.node.wait_ready(SOON).unwrap();
    }
    assert_eq!(world.count("telemetry", "energy_consumption"), LETTERS);
    let distinct = "SELECT count(DISTINCT active_energy_total) FROM energy_consumption";
    assert_eq!(world.postgres.value("telemetry", distinct).unwrap(), LETTERS.to_string());
    assert!(letters(&world, &[]).is_empty());
    world.drained(Duration::from_secs(30));
    assert_eq!(world.books("energy", "energy_consumption", "delivered"), LETTERS);
    assert_eq!(world.books("energy", "energy_consumption", "dead_lettered"), 0);
}
