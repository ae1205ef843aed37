//! `telemetry check`: golden reports over broken configurations, the homelab example, and the pages
//! made from the code.
//!
//! `UPDATE_GOLDEN=1 cargo test --test check` writes the golden files anew; read the difference
//! before you keep it.

#[path = "check/alerts.rs"]
mod alerts;
#[path = "check/log_events.rs"]
mod log_events;

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
    if std::env::var("UPDATE_GOLDEN").is_ok_and(|wish| wish == "1") {
        std::fs::write(path, made).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == made,
        "{} differs from what the code makes; look, then run UPDATE_GOLDEN=1 cargo test \
             --test check\n{made}",
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

/// A folder with a main file and others beside it.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, private).unwrap();
    }
    folder
}

const SMALL: &str = r#"
[node]
name = "node-1"
state_dir = "."
[brokers.home]
host = "127.0.0.1"
username = "telemetry"
password_file = "secrets/mqtt"
[clusters.main]
bootstrap_servers = ["127.0.0.1:9092"]
properties = { "client.token" = "swordfish-3" }
[clusters.main.sasl]
mechanism = "PLAIN"
username = "telemetry"
password_credential = "kafka"
[databases.main]
host = "127.0.0.1"
dbname = "telemetry"
user = "telemetry"
password_env = "DATABASE_PASSWORD"
tls_mode = "off"
[streams.one]
broker = "home"
topic_filter = "a"
silent_warning_after_seconds = 60
fields.device = { path = "id", type = "text", device_id = true }
kafka = { cluster = "main", topic = "one" }
tables.one = { database = "main", kind = "append" }
"#;

