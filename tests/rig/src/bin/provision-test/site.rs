//! The machine, the inventory that describes it, and runs of the playbooks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rig::{Container, Folder, Scene, get, repository, succeeded, until};

use crate::archive;

pub const HOST: &str = "node1";
/// Where the node listens: the network is ours, so the default is free.
const HTTP_PORT: u16 = 9464;
pub const SOON: Duration = Duration::from_secs(30);
/// No run takes longer; issue of a hang, not of a slow machine.
const PLAY_WITHIN: &str = "600";

/// What each name in the vault is called in the inventory's own templates.
const SECRETS: [&str; 5] = [
    "vault_mqtt_node_password",
    "vault_mqtt_devices_password",
    "vault_database_migrator_password",
    "vault_database_writer_password",
    "vault_database_reader_password",
];

pub struct Site {
    pub machine: Container,
    folder: Folder,
    inventory: PathBuf,
    pub package: PathBuf,
    pub newer: PathBuf,
    /// Counts the sets of passwords.
    generation: u32,
}

impl Site {
    /// The machine booted, with nothing but ssh; the example inventory with its address in it.
    pub fn begin(package: &Path, newer: &Path) -> Result<Self> {
        let folder = Folder::new(None, "provision")?;
        let key = folder.join("key");
        succeeded(
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key),
        )?;
        let machine = Container::boot_with(
            "telemetry-provision-test",
            &folder.join("machine.log"),
            &[(&archive::folder(), "/srv/packages")],
            // For the firewall; the network is the machine's own anyway.
            &["--capability=CAP_NET_ADMIN"],
        )?;
        let public = std::fs::read_to_string(folder.join("key.pub")).context("read the key")?;
        machine.write_with_mode("/root/.ssh/authorized_keys", &public, "0600")?;
        machine.write("/etc/apt/sources.list", "deb [trusted=yes] file:/srv/packages ./\n")?;
        machine.shell(
            "apt-get purge --quiet --yes python3-apt >/dev/null; rm -rf /var/lib/apt/lists/*; \
             systemctl start ssh",
        )?;
        let absolute =
            |path: &Path| path.canonicalize().with_context(|| format!("find {}", path.display()));
        let (package, newer) = (absolute(package)?, absolute(newer)?);
        let inventory = folder.join("inventory");
        let mut site = Site { machine, folder, inventory, package, newer, generation: 0 };
        site.write_inventory()?;
        Ok(site)
    }

    fn write_inventory(&mut self) -> Result<()> {
        let example = repository().join("ansible/inventory/example");
        succeeded(Command::new("cp").arg("--recursive").arg(example).arg(&self.inventory))?;
        let key = self.folder.join("key");
        let connection = format!(
            "    ansible_host: 127.0.0.1\n    ansible_ssh_private_key_file: {}\n    \
             ansible_ssh_common_args: -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null\n",
            key.display()
        );
        let groups = |nodes: &str| {
            format!(
                "---\nall:\n  vars:\n{connection}nodes:\n  hosts: {{{nodes}}}\n\
                 brokers:\n  hosts: {{{HOST}: }}\ndatabases:\n  hosts: {{{HOST}: }}\n"
            )
        };
        // One host in all groups.
        self.write("hosts.yml", &groups(&format!("{HOST}: ")))?;
        // The same machine once more, as the one that comes after it.
        self.write("rolling.yml", &groups(&format!("{HOST}: , node2: ")))?;
        std::fs::copy(&self.package, self.inventory.join("telemetry.deb"))
            .context("copy the package")?;
        self.renew_passwords()
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let file = self.inventory.join(name);
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))
    }

    /// Changes a file of the inventory.
    pub fn edit(&self, name: &str, from: &str, to: &str) -> Result<()> {
        let file = self.inventory.join(name);
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        if !text.contains(from) {
            bail!("no {from:?} in {}", file.display());
        }
        self.write(name, &text.replacen(from, to, 1))
    }

    /// Every secret of the vault becomes another one.
    pub fn renew_passwords(&mut self) -> Result<()> {
        self.generation += 1;
        let line = |name: &&str| format!("{name}: {}\n", self.password(name));
        let vault: String = SECRETS.iter().map(line).collect();
        self.write("group_vars/all/vault.yml", &format!("---\n{vault}"))
    }

    /// One of the vault's secrets.
    pub fn password(&self, name: &str) -> String {
        format!("planted-{}-{}", self.generation, name.replace('_', "-"))
    }

    /// Runs a playbook over ssh.
    pub fn play(&self, words: &[&str]) -> Result<Run> {
        self.play_on("hosts.yml", words)
    }

    /// The same with another file of hosts.
    pub fn play_on(&self, hosts: &str, words: &[&str]) -> Result<Run> {
        let began = Instant::now();
        let output = Command::new("timeout")
            .args([PLAY_WITHIN, "ansible-playbook", "-i"])
            .arg(self.inventory.join(hosts))
            .args(words)
            .current_dir(repository().join("ansible"))
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", self.folder.path())
            .env("ANSIBLE_NOCOLOR", "1")
            .stdin(Stdio::null())
            .output()
            .context("run ansible-playbook (Debian: ansible-core)")?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        // Whatever a run prints, it prints no secret.
        for name in SECRETS {
            if text.contains(&self.password(name)) {
                bail!("{name} is in what the run printed:\n{text}");
            }
        }
        Ok(Run { text, succeeded: output.status.success(), took: began.elapsed() })
    }

    /// Waits until the node answers that it is ready.
    pub fn wait_ready(&self) -> Result<()> {
        until(SOON, "the node is ready", || {
            let ready = get(HTTP_PORT, "/health/ready").is_ok_and(|answer| answer.status == 200);
            Ok(ready.then_some(()))
        })
    }

    /// Publishes so many messages as a device does, and returns when the broker has acknowledged all.
    pub fn publish(&self, count: u32) -> Result<()> {
        let password = self.password("vault_mqtt_devices_password");
        let script = format!(
            "seq {count} | sed 's/.*/{{\"temperature_c\": &}}/' | mosquitto_pub -h 127.0.0.1 -p 8883 \
             --cafile /etc/telemetry/tls/ca.pem -u devices -P {password} -q 1 -l \
             -t homelab/temperature/outdoor"
        );
        self.machine.shell(&script).map(drop)
    }

    pub fn rows(&self) -> Result<u32> {
        let text = self.sql("SELECT count(*) FROM temperature_sensors")?;
        text.parse().with_context(|| format!("{text} is no count"))
    }

    /// Waits for exactly so many rows.
    pub fn wait_rows(&self, wanted: u32) -> Result<()> {
        until(SOON, format!("{wanted} rows"), || {
            let rows = self.rows()?;
            if rows > wanted {
                bail!("{rows} rows");
            }
            Ok((rows == wanted).then_some(()))
        })
    }

    /// As the server's administrator.
    pub fn sql(&self, statement: &str) -> Result<String> {
        self.machine.run(&[
            "runuser",
            "--user=postgres",
            "--",
            "psql",
            "-X",
            "-At",
            "telemetry",
            "-c",
            statement,
        ])
    }
}

