//! The machine, the servers around it, and what is asked of both again and again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rig::{
    Container, Disk, FileSystem, Folder, Homelab, Kafka, Mosquitto, MosquittoOptions, PASSWORD,
    Postgres, Scene, Streams, get, until,
};
use toml_edit::value;

use crate::load::Load;

/// Where the node listens: the network is ours, so the default is free.
pub const HTTP_PORT: u16 = 9464;
/// Longest wait for something that normally takes a second or two.
pub const SOON: Duration = Duration::from_secs(30);
/// For the backlog of a step.
pub const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(60);
/// `drain_timeout_seconds` of this node: shorter than the default, so that a stop during an outage is.
pub const DRAIN: Duration = Duration::from_secs(6);
pub const MQTT_USER: &str = "node";
pub const MQTT_PASSWORD: &str = "made-up-4Jh8sW1";
/// Where the machine has the disk that may stand still.
pub const DISK: &str = "/srv/disk";
pub const DATABASES: [&str; 2] = ["telemetry", "homelab_settings"];
const STORY_LINES: &str = "40";

pub struct World {
    // Dropped in this order: the load before its broker, the machine before the servers.
    pub load: Option<Load>,
    pub machine: Container,
    pub mosquitto: Mosquitto,
    pub postgres: Postgres,
    pub kafka: Kafka,
    /// Another file system, which may stand still: [`DISK`] on the machine.
    pub disk: Disk,
    /// Their folder here, and their file names, which are below /packages on the machine.
    pub packages: PathBuf,
    pub package: String,
    pub newer: String,
    folder: Folder,
}

impl World {
    /// Servers up, the machine booted, nothing installed.
    pub fn begin(package: &Path, newer: &Path) -> Result<Self> {
        let folder = Folder::new(None, "service")?;
        let kafka = Kafka::start()?;
        let mosquitto = Mosquitto::start_with(MosquittoOptions {
            users: vec![(MQTT_USER.into(), MQTT_PASSWORD.into())],
            max_inflight_messages: 1_000,
            // It is never killed here.
            autosave_on_changes: false,
            ..MosquittoOptions::default()
        })?;
        let postgres = Postgres::start()?;
        for database in DATABASES {
            postgres.create_database(database)?;
        }
        let packages =
            package.canonicalize().with_context(|| format!("find {}", package.display()))?;
        let packages = packages.parent().context("the packages' folder")?.to_owned();
        let disk =
            Disk::open(&folder.join("disk"), FileSystem::Ext4).context("a disk of its own")?;
        let bind = format!("--bind={}:{DISK}", disk.mount_point().display());
        let machine = Container::boot_with(
            "telemetry-service-test",
            &folder.join("machine.log"),
            &[(&packages, "/packages")],
            &[&bind],
        )?;
        let (package, newer) = (file_name(package)?, file_name(newer)?);
        Ok(World {
            load: None,
            machine,
            mosquitto,
            postgres,
            kafka,
            disk,
            packages,
            package,
            newer,
            folder,
        })
    }

    /// The example's five streams between the servers, with every secret as a credential.
    pub fn homelab(&self) -> Result<Homelab> {
        let mut homelab = Homelab::load()?;
        homelab.node(Path::new("/var/lib/telemetry"), HTTP_PORT);
        homelab.set(&["node", "drain_timeout_seconds"], DRAIN.as_secs() as i64);
        homelab.broker(self.mosquitto.port());
        homelab.each("brokers", |broker| {
            broker.insert("username", value(MQTT_USER));
            broker.insert("password_credential", value("mqtt"));
        });
        homelab.cluster(&self.kafka.bootstrap());
        homelab.databases(self.postgres.port(), self.folder.path())?;
        homelab.each("databases", |database| {
            database.remove("password_file");
            database.insert("password_credential", value("database"));
        });
        for database in DATABASES {
            let migrations = format!("/usr/share/telemetry/migrations/{database}");
            homelab.set(&["databases", database, "migrations_dir"], migrations);
        }
        Ok(homelab)
    }

