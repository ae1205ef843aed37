-- database: homelab_settings
--
-- What people have set on each heat pump: one row per device, changed only when a value changes. `updated_at` is the
-- arrival of the message that changed something.

CREATE TABLE settings (
    device_id          text PRIMARY KEY,
    indoor_target_temp double precision,
    mode               integer,
    curve              integer,
    curve_min          integer,
    curve_max          integer,
    curve_plus_5       integer,
    curve_zero         integer,
    curve_minus_5      integer,
    heatstop           integer,
    integral_setting   smallint,
    updated_at         timestamptz NOT NULL
);

CREATE INDEX settings_updated_at ON settings (updated_at DESC);
