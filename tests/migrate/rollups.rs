//! Counter difference done right: golden cases of the hourly and daily energy.

use telemetry::database::maintenance::ensure_partitions;

use crate::database::{DAY, TestDatabase, append_table};

/// 2026-03-14T00:00:00Z
const MARCH_14: i64 = 1_773_446_400_000_000;
const DAY_MICROS: i64 = 86_400_000_000;

const HOURS: &str = "SELECT device_serial, to_char(hour_start AT TIME ZONE 'UTC', 'DD HH24'), energy_wh, \
                     measurement_count, reset_count FROM energy_hourly ORDER BY device_serial, hour_start";
const DAYS: &str = "SELECT device_serial, to_char(day_start AT TIME ZONE 'UTC', 'DD'), energy_wh, measurement_count, \
                    reset_count FROM energy_daily_summary ORDER BY device_serial, day_start";

struct Meters(TestDatabase);

impl Meters {
    async fn new() -> Self {
        let database = TestDatabase::migrated("telemetry").await;
        let client = database.client().await;
        let table = append_table("energy_consumption", DAY, None);
        let (from, to) = (MARCH_14 - 3 * DAY_MICROS, MARCH_14 + 5 * DAY_MICROS);
        ensure_partitions(&client, &database.settings, &table, from, to).await.unwrap();
        Meters(database)
    }

    /// A time is `DD HH:MM:SS` of March 2026, UTC.
    fn read(&self, device: &str, at: &str, counter: impl Into<Option<i64>>) {
        let counter = counter.into().map_or("NULL".to_owned(), |counter| counter.to_string());
        self.0.execute(&format!(
            "INSERT INTO energy_consumption (time, device_serial, active_energy_total, active_power_total) \
             VALUES ('2026-03-{at}Z', '{device}', {counter}, 1200)"
        ));
    }

    fn refresh(&self, from: &str, to: &str) {
        self.0
            .execute(&format!("SELECT refresh_energy_rollups('2026-03-{from}Z', '2026-03-{to}Z')"));
    }

    fn hours(&self) -> Vec<String> {
        self.0.rows(HOURS)
    }

    fn days(&self) -> Vec<String> {
        self.0.rows(DAYS)
    }
}

#[tokio::test]
async fn a_reset_adds_nothing_and_is_flagged() {
    let meters = Meters::new().await;
    for (second, counter) in [(1, 104_233_871), (2, 104_233_890), (3, 5), (4, 60)] {
        meters.read("a", &format!("14 10:00:0{second}"), counter);
    }
    meters.refresh("14 00:00:00", "15 00:00:00");
    assert_eq!(meters.hours(), ["a 14 10 74 4 1"]);
    assert_eq!(meters.days(), ["a 14 74 4 1"]);
    let readable =
        "SELECT total_energy_kwh, avg_power_total_kw, hour_end - hour_start FROM energy_hourly";
    assert_eq!(meters.0.rows(readable), ["0.074 1.2 01:00:00"]);
    let month = "SELECT energy_wh, measurement_count, reset_count, month_start AT TIME ZONE 'UTC', \
                 month_end AT TIME ZONE 'UTC' FROM energy_monthly_summary";
    assert_eq!(meters.0.rows(month), ["74 4 1 2026-03-01 00:00:00 2026-04-01 00:00:00"]);
    assert_eq!(
        meters.0.rows("SELECT energy_wh, year_end AT TIME ZONE 'UTC' FROM energy_yearly_summary"),
        ["74 2027-01-01 00:00:00"]
    );
}

#[tokio::test]
async fn meters_are_never_mixed_and_nulls_are_skipped() {
    let meters = Meters::new().await;
    for (second, a, b) in
        [(1, Some(100), Some(9_000)), (2, None, Some(9_007)), (3, Some(130), None)]
    {
        meters.read("a", &format!("14 10:00:0{second}"), a);
        meters.read("b", &format!("14 10:00:0{second}"), b);
    }
    meters.refresh("14 00:00:00", "15 00:00:00");
    assert_eq!(meters.hours(), ["a 14 10 30 3 0", "b 14 10 7 3 0"]);
}

#[tokio::test]
async fn a_difference_belongs_to_the_later_reading_however_far_back_the_other_lies() {
    let meters = Meters::new().await;
    meters.read("a", "11 05:30:00", 100);
    meters.read("a", "14 09:59:59.999999", 150);
    meters.read("a", "14 10:00:00", 157);
    meters.refresh("14 00:00:00", "15 00:00:00");
    assert_eq!(
        meters.hours(),
        ["a 11 05 0 1 0", "a 14 09 50 1 0", "a 14 10 7 1 0"],
        "an edge belongs to the next"
    );
}