impl Scene for Site {
    fn story(&self) -> String {
        let ask = |words: &[&str]| match self.machine.output(words) {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => format!("{error:#}"),
        };
        let units = ask(&["systemctl", "--no-pager", "--failed"]);
        let lines = ask(&["journalctl", "--no-pager", "--lines=40"]);
        format!("--- failed units ---\n{units}--- the journal ---\n{lines}---")
    }
}

/// What a run printed.
pub struct Run {
    pub text: String,
    pub succeeded: bool,
    pub took: Duration,
}

impl Run {
    /// That it went through.
    pub fn fine(self) -> Result<Run> {
        if !self.succeeded {
            bail!("the run failed:\n{}", self.text);
        }
        Ok(self)
    }

    /// That it went through and changed nothing anywhere.
    pub fn unchanged(self) -> Result<Run> {
        let run = self.fine()?;
        let changed = run.changed();
        if !changed.is_empty() || run.counts("changed").values().any(|count| *count > 0) {
            bail!("changed: {changed:?}\n{}", run.text);
        }
        Ok(run)
    }

    /// The tasks that changed something, without their roles.
    pub fn changed(&self) -> Vec<String> {
        let mut task = "";
        let mut changed = Vec::new();
        for line in self.text.lines() {
            if let Some((_, name)) = line.split_once("TASK [").or(line.split_once("HANDLER [")) {
                let name = name.split(']').next().unwrap_or(name);
                task = name.split_once(" : ").map_or(name, |(_, name)| name);
            } else if line.starts_with("changed: ")
                && changed.last().is_none_or(|last| last != task)
            {
                changed.push(task.to_owned());
            }
        }
        changed
    }

    /// A figure of the recap by host.
    pub fn counts(&self, name: &str) -> BTreeMap<String, u32> {
        let recap = self.text.split("PLAY RECAP").nth(1).unwrap_or_default();
        let count = |line: &str| {
            let (host, figures) = line.split_once(':')?;
            let figure = figures
                .split_whitespace()
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())?;
            Some((host.trim().to_owned(), figure))
        };
        recap.lines().filter_map(count).collect()
    }
}
