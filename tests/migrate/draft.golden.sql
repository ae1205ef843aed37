-- database: telemetry
--
-- Rows of stream temperature_outdoor, as its mapping makes them.

CREATE TABLE "temperature_sensors" (
    "time" timestamptz NOT NULL,
    "device_id" text NOT NULL,
    "location" text,
    "temperature_c" double precision NOT NULL,
    "humidity" double precision,
    "wind_speed_ms" double precision,
    "pressure_hpa" double precision,
    "node" text
);

-- A hypertable where TimescaleDB is installed; else range partitions, which the node creates ahead and drops.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        PERFORM create_hypertable('"temperature_sensors"', 'time',
            chunk_time_interval => interval '7 days', create_default_indexes => false);
    ELSE
        ALTER TABLE "temperature_sensors" RENAME TO "temperature_sensors_columns";
        CREATE TABLE "temperature_sensors" (LIKE "temperature_sensors_columns" INCLUDING ALL) PARTITION BY RANGE ("time");
        DROP TABLE "temperature_sensors_columns";
    END IF;
END
$$;

CREATE INDEX "temperature_sensors_device_time" ON "temperature_sensors" ("device_id", "time" DESC);
