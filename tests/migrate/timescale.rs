//! The way taken where TimescaleDB is installed. The extension is not to be had from Debian, so its functions are
//! played by recorders: what is tested is which calls are made, with which values.

use telemetry::database::maintenance::{
    TableShape, Tier, apply_retention, detect_tier, ensure_partitions, shape,
};
use telemetry::migrate::Session;

use crate::database::{DAY, TestDatabase, append_table, shipped};

const RECORDER: &str = "
    CREATE TABLE calls (call text);
    CREATE FUNCTION create_hypertable(relation regclass, time_column name, chunk_time_interval interval,
                                      create_default_indexes boolean) RETURNS void LANGUAGE sql AS
        $$ INSERT INTO calls VALUES (format('create_hypertable(%s, %s, %s, %s)', relation, time_column,
                                            chunk_time_interval, create_default_indexes)) $$;
    CREATE FUNCTION drop_chunks(relation regclass, older_than timestamptz) RETURNS SETOF text LANGUAGE sql AS
        $$ INSERT INTO calls VALUES (format('drop_chunks(%s, %s)', relation, round(extract(epoch FROM now() - older_than) / 86400)))
           RETURNING '_timescaledb_internal._hyper_1_1_chunk' $$;
    CREATE SCHEMA timescaledb_information;
    CREATE VIEW timescaledb_information.hypertables AS
        SELECT 'public'::name AS hypertable_schema, 'energy_consumption'::name AS hypertable_name;
    SET allow_system_table_mods TO on;
    INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
        VALUES (99999, 'timescaledb', 10, 'public'::regnamespace, false, '2.22.1');";

#[tokio::test]
async fn time_series_become_hypertables_and_lose_old_chunks_by_our_own_call() {
    let mut database = TestDatabase::new();
    database.execute(RECORDER);
    database
        .execute(&format!("ALTER DATABASE {} SET timescaledb.license TO 'apache'", database.name));
    database.settings.migrations_dir = Some(shipped("telemetry"));
    Session::open("telemetry", &database.settings).await.unwrap().apply().await.unwrap();
    let made = ["energy_consumption", "heatpump_status", "temperature_sensors"]
        .map(|table| format!("create_hypertable({table}, time, 7 days, f)"));
    assert_eq!(database.rows("SELECT call FROM calls"), made);
    assert_eq!(
        database.rows("SELECT relkind FROM pg_class WHERE relname = 'energy_consumption'"),
        ["r"]
    );

    let (client, settings) = (database.client().await, &database.settings);
    let tier = detect_tier(&client).await.unwrap();
    let version = "2.22.1".to_owned();
    assert_eq!(tier, Tier::Apache { schema: "public".to_owned(), version });
    assert_eq!(
        shape(&client, settings, "energy_consumption").await.unwrap(),
        TableShape::Hypertable
    );
    let table = append_table("energy_consumption", DAY, Some(60 * DAY));
    ensure_partitions(&client, settings, &table, 0, 0).await.unwrap();
    let dropped = apply_retention(&client, settings, &tier, &table).await.unwrap();
    assert_eq!(dropped.names, ["_timescaledb_internal._hyper_1_1_chunk"]);
    let calls = "SELECT call FROM calls WHERE call LIKE 'drop%'";
    assert_eq!(database.rows(calls), ["drop_chunks(energy_consumption, 60)"]);
}
