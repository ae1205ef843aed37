//! Listeners with TLS beside the plain one.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use crate::certificates::Certificates;

/// Two further listeners: one asks for user and password (PLAIN or SCRAM-SHA-512), one for a client certificate.
#[derive(Debug, Clone)]
pub struct KafkaSecurity {
    pub certificates: Certificates,
    pub user: String,
    pub password: String,
}

impl KafkaSecurity {
    pub(super) fn add_to(
        &self,
        properties: &mut BTreeMap<String, String>,
        [login, certificate]: [u16; 2],
        folder: &Path,
    ) -> Result<()> {
        let files = self.certificates.write(folder)?;
        // A PEM key store is one file, the key first.
        let key_store = folder.join("server.pem");
        let pem =
            format!("{}{}", self.certificates.server_key, self.certificates.server_certificate);
        std::fs::write(&key_store, pem)
            .with_context(|| format!("write {}", key_store.display()))?;

        let listeners = format!(",SASL_SSL://127.0.0.1:{login},SSL://127.0.0.1:{certificate}");
        for name in ["listeners", "advertised.listeners"] {
            properties.entry(name.to_owned()).or_default().push_str(&listeners);
        }
        let map = properties.entry("listener.security.protocol.map".to_owned()).or_default();
        map.push_str(",SASL_SSL:SASL_SSL,SSL:SSL");
        const JAAS: &str = "org.apache.kafka.common.security";
        let Self { user, password, .. } = self;
        let more = [
            ("ssl.keystore.type", "PEM".to_owned()),
            ("ssl.keystore.location", key_store.display().to_string()),
            ("ssl.truststore.type", "PEM".to_owned()),
            ("ssl.truststore.location", files.authority.display().to_string()),
            ("listener.name.ssl.ssl.client.auth", "required".to_owned()),
            ("sasl.enabled.mechanisms", "PLAIN,SCRAM-SHA-512".to_owned()),
            (
                "listener.name.sasl_ssl.plain.sasl.jaas.config",
                format!("{JAAS}.plain.PlainLoginModule required user_{user}=\"{password}\";"),
            ),
            (
                "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config",
                format!("{JAAS}.scram.ScramLoginModule required;"),
            ),
        ];
        properties.extend(more.map(|(name, value)| (name.to_owned(), value)));
        Ok(())
    }

    /// As `--add-scram` of the storage tool takes it.
    pub(super) fn scram_user(&self) -> String {
        format!("SCRAM-SHA-512=[name={},password={}]", self.user, self.password)
    }
}
