//! The frame of the programs that boot a machine and take it through a life: root, what must come from the real network,
//! a network of one's own, then step after step.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::signals::on_signal;

/// What the steps act on.
pub trait Scene {
    /// What belongs into every error.
    fn story(&self) -> String;
}

/// A name, and what is done and found.
pub type Step<S> = (&'static str, fn(&mut S) -> Result<String>);

/// Runs `play` as root in a network of its own, where the ports are free and nothing can leave: for that the program
/// starts itself again, with `--isolated`. `fetch` runs before, in the real network.
pub fn on_stage(
    program: &str,
    isolated: bool,
    fetch: impl FnOnce() -> Result<()>,
    play: impl FnOnce() -> Result<()>,
) -> ExitCode {
    let outcome = if isolated { prepare().and_then(|()| play()) } else { isolate(fetch) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Every step in this order; the first that fails ends it.
///
/// # Errors
/// With the step and the scene's story.
pub fn play<S: Scene>(scene: &mut S, steps: &[Step<S>]) -> Result<()> {
    let began = Instant::now();
    for (name, step) in steps {
        let started = Instant::now();
        let found = step(scene).with_context(|| format!("{name}\n{}", scene.story()))?;
        println!("ok  {name:<45} {:>5.1} s  {found}", started.elapsed().as_secs_f64());
    }
    println!("{} steps passed in {:.0} s", steps.len(), began.elapsed().as_secs_f64());
    Ok(())
}

/// Never returns when it works.
fn isolate(fetch: impl FnOnce() -> Result<()>) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        let error =
            own_program(Command::new("sudo").arg("--preserve-env=CARGO_TARGET_DIR"), false)?.exec();
        bail!("booting a machine needs root, and sudo cannot be run: {error}");
    }
    fetch()?;
    let mut command = Command::new("unshare");
    let error = own_program(command.args(["--net", "--mount", "--"]), true)?.exec();
    bail!("run unshare (Debian: util-linux): {error}")
}

fn own_program(command: &mut Command, isolated: bool) -> Result<&mut Command> {
    let program = std::env::current_exe().context("find this program")?;
    Ok(command
        .arg(program)
        .args(std::env::args_os().skip(1))
        .args(isolated.then_some("--isolated")))
}

fn prepare() -> Result<()> {
    on_signal(|| std::process::exit(130))?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    let up = up.context("run ip (Debian: iproute2)")?;
    if !up.success() {
        bail!("a network of our own cannot be set up here ({up})");
    }
    Ok(())
}
