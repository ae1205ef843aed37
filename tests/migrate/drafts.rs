//! A draft applies as it is printed, and agrees with the files the project ships.

use std::collections::BTreeMap;
use std::path::Path;

use telemetry::cli::Exit;
use telemetry::cli::migrate::{MigrateArgs, MigrateCommand, run};
use telemetry::config::{Settings, load};
use telemetry::migrate::{Draft, Session, draft};

use crate::database::TestDatabase;

fn homelab() -> Settings {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/homelab/telemetry.toml");
    load(&file, &|_| None).unwrap_or_else(|report| panic!("{report:?}")).settings
}

/// Column → type, of one table.
fn columns(database: &TestDatabase, table: &str) -> BTreeMap<String, String> {
    let sql = "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute \
               WHERE attnum > 0 AND NOT attisdropped AND attrelid = ";
    let rows = database.rows(&format!("{sql}'{table}'::regclass"));
    let split = |row: &String| row.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
    rows.iter().filter_map(split).collect()
}

async fn apply(draft: &Draft) -> TestDatabase {
    let database = TestDatabase::new();
    let folder = database.settings.migrations_dir.clone().unwrap();
    std::fs::write(folder.join("0001_draft.sql"), &draft.sql).unwrap();
    let session = Session::open(&draft.database, &database.settings).await.unwrap();
    let applied = session.apply().await.unwrap_or_else(|error| panic!("{error}\n{}", draft.sql));
    assert_eq!(applied.len(), 1);
    database
}

#[tokio::test]
async fn every_homelab_draft_applies_and_agrees_with_what_is_shipped() {
    let shipped = [
        ("telemetry", TestDatabase::migrated("telemetry").await),
        ("homelab_settings", TestDatabase::migrated("homelab_settings").await),
    ];
    let drafts: Vec<Draft> = homelab().streams.values().flat_map(draft).collect();
    assert_eq!(drafts.len(), 6);
    for draft in drafts {
        let ours = &shipped.iter().find(|(name, _)| *name == draft.database).unwrap().1;
        let (ours, drafted) =
            (columns(ours, &draft.table), columns(&apply(&draft).await, &draft.table));
        assert!(drafted.len() >= 5, "{drafted:?}");
        for (column, sql_type) in drafted {
            assert_eq!(ours.get(&column), Some(&sql_type), "{}.{column}", draft.table);
        }
    }
}

#[tokio::test]
async fn a_drafted_time_series_is_partitioned_and_a_latest_table_has_its_key() {
    let settings = homelab();
    let stream =
        settings.streams.values().find(|stream| stream.name.as_str() == "heatpump").unwrap();
    let drafts = draft(stream);
    let series = apply(&drafts[0]).await;
    assert_eq!(series.rows("SELECT partstrat FROM pg_partitioned_table"), ["r"]);
    let index = "SELECT indexdef FROM pg_indexes WHERE tablename = 'heatpump_status'";
    assert!(series.rows(index)[0].ends_with("(device_id, \"time\" DESC)"));
    let latest = apply(&drafts[1]).await;
    let keys =
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'settings'::regclass";
    assert_eq!(latest.rows(keys), ["PRIMARY KEY (device_id)"]);
}

#[test]
fn a_draft_of_a_time_series_reads_like_this() {
    let settings = homelab();
    let stream =
        settings.streams.values().find(|s| s.name.as_str() == "temperature_outdoor").unwrap();
    assert_eq!(draft(stream)[0].sql, include_str!("draft.golden.sql"));
}

async fn command(settings: &Settings, command: MigrateCommand, json: bool) -> (Exit, String) {
    let args = MigrateArgs { command, config: "unused".into(), database: None, json };
    let mut out = Vec::new();
    let code = run(&args, settings, &mut out).await.unwrap();
    (code, String::from_utf8(out).unwrap())
}

#[tokio::test]
async fn the_command_plans_applies_and_tells() {
    let (database, mut settings) = (TestDatabase::new(), homelab());
    settings.databases.retain(|name, _| name == "telemetry");
    settings.databases["telemetry"] = database.settings.clone();
    database.write("0001_a.sql", "CREATE TABLE a (x integer);");
    let (code, text) = command(&settings, MigrateCommand::Plan, false).await;
    assert_eq!(code, Exit::Fine);
    assert!(text.contains("0001_a.sql") && text.contains("pending"), "{text}");
    let (code, text) = command(&settings, MigrateCommand::Apply, false).await;
    assert!(code == Exit::Fine && text.contains("applied now"), "{text}");
    let (code, text) = command(&settings, MigrateCommand::Status, true).await;
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, json[0]["applied"][0].as_str()), (Exit::Fine, Some("0001_a.sql")));
    database.write("0002_b.sql", "nonsense");
    let (code, text) = command(&settings, MigrateCommand::Apply, false).await;
    assert!(code == Exit::Failed && text.contains("0002_b.sql, line 2"), "{text}");
    let (code, text) =
        command(&settings, MigrateCommand::Draft { stream: "plug".to_owned() }, false).await;
    assert!(code == Exit::Fine && text.contains("CREATE TABLE \"power_plugs\""), "{text}");
    let (code, text) =
        command(&settings, MigrateCommand::Draft { stream: "none".to_owned() }, false).await;
    assert!(code == Exit::Usage && text.contains("energy, heatpump"), "{text}");
}
