//! Secrets reach the node, and nobody else.

use anyhow::{Result, ensure};
use rig::{PASSWORD, get};

use crate::world::{HTTP_PORT, MQTT_PASSWORD, World};

/// Everything that others can read of the node, as a user without rights and as root.
const PLACES: [(&str, &str); 7] = [
    ("the journal", "journalctl --no-pager -o export"),
    ("the unit's text", "systemctl cat telemetry"),
    ("the unit's properties", "systemctl show telemetry"),
    (
        "the process's environment",
        "tr '\\0' '\\n' </proc/$(systemctl show telemetry -P MainPID)/environ",
    ),
    ("the process list", "ps axwwe"),
    ("the effective configuration", "telemetry check --effective"),
    ("the node's state", "grep -raE . /var/lib/telemetry --exclude-dir=buffer"),
];
const READ_BY_OTHERS: [&str; 3] = [
    "cat /etc/telemetry/credentials/database",
    "cat /run/credentials/telemetry.service/database",
    "ls /var/lib/telemetry",
];

pub fn stay_secret(world: &mut World) -> Result<String> {
    for script in READ_BY_OTHERS {
        let words =
            ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "sh", "-c", script];
        // What is not there cannot be read either.
        world.machine.shell(script)?;
        let read = world.machine.output(&words)?;
        ensure!(!read.status.success(), "anybody may: {script}");
    }
    let mut looked = Vec::new();
    for (place, script) in PLACES {
        looked.push((place, world.machine.shell(script)?));
    }
    for path in ["/health", "/streams", "/metrics"] {
        looked.push((path, get(HTTP_PORT, path)?.body));
    }
    for (place, text) in &looked {
        ensure!(!text.is_empty(), "{place} is empty");
        for secret in [PASSWORD, MQTT_PASSWORD] {
            ensure!(!text.contains(secret), "{place} shows a password");
        }
    }
    Ok(format!("in none of {} places", looked.len()))
}
