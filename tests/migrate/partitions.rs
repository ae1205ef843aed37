//! Partitions are made ahead and for late rows; retention drops whole ones.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use telemetry::database::maintenance::{
    Tier, apply_retention, detect_tier, ensure_partitions, prepare_session,
};

use crate::database::{DAY, TestDatabase, append_table};

/// 2026-03-14T00:00:00Z
const MARCH_14: i64 = 1_773_446_400_000_000;
const DAY_MICROS: i64 = 86_400_000_000;

fn names(database: &TestDatabase, table: &str) -> Vec<String> {
    database.rows(&format!("SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = '{table}'::regclass ORDER BY 1::text"))
}

async fn with_table() -> TestDatabase {
    TestDatabase::migrated("telemetry").await
}

#[tokio::test]
async fn a_missing_partition_is_made_and_the_row_fits() {
    let database = with_table().await;
    let client = database.client().await;
    let table = append_table("energy_consumption", DAY, None);
    let insert = "INSERT INTO energy_consumption (time, device_serial) VALUES ('2026-03-14 23:59:59.999999Z', 'a')";
    let error = client.execute(insert, &[]).await.map_err(telemetry::database::postgres("insert"));
    assert!(error.unwrap_err().is_missing_partition());
    ensure_partitions(&client, &database.settings, &table, MARCH_14, MARCH_14).await.unwrap();
    client.execute(insert, &[]).await.unwrap();
    assert_eq!(names(&database, "energy_consumption"), ["energy_consumption_p20260314"]);
    let indexes =
        "SELECT count(*) FROM pg_indexes WHERE tablename = 'energy_consumption_p20260314'";
    assert_eq!(database.rows(indexes), ["1"]);
}

#[tokio::test]
async fn a_range_gets_every_partition_and_repeating_it_makes_none() {
    let database = with_table().await;
    let client = database.client().await;
    let (settings, table) = (&database.settings, append_table("heatpump_status", DAY, None));
    for _ in 0..2 {
        ensure_partitions(&client, settings, &table, MARCH_14 - 1, MARCH_14 + DAY_MICROS)
            .await
            .unwrap();
    }
    let expected = ["13", "14", "15"].map(|day| format!("heatpump_status_p202603{day}"));
    assert_eq!(names(&database, "heatpump_status"), expected);
    let weeks = append_table("heatpump_status", 7 * DAY, None);
    ensure_partitions(&client, settings, &weeks, MARCH_14, MARCH_14).await.unwrap();
    let bounds = "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'heatpump_status_p20260312'";
    assert_eq!(
        names(&database, "heatpump_status").len(),
        5,
        "the week's rest, around what is there"
    );
    assert_eq!(database.rows(bounds).len(), 1);
}

#[tokio::test]
async fn two_nodes_may_make_the_same_partitions_at_once() {
    let database = with_table().await;
    let table = append_table("energy_consumption", DAY, None);
    let clients = [database.client().await, database.client().await, database.client().await];
    let make = |client| {
        ensure_partitions(client, &database.settings, &table, MARCH_14, MARCH_14 + 20 * DAY_MICROS)
    };
    let (a, b, c) = tokio::join!(make(&clients[0]), make(&clients[1]), make(&clients[2]));
    a.unwrap();
    b.unwrap();
    c.unwrap();
    assert_eq!(names(&database, "energy_consumption").len(), 21);
}

#[tokio::test]
async fn what_cannot_be_made_is_told() {
    let database = with_table().await;
    let client = database.client().await;
    let settings = &database.settings;
    let missing = append_table("no_such_table", DAY, None);
    let error =
        ensure_partitions(&client, settings, &missing, MARCH_14, MARCH_14).await.unwrap_err();
    assert!(error.to_string().contains("telemetry migrate draft"), "{error}");
    let table = append_table("energy_consumption", DAY, None);
    let error = ensure_partitions(&client, settings, &table, 0, MARCH_14).await.unwrap_err();
    assert!(error.to_string().contains("more than 1000 partitions"), "{error}");
    database.execute("CREATE TABLE energy_consumption_p20260314 (a integer)");
    let error = ensure_partitions(&client, settings, &table, MARCH_14, MARCH_14).await.unwrap_err();
    assert!(error.to_string().contains("rename or drop what is in its way"), "{error}");
}

#[tokio::test]
async fn rows_of_a_default_partition_are_left_in_peace() {
    let database = with_table().await;
    let client = database.client().await;
    database.execute(
        "CREATE TABLE rest PARTITION OF energy_consumption DEFAULT; \
         INSERT INTO energy_consumption (time) VALUES ('2026-03-14 12:00:00Z')",
    );
    let table = append_table("energy_consumption", DAY, None);
    ensure_partitions(&client, &database.settings, &table, MARCH_14, MARCH_14).await.unwrap();
    assert_eq!(names(&database, "energy_consumption"), ["rest"]);
}

#[tokio::test]
async fn retention_drops_whole_old_partitions_and_a_shorter_one_takes_effect() {
    let database = with_table().await;
    let client = database.client().await;
    let settings = &database.settings;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as i64;
    let kept = |days: u64| {
        append_table("temperature_sensors", DAY, Some(Duration::from_secs(days * 86_400)))
    };
    let from = now - 100 * DAY_MICROS;
    ensure_partitions(&client, settings, &kept(90), from, now + 2 * DAY_MICROS).await.unwrap();
    database.execute("INSERT INTO temperature_sensors (time) SELECT now() - n * interval '1 day' FROM generate_series(0, 99) n");
    let oldest = "SELECT floor(extract(epoch FROM now() - min(time)) / 86400), count(*) FROM temperature_sensors";
    for (days, expected) in [(90, "90 91"), (60, "60 61"), (60, "60 61")] {
        apply_retention(&client, settings, &Tier::None, &kept(days)).await.unwrap();
        assert_eq!(
            database.rows(oldest),
            [expected],
            "a partition that reaches into the time kept stays"
        );
    }
    let forever = append_table("temperature_sensors", DAY, None);
    assert_eq!(
        apply_retention(&client, settings, &Tier::None, &forever).await.unwrap().names,
        [""; 0]
    );
}

#[tokio::test]
async fn retention_gives_way_to_a_long_query_instead_of_stopping_writers() {
    let database = with_table().await;
    let (client, mut reader) = (database.client().await, database.client().await);
    let table = append_table("energy_consumption", DAY, Some(DAY));
    ensure_partitions(&client, &database.settings, &table, MARCH_14, MARCH_14).await.unwrap();
    let reading = reader.transaction().await.unwrap();
    reading.query("SELECT * FROM energy_consumption", &[]).await.unwrap();
    let error =
        apply_retention(&client, &database.settings, &Tier::None, &table).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("55P03"), "{error}");
    reading.commit().await.unwrap();
    let dropped = apply_retention(&client, &database.settings, &Tier::None, &table).await.unwrap();
    assert_eq!(dropped.names, ["energy_consumption_p20260314"]);
}

#[tokio::test]
async fn a_heap_is_said_to_have_no_retention() {
    let database = TestDatabase::new();
    database.execute("CREATE TABLE plain (time timestamptz)");
    let client = database.client().await;
    prepare_session(&client, &database.settings).await.unwrap();
    assert_eq!(detect_tier(&client).await.unwrap(), Tier::None);
    let table = append_table("plain", DAY, Some(DAY));
    assert!(
        apply_retention(&client, &database.settings, &Tier::None, &table)
            .await
            .unwrap()
            .not_partitioned
    );
    ensure_partitions(&client, &database.settings, &table, MARCH_14, MARCH_14).await.unwrap();
}
