//! The newcomer's path: what `docs/install.md` says, typed into a clean Debian 12 as it stands there.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rig::{Container, Folder, repository, until};

use crate::world::{SOON, World};

const PAGE: &str = "docs/install.md";
const CHAPTER: &str = "## With the package";
const FENCE: &str = "```sh";
/// The one line that is for the machine that builds.
const ELSEWHERE: &str = "make deb";
/// Where the package was copied to, and the commands are typed.
const HOME: &str = "/root";

pub fn follow(world: &mut World) -> Result<String> {
    let commands = commands()?;
    let folder = Folder::new(None, "newcomer")?;
    let packages = Path::new("/packages");
    let ours = world.packages.clone();
    let machine = Container::boot(
        "telemetry-newcomer",
        &folder.join("machine.log"),
        &[(&ours, &packages.display().to_string())],
    )?;
    machine.run(&["cp", &format!("{}/{}", packages.display(), world.package), HOME])?;
    // Root needs no sudo, and a bare Debian has none.
    let script = format!("set -eu; cd {HOME}; sudo() {{ \"$@\"; }}\n{}", commands.join("\n"));
    machine.run(&["bash", "-c", &script]).context(PAGE)?;
    until(SOON, "it accepts", || {
        let line = machine.run(&["systemctl", "show", "telemetry", "-P", "StatusText"])?;
        Ok(line.starts_with("accepting; ").then_some(()))
    })?;
    let enabled = machine.run(&["systemctl", "is-enabled", "telemetry"])?;
    ensure!(enabled == "enabled", "{enabled}");
    let secret = machine.shell("cat /run/credentials/telemetry.service/database")?;
    ensure!(secret == "the password", "the secret did not arrive: {secret}");
    Ok(format!("{} lines of {PAGE}, and it accepts", commands.len()))
}

/// The lines of the chapter's shell blocks, in order.
fn commands() -> Result<Vec<String>> {
    let page = std::fs::read_to_string(repository().join(PAGE)).context(PAGE)?;
    let chapter = page.split(CHAPTER).nth(1).context("the chapter is gone")?;
    let chapter = chapter.split("\n## ").next().unwrap_or_default();
    let blocks = chapter.split(FENCE).skip(1).filter_map(|rest| rest.split("```").next());
    let blocks: Vec<&str> = blocks.filter(|block| !block.contains(ELSEWHERE)).collect();
    ensure!(blocks.len() >= 4, "{} blocks in {PAGE}, {CHAPTER}", blocks.len());
    // A block inside a list is indented as the list is.
    let lines = blocks.iter().flat_map(|block| {
        let indent = block.lines().nth(1).map_or(0, |line| line.len() - line.trim_start().len());
        block.lines().map(move |line| line.get(indent..).unwrap_or_default().to_owned())
    });
    Ok(lines.filter(|line| !line.is_empty()).collect())
}
