//! What an administrator of the broker does while it runs.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, ensure};
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};

use super::{Kafka, class_path, config};
use crate::background::block_on;

/// Lines of `server.properties`: every user needs rights but those of the plain listener, who may do everything.
pub const KAFKA_RIGHTS: [(&str, &str); 2] = [
    ("authorizer.class.name", "org.apache.kafka.metadata.authorizer.StandardAuthorizer"),
    ("super.users", "User:ANONYMOUS"),
];
const ACLS: &str = "org.apache.kafka.tools.AclCommand";

impl Kafka {
    /// A topic's settings become these alone.
    ///
    /// # Errors
    /// When there is no such topic or the broker does not answer.
    pub fn set_topic(&self, topic: &str, settings: &[(&str, &str)]) -> Result<()> {
        let bootstrap = self.bootstrap();
        let topic = topic.to_owned();
        let settings: Vec<(String, String)> =
            settings.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        block_on(async move {
            let admin: AdminClient<_> = config(&bootstrap).create().context("make a client")?;
            let order = settings.iter().fold(
                AlterConfig::new(ResourceSpecifier::Topic(&topic)),
                |order, (name, value)| order.set(name, value),
            );
            for answer in admin.alter_configs([&order], &AdminOptions::new()).await? {
                answer.map_err(|(_, code)| anyhow!("change topic {topic}: {code}"))?;
            }
            Ok(())
        })
    }

    /// A user may write to a topic. Only with [`KAFKA_RIGHTS`].
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn allow(&self, user: &str, topic: &str) -> Result<()> {
        self.change_rights("--add", user, topic)
    }

    /// The user may not any more.
    ///
    /// # Errors
    /// As [`Kafka::allow`].
    pub fn revoke(&self, user: &str, topic: &str) -> Result<()> {
        self.change_rights("--remove", user, topic)
    }

    fn change_rights(&self, how: &str, user: &str, topic: &str) -> Result<()> {
        let user = format!("User:{user}");
        let words = [how, "--force", "--allow-principal", &user, "--topic", topic];
        let rights = ["--operation", "Write", "--operation", "Describe"];
        run(ACLS, &self.bootstrap(), &[&words[..], &rights].concat())
    }
}

/// One of Kafka's own programs.
pub(super) fn run(class: &str, bootstrap: &str, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("java");
    command
        .args(["-Xmx96m", "-XX:TieredStopAtLevel=1", "-cp", &class_path()?, class])
        .args(["--bootstrap-server", bootstrap])
        .args(arguments)
        .stdin(Stdio::null());
    let output = command.output().context("run java (Debian: default-jre-headless)")?;
    ensure!(
        output.status.success(),
        "{command:?} failed:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
