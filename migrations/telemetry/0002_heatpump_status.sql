-- database: telemetry
--
-- One row per register dump of a heat pump: temperatures in degrees Celsius, run times in hours, `integral` in
-- degree-minutes. What people set on it is in the table `settings` of homelab_settings.

CREATE TABLE heatpump_status (
    time                  timestamptz NOT NULL,
    device_id             text,
    outdoor_temp          smallint,
    supplyline_temp       smallint,
    returnline_temp       smallint,
    hotwater_temp         smallint,
    brine_out_temp        smallint,
    brine_in_temp         smallint,
    flowlinepump_speed    smallint,
    integral              smallint,
    runtime_compressor    integer,
    runtime_hotwater      integer,
    runtime_3kw           integer,
    runtime_6kw           integer,
    indoor_temp           smallint,
    brinepump_on          boolean,
    compressor_on         boolean,
    flowlinepump_on       boolean,
    hotwater_production   boolean,
    aux_heater_3kw_on     boolean,
    aux_heater_6kw_on     boolean,
    node                  text
);

-- A hypertable where TimescaleDB is installed; else range partitions, which the node creates ahead and drops.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        PERFORM create_hypertable('heatpump_status', 'time',
            chunk_time_interval => interval '7 days', create_default_indexes => false);
    ELSE
        ALTER TABLE heatpump_status RENAME TO heatpump_status_columns;
        CREATE TABLE heatpump_status (LIKE heatpump_status_columns INCLUDING ALL)
            PARTITION BY RANGE (time);
        DROP TABLE heatpump_status_columns;
    END IF;
END
$$;

CREATE INDEX heatpump_status_device_time ON heatpump_status (device_id, time DESC);
