//! A private PostgreSQL cluster.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use crate::background::{block_on, spawn};
use crate::daemon::Daemon;
use crate::paths::Folder;
use crate::ports::free_port;
use crate::wait::until;

/// The cluster's first role.
pub const SUPERUSER: &str = "postgres";
/// Its password; connections must give it.
pub const PASSWORD: &str = "rig";

const READY_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(30);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
const QUERY_WITHIN: Duration = Duration::from_secs(120);
const PORT_TRIES: usize = 3;
/// Who runs the server when we are root, which PostgreSQL refuses to be.
const SYSTEM_USERS: [&str; 2] = ["postgres", "nobody"];

/// What the cluster is to be like.
#[derive(Debug, Clone, Default)]
pub struct PostgresOptions {
    /// `None` = a temporary folder. A folder that holds a cluster is used as it is.
    pub folder: Option<PathBuf>,
    /// Settings of `postgresql.conf`, which win over the rig's own.
    pub settings: Vec<(String, String)>,
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
        let privileges = privileges(folder.path())?;
        if !data.join("PG_VERSION").exists() {
            initialise(&folder, &data, &privileges)?;
        }
        let port = free_port();
        let daemon = Daemon::new("postgres", program("postgres")?, folder.join("postgres.log"))
            .privileges(privileges)
            .working_folder(folder.path())
            .arguments(["-D".into(), data.into_os_string()])
            .arguments(settings(port, &options.settings))
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
        ("timezone", "UTC".into()),
    ];
    let own = own.map(|(name, value)| (name.to_owned(), value));
    own.iter()
        .chain(given)
        .flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")])
        .collect()
}

fn initialise(folder: &Folder, data: &Path, privileges: &[String]) -> Result<()> {
    let password = folder.join("superuser-password");
    std::fs::write(&password, format!("{PASSWORD}\n")).context("write the password file")?;
    if let Some((user, group)) = server_user()? {
        for path in [folder.path(), &password] {
            chown(path, Some(user), Some(group))
                .with_context(|| format!("give {} to the server's user", path.display()))?;
        }
    }
    let mut command = Command::new("setpriv");
    command
        .args(privileges)
        .arg("--")
        .arg(program("initdb")?)
        .arg("-D")
        .arg(data)
        .args(["-U", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"])
        // A half-made cluster is made again, so nothing need be durable yet.
        .args(["--no-sync", "--no-instructions"])
        .arg(format!("--pwfile={}", password.display()))
        .current_dir(folder.path())
        .stdin(Stdio::null());
    let output = command.output().context("run initdb")?;
    if !output.status.success() {
        bail!(
            "{command:?} failed:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Debian keeps the server out of the search path, one folder per version; the newest wins.
fn program(name: &str) -> Result<PathBuf> {
    let mut folders: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .collect();
    folders.sort();
    let asked = Command::new("pg_config").arg("--bindir").output().ok();
    let asked = asked.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let newest = folders.into_iter().rev().map(|(_, folder)| folder);
    newest
        .chain(asked.map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("{name} not found in /usr/lib/postgresql/*/bin nor by pg_config --bindir")
        })
}

/// User and group the server runs as: `None` = as we do.
fn server_user() -> Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let users = std::fs::read_to_string("/etc/passwd").context("read /etc/passwd")?;
    let find = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut numbers = line.split(':').skip(2);
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    let found = SYSTEM_USERS.iter().find_map(|name| find(name));
    Ok(Some(found.context("run as root, but there is no user for the server to be")?))
}

/// Options of `setpriv` that give up root, but keep the way into the folder when only root may walk it.
fn privileges(folder: &Path) -> Result<Vec<String>> {
    let Some((user, group)) = server_user()? else { return Ok(Vec::new()) };
    let mut options =
        vec![format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()];
    let folder = folder.canonicalize().context("find the server's folder")?;
    let closed = folder.ancestors().skip(1).any(|above| {
        above
            .metadata()
            .is_ok_and(|about| about.uid() != user && about.permissions().mode() & 0o001 == 0)
    });
    if closed {
        options
            .extend(["--inh-caps=+dac_override", "--ambient-caps=+dac_override"].map(Into::into));
    }
    Ok(options)
}
