//! A private PostgreSQL cluster.

mod cluster;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::Signal;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::background::{block_on, spawn};
use crate::certificates::Certificates;
use crate::daemon::Daemon;
use crate::paths::Folder;
use crate::ports::free_port;
use crate::wait::until;

/// The cluster's first role.
pub const SUPERUSER: &str = "postgres";
/// Its password; connections must give it.
pub const PASSWORD: &str = "made-up-7Q2xVt9";

const READY_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(30);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
const QUERY_WITHIN: Duration = Duration::from_secs(120);
const PORT_TRIES: usize = 3;
/// What the cluster is to be like.
#[derive(Debug, Clone, Default)]
pub struct PostgresOptions {
    /// `None` = a temporary folder. A folder that holds a cluster is used as it is.
    pub folder: Option<PathBuf>,
    /// Settings of `postgresql.conf`, which win over the rig's own.
    pub settings: Vec<(String, String)>,
    /// Speaks TLS as well, with this server certificate.
    pub tls: Option<Certificates>,
}

/// A running (or stopped) cluster.
#[derive(Debug)]
pub struct Postgres {
    daemon: Daemon,
    port: u16,
    folder: Folder,
}

impl Postgres {
    /// With the defaults.
    ///
    /// # Errors
    /// As [`Postgres::start_with`].
    pub fn start() -> Result<Self> {
        Self::start_with(PostgresOptions::default())
    }

