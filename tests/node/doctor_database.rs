//! `telemetry doctor` and a database whose roles may too little, which has no connection left, or whose table fits no
//! mapping.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::thread;

use rig::{Homelab, eventually};
use serde_json::Value;

use crate::doctor::{doctor, findings, verdict};
use crate::world::{Changes, SOON, World};

const DATABASE: &str = "telemetry";
const ABOUT: &str = "postgresql:telemetry";
const PASSWORD: &str = "a good word";

/// The database of that name is used by these roles, which may nothing yet: one writes rows, one makes tables.
fn prepare(changes: Changes) -> World {
    let world = World::prepare(changes);
    let config = world.node.config();
    let file = config.with_file_name("roles-password");
    fs::write(&file, PASSWORD).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let mut homelab = Homelab::open(config).unwrap();
    for (role, path) in [("writer", &[][..]), ("maker", &["migrator"])] {
        world.postgres.create_role(role, PASSWORD).unwrap();
        let at = |last| [&["databases", DATABASE], path, &[last]].concat();
        homelab.set(&at("user"), role);
        homelab.set(&at("password_file"), file.display().to_string());
    }
    homelab.write(config).unwrap();
    world
}

/// Figures and remedies of the lines about rights that fail.
fn missing(report: &Value) -> Vec<(String, String)> {
    let all = findings(report, ABOUT, "rights").into_iter();
    let failed = all.filter(|line| line["verdict"] == "fail");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    failed.map(|line| (text(&line["figure"]), text(&line["remedy"]))).collect()
}

/// Follows the report's advice to the letter.
#[track_caller]
fn follow(world: &World, expected: &[&str]) {
    let (code, report) = doctor(world);
    assert_eq!(code, Some(1), "{report:#}");
    let missing = missing(&report);
    let figures: Vec<_> = missing.iter().map(|(figure, _)| figure.as_str()).collect();
    assert_eq!(figures, expected, "{report:#}");
    for (_, remedy) in &missing {
        assert!(remedy.starts_with("GRANT "), "{remedy}");
        world.postgres.execute(DATABASE, remedy).unwrap();
    }
    let (_, report) = doctor(world);
    assert_eq!(verdict(&report, ABOUT, "rights"), "ok", "{report:#}");
    assert_eq!(findings(&report, ABOUT, "rights").len(), 2, "of both roles: {report:#}");
    assert_eq!(self::missing(&report), [], "{report:#}");
}

#[test]
fn each_right_that_is_missing_is_told_with_the_statement_that_gives_it() {
    let mut world = prepare(Changes::default());
    let sql = |text: &str| world.postgres.execute(DATABASE, text).unwrap();
    let no_row = "no row is written before it may";
    follow(&world, &[&format!("maker may not create in schema public: {no_row}")]);
    sql("REVOKE USAGE ON SCHEMA public FROM PUBLIC");
    follow(&world, &["writer may not use schema public"]);

    // The one makes the tables, and gives the other no right to them.
    world.node.spawn().unwrap();
    eventually(SOON, "the tables are there", || {
        let left = world.node.get("/health").and_then(|answer| answer.json());
        left.is_ok_and(|health| {
            let database = &health["dependencies"][ABOUT];
            database["migration"] == "done"
        })
    });
    let (_, report) = doctor(&world);
    let table = findings(&report, ABOUT, "table");
    assert!(!table.is_empty(), "{report:#}");
    for line in table {
        assert_eq!(line["verdict"], "fail", "{line}");
        let figure = line["figure"].as_str().unwrap();
        assert!(figure.contains("lacks rights (GRANT INSERT ON \"public\"."), "{figure}");
    }
    follow(
        &world,
        &[
            "writer lacks INSERT, SELECT, UPDATE on \"public\".\"telemetry_cursors\"",
            "writer lacks INSERT, SELECT, UPDATE on \"public\".\"telemetry_latest_seen\"",
            "writer lacks INSERT, SELECT on \"public\".\"telemetry_replayed\"",
        ],
    );
    let sql = |text: &str| world.postgres.execute(DATABASE, text).unwrap();
    sql("GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO writer");
    let (_, report) = doctor(&world);
    assert_eq!(verdict(&report, ABOUT, "table"), "ok", "{report:#}");
    sql("REVOKE UPDATE ON telemetry_cursors FROM writer");
    follow(&world, &["writer lacks UPDATE on \"public\".\"telemetry_cursors\""]);
}

