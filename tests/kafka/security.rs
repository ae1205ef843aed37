//! TLS, PLAIN and SCRAM against a real Kafka, and what an operator reads when they do not fit.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use rig::{
    CertificateFiles, Certificates, Folder, KAFKA_RIGHTS, Kafka, KafkaOptions, KafkaSecurity,
};

use crate::site::Site;

const USER: &str = "node";
const PASSWORD: &str = "a-good-password";
const WRONG: &str = "a-forgotten-password";

/// One broker for all tests of this file; each has its own topic.
struct Fortress {
    kafka: Kafka,
    files: CertificateFiles,
    folder: Folder,
}

fn fortress() -> &'static Fortress {
    static FORTRESS: OnceLock<Fortress> = OnceLock::new();
    FORTRESS.get_or_init(|| Fortress::build(&[]))
}

impl Fortress {
    fn build(properties: &[(&str, &str)]) -> Self {
        let certificates = Certificates::generate().unwrap();
        let folder = Folder::new(None, "fortress").unwrap();
        let files = certificates.write(folder.path()).unwrap();
        let security = KafkaSecurity { certificates, user: USER.into(), password: PASSWORD.into() };
        let properties = properties.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let options = KafkaOptions {
            security: Some(security),
            properties: properties.collect(),
            ..KafkaOptions::default()
        };
        Fortress { kafka: Kafka::start_with(options).unwrap(), files, folder }
    }

    fn password_file(&self, name: &str, password: &str) -> PathBuf {
        let file = self.folder.path().join(name);
        fs::write(&file, password).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        file
    }

    /// A node that logs in.
    fn login(&self, topic: &str, mechanism: &str, password: &Path, authority: &Path) -> Site {
        self.kafka.create_topic(topic, 2).unwrap();
        let cluster = format!(
            "[clusters.main.tls]\nca_file = {authority:?}\n\
             [clusters.main.sasl]\nmechanism = \"{mechanism}\"\nusername = \"{USER}\"\n\
             password_file = {password:?}\n"
        );
        Site::start(&self.kafka.login_bootstrap(), topic, &cluster, "")
    }
}

#[test]
fn records_arrive_over_tls_with_each_way_to_log_in() {
    let fortress = fortress();
    let password = fortress.password_file("password", PASSWORD);
    for mechanism in ["PLAIN", "SCRAM-SHA-512"] {
        let topic = format!("over-{mechanism}");
        let mut site = fortress.login(&topic, mechanism, &password, &fortress.files.authority);
        site.publish(200);
        site.assert_topic_is_whole(&fortress.kafka);
    }
}

#[test]
fn records_arrive_with_a_client_certificate_and_without_one_the_reason_is_told() {
    let fortress = fortress();
    let (kafka, files) = (&fortress.kafka, &fortress.files);
    kafka.create_topic("certified", 2).unwrap();
    let authority = format!("[clusters.main.tls]\nca_file = {:?}\n", files.authority);
    let own = format!(
        "{authority}certificate_file = {:?}\nkey_file = {:?}\n",
        files.client_certificate, files.client_key
    );
    let mut site = Site::start(&kafka.certificate_bootstrap(), "certified", &own, "");
    site.publish(200);
    site.assert_topic_is_whole(kafka);

    let mut site = Site::start(&kafka.certificate_bootstrap(), "certified", &authority, "");
    site.publish(10);
    site.assert_table_follows();
    site.says("held", &["[clusters.main.tls]", "certificate_file"]);
}

#[test]
fn a_wrong_password_is_told_and_once_corrected_the_backlog_flows() {
    let fortress = fortress();
    for mechanism in ["PLAIN", "SCRAM-SHA-512"] {
        let topic = format!("forgotten-{mechanism}");
        let password = fortress.password_file(&topic, WRONG);
        let mut site = fortress.login(&topic, mechanism, &password, &fortress.files.authority);
        site.publish(200);
        site.assert_table_follows();
        site.says("held", &["main", "uthentication", "password", "[clusters.main.sasl]"]);

        let (verdict, figure) = doctor(&site, "reachable");
        assert_eq!(verdict, "fail");
        assert!(figure.contains("[clusters.main.sasl]"), "{figure}");

        // The node goes on running.
        fs::write(&password, PASSWORD).unwrap();
        site.assert_topic_is_whole(&fortress.kafka);
        for check in ["reachable", "topic", "acks", "message size"] {
            let (verdict, figure) = doctor(&site, check);
            assert_eq!(verdict, "ok", "{check}: {figure}");
        }
        let log = site.world.node.log_text();
        assert!(!log.contains(WRONG) && !log.contains(PASSWORD), "{log}");
    }
}

#[test]
fn rights_revoked_hold_the_sink_and_given_back_leave_no_hole() {
    const TOPIC: &str = "guarded";
    let fortress = Fortress::build(&KAFKA_RIGHTS);
    let kafka = &fortress.kafka;
    kafka.allow(USER, TOPIC).unwrap();
    let password = fortress.password_file("password", PASSWORD);
    let mut site = fortress.login(TOPIC, "PLAIN", &password, &fortress.files.authority);
    site.publish(300);
    site.assert_topic_is_whole(kafka);
    for _ in 0..2 {
        kafka.revoke(USER, TOPIC).unwrap();
        site.publish(300);
        site.assert_table_follows();
        site.says("held", &["allow this user"]);
        let health = site.world.node.get("/health").unwrap().json().unwrap();
        assert_eq!(health["state"], "unhealthy", "{health}");
        kafka.allow(USER, TOPIC).unwrap();
        site.publish(300);
        site.assert_topic_is_whole(kafka);
    }
}

