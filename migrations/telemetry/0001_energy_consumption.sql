-- database: telemetry
--
-- One row per reading of an electricity meter (W, Wh, V, mA, percent). `time` is the arrival at the node that wrote
-- the row, `node` its name; NULL there means another writer. The two energy columns are the meter's counters.

CREATE TABLE energy_consumption (
    time                     timestamptz NOT NULL,
    device_serial            text,
    meter_type               text,
    wifi_rssi                smallint,
    active_power_total       integer,
    active_power_l1          integer,
    active_power_l2          integer,
    active_power_l3          integer,
    active_production_total  integer,
    active_energy_total      bigint,
    active_energy_production bigint,
    voltage_l1               smallint,
    voltage_l2               smallint,
    voltage_l3               smallint,
    current_l1               integer,
    current_l2               integer,
    current_l3               integer,
    power_factor             smallint,
    node                     text
);

-- A hypertable where TimescaleDB is installed; else range partitions, which the node creates ahead and drops.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb') THEN
        PERFORM create_hypertable('energy_consumption', 'time',
            chunk_time_interval => interval '7 days', create_default_indexes => false);
    ELSE
        ALTER TABLE energy_consumption RENAME TO energy_consumption_columns;
        CREATE TABLE energy_consumption (LIKE energy_consumption_columns INCLUDING ALL)
            PARTITION BY RANGE (time);
        DROP TABLE energy_consumption_columns;
    END IF;
END
$$;

CREATE INDEX energy_consumption_device_time ON energy_consumption (device_serial, time DESC);