    /// Puts a configuration onto the machine.
    pub fn configure(&self, homelab: &Homelab, path: &str) -> Result<()> {
        let file = self.folder.join("telemetry.toml");
        homelab.write(&file)?;
        let text = std::fs::read_to_string(&file).context("read the configuration back")?;
        self.machine.write(path, &text)
    }

    /// Puts the secrets where systemd hands them over from.
    pub fn give_secrets(&self, unit: &str) -> Result<()> {
        let secrets = [("mqtt", MQTT_PASSWORD), ("database", PASSWORD)];
        let mut drop_in = String::from("[Service]\n");
        for (name, secret) in secrets {
            let file = format!("/etc/telemetry/credentials/{name}");
            self.machine.write_with_mode(&file, secret, "0600")?;
            drop_in.push_str(&format!("LoadCredential={name}:{file}\n"));
        }
        self.machine.write(&format!("/etc/systemd/system/{unit}.d/credentials.conf"), &drop_in)?;
        self.machine.run(&["systemctl", "daemon-reload"]).map(drop)
    }

    /// A property of the unit, as `systemctl show` has it.
    pub fn property(&self, name: &str) -> Result<String> {
        self.machine.run(&["systemctl", "show", "telemetry", "--property", name, "--value"])
    }

    /// A unit's main process, as it is numbered outside the machine.
    pub fn main_process(&self, unit: &str) -> Result<u32> {
        let inside = self.machine.run(&["systemctl", "show", unit, "-P", "MainPID"])?;
        self.machine.outside(inside.parse().with_context(|| format!("MainPID={inside}"))?)
    }

    /// A file of the test's own, outside the machine.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn count(&self, name: &str) -> Result<u64> {
        let text = self.property(name)?;
        text.parse().with_context(|| format!("{name}={text}"))
    }

    pub fn expect(&self, name: &str, wanted: &str) -> Result<()> {
        let found = self.property(name)?;
        if found != wanted {
            bail!("{name}={found}, not {wanted}");
        }
        Ok(())
    }

    /// Waits until the node is ready with all its streams; gives how long that took.
    pub fn wait_ready(&self, within: Duration) -> Result<Duration> {
        let began = Instant::now();
        until(within, "ready, with every stream subscribed", || {
            let ready = get(HTTP_PORT, "/health/ready").is_ok_and(|answer| answer.status == 200);
            let subscribed = self.streams().is_ok_and(|streams| streams.all_subscribed());
            Ok((ready && subscribed).then(|| began.elapsed()))
        })
    }

    pub fn streams(&self) -> Result<Streams> {
        let answer = get(HTTP_PORT, "/streams")?;
        serde_json::from_str(&answer.body).with_context(|| format!("/streams: {}", answer.body))
    }

    /// Waits until every sink has passed all that was published.
    pub fn wait_drained(&self, within: Duration) -> Result<()> {
        until(within, "every sink has passed every record", || {
            let streams = self.streams().unwrap_or_default();
            let drained = !streams.streams.is_empty()
                && streams.streams.iter().all(|stream| stream.is_drained());
            Ok(drained.then_some(()))
        })
    }

    pub fn load(&self) -> Result<&Load> {
        self.load.as_ref().context("the load has not begun")
    }
}

impl Scene for World {
    fn story(&self) -> String {
        let ask = |words: &[&str]| match self.machine.output(words) {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => format!("{error:#}"),
        };
        let state = ask(&["systemctl", "status", "telemetry", "--no-pager", "--lines=0"]);
        let lines = ask(&["journalctl", "--no-pager", "--lines", STORY_LINES]);
        format!("--- the unit ---\n{state}--- the journal ---\n{lines}---")
    }
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().with_context(|| format!("{} is no file", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}