    /// Makes a cluster (unless the folder holds one), starts it and waits until it answers a query.
    ///
    /// # Errors
    /// Names the command and the log's last lines.
    pub fn start_with(options: PostgresOptions) -> Result<Self> {
        let mut last = None;
        for _ in 0..PORT_TRIES {
            let mut server = Self::prepare(&options)?;
            match server.restart() {
                Ok(()) => return Ok(server),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("there was at least one try"))
    }

    /// Makes the cluster and chooses the port, but starts nothing: a database that is away.
    ///
    /// # Errors
    /// When the cluster cannot be made.
    pub fn prepare(options: &PostgresOptions) -> Result<Self> {
        let folder = Folder::new(options.folder.clone(), "postgres")?;
        let data = folder.join("data");
        let privileges = cluster::privileges(folder.path())?;
        if !data.join("PG_VERSION").exists() {
            cluster::make(&folder, &data)?;
        }
        let mut wanted = options.settings.clone();
        if let Some(certificates) = &options.tls {
            cluster::secure(&data, certificates)?;
            wanted.push(("ssl".to_owned(), "on".to_owned()));
        }
        let port = free_port();
        let daemon =
            Daemon::new("postgres", cluster::program("postgres")?, folder.join("postgres.log"))
                .privileges(privileges)
                .working_folder(folder.path())
                .arguments(["-D".into(), data.into_os_string()])
                .arguments(settings(port, &wanted))
                // SIGTERM would wait for every client to leave.
                .stop_signal(Signal::INT);
        Ok(Self { daemon, port, folder })
    }

    /// Starts it again, with the same port and data.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn restart(&mut self) -> Result<()> {
        // After SIGKILL the old server's shared memory can be seen for a moment: then the new one refuses to start.
        until(READY_WITHIN, "postgres started", || {
            let before = self.daemon.log_text().len();
            match self.start_once() {
                Ok(()) => Ok(Some(())),
                Err(_) if refused_for_a_moment(&self.daemon, before) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }

    fn start_once(&mut self) -> Result<()> {
        self.daemon.start()?;
        let target = self.connection_string("postgres");
        self.daemon.wait_ready(READY_WITHIN, move || {
            let target = target.clone();
            Ok(block_on(async move { simple_query(&target, "SELECT 1").await.is_ok() }))
        })
    }

    /// SIGINT ("fast shutdown": sessions are ended, data is written), and wait.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop(STOP_WITHIN).map(drop)
    }

    /// SIGKILL to every process of the server.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// SIGSTOP to every process of the server: connections stay, nothing answers.
    pub fn freeze(&self) {
        self.daemon.freeze();
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.daemon.thaw();
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    pub fn log_tail(&self, lines: usize) -> String {
        self.daemon.log_tail(lines)
    }

    /// For tokio-postgres and psql, as the superuser.
    pub fn connection_string(&self, database: &str) -> String {
        self.connection_string_as(database, SUPERUSER, PASSWORD)
    }

    pub fn connection_string_as(&self, database: &str, user: &str, password: &str) -> String {
        format!(
            "host=127.0.0.1 port={} dbname={database} user={user} password={password} connect_timeout={}",
            self.port,
            CONNECT_WITHIN.as_secs()
        )
    }

    /// Runs statements and gives the rows of all of them, every value as text.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn query(&self, database: &str, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let target = self.connection_string(database);
        let statement = sql.to_owned();
        block_on(async move {
            tokio::time::timeout(QUERY_WITHIN, simple_query(&target, &statement))
                .await
                .map_err(|_| anyhow!("no answer within {QUERY_WITHIN:?}"))?
        })
        .with_context(|| format!("in database {database}: {sql}"))
    }

    /// Runs statements.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn execute(&self, database: &str, sql: &str) -> Result<()> {
        self.query(database, sql).map(drop)
    }

    /// Runs statements in a transaction that stays open until the answer is dropped; then it is rolled back.
    ///
    /// # Errors
    /// When the server refuses or does not answer.
    pub fn hold(&self, database: &str, sql: &str) -> Result<Held> {
        let (target, statements) = (self.connection_string(database), format!("BEGIN; {sql}"));
        let client = block_on(async move {
            let begun = async {
                let (client, connection) =
                    tokio_postgres::connect(&target, NoTls).await.map_err(told)?;
                spawn(connection);
                client.batch_execute(&statements).await.map_err(told)?;
                anyhow::Ok(client)
            };
            tokio::time::timeout(QUERY_WITHIN, begun)
                .await
                .map_err(|_| anyhow!("no answer within {QUERY_WITHIN:?}"))?
        });
        client.map(Held).with_context(|| format!("in database {database}: {sql}"))
    }

    /// The first value of the first row.
    ///
    /// # Errors
    /// When there is none, or it is NULL.
    pub fn value(&self, database: &str, sql: &str) -> Result<String> {
        let rows = self.query(database, sql)?;
        let first = rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten();
        first.with_context(|| format!("no value from {sql}"))
    }

    /// Rows of a table (or of anything that can follow FROM).
    ///
    /// # Errors
    /// When the table is not there.
    pub fn count(&self, database: &str, table: &str) -> Result<u64> {
        let value = self.value(database, &format!("SELECT count(*) FROM {table}"))?;
        value.parse().with_context(|| format!("{value} is no count"))
    }

    /// # Errors
    /// When it exists already.
    pub fn create_database(&self, name: &str) -> Result<()> {
        self.execute("postgres", &format!("CREATE DATABASE {}", quoted(name, '"')))
    }

    /// A role that may log in.
    ///
    /// # Errors
    /// When it exists already.
    pub fn create_role(&self, name: &str, password: &str) -> Result<()> {
        let (name, password) = (quoted(name, '"'), quoted(password, '\''));
        self.execute("postgres", &format!("CREATE ROLE {name} LOGIN PASSWORD {password}"))
    }
}

fn quoted(text: &str, mark: char) -> String {
    format!("{mark}{}{mark}", text.replace(mark, &format!("{mark}{mark}")))
}

/// An open transaction.
pub struct Held(#[expect(dead_code, reason = "its drop ends the session")] Client);

async fn simple_query(target: &str, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
    let (client, connection) = tokio_postgres::connect(target, NoTls).await.map_err(told)?;
    let driver = spawn(connection);
    let messages = client.simple_query(sql).await.map_err(told)?;
    drop(client);
    driver.abort();
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(
            (0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect::<Vec<_>>(),
        ),
        _ => None,
    });
    Ok(rows.collect())
}

/// The library's own text is only "db error".
fn told(error: tokio_postgres::Error) -> anyhow::Error {
    match error.as_db_error() {
        Some(db) => anyhow!("{} ({})", db.message(), db.code().code()),
        None => error.into(),
    }
}

fn refused_for_a_moment(daemon: &Daemon, log_before: usize) -> bool {
    let log = daemon.log_text();
    let news = log.get(log_before..).unwrap_or_default();
    ["lock file", "shared memory block", "the database system is shutting down"]
        .iter()
        .any(|words| news.contains(words))
}

fn settings(port: u16, given: &[(String, String)]) -> Vec<String> {
    let own = [
        ("port", port.to_string()),
        ("listen_addresses", "127.0.0.1".into()),
        ("unix_socket_directories", String::new()),
        ("fsync", "on".into()),
        ("max_connections", "100".into()),
        ("log_timezone", "UTC".into()),
        // A shutdown waits so long for whoever has connected and says nothing.
        ("authentication_timeout", "10s".into()),
        ("timezone", "UTC".into()),
    ];
    let own = own.map(|(name, value)| (name.to_owned(), value));
    own.iter()
        .chain(given)
        .flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")])
        .collect()
}
