//! `telemetry pages`: the package's manual pages and shell completions, made from the commands themselves, so that they
//! cannot disagree with them.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, Exit};

#[derive(Args, Debug)]
pub struct PagesArgs {
    /// The folder they are written to; made when missing
    folder: PathBuf,
}

pub fn run(args: &PagesArgs) -> anyhow::Result<Exit> {
    let folder = &args.folder;
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let mut command = Cli::command();
    clap_mangen::generate_to(command.clone(), folder)
        .with_context(|| format!("write the manual pages to {}", folder.display()))?;
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, &name, folder)
            .with_context(|| format!("write the completions to {}", folder.display()))?;
    }
    Ok(Exit::Fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_every_shell_its_completions() {
        let folder = tempfile::tempdir().unwrap();
        let args = PagesArgs { folder: folder.path().join("new") };
        assert_eq!(run(&args).unwrap(), Exit::Fine);
        let has = |name: &str| assert!(args.folder.join(name).is_file(), "{name} is missing");
        let mut commands = Cli::command();
        commands.build();
        for command in commands.get_subcommands().filter(|command| !command.is_hide_set()) {
            if command.get_name() != "help" {
                has(&format!("telemetry-{}.1", command.get_name()));
            }
        }
        for name in ["telemetry.1", "telemetry.bash", "_telemetry", "telemetry.fish"] {
            has(name);
        }
    }
}
