//! The unit's walls, tried from inside: a script in the place of the node, with everything else as it is shipped. The same
//! as root, whom no permission stops; and outside of the walls, where all of it works.

use anyhow::{Result, ensure};

use crate::world::World;

const UNIT: &str = "/usr/lib/systemd/system/telemetry.service";
/// For a line that begins with `own` the wall is a permission, or a group: it does not stop root.
const PROBE: &str = r#"
try() { wanted=$1; what=$2; shift 2
    [ -z "$OUTSIDE" ] || wanted=works
    if "$@" >/dev/null 2>&1; then got=works; else got=refused; fi
    [ $got = $wanted ] && echo "as wanted: $what $got" || echo "WRONG: $what $got"; }
own() { if [ -n "$OUTSIDE" ] || [ "$(id -u)" != 0 ]; then try "$@"; fi; }
python() { /usr/bin/python3 -c "$1"; }
try works   "a write to the state directory" touch "$STATE_DIRECTORY/probe"
try works   "its removal"                    rm "$STATE_DIRECTORY/probe"
try works   "a write to the runtime directory" touch "$RUNTIME_DIRECTORY/probe"
try works   "a TCP socket"                   python 'import socket; socket.socket(socket.AF_INET)'
try refused "a write to /etc"                touch /etc/telemetry/probe
try refused "a write to /usr"                touch /usr/bin/probe
try refused "a write to /var"                touch /var/lib/probe
own refused "a write to /run"                touch /run/elsewhere
try refused "a look into /home"              ls /home/.
try refused "a look into /root"              ls /root/.
own refused "a look at other processes"      test -e /proc/1
own refused "a secret's file"                cat /etc/telemetry/credentials/database
try refused "a packet socket"                python 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'
try refused "a netlink socket"               python 'import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)'
try refused "memory to write and execute"    python 'import mmap; mmap.mmap(-1, 4096, prot=7)'
try refused "a namespace"                    unshare --user true
try refused "a mount"                        mount -t tmpfs none /mnt
try refused "a kernel setting"               cat /proc/sys/kernel/ostype
try refused "another priority"             python 'import os; os.nice(5)'
try refused "what is in /dev"                test -e /dev/probe
"#;

pub fn in_force(world: &mut World) -> Result<String> {
    world.machine.write("/run/probe.sh", PROBE)?;
    world.machine.write("/dev/probe", "")?;
    let count = |words: &[&str]| {
        PROBE.lines().filter(|line| words.iter().any(|w| line.starts_with(w))).count()
    };
    let (tries, of_root) = (count(&["try ", "own "]), count(&["try "]));
    as_wanted(&inside(world, "telemetry")?, tries)?;
    as_wanted(&inside(world, "root")?, of_root)?;
    let outside = "mkdir /run/outside; cd /run/outside; export OUTSIDE=1 STATE_DIRECTORY=. RUNTIME_DIRECTORY=.; \
                   sh /run/probe.sh; umount /mnt; \
                   rm -f /etc/telemetry/probe /usr/bin/probe /var/lib/probe /run/elsewhere /dev/probe";
    as_wanted(&world.machine.shell(outside)?, tries)?;
    of_the_node(world)?;
    Ok(format!("{tries} tries, {of_root} of them as root, all of them outside"))
}

/// What the script says in the node's place, run by this user.
fn inside(world: &World, user: &str) -> Result<String> {
    let unit = format!("probe-{user}");
    world.machine.shell(&format!(
        "sed -e 's#^ExecStart=.*#ExecStart=/bin/sh /run/probe.sh#' -e 's/^Type=.*/Type=oneshot/' \
         -e '/^Restart/d' -e '/^Watchdog/d' -e 's/^User=.*/User={user}/' -e 's/^Group=.*/Group={user}/' \
         -e 's/^\\(State\\|Runtime\\)Directory=.*/\\1Directory={unit}/' {UNIT} \
         >/run/systemd/system/{unit}.service; systemctl daemon-reload; systemctl start {unit}; \
         journalctl -u {unit} -o cat --no-pager | grep -E '^(as wanted|WRONG): '"
    ))
}

fn as_wanted(said: &str, tries: usize) -> Result<()> {
    ensure!(!said.contains("WRONG") && said.lines().count() == tries, "not {tries} times:\n{said}");
    Ok(())
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
