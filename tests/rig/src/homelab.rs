//! The example configuration of the homelab, bent towards the rig's private servers: places change, streams and
//! mappings stay as a user has them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use toml_edit::{Array, DocumentMut, Item, Table, TableLike, Value, value};

use crate::paths::repository;
use crate::postgres::{PASSWORD, SUPERUSER};

const EXAMPLE: &str = "examples/homelab/telemetry.toml";
/// How to log in is replaced as a whole.
const CREDENTIALS: [&str; 6] =
    ["tls", "sasl", "username", "password_file", "password_credential", "password_env"];

/// An editable configuration.
#[derive(Debug, Clone)]
pub struct Homelab {
    document: DocumentMut,
}

/// Where a stream writes rows, by the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSink {
    pub sink: String,
    /// The database's name on its server.
    pub dbname: String,
    pub table: String,
}

impl Homelab {
    /// Reads the example.
    ///
    /// # Errors
    /// When it is not there or is no TOML.
    pub fn load() -> Result<Self> {
        let file = repository().join(EXAMPLE);
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let mut homelab = Self { document: text.parse().context("parse the example")? };
        homelab.absolute_migrations(file.parent().unwrap_or(Path::new("/")));
        Ok(homelab)
    }

    /// Reads a configuration that was written before, to change it.
    ///
    /// # Errors
    /// When it is not there or is no TOML.
    pub fn open(file: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        Ok(Self { document: text.parse().context("parse the configuration")? })
    }

    /// The configuration moves to another folder, so its relative paths must not be relative any more.
    fn absolute_migrations(&mut self, folder: &Path) {
        self.each("databases", |database| {
            let given = database.get("migrations_dir").and_then(Item::as_str).map(PathBuf::from);
            if let Some(path) = given {
                let path = folder.join(path).canonicalize().unwrap_or_else(|_| folder.to_owned());
                database.insert("migrations_dir", value(path.display().to_string()));
            }
        });
    }

    /// Sets one value; tables on the way are made.
    ///
    /// # Panics
    /// When something on the way is not a table.
    pub fn set(&mut self, path: &[&str], new: impl Into<Value>) {
        let (last, way) = path.split_last().expect("a path has an end");
        let mut table: &mut dyn TableLike = self.document.as_table_mut();
        for name in way {
            table = table
                .entry(name)
                .or_insert_with(|| Item::Table(Table::new()))
                .as_table_like_mut()
                .expect("the way leads through tables");
        }
        table.insert(last, value(new));
    }

    /// Changes every `[section.<name>]`.
    pub fn each(&mut self, section: &str, mut change: impl FnMut(&mut dyn TableLike)) {
        let Some(section) = self.document.get_mut(section).and_then(Item::as_table_like_mut) else {
            return;
        };
        for (_, item) in section.iter_mut() {
            if let Some(table) = item.as_table_like_mut() {
                change(table);
            }
        }
    }

    /// Names of `[section.<name>]`.
    pub fn names(&self, section: &str) -> Vec<String> {
        let section = self.document.get(section).and_then(Item::as_table_like);
        section
            .into_iter()
            .flat_map(|table| table.iter().map(|(name, _)| name.to_owned()))
            .collect()
    }

    /// A text at a path.
    pub fn text(&self, path: &[&str]) -> Option<&str> {
        let mut item = self.document.as_item();
        for name in path {
            item = item.get(name)?;
        }
        item.as_str()
    }

    pub fn node(&mut self, state_dir: &Path, http_port: u16) {
        self.set(&["node", "state_dir"], state_dir.display().to_string());
        self.set(&["http", "listen"], format!("127.0.0.1:{http_port}"));
    }

    /// All streams from this broker.
    pub fn broker(&mut self, port: u16) {
        self.each("brokers", |broker| {
            forget(broker, &CREDENTIALS);
            broker.insert("host", value("127.0.0.1"));
            broker.insert("port", value(i64::from(port)));
        });
    }

    /// All records to this cluster: `host:port`, or several by commas.
    pub fn cluster(&mut self, bootstrap: &str) {
        self.each("clusters", |cluster| {
            forget(cluster, &CREDENTIALS);
            cluster.insert("bootstrap_servers", value(Array::from_iter(bootstrap.split(','))));
        });
    }

    /// No records at all.
    pub fn without_kafka(&mut self) {
        self.document.remove("clusters");
        self.each("streams", |stream| forget(stream, &["kafka"]));
    }