#[tokio::test]
async fn a_late_row_changes_its_own_hour_and_that_of_the_next_reading() {
    let meters = Meters::new().await;
    for (at, counter) in [("14 08:10:00", 100), ("14 12:10:00", 400), ("14 15:10:00", 500)] {
        meters.read("a", at, counter);
    }
    meters.refresh("14 00:00:00", "15 00:00:00");
    assert_eq!(meters.hours(), ["a 14 08 0 1 0", "a 14 12 300 1 0", "a 14 15 100 1 0"]);
    meters.read("a", "14 09:10:00", 180);
    meters.refresh("14 09:00:00", "14 09:20:00");
    assert_eq!(
        meters.hours(),
        ["a 14 08 0 1 0", "a 14 09 80 1 0", "a 14 12 220 1 0", "a 14 15 100 1 0"]
    );
    assert_eq!(meters.days(), ["a 14 400 4 0"]);
}

#[tokio::test]
async fn a_backlog_older_than_the_range_is_caught_up_with() {
    let meters = Meters::new().await;
    meters.read("a", "11 05:30:00", 100);
    meters.refresh("11 00:00:00", "11 06:00:00");
    // An outage: days later the buffer delivers what it kept.
    for (at, counter) in
        [("11 05:40:00", 110), ("12 07:00:00", 300), ("13 08:00:00", 350), ("16 09:00:00", 360)]
    {
        meters.read("a", at, counter);
    }
    meters.refresh("16 00:00:00", "16 12:00:00");
    assert_eq!(
        meters.hours(),
        ["a 11 05 10 2 0", "a 12 07 190 1 0", "a 13 08 50 1 0", "a 16 09 10 1 0"]
    );
}

#[tokio::test]
async fn twenty_four_hours_equal_their_day_and_a_repeat_changes_nothing() {
    let meters = Meters::new().await;
    meters.0.execute(
        "INSERT INTO energy_consumption (time, device_serial, active_energy_total) \
         SELECT timestamptz '2026-03-13 00:00:00Z' + n * interval '10 seconds', 'a', (n * 7 + n % 5) % 400000 \
         FROM generate_series(0, 25919) n",
    );
    meters.refresh("13 00:00:00", "16 00:00:00");
    let difference = "SELECT d.day_start, d.energy_wh - sum(h.energy_wh), count(*) FROM energy_daily_summary d \
                      JOIN energy_hourly h ON h.hour_start >= d.day_start AND h.hour_start < d.day_end \
                      GROUP BY d.day_start, d.energy_wh HAVING d.energy_wh <> sum(h.energy_wh) OR count(*) <> 24";
    assert_eq!(meters.0.rows(difference), [""; 0]);
    assert_eq!(meters.days().len(), 3);
    let direct = "SELECT sum(greatest(step, 0)), count(*) FILTER (WHERE step < 0) FROM (SELECT active_energy_total \
                  - lag(active_energy_total) OVER (ORDER BY time) AS step FROM energy_consumption) s";
    assert_eq!(
        meters.0.rows("SELECT sum(energy_wh), sum(reset_count) FROM energy_daily_summary"),
        meters.0.rows(direct)
    );
    let versions = "SELECT sum(xmin::text::bigint) FROM energy_hourly";
    let before = (meters.hours(), meters.0.rows(versions));
    meters.refresh("14 05:10:00", "15 12:20:00");
    meters.refresh("13 00:00:00", "16 00:00:00");
    assert_eq!((meters.hours(), meters.0.rows(versions)), before, "not one row was rewritten");
}

#[tokio::test]
async fn the_running_hour_and_day_are_visible() {
    let meters = Meters::new().await;
    let client = meters.0.client().await;
    let table = append_table("energy_consumption", DAY, None);
    let now = telemetry::domain::Arrival::now().as_micros();
    ensure_partitions(&client, &meters.0.settings, &table, now - DAY_MICROS, now).await.unwrap();
    meters.0.execute(
        "INSERT INTO energy_consumption (time, device_serial, active_energy_total) \
         VALUES (now() - interval '2 microseconds', 'a', 10), (now() - interval '1 microsecond', 'a', 30); \
         SELECT refresh_energy_rollups(now() - interval '2 days', now())",
    );
    let running =
        "SELECT sum(energy_wh) FROM energy_hourly WHERE hour_end > now() - interval '1 second'";
    assert_eq!(meters.0.rows(running), ["20"]);
    assert_eq!(meters.0.rows("SELECT sum(energy_wh) FROM energy_daily_summary"), ["20"]);
}

