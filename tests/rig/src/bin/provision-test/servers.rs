//! What stands around the node: database, broker, firewall, kernel settings.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use rig::{Daemon, succeeded};

use crate::site::{SOON, Site};

/// Addresses of the machine, of a host in the inventory's networks, and of a stranger.
const MACHINE: &str = "192.0.2.1";
const NEIGHBOUR: &str = "192.0.2.2";
const STRANGER: &str = "198.51.100.2";

pub fn least_rights(site: &mut Site) -> Result<String> {
    let ask = |role: &str, database: &str, sql: &str| {
        let password = site.password(&format!("vault_database_{role}_password"));
        let script = format!(
            "PGPASSWORD={password} psql -X -At 'host=127.0.0.1 sslmode=require user=telemetry_{role} \
             dbname={database}' -c \"{sql}\" 2>&1 || true"
        );
        site.machine.shell(&script)
    };
    let insert = "INSERT INTO temperature_sensors (time, device_id) VALUES (now(), 'x')";
    for (role, sql, answer) in [
        ("reader", "SELECT count(*) FROM temperature_sensors", "100"),
        ("reader", insert, "permission denied"),
        ("reader", "CREATE TABLE x ()", "permission denied"),
        ("writer", "UPDATE temperature_sensors SET node = node", "UPDATE 100"),
        ("writer", "CREATE TABLE x ()", "permission denied"),
        ("writer", "DROP TABLE temperature_sensors", "must be owner"),
        ("writer", "TRUNCATE temperature_sensors", "permission denied"),
        ("migrator", "CREATE ROLE x", "permission denied"),
    ] {
        let said = ask(role, "telemetry", sql)?;
        ensure!(said.contains(answer), "{role}: {sql}: {said}");
    }
    let said = ask("reader", "postgres", "SELECT 1")?;
    ensure!(said.contains("pg_hba.conf"), "a database that is not ours: {said}");
    Ok("each no more than it needs".to_owned())
}

pub fn firewall(site: &mut Site) -> Result<String> {
    let mut outside = Daemon::new("outside", "unshare", std::env::temp_dir().join("outside.log"))
        .arguments(["--net", "sleep", "infinity"]);
    outside.start()?;
    let pid = outside.pid().context("the outside's process")?.to_string();
    let ours = std::fs::read_link("/proc/self/ns/net").context("our network")?;
    rig::until(SOON, "a network outside", || {
        let theirs = std::fs::read_link(format!("/proc/{pid}/ns/net")).context("their network")?;
        Ok((theirs != ours).then_some(()))
    })?;
    let there = |words: &[&str]| {
        succeeded(Command::new("nsenter").args(["-t", &pid, "-n", "--"]).args(words))
    };
    let here = |words: &[&str]| succeeded(Command::new("ip").args(words));
    here(&["link", "add", "inside", "type", "veth", "peer", "name", "outside", "netns", &pid])?;
    here(&["address", "add", &format!("{MACHINE}/24"), "dev", "inside"])?;
    here(&["link", "set", "inside", "up"])?;
    here(&["route", "add", STRANGER, "dev", "inside"])?;
    there(&["ip", "address", "add", &format!("{NEIGHBOUR}/24"), "dev", "outside"])?;
    there(&["ip", "address", "add", &format!("{STRANGER}/32"), "dev", "outside"])?;
    there(&["ip", "link", "set", "outside", "up"])?;
    // Answers at once when open; otherwise silence.
    let dial = "import socket, sys\nsocket.create_connection((sys.argv[1], int(sys.argv[2])), 2, (sys.argv[3], 0))";
    let open =
        |port: &str, from: &str| there(&["python3", "-c", dial, MACHINE, port, from]).is_ok();
    rig::until(SOON, "the way to the machine", || Ok(open("22", NEIGHBOUR).then_some(())))?;
    for (port, from, wanted) in [
        ("22", STRANGER, true),
        ("8883", NEIGHBOUR, true),
        ("8883", STRANGER, true),
        ("5432", NEIGHBOUR, true),
        ("5432", STRANGER, false),
        ("9464", NEIGHBOUR, false),
    ] {
        ensure!(open(port, from) == wanted, "port {port} from {from}: open is not {wanted}");
    }
    // Without the rules PostgreSQL itself would have answered the stranger.
    site.play(&["firewall.yml", "-e", "firewall_state=absent"])?.fine()?;
    ensure!(open("5432", STRANGER), "the rules are still in force");
    site.play(&["firewall.yml", "-e", "firewall_state=absent"])?.unchanged()?;
    site.play(&["firewall.yml"])?.fine()?;
    ensure!(!open("5432", STRANGER), "the rules are not in force again");
    here(&["link", "delete", "inside"])?;
    outside.kill();
    Ok("ssh, MQTT, and PostgreSQL for its networks".to_owned())
}

