-- database: homelab_settings
--
-- The last state of each switched plug. `name` is the plug's id at first and people's from then on: the node never
-- writes it again.

CREATE TABLE power_plugs (
    plug_id        text PRIMARY KEY,
    name           text NOT NULL,
    status         boolean,
    wifi_rssi      integer,
    uptime_seconds integer,
    updated_at     timestamptz NOT NULL
);

CREATE INDEX power_plugs_updated_at ON power_plugs (updated_at DESC);