/// The user may look at a topic and write to none.
fn allow_to_look(kafka: &Kafka, topic: &str) {
    let class_path = format!("{}/*", rig::target().join("kafka/libs").display());
    let output = Command::new("java")
        .args(["-Xmx96m", "-XX:TieredStopAtLevel=1", "-cp", &class_path])
        .args(["org.apache.kafka.tools.AclCommand", "--bootstrap-server", &kafka.bootstrap()])
        .args(["--add", "--force", "--allow-principal", &format!("User:{USER}")])
        .args(["--topic", topic, "--operation", "Describe"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_right_to_write_that_was_never_given_holds_the_sink_and_once_given_all_arrives() {
    const TOPIC: &str = "looked-at";
    let fortress = Fortress::build(&KAFKA_RIGHTS);
    let kafka = &fortress.kafka;
    allow_to_look(kafka, TOPIC);
    let password = fortress.password_file("password", PASSWORD);
    let mut site = fortress.login(TOPIC, "PLAIN", &password, &fortress.files.authority);
    site.publish(300);
    site.assert_table_follows();
    let right = "allow this user to Write topic \"looked-at\"";
    site.says("held", &[right]);
    // Several tries later.
    for _ in 0..50 {
        let (state, trouble) = site.kafka_state();
        assert!(state == "held" && trouble.contains(right), "{state}: {trouble}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let (verdict, figure) = doctor(&site, "write");
    assert!(verdict == "fail" && figure.contains(right), "{verdict}: {figure}");
    kafka.allow(USER, TOPIC).unwrap();
    site.publish(300);
    site.assert_topic_is_whole(kafka);
    assert_eq!(kafka.count(TOPIC).unwrap(), site.published(), "nothing twice");
}

#[test]
fn a_listener_that_wants_tls_or_a_login_the_node_has_not_got_is_asked_about() {
    let fortress = fortress();
    fortress.kafka.create_topic("openly", 1).unwrap();
    let tls = format!("[clusters.main.tls]\nca_file = {:?}\n", fortress.files.authority);
    for (cluster, wanted) in [("", "[clusters.main.tls]?"), (&*tls, "[clusters.main.sasl]?")] {
        let mut site = Site::start(&fortress.kafka.login_bootstrap(), "openly", cluster, "");
        site.publish(10);
        site.assert_table_follows();
        site.says("waiting", &[wanted]);
        let (verdict, remedy) = doctor_says(&site, "reachable", "remedy");
        assert_eq!(verdict, "fail");
        assert!(remedy.contains(wanted), "{remedy}");
    }
}

/// Verdict and figure of what `telemetry doctor` says of the cluster.
fn doctor(site: &Site, check: &str) -> (String, String) {
    doctor_says(site, check, "figure")
}

/// The verdict and another of its words on the cluster.
fn doctor_says(site: &Site, check: &str, word: &str) -> (String, String) {
    let output = site.world.node.command(&["doctor", "--json"]).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let lines = report["findings"].as_array().unwrap();
    let of_cluster =
        |line: &&serde_json::Value| line["about"] == "kafka:main" && line["check"] == check;
    let line = lines.iter().find(of_cluster).unwrap_or_else(|| panic!("{check} in {report:#}"));
    let text = |name: &str| line[name].as_str().unwrap().to_owned();
    (text("verdict"), text(word))
}

#[test]
fn a_topic_that_is_missing_is_found_by_the_doctor() {
    let fortress = fortress();
    let site = Site::start(&fortress.kafka.bootstrap(), "never-made", "", "");
    let (verdict, figure) = doctor(&site, "topic");
    assert_eq!(verdict, "fail");
    assert!(figure.contains("never-made"), "{figure}");
}

#[test]
fn a_topic_that_is_not_as_asked_for_or_takes_less_than_the_node_sends_is_doubtful() {
    let fortress = fortress();
    let kafka = &fortress.kafka;
    kafka.create_topic("otherwise", 2).unwrap();
    let ensure = "ensure = { partitions = 3 }";
    let site =
        Site::start(&kafka.bootstrap(), "otherwise", "message_bytes_max = 2000000\n", ensure);
    for (check, words) in [("topic", "3"), ("message size", "the node sends up to 2000000")] {
        let (verdict, figure) = doctor(&site, check);
        assert_eq!(verdict, "warn", "{check}: {figure}");
        assert!(figure.contains("otherwise") && figure.contains(words), "{check}: {figure}");
    }
}

#[test]
fn a_foreign_authority_is_told_and_the_right_one_taken_up() {
    let fortress = fortress();
    let password = fortress.password_file("password-of-all", PASSWORD);
    let foreign = fortress.folder.path().join("foreign");
    let foreign = Certificates::generate().unwrap().write(&foreign).unwrap();
    let mut site = fortress.login("foreign", "PLAIN", &password, &foreign.authority);
    site.publish(10);
    site.assert_table_follows();
    site.says("held", &["certificate verify failed", "ca_file", "[clusters.main.tls]"]);
    fs::copy(&fortress.files.authority, &foreign.authority).unwrap();
    site.assert_topic_is_whole(&fortress.kafka);
}
