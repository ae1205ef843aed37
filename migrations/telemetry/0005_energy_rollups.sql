-- database: telemetry
--
-- Energy by hour and day (kept by `refresh_energy_rollups`, which the node calls as a job) and by month and year (summed
-- from the days). Buckets are half-open, [start, end), and in UTC.

CREATE TABLE energy_hourly (
    device_serial      text        NOT NULL,
    hour_start         timestamptz NOT NULL,
    hour_end           timestamptz NOT NULL,
    energy_wh          bigint      NOT NULL,
    total_energy_kwh   numeric(22, 3) GENERATED ALWAYS AS (energy_wh / 1000.0) STORED,
    avg_power_total_kw double precision,
    avg_power_l1_kw    double precision,
    avg_power_l2_kw    double precision,
    avg_power_l3_kw    double precision,
    measurement_count  bigint      NOT NULL,
    reset_count        bigint      NOT NULL,
    -- The rest serves the next refresh: what raw rows this hour was made of, and the counter it ended with. The raw
    -- rows may be gone by then.
    first_reading      timestamptz NOT NULL,
    last_reading       timestamptz NOT NULL,
    last_counter       bigint,
    last_counter_at    timestamptz,
    PRIMARY KEY (device_serial, hour_start)
);
CREATE INDEX energy_hourly_start ON energy_hourly (hour_start DESC);

CREATE TABLE energy_daily_summary (
    device_serial     text        NOT NULL,
    day_start         timestamptz NOT NULL,
    day_end           timestamptz NOT NULL,
    energy_wh         bigint      NOT NULL,
    measurement_count bigint      NOT NULL,
    reset_count       bigint      NOT NULL,
    PRIMARY KEY (device_serial, day_start)
);
CREATE INDEX energy_daily_summary_start ON energy_daily_summary (day_start DESC);

