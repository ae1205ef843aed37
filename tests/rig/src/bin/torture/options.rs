//! What a run is asked for, and the command that asks for one of its rounds again.

use std::path::PathBuf;

use clap::Parser;
use rig::FileSystem;

/// Rounds of faults under load, and whether anything was lost, doubled, reordered or stuck.
#[derive(Debug, Parser)]
pub struct Options {
    /// The node's binary; only a build with fail points can take the crashes.
    #[arg(long)]
    pub node: PathBuf,
    #[arg(long, default_value = "40")]
    pub rounds: u64,
    /// Of the first round; each further one has the next number.
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// Only faults whose name is or contains one of these, separated by commas.
    #[arg(long, default_value = "")]
    pub faults: String,
    /// What the node's state is on.
    #[arg(long, value_enum, default_value = "ext4")]
    pub filesystem: FileSystem,
    /// The node's state lies in the folder of the run; faults that need a disk of the node's own (root, loop devices) are
    /// named as never taken and do not fail the run.
    #[arg(long)]
    pub without_disk: bool,
    /// Kafka brokers; of three, each has every record, and the leaders of topics come and go.
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u8).range(1..=3))]
    pub kafka_nodes: u8,
    /// Print the list of faults and end.
    #[arg(long)]
    pub list: bool,
}

impl Options {
    /// The command that repeats one round over the faults these words choose. What decides which those are must all be in
    /// it: a list of another length gives the seed other faults.
    pub fn again(&self, seed: u64, words: &str) -> String {
        let list = if words.is_empty() { String::new() } else { format!(" FAULTS={words}") };
        let filesystem = match self.filesystem {
            FileSystem::Ext4 => "",
            FileSystem::Xfs => " FILESYSTEM=xfs",
        };
        let nodes = match self.kafka_nodes {
            1 => String::new(),
            nodes => format!(" KAFKA_NODES={nodes}"),
        };
        let disk = if self.without_disk { " DISK=no" } else { "" };
        format!("make torture ROUNDS=1 SEED={seed}{list}{filesystem}{nodes}{disk}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(arguments: &[&str]) -> String {
        let words = ["torture", "--node", "telemetry"].iter().chain(arguments);
        let options = Options::parse_from(words);
        options.again(options.seed, &options.faults)
    }

    #[test]
    fn a_round_is_repeated_by_its_seed_and_whatever_else_was_asked_for() {
        assert_eq!(again(&["--rounds", "40", "--seed", "7"]), "make torture ROUNDS=1 SEED=7");
        let all = [
            ["--faults", "kafka,power"],
            ["--filesystem", "xfs"],
            ["--kafka-nodes", "3"],
            ["--seed", "9"],
        ];
        assert_eq!(
            again(&[&all.concat()[..], &["--without-disk"]].concat()),
            "make torture ROUNDS=1 SEED=9 FAULTS=kafka,power FILESYSTEM=xfs KAFKA_NODES=3 DISK=no"
        );
    }

    /// What the makefile makes of the words is what the program was asked for.
    #[test]
    fn the_makefile_hands_the_words_on() {
        let words = again(&["--faults", "kafka,power", "--filesystem", "xfs", "--without-disk"]);
        let mut words = words.split(' ');
        let mut make = std::process::Command::new(words.next().unwrap());
        let make = make.arg("--dry-run").args(words).current_dir(rig::repository());
        let said = String::from_utf8(make.output().unwrap().stdout).unwrap();
        let said = said.replace("\\\n", " ");
        let line = said.lines().find(|line| line.contains("--node")).expect("the program's line");
        let handed = line.split_whitespace().skip_while(|word| *word != "exec").skip(1);
        let options = Options::parse_from(handed);
        assert_eq!((options.rounds, options.seed), (1, 1));
        assert_eq!(options.faults, "kafka,power");
        assert_eq!(options.filesystem, FileSystem::Xfs);
        assert!(options.without_disk);
    }
}