#[test]
fn secrets_come_from_outside_and_are_never_shown() {
    let folder = folder(&[
        ("telemetry.toml", SMALL),
        ("secrets/mqtt", "swordfish-1\n"),
        ("credentials/kafka", "swordfish-2"),
    ]);
    let credentials = folder.path().join("credentials").display().to_string();
    let environment = |name: &str| match name {
        "CREDENTIALS_DIRECTORY" => Some(credentials.clone()),
        "DATABASE_PASSWORD" => Some("swordfish-4".to_owned()),
        _ => None,
    };
    let loaded = config::load(&folder.path().join("telemetry.toml"), &environment)
        .unwrap_or_else(|report| panic!("{report}"));
    let settings = &loaded.settings;
    let password =
        |password: Option<&config::Password>| password.unwrap().current().expose().to_owned();
    assert_eq!(password(settings.brokers["home"].password.as_ref()), "swordfish-1");
    let sasl = settings.clusters["main"].sasl.as_ref().unwrap();
    assert_eq!(password(Some(&sasl.password)), "swordfish-2");
    assert_eq!(password(settings.databases["main"].password.as_ref()), "swordfish-4");

    let lines: Vec<String> = loaded.effective.iter().map(ToString::to_string).collect();
    let shown = lines.join("\n");
    assert!(!shown.contains("swordfish"), "{shown}");
    assert!(!serde_json::to_string(&loaded.effective).unwrap().contains("swordfish"));
    assert!(shown.contains("brokers.home.password = \"***\""), "{shown}");
    assert!(shown.contains("# credential \"kafka\""), "{shown}");
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

#[test]
fn outside_systemd_credentials_are_looked_for_beside_the_file() {
    let folder = folder(&[
        ("telemetry.toml", SMALL),
        ("secrets/mqtt", "swordfish-1\n"),
        ("credentials/kafka", "swordfish-2"),
    ]);
    let environment = |name: &str| (name == "DATABASE_PASSWORD").then(|| "swordfish-4".to_owned());
    let loaded = config::load(&folder.path().join("telemetry.toml"), &environment)
        .unwrap_or_else(|report| panic!("{report}"));
    let sasl = loaded.settings.clusters["main"].sasl.as_ref().unwrap();
    assert_eq!(sasl.password.current().expose(), "swordfish-2");
}

#[test]
fn a_secret_file_that_everyone_can_read_is_warned_of() {
    let text = SMALL
        .replace("password_credential = \"kafka\"", "password_file = \"secrets/mqtt\"")
        .replace("password_env = \"DATABASE_PASSWORD\"", "");
    let folder = folder(&[("telemetry.toml", &text), ("secrets/mqtt", "swordfish-1")]);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(folder.path().join("secrets/mqtt"), open).unwrap();
    let loaded = config::load(&folder.path().join("telemetry.toml"), &no_environment)
        .unwrap_or_else(|report| panic!("{report}"));
    let paths: Vec<&str> = loaded.warnings.iter().map(|warning| warning.path.as_str()).collect();
    assert_eq!(paths, ["brokers.home.password_file", "clusters.main.sasl.password_file"]);
    assert!(loaded.warnings.iter().all(|warning| warning.rule.contains("readable by every user")));
}

#[test]
fn settings_without_effect_and_tables_shared_at_odds_are_warned_of() {
    let folder = folder(&[("telemetry.toml", DOUBTFUL)]);
    let loaded = config::load(&folder.path().join("telemetry.toml"), &no_environment)
        .unwrap_or_else(|report| panic!("{report}"));
    let found: Vec<_> =
        loaded.warnings.iter().map(|w| (w.path.as_str(), w.rule.as_str())).collect();
    assert_eq!(
        found,
        [
            ("http.clear_text_allowed", "has no effect: only this machine reaches the listener"),
            (
                "clusters.main.batch_bytes",
                "above message_bytes_max = 100000: no batch becomes larger than that"
            ),
            ("streams.one.require_any", "has no effect: no table has one of these fields"),
            (
                "streams.two.tables.again.retention_days",
                "sink one of stream one keeps the same table for ever: the longest counts"
            ),
            (
                "streams.two.tables.again.partition_days",
                "sink one of stream one has 7 for the same table: whichever makes a partition decides its width"
            ),
        ]
    );
}

#[test]
fn clear_text_is_not_allowed_beside_tls() {
    let tls = "tls = { certificate_file = \"telemetry.toml\", key_file = \"telemetry.toml\" }";
    let listen = "listen = \"0.0.0.0:9464\"\nclear_text_allowed = true";
    let text = DOUBTFUL.replace("clear_text_allowed = true", &format!("{listen}\n{tls}"));
    let folder = folder(&[("telemetry.toml", &text)]);
    let loaded = config::load(&folder.path().join("telemetry.toml"), &no_environment)
        .unwrap_or_else(|report| panic!("{report}"));
    let first = &loaded.warnings[0];
    assert_eq!(first.rule, "has no effect beside [http.tls]");
}

const DOUBTFUL: &str = r#"
[node]
name = "node-1"
state_dir = "."
[http]
clear_text_allowed = true
[brokers.home]
host = "127.0.0.1"
[clusters.main]
bootstrap_servers = ["127.0.0.1:9092"]
batch_bytes = 100_001
message_bytes_max = 100_000
[databases.main]
host = "127.0.0.1"
dbname = "telemetry"
user = "telemetry"
tls_mode = "off"
[streams.one]
broker = "home"
topic_filter = "a"
silent_warning_after_seconds = 60
require_any = ["power"]
fields.device = { path = "id", type = "text", device_id = true }
fields.power = { path = "p", type = "int4" }
kafka = { cluster = "main", topic = "one" }
tables.one = { database = "main", kind = "append", fields = ["device"] }
[streams.two]
broker = "home"
topic_filter = "b"
silent_warning_after_seconds = 60
fields.device = { path = "id", type = "text", device_id = true }
tables.again = { database = "main", kind = "append", table = "one", retention_days = 30, partition_days = 1 }
"#;

#[test]
fn what_librdkafka_refuses_is_a_mistake_with_its_place() {
    let (own, wrong) = ("\"client.token\" = \"swordfish-3\"", "\"socket.timeout.ms\" = \"soon\"");
    let text = SMALL
        .replace(own, &format!("{own}, {wrong}"))
        .replace("password_credential = \"kafka\"", "password_file = \"secrets/mqtt\"")
        .replace("password_env = \"DATABASE_PASSWORD\"", "");
    let folder = folder(&[("telemetry.toml", &text), ("secrets/mqtt", "swordfish-1")]);
    let report = telemetry::cli::check::load(&folder.path().join("telemetry.toml")).unwrap_err();
    let [unknown, value] = report.problems.as_slice() else { panic!("{report}") };
    for problem in [unknown, value] {
        assert_eq!(problem.path, "clusters.main.properties");
        assert_eq!(problem.place.as_ref().map(|place| place.line), Some(11));
    }
    let unknown_rule = "librdkafka refuses it: No such configuration property: \"client.token\"";
    assert_eq!(unknown.rule, unknown_rule);
    assert!(value.rule.contains("socket.timeout.ms"), "{report}");
    // What two properties make of each other only a client tells.
    let text = text.replace(&format!("{own}, {wrong}"), "\"reconnect.backoff.max.ms\" = \"100\"");
    std::fs::write(folder.path().join("telemetry.toml"), text).unwrap();
    let report = telemetry::cli::check::load(&folder.path().join("telemetry.toml")).unwrap_err();
    let [together] = report.problems.as_slice() else { panic!("{report}") };
    assert_eq!(together.path, "clusters.main.properties");
    assert!(together.rule.contains("reconnect.backoff"), "{report}");
}

#[test]
fn fragments_add_to_the_main_file_and_name_themselves_as_origin() {
    let text = SMALL.replace("password_credential = \"kafka\"", "").replace("password_env", "# ");
    let folder = folder(&[
        ("telemetry.toml", &text),
        ("secrets/mqtt", "swordfish-1"),
        ("secrets/kafka", "swordfish-2"),
        ("conf.d/10-secrets.toml", "[clusters.main.sasl]\npassword_file = \"secrets/kafka\"\n"),
        ("conf.d/20-buffer.toml", "[buffer]\nsync_linger_ms = 0\n"),
        ("conf.d/ignored.txt", "not TOML"),
    ]);
    let loaded = config::load(&folder.path().join("telemetry.toml"), &no_environment)
        .unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(loaded.settings.buffer.sync_linger, Duration::ZERO);
    let sasl = loaded.settings.clusters["main"].sasl.as_ref().unwrap();
    // A path in a fragment begins at the main file's folder like every other.
    assert_eq!(sasl.password.current().expose(), "swordfish-2");
    let line = |path: &str| loaded.effective.iter().find(|line| line.path == path).unwrap();
    assert!(line("buffer.sync_linger_ms").origin.ends_with("conf.d/20-buffer.toml:2"));
    assert_eq!(line("buffer.quota_bytes").origin, "default");
    assert_eq!(line("buffer.quota_bytes").value, "8589934592");
    assert_eq!(line("streams.one.client_id").value, "\"node-1-one\"");
    assert_eq!(line("streams.one.client_id").origin, "derived");
}

#[test]
fn a_report_is_data_too() {
    let report = load("tests/check/bad_input.toml").unwrap_err();
    let json = serde_json::to_value(&report).unwrap();
    let first = &json["problems"][0];
    assert_eq!(first["file"], "tests/check/bad_input.toml");
    assert_eq!(first["line"], 5);
    assert_eq!(first["column"], 1);
    assert_eq!(first["path"], "node.colour");
    assert_eq!(first["value"], "\"blue\"");
    assert_eq!(first["rule"], "unknown setting");
}

#[test]
fn the_mappings_of_the_homelab_compile() {
    let loaded = telemetry::cli::check::load(Path::new(HOMELAB));
    loaded.unwrap_or_else(|report| panic!("{report}"));
}

#[test]
fn every_default_is_a_value_the_reader_takes() {
    let folder = folder(&[("telemetry.toml", SMALL), ("secrets/mqtt", "x"), ("kafka", "x")]);
    let here = folder.path().display().to_string();
    let environment = |_: &str| Some(here.clone());
    let main = folder.path().join("telemetry.toml");
    let loaded = config::load(&main, &environment).unwrap_or_else(|report| panic!("{report}"));
    let spelled: String = loaded
        .effective
        .iter()
        .filter(|line| line.origin == "default" || line.origin == "derived")
        .filter(|line| !line.path.starts_with("streams."))
        .map(|line| format!("{} = {}\n", line.path, line.value))
        .collect();
    let written = folder.path().join("conf.d");
    std::fs::create_dir(&written).unwrap();
    std::fs::write(written.join("defaults.toml"), spelled).unwrap();
    let again = config::load(&main, &environment).unwrap_or_else(|report| panic!("{report}"));
    let values = |loaded: &Loaded| {
        loaded.effective.iter().map(|l| (l.path.clone(), l.value.clone())).collect::<Vec<_>>()
    };
    assert_eq!(values(&loaded), values(&again));
}

const PLANTS: &str = r#"
[node]
name = "greenhouse"
state_dir = "."
[brokers.boards]
host = "127.0.0.1"
version = "3.1.1"
[brokers.boards.tls]
ca_file = "ca.pem"
[databases.plants]
host = "127.0.0.1"
dbname = "plants"
user = "telemetry"
tls_mode = "off"
[streams.readings]
broker = "boards"
topic_filter = "devices/+/telemetry"
silent_warning_after_seconds = 180
require_any = ["soil_moisture", "light_level"]
dedupe = { by = "message_id", message_id_paths = ["id", "list[0].n"], window_seconds = 900 }
[streams.readings.filter]
path = "kind"
none_of = ["test", 0, false]
[streams.readings.fields]
device_id = { topic_level = 2, device_id = true }
device_time = { path = "timestamp", type = "timestamp", timestamp_skew_max_seconds = 60 }
soil_moisture = { path = "soil_moisture", type = "float8", min = 0, max = 100, out_of_range = "flag" }
light_level = { path = "light_level", aliases = ["light"], type = "float8", scale = 0.1, offset = -2 }
battery = { path = "mv", type = "int2", round = "nearest", default = 0, text_as_number = true }
seen = { arrival = true }
flags = { flags = true }
[streams.readings.tables.telemetry]
database = "plants"
kind = "append"
columns = { battery = "battery_mv" }
time_column = "arrived"
node_column = ""
partition_days = 1
retention_days = 30
"#;

#[test]
fn every_option_of_a_field_reaches_the_settings() {
    use telemetry::config::*;
    let folder = folder(&[("telemetry.toml", PLANTS), ("ca.pem", "")]);
    let loaded = config::load(&folder.path().join("telemetry.toml"), &no_environment)
        .unwrap_or_else(|report| panic!("{report}"));
    let broker = &loaded.settings.brokers["boards"];
    assert_eq!((broker.port, broker.version), (8883, MqttVersion::V311));
    assert_eq!(broker.tls.as_ref().unwrap().ca_file, Some(folder.path().join("ca.pem")));

    let stream = loaded.settings.streams.values().next().unwrap();
    let dedupe = stream.dedupe.as_ref().unwrap();
    assert!(matches!(&dedupe.key, DedupeKey::MessageId(paths) if paths == &["id", "list[0].n"]));
    let filter = stream.mapping.filter.as_ref().unwrap();
    assert_eq!(filter.source, FieldSource::Paths(vec!["kind".into()]));
    let expected = serde_json::json!(["test", 0, false]);
    assert!(
        matches!(&filter.test, FilterTest::NoneOf(values) if expected == serde_json::json!(values))
    );
    assert_eq!(stream.mapping.require_any, ["soil_moisture", "light_level"]);
    assert_eq!(stream.mapping.device_id, "device_id");

    let field = |name: &str| &stream.mapping.fields[name];
    assert_eq!(field("device_id").source, FieldSource::TopicLevel(2));
    assert_eq!(field("device_time").timestamp.max_skew, Duration::from_secs(60));
    assert_eq!(field("device_time").timestamp.max_age, Duration::from_secs(7 * 86_400));
    let soil = field("soil_moisture");
    assert_eq!((soil.min, soil.max, soil.out_of_range), (Some(0.0), Some(100.0), OutOfRange::Flag));
    let light = field("light_level");
    assert_eq!(light.source, FieldSource::Paths(vec!["light_level".into(), "light".into()]));
    assert_eq!((light.scale, light.offset), (0.1, -2.0));
    let battery = field("battery");
    assert_eq!((battery.field_type, battery.rounding), (FieldType::Int2, Rounding::Nearest));
    assert!(battery.text_as_number && battery.default == Some(0.into()));
    let of = |name: &str| (field(name).source.clone(), field(name).field_type);
    assert_eq!(of("seen"), (FieldSource::Arrival, FieldType::Timestamp));
    assert_eq!(of("flags"), (FieldSource::Flags, FieldType::Text));

    let table = stream.tables.values().next().unwrap();
    assert_eq!(table.columns["battery"], "battery_mv");
    let TableKind::Append { time_column, node_column, retention, partition } = &table.kind else {
        panic!("{:?}", table.kind)
    };
    assert_eq!((time_column.as_str(), node_column), ("arrived", &None));
    let day = Duration::from_secs(86_400);
    assert_eq!((*retention, *partition), (Some(30 * day), day));
    telemetry::mapping::RecordMapper::compile(stream).map(|_| ()).unwrap();
}