CREATE VIEW energy_monthly_summary AS
SELECT device_serial,
       month_start,
       (month_start AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC' AS month_end,
       sum(energy_wh)         AS energy_wh,
       sum(measurement_count) AS measurement_count,
       sum(reset_count)       AS reset_count
FROM (SELECT *, date_trunc('month', day_start, 'UTC') AS month_start FROM energy_daily_summary) AS days
GROUP BY device_serial, month_start;

CREATE VIEW energy_yearly_summary AS
SELECT device_serial,
       year_start,
       (year_start AT TIME ZONE 'UTC' + interval '1 year') AT TIME ZONE 'UTC' AS year_end,
       sum(energy_wh)         AS energy_wh,
       sum(measurement_count) AS measurement_count,
       sum(reset_count)       AS reset_count
FROM (SELECT *, date_trunc('year', day_start, 'UTC') AS year_start FROM energy_daily_summary) AS days
GROUP BY device_serial, year_start;

-- The start of the UTC bucket a moment belongs to.
CREATE FUNCTION bucket_start(width interval, moment timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN date_bin(width, moment, timestamptz '1970-01-01 00:00:00+00');

-- The first bucket edge at or after a moment.
CREATE FUNCTION bucket_ceiling(width interval, moment timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN date_bin(width, moment + width - interval '1 microsecond', timestamptz '1970-01-01 00:00:00+00');

-- Every meter with raw rows, by hopping through the index instead of reading all rows.
CREATE FUNCTION energy_devices() RETURNS SETOF text
LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    WITH RECURSIVE serials (serial) AS (
        SELECT min(device_serial) FROM energy_consumption
        UNION ALL
        SELECT (SELECT min(device_serial) FROM energy_consumption WHERE device_serial > serial)
        FROM serials WHERE serial IS NOT NULL
    )
    SELECT serial FROM serials WHERE serial IS NOT NULL
$$;

-- The hours of one meter in [first_hour, end_hour), both on the hour.
--
-- Each reading adds its counter minus the previous counter of the same meter to the hour of the later reading, however
-- far back the previous one lies; that is why a TimescaleDB continuous aggregate, which sees one bucket at a time,
-- cannot do this, and the same function serves with and without the extension. A lower counter is a reset: it adds
-- nothing and is counted. The first reading ever adds nothing. NULL counters are skipped.
--
-- Retention may have dropped raw rows. Then the last counter of each hour already rolled up stands in for them (where
-- they are still there it follows the one it repeats and adds 0), and an hour is rewritten only from at least the rows it was
-- made of: one whose raw rows are gone is never recomputed. So after deleting raw rows on purpose delete the hour's and
-- the day's row too.
CREATE FUNCTION refresh_energy_hours(device text, first_hour timestamptz, end_hour timestamptz) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    WITH readings AS (
        SELECT time, active_energy_total AS counter, true AS raw,
               active_power_total, active_power_l1, active_power_l2, active_power_l3
        FROM energy_consumption
        WHERE device_serial = device AND time >= first_hour AND time < end_hour
        UNION ALL
        SELECT last_counter_at, last_counter, false, NULL, NULL, NULL, NULL
        FROM energy_hourly
        WHERE device_serial = device AND hour_start >= first_hour AND hour_start < end_hour
          AND last_counter IS NOT NULL
        UNION ALL
        (SELECT time, active_energy_total, false, NULL, NULL, NULL, NULL
         FROM energy_consumption
         WHERE device_serial = device AND time < first_hour AND active_energy_total IS NOT NULL
         ORDER BY time DESC, active_energy_total DESC LIMIT 1)
        UNION ALL
        (SELECT last_counter_at, last_counter, false, NULL, NULL, NULL, NULL
         FROM energy_hourly
         WHERE device_serial = device AND hour_start < first_hour AND last_counter IS NOT NULL
         ORDER BY hour_start DESC LIMIT 1)
    ),
    steps AS (
        SELECT *,
               bucket_start('1 hour', time) AS hour,
               lag(counter) OVER (PARTITION BY counter IS NULL ORDER BY time, counter, raw DESC) AS previous
        FROM readings
    ),
    hours AS (
        SELECT hour,
               -- numeric while summing: two absurd counters must not fail every refresh that follows
               least(coalesce(sum(counter::numeric - previous) FILTER (WHERE counter > previous), 0),
                     9223372036854775807)::bigint AS energy_wh,
               avg(active_power_total)::double precision / 1000 AS total_kw,
               avg(active_power_l1)::double precision / 1000 AS l1_kw,
               avg(active_power_l2)::double precision / 1000 AS l2_kw,
               avg(active_power_l3)::double precision / 1000 AS l3_kw,
               count(*) AS measurement_count,
               count(*) FILTER (WHERE counter < previous) AS reset_count,
               min(time) AS first_reading,
               max(time) AS last_reading,
               max(time) FILTER (WHERE counter IS NOT NULL) AS last_counter_at
        FROM steps
        WHERE raw
        GROUP BY hour
    )
    INSERT INTO energy_hourly AS stored (
        device_serial, hour_start, hour_end, energy_wh,
        avg_power_total_kw, avg_power_l1_kw, avg_power_l2_kw, avg_power_l3_kw,
        measurement_count, reset_count, first_reading, last_reading, last_counter, last_counter_at)
    SELECT device, hour, hour + interval '1 hour', energy_wh, total_kw, l1_kw, l2_kw, l3_kw,
           measurement_count, reset_count, first_reading, last_reading,
           (SELECT active_energy_total FROM energy_consumption
            WHERE device_serial = device AND time = last_counter_at AND active_energy_total IS NOT NULL
            ORDER BY active_energy_total DESC LIMIT 1),
           last_counter_at
    FROM hours
    ORDER BY hour
    ON CONFLICT (device_serial, hour_start) DO UPDATE SET
        energy_wh = excluded.energy_wh,
        avg_power_total_kw = excluded.avg_power_total_kw,
        avg_power_l1_kw = excluded.avg_power_l1_kw,
        avg_power_l2_kw = excluded.avg_power_l2_kw,
        avg_power_l3_kw = excluded.avg_power_l3_kw,
        measurement_count = excluded.measurement_count,
        reset_count = excluded.reset_count,
        first_reading = excluded.first_reading,
        last_reading = excluded.last_reading,
        last_counter = excluded.last_counter,
        last_counter_at = excluded.last_counter_at
    WHERE excluded.measurement_count >= stored.measurement_count
      AND excluded.first_reading <= stored.first_reading
      AND excluded.last_reading >= stored.last_reading
      AND (excluded.energy_wh, excluded.measurement_count, excluded.reset_count, excluded.last_counter,
           excluded.first_reading, excluded.last_reading)
          IS DISTINCT FROM
          (stored.energy_wh, stored.measurement_count, stored.reset_count, stored.last_counter,
           stored.first_reading, stored.last_reading)
$$;

-- The days of one meter that touch [first_hour, end_hour): the sum of their hours, so that 24 hours equal their day.
-- A day some of whose hours are gone is left as it is.
CREATE FUNCTION refresh_energy_days(device text, first_hour timestamptz, end_hour timestamptz) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    INSERT INTO energy_daily_summary AS stored
        (device_serial, day_start, day_end, energy_wh, measurement_count, reset_count)
    SELECT device, day, day + interval '24 hours',
           least(sum(energy_wh), 9223372036854775807)::bigint, sum(measurement_count), sum(reset_count)
    FROM (SELECT *, bucket_start('1 day', hour_start) AS day
          FROM energy_hourly
          WHERE device_serial = device
            AND hour_start >= bucket_start('1 day', first_hour)
            AND hour_start < bucket_ceiling('1 day', end_hour)) AS hours
    GROUP BY day
    ORDER BY day
    ON CONFLICT (device_serial, day_start) DO UPDATE SET
        energy_wh = excluded.energy_wh,
        measurement_count = excluded.measurement_count,
        reset_count = excluded.reset_count
    WHERE excluded.measurement_count >= stored.measurement_count
      AND (excluded.energy_wh, excluded.measurement_count, excluded.reset_count)
          IS DISTINCT FROM (stored.energy_wh, stored.measurement_count, stored.reset_count)
$$;

-- Brings the roll-ups of [range_start, range_end) up to date, whole hours. Wider where it must be:
-- * backwards to the meter's newest hour, so that a backlog older than the job's lookback, delivered after an outage, is
--   never skipped;
-- * forwards to the hour of the next reading after the range, whose difference a late row changes.
-- Repeating it changes nothing. A row that arrives behind the newest hour and behind the lookback (a dead letter
-- replayed after weeks) needs one call with a range that holds it.
CREATE FUNCTION refresh_energy_rollups(range_start timestamptz, range_end timestamptz) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    device       text;
    newest_hour  timestamptz;
    next_reading timestamptz;
    first_hour   timestamptz;
    end_hour     timestamptz;
BEGIN
    -- Two nodes take turns: the second works on a snapshot that holds what the first has written.
    PERFORM pg_advisory_xact_lock(hashtextextended('energy roll-ups of ' || current_schema(), 0));
    FOR device IN SELECT energy_devices() LOOP
        SELECT max(hour_start) INTO newest_hour FROM energy_hourly WHERE device_serial = device;
        first_hour := least(bucket_start('1 hour', range_start), coalesce(newest_hour, '-infinity'));
        end_hour := bucket_ceiling('1 hour', range_end);
        SELECT time INTO next_reading FROM energy_consumption
        WHERE device_serial = device AND time >= end_hour AND active_energy_total IS NOT NULL
        ORDER BY time LIMIT 1;
        IF FOUND THEN
            end_hour := bucket_start('1 hour', next_reading) + interval '1 hour';
        END IF;
        PERFORM refresh_energy_hours(device, first_hour, end_hour);
        PERFORM refresh_energy_days(device, first_hour, end_hour);
    END LOOP;
    -- Hours are kept 2 years and days 5; the newest counter of a meter that has been silent for longer stays.
    DELETE FROM energy_hourly AS old
    WHERE hour_start < least(range_end, now()) - interval '2 years'
      AND EXISTS (SELECT FROM energy_hourly AS newer
                  WHERE newer.device_serial = old.device_serial AND newer.hour_start > old.hour_start
                    AND newer.last_counter IS NOT NULL);
    DELETE FROM energy_daily_summary WHERE day_start < least(range_end, now()) - interval '5 years';
END
$$;