    /// All rows to databases of this server, as its superuser, whose password is written to a file of this folder.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn databases(&mut self, port: u16, folder: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let file = folder.join("database-password");
        std::fs::write(&file, PASSWORD).with_context(|| format!("write {}", file.display()))?;
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600))
            .with_context(|| format!("protect {}", file.display()))?;
        self.each("databases", |database| {
            forget(database, &CREDENTIALS);
            database.insert("host", value("127.0.0.1"));
            database.insert("port", value(i64::from(port)));
            database.insert("user", value(SUPERUSER));
            database.insert("password_file", value(file.display().to_string()));
            database.insert("tls_mode", value("off"));
        });
        Ok(())
    }

    /// The databases' names on their server, each once.
    pub fn dbnames(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .names("databases")
            .iter()
            .filter_map(|key| self.text(&["databases", key, "dbname"]).map(str::to_owned))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Where a stream's rows go.
    ///
    /// # Errors
    /// When a table names a database that is not there.
    pub fn tables(&self, stream: &str) -> Result<Vec<TableSink>> {
        let tables = self.document.get("streams").and_then(|all| all.get(stream)?.get("tables"));
        let tables = tables.and_then(Item::as_table_like);
        let names = tables.into_iter().flat_map(|all| all.iter().map(|(name, _)| name.to_owned()));
        names
            .map(|sink| {
                let path = ["streams", stream, "tables", &sink];
                let at = |name| self.text(&[path[0], path[1], path[2], path[3], name]);
                let database = at("database").unwrap_or_default();
                let Some(dbname) = self.text(&["databases", database, "dbname"]) else {
                    bail!("{stream}: table {sink} has no database");
                };
                let table = at("table").unwrap_or(&sink).to_owned();
                Ok(TableSink { dbname: dbname.to_owned(), table, sink: sink.clone() })
            })
            .collect()
    }

    /// The names of a stream's fields in their order, and whether each is a tag.
    pub fn fields(&self, stream: &str) -> Vec<(String, bool)> {
        let fields = self.document.get("streams").and_then(|all| all.get(stream)?.get("fields"));
        let fields = fields.and_then(Item::as_table_like);
        let is_tag = |item: &Item| item.get("tag").and_then(Item::as_bool).unwrap_or_default();
        let fields = fields.into_iter().flat_map(|all| all.iter());
        fields.map(|(name, item)| (name.to_owned(), is_tag(item))).collect()
    }

    /// A stream's Kafka topic.
    pub fn topic(&self, stream: &str) -> Option<&str> {
        self.text(&["streams", stream, "kafka", "topic"])
    }

    /// Leaves one stream alone, and of what it does not use nothing.
    ///
    /// # Errors
    /// When there is no such stream.
    pub fn keep_stream(&mut self, keep: &str) -> Result<()> {
        if !self.names("streams").iter().any(|name| name == keep) {
            bail!("the example has no stream {keep}");
        }
        let used: Vec<String> = self
            .tables(keep)?
            .iter()
            .filter_map(|table| {
                self.text(&["streams", keep, "tables", &table.sink, "database"]).map(str::to_owned)
            })
            .collect();
        self.retain("streams", |name| name == keep);
        self.retain("databases", |name| used.iter().any(|one| one == name));
        Ok(())
    }

    fn retain(&mut self, section: &str, keep: impl Fn(&str) -> bool) {
        for name in self.names(section) {
            if !keep(&name)
                && let Some(table) =
                    self.document.get_mut(section).and_then(Item::as_table_like_mut)
            {
                table.remove(&name);
            }
        }
    }

    /// Removes a value or a table.
    pub fn remove(&mut self, path: &[&str]) {
        let Some((last, way)) = path.split_last() else { return };
        let mut item = self.document.as_item_mut();
        for name in way {
            match item.get_mut(name) {
                Some(next) => item = next,
                None => return,
            }
        }
        if let Some(table) = item.as_table_like_mut() {
            table.remove(last);
        }
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        std::fs::write(file, self.document.to_string())
            .with_context(|| format!("write {}", file.display()))
    }
}

fn forget(table: &mut dyn TableLike, names: &[&str]) {
    for name in names {
        table.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
[brokers.home]
host = "broker.lan"
username = "x"
password_file = "secret"
[brokers.home.tls]
ca_file = "ca.pem"
[databases.readings]
host = "db.lan"
dbname = "telemetry"
[databases.settings]
host = "db.lan"
dbname = "homelab_settings"
[streams.a.fields]
power = { path = "w", type = "int4" }
device = { path = "id", type = "text", tag = true }
[streams.a.kafka]
topic = "topic-a"
[streams.a.tables.things]
database = "readings"
[streams.b.tables.latest]
database = "settings"
table = "others"
"#;

    fn homelab() -> Homelab {
        Homelab { document: TEXT.parse().unwrap() }
    }

    #[test]
    fn a_broker_moves_and_forgets_its_credentials() {
        let mut homelab = homelab();
        homelab.broker(1234);
        assert_eq!(homelab.text(&["brokers", "home", "host"]), Some("127.0.0.1"));
        assert_eq!(homelab.text(&["brokers", "home", "username"]), None);
        assert!(!homelab.document.to_string().contains("ca.pem"));
    }

    #[test]
    fn a_table_is_found_with_its_database() {
        let found = homelab().tables("b").unwrap();
        let expected = TableSink {
            sink: "latest".into(),
            dbname: "homelab_settings".into(),
            table: "others".into(),
        };
        assert_eq!(found, [expected]);
        assert_eq!(homelab().dbnames(), ["homelab_settings", "telemetry"]);
    }

    #[test]
    fn fields_come_in_the_order_of_the_configuration() {
        let expected = [("power".to_owned(), false), ("device".to_owned(), true)];
        assert_eq!(homelab().fields("a"), expected);
        assert!(homelab().fields("b").is_empty());
    }

    #[test]
    fn one_stream_keeps_only_what_it_uses() {
        let mut homelab = homelab();
        homelab.keep_stream("a").unwrap();
        assert_eq!(homelab.names("streams"), ["a"]);
        assert_eq!(homelab.names("databases"), ["readings"]);
        assert_eq!(homelab.topic("a"), Some("topic-a"));
        homelab.without_kafka();
        assert_eq!(homelab.topic("a"), None);
    }
}