pub fn killed_broker(site: &mut Site) -> Result<String> {
    let before = site.rows()?;
    site.machine.run(&["systemctl", "stop", "telemetry"])?;
    // More than Mosquitto's own bound of 1000.
    site.publish(3000)?;
    site.machine.run(&["systemctl", "kill", "--signal=KILL", "mosquitto"])?;
    site.machine.run(&["systemctl", "start", "telemetry"])?;
    site.wait_rows(before + 3000)?;
    Ok("3,000 queued, 3,000 rows".to_owned())
}

pub fn new_passwords(site: &mut Site) -> Result<String> {
    let before = site.rows()?;
    site.renew_passwords()?;
    let run = site.play(&["all.yml"])?.fine()?;
    let wanted = [
        "Write the users",
        "Reload the broker",
        "Set the passwords",
        "Write the secrets",
        "Restart the node",
    ];
    ensure!(run.changed() == wanted, "{:?}", run.changed());
    site.publish(20)?;
    site.wait_rows(before + 20)?;
    let old =
        site.machine.shell("grep -rl planted-1 /etc /var/lib /var/log 2>/dev/null || true")?;
    ensure!(old.is_empty(), "the old ones are still in {old}");
    let words =
        site.machine.shell("grep -rl planted-2 /etc /var/lib /var/log 2>/dev/null || true")?;
    let places: Vec<&str> = words.lines().filter(|file| !file.contains("/credentials/")).collect();
    ensure!(places.is_empty(), "secrets lie in {places:?}");
    Ok("all five, in the vault, on the servers, at the node".to_owned())
}

pub fn tuning(site: &mut Site) -> Result<String> {
    // A container may change nothing; its network's settings are nobody else's.
    site.machine.shell(
        "mount --bind /proc/sys/net /proc/sys/net; mount -o remount,rw,bind /proc/sys/net",
    )?;
    let wanted = r#"{"tuning_sysctl": [
        {"name": "net.ipv4.tcp_retries2", "value": 8, "why": "a test"},
        {"name": "net.ipv4.tcp_rmem", "value": "4096 100000 6000000", "why": "a test"},
        {"name": "vm.swappiness", "value": 10, "why": "not this machine's to change"}]}"#;
    let read = || site.machine.run(&["sysctl", "net.ipv4.tcp_retries2", "net.ipv4.tcp_rmem"]);
    let (before, present) = (read()?, ["tuning.yml", "-e", wanted]);
    site.play(&present)?.fine()?;
    let in_force = read()?;
    ensure!(in_force.contains("retries2 = 8") && in_force.contains("100000"), "{in_force}");
    site.play(&present)?.unchanged()?;
    let absent = ["tuning.yml", "-e", "tuning_state=absent"];
    site.play(&absent)?.fine()?;
    ensure!(read()? == before, "{before}\nbecame\n{}", read()?);
    site.play(&absent)?.unchanged()?;
    Ok("2 in force, 1 left to the container's host".to_owned())
}
