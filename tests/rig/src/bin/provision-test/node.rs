//! The node: from nothing to ready, changed, upgraded, taken away.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::site::{HOST, Site};

/// What is promised for a bare host.
const READY_WITHIN: Duration = Duration::from_secs(600);

const KEPT: &str = "ls /etc/telemetry/telemetry.toml /var/lib/telemetry/buffer";

pub fn bare_check(site: &mut Site) -> Result<String> {
    let run = site.play(&["all.yml", "--check", "--diff"])?.fine()?;
    ensure!(!run.changed().is_empty(), "it says that nothing is to be done:\n{}", run.text);
    let left = site.machine.shell(
        "ls -d /etc/telemetry /etc/mosquitto /etc/postgresql /etc/nftables.d /var/cache/telemetry-package \
         /usr/lib/python3/dist-packages/apt 2>/dev/null || true",
    )?;
    ensure!(left.is_empty(), "check mode made {left}");
    Ok(format!("{} tasks would change something", run.changed().len()))
}

pub fn provision(site: &mut Site) -> Result<String> {
    let run = site.play(&["all.yml"])?.fine()?;
    site.wait_ready()?;
    ensure!(run.took < READY_WITHIN, "it took {:?}", run.took);
    let modes = site.machine.shell(
        "stat -c '%a %U' /etc/telemetry/credentials /etc/telemetry/credentials/* | sort -u | tr '\\n' ' '",
    )?;
    ensure!(modes == "600 root 700 root", "credentials: {modes}");
    Ok(format!("{:.0} s", run.took.as_secs_f64()))
}

pub fn flow(site: &mut Site) -> Result<String> {
    site.machine.shell("apt-get install --quiet --yes mosquitto-clients >/dev/null 2>&1")?;
    site.publish(100)?;
    site.wait_rows(100)?;
    Ok("100 published over TLS, 100 rows".to_owned())
}

pub fn second_run(site: &mut Site) -> Result<String> {
    let run = site.play(&["all.yml"])?.unchanged()?;
    Ok(format!("changed=0 in {:.0} s", run.took.as_secs_f64()))
}

pub fn converged_check(site: &mut Site) -> Result<String> {
    let run = site.play(&["all.yml", "--check", "--diff"])?.unchanged()?;
    Ok(format!("changed=0 in {:.0} s", run.took.as_secs_f64()))
}

/// A setting of a stream is reloaded, one of the buffer needs a new process.
pub fn reload(site: &mut Site) -> Result<String> {
    let wanted = ["Write the configuration once it is right", "Take the changed configuration"];
    let before = main_pid(site)?;
    let limit = "silent_warning_after_seconds = 7200";
    site.edit("streams.toml", limit, "silent_warning_after_seconds = 7100")?;
    let reloaded = site.play(&["site.yml"])?.fine()?;
    ensure!(reloaded.changed() == wanted, "{:?}", reloaded.changed());
    ensure!(main_pid(site)? == before, "the node was restarted for a stream's setting");
    let journal = ["journalctl", "-u", "telemetry", "-o", "cat", "--no-pager"];
    let said = site.machine.run(&journal)?;
    ensure!(said.contains("the configuration was read again"), "no reload in\n{said}");
    site.edit(
        "streams.toml",
        "[streams.plug]",
        "[buffer]\nquota_bytes = 4294967296\n\n[streams.plug]",
    )?;
    let restarted = site.play(&["site.yml"])?.fine()?;
    ensure!(restarted.changed() == wanted, "{:?}", restarted.changed());
    ensure!(main_pid(site)? != before, "buffer.quota_bytes counts only from the next start on");
    site.play(&["site.yml"])?.unchanged()?;
    Ok("a stream's by a reload, the buffer's by a restart, then changed=0".to_owned())
}

pub fn change(site: &mut Site) -> Result<String> {
    let wanted = ["Write the unit's drop-in", "Restart the node"];
    let memory = ["site.yml", "--diff", "-e", "telemetry_memory_high=512M"];
    let foreseen = site.play(&[&memory[..], &["--check"]].concat())?.fine()?;
    ensure!(foreseen.changed() == wanted, "check mode: {:?}", foreseen.changed());
    ensure!(foreseen.text.contains("+MemoryHigh=512M"), "no difference:\n{}", foreseen.text);
    let started = main_pid(site)?;
    ensure!(site.play(&memory[..1])?.unchanged().is_ok(), "check mode changed something");
    let made = site.play(&memory)?.fine()?;
    ensure!(made.changed() == wanted, "{:?}", made.changed());
    ensure!(main_pid(site)? != started, "the node was not restarted");
    site.play(&["site.yml"])?.fine()?;
    Ok("foreseen, then made".to_owned())
}

