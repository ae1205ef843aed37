//! The newcomer's paths: what `docs/install.md` says, typed into a clean Debian 12 as it stands there.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rig::{Container, Folder, repository, until};

use crate::world::{SOON, World};

const PAGE: &str = "docs/install.md";
const FENCE: &str = "```sh";
/// Lines for the machine that builds.
const ELSEWHERE: [&str; 2] = ["make deb", "make release"];
/// Where the package was copied to, and the commands are typed.
const HOME: &str = "/root";
/// The repository, for who does it by hand.
const SOURCE: &str = "/usr/src/telemetry";

pub fn follow(world: &mut World) -> Result<String> {
    let commands: Vec<String> = blocks("## With the package", 4)?.concat();
    let folder = Folder::new(None, "newcomer")?;
    let packages = Path::new("/packages");
    let ours = world.packages.clone();
    let machine = Container::boot(
        "telemetry-newcomer",
        &folder.join("machine.log"),
        &[(&ours, &packages.display().to_string())],
    )?;
    machine.run(&["cp", &format!("{}/{}", packages.display(), world.package), HOME])?;
    it_accepts(&machine, HOME, &commands)?;
    Ok(format!("{} lines of {PAGE}, and it accepts", commands.len()))
}

pub fn by_hand(_: &mut World) -> Result<String> {
    let own = blocks("## By hand", 1)?;
    // Secrets, check and start are those of the package.
    let above = blocks("## With the package", 4)?;
    let commands = [&own[..], &above[above.len() - 2..]].concat().concat();
    let folder = Folder::new(None, "by-hand")?;
    let log = folder.join("machine.log");
    let machine = Container::boot("telemetry-by-hand", &log, &[(&repository(), SOURCE)])?;
    it_accepts(&machine, SOURCE, &commands)?;
    Ok(format!("{} lines of {PAGE}, and it accepts", commands.len()))
}

fn it_accepts(machine: &Container, folder: &str, commands: &[String]) -> Result<()> {
    // Root needs no sudo, and a bare Debian has none.
    let script = format!("set -eu; cd {folder}; sudo() {{ \"$@\"; }}\n{}", commands.join("\n"));
    machine.run(&["bash", "-c", &script]).context(PAGE)?;
    until(SOON, "it accepts", || {
        let line = machine.run(&["systemctl", "show", "telemetry", "-P", "StatusText"])?;
        Ok(line.starts_with("accepting; ").then_some(()))
    })?;
    let enabled = machine.run(&["systemctl", "is-enabled", "telemetry"])?;
    ensure!(enabled == "enabled", "{enabled}");
    let secret = machine.shell("cat /run/credentials/telemetry.service/database")?;
    ensure!(secret == "the password", "the secret did not arrive: {secret}");
    Ok(())
}

/// The lines of the chapter's shell blocks, in order.
fn blocks(chapter: &str, at_least: usize) -> Result<Vec<Vec<String>>> {
    let page = std::fs::read_to_string(repository().join(PAGE)).context(PAGE)?;
    let text = page.split(chapter).nth(1).with_context(|| format!("{chapter} is gone"))?;
    let text = text.split("\n## ").next().unwrap_or_default();
    let blocks = text.split(FENCE).skip(1).filter_map(|rest| rest.split("```").next());
    let here = |line: &str| !line.is_empty() && !ELSEWHERE.iter().any(|of| line.starts_with(of));
    let blocks = blocks.map(|block| {
        // A block inside a list is indented as the list is.
        let indent = block.lines().nth(1).map_or(0, |line| line.len() - line.trim_start().len());
        let lines = block.lines().map(|line| line.get(indent..).unwrap_or_default());
        lines.filter(|line| here(line)).map(str::to_owned).collect::<Vec<_>>()
    });
    let blocks: Vec<_> = blocks.filter(|lines| !lines.is_empty()).collect();
    ensure!(blocks.len() >= at_least, "{} blocks in {PAGE}, {chapter}", blocks.len());
    Ok(blocks)
}
