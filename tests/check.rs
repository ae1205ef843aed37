//! `telemetry check`: golden reports over broken configurations, the homelab example, and the pages made from the code.
//!
//! `UPDATE_GOLDEN=1 cargo test --test check` writes the golden files anew; read the difference before you keep it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use telemetry::config::{self, Loaded, Report};

fn no_environment(_: &str) -> Option<String> {
    None
}

fn load(path: &str) -> Result<Loaded, Report> {
    config::load(Path::new(path), &no_environment)
}

/// The file's text is what the code makes, or becomes it when asked to.
fn assert_golden(path: &Path, made: &str) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, made).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == made,
        "{} differs from what the code makes; look, then run UPDATE_GOLDEN=1 cargo test --test check\n{made}",
        path.display()
    );
}

fn broken_configurations() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir("tests/check")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| if path.is_dir() { path.join("telemetry.toml") } else { path })
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    found.sort();
    found
}

#[test]
fn every_broken_configuration_gets_its_report() {
    let configurations = broken_configurations();
    assert!(configurations.len() >= 12, "{configurations:?}");
    for path in configurations {
        let report = config::load(&path, &no_environment)
            .err()
            .unwrap_or_else(|| panic!("{} passed", path.display()));
        assert!(!report.problems.is_empty());
        assert_golden(&path.with_extension("report"), &report.to_string());
    }
}

#[test]
fn the_reference_page_and_the_schema_are_those_of_the_code() {
    assert_golden(Path::new("docs/configuration.md"), &config::markdown());
    let schema = format!("{:#}\n", config::json_schema());
    assert_golden(Path::new("docs/telemetry.schema.json"), &schema);
}

const HOMELAB: &str = "examples/homelab/telemetry.toml";

#[test]
fn the_homelab_example_serves_the_five_streams() {
    let loaded = load(HOMELAB).unwrap_or_else(|report| panic!("{report}"));
    let settings = loaded.settings;
    let minutes = |count: u64| Some(Duration::from_secs(count * 60));
    let expected = [
        ("energy", "saveeye/telemetry", "homelab-energy-realtime", (None, minutes(10))),
        (
            "heatpump",
            "thermiq_heatpump/data",
            "homelab-heatpump-telemetry",
            (minutes(10), minutes(15)),
        ),
        ("temperature_indoor", "+/events/rpc", "homelab-temperature-indoor", (minutes(120), None)),
        (
            "temperature_outdoor",
            "homelab/temperature/outdoor",
            "homelab-temperature-outdoor",
            (minutes(120), None),
        ),
        ("plug", "tele/+/STATE", "homelab-plug-telemetry", (minutes(15), None)),
    ];
    let found: Vec<_> = settings
        .streams
        .values()
        .map(|stream| {
            let kafka = stream.kafka.as_ref().unwrap();
            assert_eq!(kafka.ensure.as_ref().unwrap().retention, Duration::from_secs(7 * 86_400));
            assert_eq!(stream.client_id, format!("homelab-1-{}", stream.name));
            assert_eq!(stream.qos, 1);
            let name = stream.name.as_str();
            (name, stream.topic_filter.as_str(), kafka.topic.as_str(), stream.silent_after)
        })
        .collect();
    assert_eq!(found, expected);
    assert_eq!(settings.brokers["home"].keepalive, Duration::from_secs(30));
}

#[test]
fn the_homelab_example_writes_the_tables_in_their_widths() {
    use telemetry::config::{FieldType, TableKind};
    let settings = load(HOMELAB).unwrap_or_else(|report| panic!("{report}")).settings;
    let mut found = Vec::new();
    for stream in settings.streams.values() {
        for table in stream.tables.values() {
            let columns = table.columns.iter().map(|(field, column)| {
                let field = &stream.mapping.fields[field];
                let kind = match field.field_type {
                    FieldType::Int2 => "int2",
                    FieldType::Int4 => "int4",
                    FieldType::Int8 => "int8",
                    FieldType::Float8 => "float8",
                    FieldType::Boolean => "boolean",
                    FieldType::Text => "text",
                    FieldType::Timestamp => "timestamp",
                };
                format!("{column} {kind}{}", if field.required { "!" } else { "" })
            });
            let kept = match &table.kind {
                TableKind::Append { retention, .. } => {
                    format!("append, {} days", retention.unwrap().as_secs() / 86_400)
                }
                TableKind::Latest { key, insert_only, .. } => {
                    format!("latest by {key}, {insert_only:?}")
                }
            };
            found.push(format!(
                "{}.{} ({kept}): {}",
                table.database,
                table.table,
                columns.collect::<Vec<_>>().join(", ")
            ));
        }
    }
    let sensors = "mac_address text, location text, temperature_c float8!, temperature_f float8, \
        humidity float8, wifi_rssi float8, battery_voltage float8, battery_percent float8, \
        external_power float8, uptime float8, ram_free float8";
    assert_eq!(
        found,
        [
            "telemetry.energy_consumption (append, 90 days): device_serial text, meter_type text, wifi_rssi int2, \
             active_power_total int4!, active_power_l1 int4, active_power_l2 int4, active_power_l3 int4, \
             active_production_total int4, active_energy_total int8, active_energy_production int8, voltage_l1 int2, \
             voltage_l2 int2, voltage_l3 int2, current_l1 int4, current_l2 int4, current_l3 int4, power_factor int2"
                .to_owned(),
            "telemetry.heatpump_status (append, 90 days): device_id text, outdoor_temp int2!, supplyline_temp int2, \
             returnline_temp int2, hotwater_temp int2, brine_out_temp int2, brine_in_temp int2, flowlinepump_speed int2, \
             integral int2, runtime_compressor int4, runtime_hotwater int4, runtime_3kw int4, runtime_6kw int4, \
             indoor_temp int2, brinepump_on boolean, compressor_on boolean, flowlinepump_on boolean, \
             hotwater_production boolean, aux_heater_3kw_on boolean, aux_heater_6kw_on boolean"
                .to_owned(),
            "homelab_settings.settings (latest by device_id, {}): device_id text, indoor_target_temp float8, mode int4, \
             curve int4, curve_min int4, curve_max int4, curve_plus_5 int4, curve_zero int4, curve_minus_5 int4, \
             heatstop int4, integral_setting int2"
                .to_owned(),
            format!("telemetry.temperature_sensors (append, 90 days): device_id text, {sensors}"),
            "telemetry.temperature_sensors (append, 90 days): device_id text, location text, temperature_c float8!, \
             humidity float8, wind_speed_ms float8, pressure_hpa float8"
                .to_owned(),
            "homelab_settings.power_plugs (latest by plug_id, {\"name\": \"plug_id\"}): plug_id text, status boolean!, \
             wifi_rssi int4, uptime_seconds int4"
                .to_owned(),
        ]
    );
}