fn main_pid(site: &Site) -> Result<String> {
    site.machine.run(&["systemctl", "show", "telemetry", "--property=MainPID", "--value"])
}

pub fn refused(site: &mut Site) -> Result<String> {
    let started = main_pid(site)?;
    let wrong = r#"{"telemetry_settings": {"node": {"name": "a b"}}}"#;
    let run = site.play(&["site.yml", "-e", wrong])?;
    ensure!(!run.succeeded && run.text.contains("failed to validate"), "{}", run.text);
    ensure!(main_pid(site)? == started, "the node was restarted");
    site.wait_ready()?;
    site.play(&["site.yml"])?.unchanged()?;
    Ok("the old one goes on".to_owned())
}

pub fn gate(site: &mut Site) -> Result<String> {
    let before = site.rows()?;
    let short = ["site.yml", "-e", "telemetry_ready_seconds=5"];
    site.machine.run(&["systemctl", "stop", "postgresql@15-main"])?;
    // Started anew without its database it keeps messages, and is not ready.
    let run =
        site.play_on("rolling.yml", &[&short[..], &["-e", "telemetry_memory_high=513M"]].concat())?;
    ensure!(!run.succeeded, "it went on:\n{}", run.text);
    let failed = run.counts("failed");
    ensure!(failed.get(HOST) == Some(&1), "{failed:?}");
    ensure!(!failed.contains_key("node2"), "the next host was touched:\n{}", run.text);
    site.publish(50)?;
    site.machine.run(&["systemctl", "start", "postgresql@15-main"])?;
    site.play(&["site.yml"])?.fine()?;
    site.wait_rows(before + 50)?;
    Ok("the next host was not touched".to_owned())
}

pub fn upgrade(site: &mut Site) -> Result<String> {
    let before = site.rows()?;
    let old = version(site)?;
    let newer = format!("telemetry_package={}", site.newer.display());
    let mut told = Vec::new();
    for (number, words) in [&["site.yml", "-e", &newer][..], &["site.yml"]].into_iter().enumerate()
    {
        // With messages in the buffer.
        site.machine.run(&["systemctl", "stop", "postgresql@15-main"])?;
        site.publish(500)?;
        site.machine.run(&["systemctl", "start", "postgresql@15-main"])?;
        let started = main_pid(site)?;
        let run = site.play(words)?.fine()?;
        let wanted = ["Copy the package", "Install the package"];
        ensure!(run.changed() == wanted, "{:?}", run.changed());
        ensure!(main_pid(site)? != started, "the old program is still running");
        site.play(words)?.unchanged()?;
        site.wait_rows(before + 500 * (number as u32 + 1))?;
        told.push(version(site)?);
    }
    let [upgraded, back] = &told[..] else { bail!("{told:?}") };
    ensure!(*upgraded != old && *back == old, "{old} {told:?}");
    Ok(format!("{old} → {upgraded} → {back}, no row lost or doubled"))
}

fn version(site: &Site) -> Result<String> {
    site.machine.run(&["dpkg-query", "--show", "--showformat=${Version}", "telemetry"])
}

pub fn remove(site: &mut Site) -> Result<String> {
    let before = site.rows()?;
    let absent = ["site.yml", "-e", "telemetry_state=absent"];
    site.play(&[&absent[..], &["--check"]].concat())?.fine()?;
    site.machine.run(&["systemctl", "is-active", "telemetry"])?;
    site.play(&absent)?.fine()?;
    site.machine.shell(KEPT)?;
    site.machine.shell("! ls /etc/telemetry/credentials 2>/dev/null")?;
    site.play(&absent)?.unchanged()?;
    site.play(&["site.yml"])?.fine()?;
    site.publish(10)?;
    site.wait_rows(before + 10)?;
    let purge = ["site.yml", "-e", r#"{"telemetry_state": "absent", "telemetry_purge": true}"#];
    site.play(&purge)?.fine()?;
    site.machine.shell("! ls -d /etc/telemetry /var/lib/telemetry 2>/dev/null")?;
    site.play(&purge)?.unchanged()?;
    // And nothing of it stands in the way of a new beginning.
    site.play(&["site.yml"])?.fine()?;
    site.wait_ready()?;
    Ok("and a new beginning".to_owned())
}
