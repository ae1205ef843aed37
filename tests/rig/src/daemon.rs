//! A server as a child process: started, stopped, killed, frozen, and never left behind.
//!
//! A child is started through `setpriv --pdeathsig`, so that the kernel ends it when we die without a word. That
//! signal follows the *thread* that started the child; all children are therefore started by one thread that lives as
//! long as the process.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait::until;

const LOG_LINES: usize = 25;
/// Between SIGKILL and the end of a process; it can only be longer while the disk hangs.
const KILL_WAIT: Duration = Duration::from_secs(20);

type Order = (Command, mpsc::SyncSender<std::io::Result<Child>>);

static SPAWNER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
    let (send, orders) = mpsc::channel::<Order>();
    std::thread::Builder::new()
        .name("rig-spawner".into())
        .spawn(move || {
            for (mut command, answer) in orders {
                let _ = answer.send(command.spawn());
            }
        })
        .expect("a thread can be started");
    Mutex::new(send)
});

fn spawn(command: Command) -> Result<Child> {
    let (send, answer) = mpsc::sync_channel(1);
    SPAWNER
        .lock()
        .expect("no holder of the lock panics")
        .send((command, send))
        .context("reach the spawner")?;
    Ok(answer.recv().context("hear from the spawner")??)
}

/// A process with a log file that can be started again and again with the same command line.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    privileges: Vec<String>,
    through: Vec<String>,
    folder: Option<PathBuf>,
    log: PathBuf,
    stop_signal: Signal,
    child: Option<Child>,
}

impl Daemon {
    /// Describes the process; [`Daemon::start`] starts it. Output is appended to `log`.
    pub fn new(name: &str, program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            privileges: Vec::new(),
            through: Vec::new(),
            folder: None,
            log: log.into(),
            stop_signal: Signal::TERM,
            child: None,
        }
    }

    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub fn environment(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// For the next start; replaces what was set before under this name.
    pub fn set_environment(&mut self, name: &str, value: impl Into<OsString>) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.into(), value.into()));
    }

    pub fn working_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Options of `setpriv` that choose the user and its capabilities.
    pub(crate) fn privileges(mut self, options: Vec<String>) -> Self {
        self.privileges = options;
        self
    }

    /// A program that runs the process, with its arguments; the process must stay our child.
    pub(crate) fn through(mut self, words: Vec<String>) -> Self {
        self.through = words;
        self
    }

    pub(crate) fn stop_signal(mut self, signal: Signal) -> Self {
        self.stop_signal = signal;
        self
    }

    /// Starts the process; it must not run already.
    ///
    /// # Errors
    /// When it runs, or cannot be started.
    pub fn start(&mut self) -> Result<()> {
        if self.is_running() {
            bail!("{} runs already", self.name);
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("open {}", self.log.display()))?;
        let mut command = Command::new("setpriv");
        command
            .args(&self.privileges)
            .args(["--pdeathsig", "KILL", "--"])
            .args(&self.through)
            .arg(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log")?)
            .stderr(log)
            .process_group(0);
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let child = spawn(command).with_context(|| format!("start {}", self.command_line()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Waits until `ready` says so; a process that ends before is an error.
    ///
    /// # Errors
    /// Names the command and the last lines of its log; the process is ended.
    pub fn wait_ready(
        &mut self,
        within: Duration,
        mut ready: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let outcome = until(within, format!("{} ready", self.name), || {
            if let Some(status) = self.exit_status()? {
                bail!("{} ended before it was ready ({status})", self.name);
            }
            Ok(ready()?.then_some(()))
        });
        if let Err(error) = outcome {
            self.kill();
            bail!("{error:#}\n{}", self.story());
        }
        Ok(())
    }

    /// The command and the last lines of the log: what belongs into every error about this process.
    pub fn story(&self) -> String {
        format!(
            "command: {}\n--- {} ---\n{}",
            self.command_line(),
            self.log.display(),
            self.log_tail(LOG_LINES)
        )
    }

    pub fn command_line(&self) -> String {
        let words = std::iter::once(self.program.as_os_str())
            .chain(self.arguments.iter().map(OsString::as_os_str));
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn log_text(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The last lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = self.log_text();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.is_some() && matches!(self.exit_status(), Ok(None))
    }

    /// How the process ended, `None` while it runs (or when it was never started).
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.child {
            Some(child) => child.try_wait().with_context(|| format!("ask after {}", self.name)),
            None => Ok(None),
        }
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it has not ended in time, or does not run.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let Some(mut child) = self.child.take() else { bail!("{} does not run", self.name) };
        let outcome = until(within, format!("{} ended", self.name), || Ok(child.try_wait()?));
        match outcome {
            Ok(status) => Ok(status),
            Err(error) => {
                self.child = Some(child);
                bail!("{error:#}\n{}", self.story())
            }
        }
    }

    /// Asks the process to end, and waits.
    ///
    /// # Errors
    /// When it has not ended in time; then it is killed.
    pub fn stop(&mut self, within: Duration) -> Result<ExitStatus> {
        self.signal(self.stop_signal)?;
        let outcome = self.wait(within);
        if outcome.is_err() {
            self.kill();
        }
        outcome
    }

    /// SIGKILL to the process and everything it started. No error when it does not run.
    pub fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let family = family(child.id());
        for pid in &family {
            send(*pid, Signal::KILL);
        }
        let _ = child.wait();
        let _ = until(KILL_WAIT, "children ended", || {
            Ok((!family.iter().any(|pid| is_alive(*pid))).then_some(()))
        });
    }

    /// Stops the clock of the process and its children (SIGSTOP).
    pub fn freeze(&self) {
        self.signal_family(Signal::STOP);
    }

    /// Lets a frozen process go on (SIGCONT).
    pub fn thaw(&self) {
        self.signal_family(Signal::CONT);
    }

    fn signal_family(&self, signal: Signal) {
        for pid in self.pid().map(family).unwrap_or_default() {
            send(pid, signal);
        }
    }

    /// Sends a signal to the process itself.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match self.pid() {
            Some(pid) => {
                send(pid, signal);
                Ok(())
            }
            None => bail!("{} does not run", self.name),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

fn send(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended in between: then there is nobody to tell.
        let _ = kill_process(pid, signal);
    }
}

fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // "pid (name) state ...": a zombie has ended, its parent has only not looked yet.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// The process and its descendants. PostgreSQL's children lead process groups of their own, so the group is not enough.
fn family(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let path = format!("/proc/{0}/task/{0}/children", found[next]);
        let children = std::fs::read_to_string(path).unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
        next += 1;
    }
    found
}
