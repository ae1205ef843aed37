//! A private Mosquitto.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::certificates::Certificates;
use crate::daemon::Daemon;
use crate::paths::Folder;
use crate::ports::free_port;

const READY_WITHIN: Duration = Duration::from_secs(10);
const STOP_WITHIN: Duration = Duration::from_secs(20);
/// Another process may take a free port between our look and the server's bind.
const PORT_TRIES: usize = 3;

/// What the broker is to be like.
#[derive(Debug, Clone)]
pub struct MosquittoOptions {
    /// `None` = a temporary folder.
    pub folder: Option<PathBuf>,
    /// Server certificate and authority; `None` = plain TCP.
    pub tls: Option<Certificates>,
    /// Demand a client certificate of the same authority.
    pub client_certificates: bool,
    /// User and password; empty = anyone.
    pub users: Vec<(String, String)>,
    /// Lines of an access control file.
    pub acl: Option<String>,
    /// Messages held for one absent client.
    pub max_queued_messages: u32,
    /// Messages to one client that are not acknowledged yet.
    pub max_inflight_messages: u32,
    /// Save after every change: what was acknowledged to a publisher survives `kill -9`. Slow with a large queue.
    pub autosave_on_changes: bool,
    /// Further lines of the configuration.
    pub extra: String,
}

impl Default for MosquittoOptions {
    fn default() -> Self {
        Self {
            folder: None,
            tls: None,
            client_certificates: false,
            users: Vec::new(),
            acl: None,
            max_queued_messages: 1_000_000,
            max_inflight_messages: 100,
            autosave_on_changes: true,
            extra: String::new(),
        }
    }
}

/// A running (or stopped) broker.
#[derive(Debug)]
pub struct Mosquitto {
    daemon: Daemon,
    port: u16,
    folder: Folder,
}

impl Mosquitto {
    /// With the defaults.
    ///
    /// # Errors
    /// As [`Mosquitto::start_with`].
    pub fn start() -> Result<Self> {
        Self::start_with(MosquittoOptions::default())
    }

    /// Starts a broker and waits until it listens.
    ///
    /// # Errors
    /// Names the command and the log's last lines.
    pub fn start_with(options: MosquittoOptions) -> Result<Self> {
        let mut last = None;
        for _ in 0..PORT_TRIES {
            let mut broker = Self::prepare(&options)?;
            match broker.restart() {
                Ok(()) => return Ok(broker),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("there was at least one try"))
    }

    /// Writes the configuration and chooses the port, but starts nothing: a broker that is away.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn prepare(options: &MosquittoOptions) -> Result<Self> {
        let folder = Folder::new(options.folder.clone(), "mosquitto")?;
        let port = free_port();
        std::fs::create_dir_all(folder.join("data")).context("create the broker's data folder")?;
        let file = folder.join("mosquitto.conf");
        std::fs::write(&file, configuration(options, port, &folder)?)
            .with_context(|| format!("write {}", file.display()))?;
        let daemon = Daemon::new("mosquitto", program(), folder.join("mosquitto.log"))
            .argument("-c")
            .argument(file);
        Ok(Self { daemon, port, folder })
    }

    /// Starts it again, with the same port and data.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.start()?;
        let port = self.port;
        self.daemon.wait_ready(READY_WITHIN, || {
            Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())
        })
    }

    /// SIGTERM, and wait.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop(STOP_WITHIN).map(drop)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// SIGSTOP: it keeps its connections and says nothing.
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
}

/// Debian keeps the broker where an ordinary user's search path does not look.
fn program() -> PathBuf {
    let usual = Path::new("/usr/sbin/mosquitto");
    if usual.exists() { usual.to_path_buf() } else { PathBuf::from("mosquitto") }
}

fn configuration(options: &MosquittoOptions, port: u16, folder: &Folder) -> Result<String> {
    let path = folder.path().display();
    let mut text = format!(
        "listener {port} 127.0.0.1\n\
         persistence true\n\
         persistence_location {path}/data/\n\
         autosave_interval 1\n\
         autosave_on_changes {}\n\
         max_queued_messages {}\n\
         max_queued_bytes 0\n\
         max_inflight_messages {}\n\
         set_tcp_nodelay true\n\
         log_dest stderr\n\
         allow_anonymous {}\n",
        options.autosave_on_changes,
        options.max_queued_messages,
        options.max_inflight_messages,
        options.users.is_empty(),
    );
    if !options.autosave_on_changes {
        text = text.replace("autosave_interval 1\n", "autosave_interval 1800\n");
    }
    if rustix::process::geteuid().is_root() {
        text.push_str("user root\n");
    }
    if let Some(tls) = &options.tls {
        let files = tls.write(&folder.join("tls"))?;
        write!(
            text,
            "cafile {}\ncertfile {}\nkeyfile {}\ntls_version tlsv1.2\nrequire_certificate {}\n",
            files.authority.display(),
            files.server_certificate.display(),
            files.server_key.display(),
            options.client_certificates,
        )?;
    }
    if !options.users.is_empty() {
        let passwords = folder.join("passwords");
        write_passwords(&passwords, &options.users)?;
        writeln!(text, "password_file {}", passwords.display())?;
    }
    if let Some(acl) = &options.acl {
        let file = folder.join("acl");
        std::fs::write(&file, acl).with_context(|| format!("write {}", file.display()))?;
        writeln!(text, "acl_file {}", file.display())?;
    }
    text.push_str(&options.extra);
    text.push('\n');
    Ok(text)
}

fn write_passwords(file: &Path, users: &[(String, String)]) -> Result<()> {
    std::fs::write(file, "").with_context(|| format!("write {}", file.display()))?;
    for (user, password) in users {
        let output = std::process::Command::new("mosquitto_passwd")
            .arg("-b")
            .arg(file)
            .args([user, password])
            .output()
            .context("run mosquitto_passwd")?;
        if !output.status.success() {
            bail!("mosquitto_passwd: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}
