//! `telemetry certs`: an authority of one's own, and how long certificates are still good.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use comfy_table::Table;
use jiff::Timestamp;
use serde_json::json;

use super::client::{self, OrderError};
use super::{ConfigArg, Exit};
use crate::certificates::{self, CertificateError, CertificateFacts, Change, Shelf, Wish};
use crate::config::Settings;
use crate::domain::NodeName;
use crate::http::CONTROL_SOCKET;

#[derive(Args, Debug)]
pub struct CertsArgs {
    #[command(subcommand)]
    order: CertsOrder,
}

#[derive(Subcommand, Debug)]
enum CertsOrder {
    /// Make an authority and what it signs; what is there and fits stays
    Init {
        #[command(flatten)]
        common: MakeArgs,
        /// Host name or address of the server; once for each
        #[arg(long = "name", value_name = "NAME", required = true)]
        names: Vec<String>,
        /// Make a bundle for this device; once for each
        #[arg(long = "device", value_name = "NAME", value_parser = |text: &str| NodeName::parse(text))]
        devices: Vec<NodeName>,
        /// How long the authority is good
        #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
        authority_days: u32,
        /// Make everything anew, the authority too: nothing signed before counts any more
        #[arg(long)]
        force: bool,
    },
    /// Sign anew what expires soon, by the same authority; running nodes take it up by themselves
    Renew {
        #[command(flatten)]
        common: MakeArgs,
        /// Renew what has at most this many days left
        #[arg(long, value_name = "DAYS", default_value_t = 30)]
        within: u32,
    },
    /// Names, expiry and days left: of files, and of what brokers and databases presented to the running node
    Show {
        #[command(flatten)]
        config: ConfigArg,
        /// PEM files and nothing else [default: those the configuration names, and what the running node was shown]
        files: Vec<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Debug)]
struct MakeArgs {
    /// The folder; its owner will own the files
    #[arg(long, value_name = "FOLDER", default_value = "/etc/telemetry/tls")]
    dir: PathBuf,
    /// How long a new certificate is good
    #[arg(long, value_name = "DAYS", default_value_t = 397, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &CertsArgs) -> anyhow::Result<Exit> {
    match &args.order {
        CertsOrder::Init { common, names, devices, authority_days, force } => {
            let wish = Wish {
                names: names.clone(),
                devices: devices.clone(),
                days: common.days,
                authority_days: *authority_days,
                force: *force,
            };
            told(&Shelf::new(common.dir.clone()).init(&wish)?, common.json);
            Ok(Exit::Fine)
        }
        CertsOrder::Renew { common, within } => {
            let shelf = Shelf::new(common.dir.clone());
            told(&shelf.renew(i64::from(*within), common.days)?, common.json);
            Ok(Exit::Fine)
        }
        CertsOrder::Show { config, files, json } => show(config, files, *json),
    }
}

fn told(changes: &[Change], json: bool) {
    if json {
        println!("{:#}", json!(changes));
        return;
    }
    for change in changes {
        let what = if change.made { "made" } else { "kept" };
        println!("{what}  {}", change.file.display());
    }
}

fn show(config: &ConfigArg, files: &[PathBuf], json: bool) -> anyhow::Result<Exit> {
    let mut read: Vec<Read> = files.iter().map(|file| of_file(file)).collect();
    if files.is_empty() {
        let settings = super::settings(&config.config)?;
        read.extend(settings.certificate_files().iter().map(|named| of_file(&named.path)));
        read.extend(super::block_on(presented(&settings))??);
    }
    if json {
        println!("{:#}", read.iter().flat_map(as_json).collect::<serde_json::Value>());
    } else {
        print_table(&read);
    }
    let failed = read.iter().any(|(_, found)| found.is_err());
    Ok(if failed { Exit::Failed } else { Exit::Fine })
}

type Read = (Source, Result<Vec<CertificateFacts>, CertificateError>);

/// Where a certificate was seen.
enum Source {
    File(PathBuf),
    Peer(String),
}

impl Source {
    /// The member of a line in JSON, and what stands there.
    fn member(&self) -> (&'static str, String) {
        match self {
            Source::File(path) => ("file", path.display().to_string()),
            Source::Peer(peer) => ("presented_by", peer.clone()),
        }
    }
}

fn of_file(file: &Path) -> Read {
    (Source::File(file.to_owned()), certificates::read(file))
}

/// What the node was shown when it connected. Without a running node nobody knows.
async fn presented(settings: &Settings) -> anyhow::Result<Vec<Read>> {
    let socket = settings.node.state_dir.join(CONTROL_SOCKET);
    let mut health = match client::order(&socket, "/health", None::<&()>).await {
        Ok(health) => health,
        Err(OrderError::NotRunning(_)) => return Ok(Vec::new()),
        Err(OrderError::Failed(error)) => return Err(error),
    };
    let found: BTreeMap<String, CertificateFacts> =
        serde_json::from_value(health["presented_certificates"].take())
            .context("the node's answer")?;
    Ok(found.into_iter().map(|(peer, facts)| (Source::Peer(peer), Ok(vec![facts]))).collect())
}

fn as_json((from, found): &Read) -> Vec<serde_json::Value> {
    let now = Timestamp::now();
    let (member, name) = from.member();
    match found {
        Err(error) => vec![json!({ member: name, "error": error.to_string() })],
        Ok(found) => {
            let line = |facts: &CertificateFacts| {
                let mut line = json!(facts);
                line[member] = json!(name);
                line["days_left"] = facts.days_left(now).into();
                line
            };
            found.iter().map(line).collect()
        }
    }
}

fn print_table(read: &[Read]) {
    let now = Timestamp::now();
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["FILE, OR WHO PRESENTED IT", "SUBJECT", "NAMES", "EXPIRES", "DAYS LEFT"]);
    for (from, found) in read {
        match found {
            Err(error) => eprintln!("{error}"),
            Ok(found) => {
                for facts in found {
                    table.add_row([
                        from.member().1,
                        facts.subject.clone(),
                        facts.names.join(" "),
                        format!("{:.0}", facts.expires),
                        facts.days_left(now).to_string(),
                    ]);
                }
            }
        }
    }
    println!("{table}");
}
