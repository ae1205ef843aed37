-- database: telemetry
--
-- One row per reading of a climate sensor, indoors or outdoors (`location`). A column a kind of sensor does not have
-- is NULL; `external_power` is 1 or 0.

CREATE TABLE temperature_sensors (
    time            timestamptz NOT NULL,
    device_id       text,
    mac_address     text,
    location        text,
    temperature_c   double precision,
    temperature_f   double precision,
    humidity        double precision,
    wifi_rssi       double precision,
    battery_voltage double precision,
    battery_percent double precision,
    external_power  double precision,
    uptime          double precision,
    ram_free        double precision,
    wind_speed_ms   double precision,
    pressure_hpa    double precision,
    node            text
);

-- A hypertable where TimescaleDB is installed; else range partitions, which the node creates ahead and drops.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        PERFORM create_hypertable('temperature_sensors', 'time',
            chunk_time_interval => interval '7 days', create_default_indexes => false);
    ELSE
        ALTER TABLE temperature_sensors RENAME TO temperature_sensors_columns;
        CREATE TABLE temperature_sensors (LIKE temperature_sensors_columns INCLUDING ALL)
            PARTITION BY RANGE (time);
        DROP TABLE temperature_sensors_columns;
    END IF;
END
$$;

CREATE INDEX temperature_sensors_device_time ON temperature_sensors (device_id, time DESC);
CREATE INDEX temperature_sensors_location_time ON temperature_sensors (location, time DESC);