#[test]
fn a_schema_that_nobody_may_make_and_a_role_that_makes_tables_and_cannot_log_in_fail() {
    let world = prepare(Changes::default());
    let mut homelab = Homelab::open(world.node.config()).unwrap();
    homelab.set(&["databases", DATABASE, "schema"], "apart");
    homelab.write(world.node.config()).unwrap();
    let (_, report) = doctor(&world);
    let (figure, remedy) = &missing(&report)[0];
    assert!(figure.starts_with("maker may not make schema apart"), "{figure}");
    world.postgres.execute(DATABASE, remedy).unwrap();
    let (_, report) = doctor(&world);
    let line = findings(&report, ABOUT, "rights")[0];
    assert_eq!(line["verdict"], "warn", "{report:#}");
    assert_eq!(line["figure"], "schema apart is not there yet, maker may make it");

    world.postgres.execute("postgres", "ALTER ROLE maker PASSWORD 'another'").unwrap();
    let (code, report) = doctor(&world);
    assert_eq!((code, verdict(&report, ABOUT, "migrator").as_str()), (Some(1), "fail"));
    assert_eq!(verdict(&report, ABOUT, "reachable"), "ok", "{report:#}");
}

/// While so many sessions of somebody else are held.
fn with_others<T>(world: &World, count: usize, then: impl FnOnce() -> T) -> T {
    const OTHERS: &str = "FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'";
    thread::scope(|scope| {
        for _ in 0..count {
            // It ends by being ended.
            scope.spawn(|| world.postgres.execute("postgres", "SELECT pg_sleep(600)").is_err());
        }
        let held = format!("SELECT count(*) {OTHERS}");
        let whole = rig::until(SOON, "the others are there", || {
            let found = world.postgres.value("postgres", &held)?;
            Ok((found == count.to_string()).then_some(()))
        });
        let result = whole.is_ok().then(then);
        world
            .postgres
            .execute("postgres", &format!("SELECT pg_terminate_backend(pid) {OTHERS}"))
            .unwrap();
        result.expect("the others are there")
    })
}

/// The verdict, and how many are left, as a role sees it that may not look at other roles' sessions.
fn connections(world: &World) -> (String, u32) {
    let (_, report) = doctor(world);
    let line = findings(&report, ABOUT, "connections");
    let line = line.first().unwrap_or_else(|| panic!("connections in {report:#}"));
    let text = |name: &str| line[name].as_str().unwrap().to_owned();
    let left = text("figure").split_once(" left, the node takes up to 8").unwrap().0.parse();
    (text("verdict"), left.unwrap())
}

#[test]
fn connections_that_others_hold_are_counted_and_so_are_the_limits_of_role_and_database() {
    // Three are the superuser's, the look has one, and the other database, where it would have one more, is away.
    let database_settings = &[("max_connections", "20"), ("superuser_reserved_connections", "3")];
    let world = prepare(Changes { database_settings, ..Changes::default() });
    let mut homelab = Homelab::open(world.node.config()).unwrap();
    homelab.set(&["databases", "homelab_settings", "port"], i64::from(rig::free_port()));
    homelab.write(world.node.config()).unwrap();
    for (others, verdict) in [(0, "ok"), (10, "warn"), (16, "fail")] {
        let found = with_others(&world, others, || connections(&world));
        assert_eq!(found, (verdict.to_owned(), 16 - others as u32), "{others} others");
    }
    let sql = |text: &str| world.postgres.execute("postgres", text).unwrap();
    sql("ALTER ROLE writer CONNECTION LIMIT 3");
    assert_eq!(connections(&world), ("warn".to_owned(), 2));
    sql("ALTER ROLE writer CONNECTION LIMIT -1; ALTER DATABASE telemetry CONNECTION LIMIT 2");
    assert_eq!(connections(&world), ("warn".to_owned(), 1));
}

#[test]
fn a_table_that_does_not_fit_fails_with_the_statement_that_mends_it() {
    let mut world = World::start(Changes::default());
    world.node.stop(SOON).unwrap();
    let sql = |text: &str| world.postgres.execute(DATABASE, text).unwrap();
    sql("ALTER TABLE temperature_sensors RENAME COLUMN temperature_c TO heat");
    let (code, report) = doctor(&world);
    assert_eq!(code, Some(1));
    let mut tables = findings(&report, ABOUT, "table").into_iter();
    let line = tables.find(|line| line["verdict"] == "fail").expect("one does not fit");
    let figure = line["figure"].as_str().unwrap();
    assert!(
        figure.contains("ALTER TABLE \"public\".\"temperature_sensors\" ADD COLUMN"),
        "{figure}"
    );
}
