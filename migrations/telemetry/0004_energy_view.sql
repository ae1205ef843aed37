-- database: telemetry
--
-- For readers that know the older names. `consumption_total_w` is the meter's counter in Wh: the name is history.

CREATE VIEW energy AS
SELECT time                AS ts,
       active_energy_total AS consumption_total_w,
       active_power_total  AS consumption_total_actual_w,
       active_power_l1     AS consumption_l1_actual_w,
       active_power_l2     AS consumption_l2_actual_w,
       active_power_l3     AS consumption_l3_actual_w
FROM energy_consumption;