#[tokio::test]
async fn a_bucket_whose_raw_rows_are_gone_is_never_recomputed_and_still_lends_its_last_counter() {
    let meters = Meters::new().await;
    for (at, counter) in [("13 22:00:00", 100), ("13 22:30:00", 140), ("13 23:59:00", 150)] {
        meters.read("a", at, counter);
    }
    meters.refresh("13 00:00:00", "14 00:00:00");
    let kept = ["a 13 22 40 2 0", "a 13 23 10 1 0"];
    assert_eq!(meters.hours(), kept);
    meters.0.execute("DROP TABLE energy_consumption_p20260313");
    meters.refresh("13 00:00:00", "14 00:00:00");
    assert_eq!(meters.hours(), kept, "nothing there to compute it from");
    meters.read("a", "14 00:00:10", 155);
    meters.refresh("13 00:00:00", "15 00:00:00");
    assert_eq!(meters.hours(), [kept[0], kept[1], "a 14 00 5 1 0"]);
    // A straggler into a bucket that lost its rows: the rest of them is not forgotten for its sake.
    let client = meters.0.client().await;
    let table = append_table("energy_consumption", DAY, None);
    let at = MARCH_14 - DAY_MICROS;
    ensure_partitions(&client, &meters.0.settings, &table, at, at).await.unwrap();
    meters.read("a", "13 22:10:00", 120);
    meters.read("a", "13 22:11:00", 121);
    meters.read("a", "13 22:12:00", 122);
    meters.refresh("12 00:00:00", "15 00:00:00");
    assert_eq!(meters.hours(), [kept[0], kept[1], "a 14 00 5 1 0"]);
    assert_eq!(meters.days(), ["a 13 50 3 0", "a 14 5 1 0"]);
}

#[tokio::test]
async fn two_nodes_at_once_agree() {
    let meters = Meters::new().await;
    meters.0.execute(
        "INSERT INTO energy_consumption (time, device_serial, active_energy_total) \
         SELECT timestamptz '2026-03-14 00:00:00Z' + n * interval '1 minute', 'm' || n % 3, n FROM generate_series(0, 2879) n",
    );
    let clients = [meters.0.client().await, meters.0.client().await];
    let call = "SELECT refresh_energy_rollups('2026-03-14', '2026-03-17')";
    let (a, b) = tokio::join!(clients[0].execute(call, &[]), clients[1].execute(call, &[]));
    a.unwrap();
    b.unwrap();
    assert_eq!(
        meters.0.rows("SELECT sum(energy_wh), sum(measurement_count) FROM energy_daily_summary"),
        ["8631 2880"]
    );
}

#[tokio::test]
async fn absurd_counters_do_not_fail_the_refresh() {
    let meters = Meters::new().await;
    for (second, counter) in [(1, i64::MIN), (2, i64::MAX), (3, i64::MIN), (4, i64::MAX)] {
        meters.read("a", &format!("14 10:00:0{second}"), counter);
    }
    meters.refresh("14 00:00:00", "15 00:00:00");
    assert_eq!(meters.hours(), ["a 14 10 9223372036854775807 4 1"]);
}

#[tokio::test]
async fn the_older_readers_view_shows_counter_and_power() {
    let meters = Meters::new().await;
    meters.read("a", "14 10:00:00", 5);
    let view = "SELECT ts AT TIME ZONE 'UTC', consumption_total_w, consumption_total_actual_w, \
                consumption_l1_actual_w, consumption_l2_actual_w, consumption_l3_actual_w FROM energy";
    assert_eq!(meters.0.rows(view), ["2026-03-14 10:00:00 5 1200 - - -"]);
}

#[tokio::test]
async fn old_hours_go_after_two_years_but_a_meters_last_counter_stays() {
    let meters = Meters::new().await;
    meters.0.execute(
        "INSERT INTO energy_hourly (device_serial, hour_start, hour_end, energy_wh, measurement_count, reset_count, \
         first_reading, last_reading, last_counter, last_counter_at) \
         SELECT 'a', t, t + interval '1 hour', 1, 1, 0, t, t, 100 + n, t FROM generate_series(0, 1) n, \
         LATERAL (SELECT timestamptz '2023-01-01 00:00:00Z' + n * interval '1 hour' AS t) x",
    );
    meters.read("a", "14 10:00:00", 111);
    meters.refresh("14 00:00:00", "15 00:00:00");
    assert_eq!(meters.hours(), ["a 14 10 10 1 0"], "the carried counter served, then went");
}
