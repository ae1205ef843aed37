//! The unit's walls, tried from inside: a script in the place of the node, with everything else as it is shipped.

use anyhow::{Result, ensure};

use crate::world::World;

const UNIT: &str = "/usr/lib/systemd/system/telemetry.service";
const PROBE: &str = r#"
try() { wanted=$1; what=$2; shift 2
    if "$@" >/dev/null 2>&1; then got=works; else got=refused; fi
    [ $got = $wanted ] && echo "as wanted: $what $got" || echo "WRONG: $what $got"; }
python() { /usr/bin/python3 -c "$1"; }
try works   "a write to the state directory" touch "$STATE_DIRECTORY/probe"
try works   "its removal"                    rm "$STATE_DIRECTORY/probe"
try works   "a write to the runtime directory" touch "$RUNTIME_DIRECTORY/probe"
try works   "a TCP socket"                   python 'import socket; socket.socket(socket.AF_INET)'
try refused "a write to /etc"                touch /etc/telemetry/probe
try refused "a write to /usr"                touch /usr/bin/probe
try refused "a write to /var"                touch /var/lib/probe
try refused "a write to /run"                touch /run/elsewhere
try refused "a look into /home"              ls /home/.
try refused "a look into /root"              ls /root/.
try refused "a look at other processes"      test -e /proc/1
try refused "a secret's file"                cat /etc/telemetry/credentials/database
try refused "a packet socket"                python 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'
try refused "a netlink socket"               python 'import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)'
try refused "memory to write and execute"    python 'import mmap; mmap.mmap(-1, 4096, prot=7)'
try refused "a namespace"                    unshare --user true
try refused "a mount"                        mount -t tmpfs none /tmp
try refused "a kernel setting"               sh -c 'echo 1 >/proc/sys/vm/drop_caches'
try refused "another priority"             python 'import os; os.nice(5)'
try refused "a device"                       test -e /dev/kmsg
"#;

pub fn in_force(world: &mut World) -> Result<String> {
    world.machine.write("/run/probe.sh", PROBE)?;
    let script = format!(
        "sed -e 's#^ExecStart=.*#ExecStart=/bin/sh /run/probe.sh#' -e 's/^Type=.*/Type=oneshot/' \
         -e '/^Restart/d' -e '/^Watchdog/d' -e 's/^RuntimeDirectory=.*/RuntimeDirectory=probe/' {UNIT} \
         >/run/systemd/system/probe.service; systemctl daemon-reload; systemctl start probe; \
         journalctl -u probe -o cat --no-pager | grep -E '^(as wanted|WRONG): '"
    );
    let said = world.machine.shell(&script)?;
    let tries = PROBE.lines().filter(|line| line.starts_with("try ")).count();
    ensure!(!said.contains("WRONG") && said.lines().count() == tries, "{said}");
    of_the_node(world)?;
    Ok(format!("{tries} tries"))
}

/// The node's own process, as the kernel sees it.
fn of_the_node(world: &World) -> Result<()> {
    let status = world.machine.shell("cat /proc/$(systemctl show telemetry -P MainPID)/status")?;
    for wanted in
        ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"]
    {
        ensure!(status.contains(wanted), "not {wanted:?} in\n{status}");
    }
    let limits = world.machine.shell("cat /proc/$(systemctl show telemetry -P MainPID)/limits")?;
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size"));
    let words: Vec<_> = core.unwrap_or_default().split_whitespace().collect();
    ensure!(words.starts_with(&["0", "0"]), "a core dump would hold secrets:\n{limits}");
    let user = world.machine.shell("ps -o user= -p $(systemctl show telemetry -P MainPID)")?;
    ensure!(user.starts_with("telemet"), "it runs as {user}");
    Ok(())
}
