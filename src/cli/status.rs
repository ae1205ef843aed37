//! `telemetry status`: one table of the running node.

use std::io::{IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table};
use serde_json::Value;

use super::client::{self, Listener};
use super::{ConfigArg, Exit};
use crate::config::TlsSettings;
use crate::domain::{Arrival, Secret};
use crate::http::CONTROL_SOCKET;

#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Ask this address, without looking at the configuration
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    address: Option<String>,
    /// File with a token, for a node that wants one
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The node speaks HTTPS, with a certificate of this authority [default: a public web authority]
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// The node speaks HTTPS, and its certificate carries this name [default: the address]
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// Draw anew every second until interrupted
    #[arg(long)]
    watch: bool,
    /// Print what /health answers
    #[arg(long)]
    json: bool,
}

/// Pause between two drawings.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

pub fn run(args: &StatusArgs) -> anyhow::Result<Exit> {
    let way = Way::of(args)?;
    super::block_on(async {
        loop {
            match way.health().await {
                Ok(health) if args.watch => show(&health, args)?,
                // A node that starts anew is back in a moment.
                Err(error) if args.watch => {
                    clear(args)?;
                    eprintln!("telemetry: {error:#}");
                }
                answer => {
                    let health = answer?;
                    show(&health, args)?;
                    let unhealthy = health["state"] == "unhealthy";
                    return Ok(if unhealthy { Exit::Failed } else { Exit::Fine });
                }
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    })?
}

/// How the node is asked.
enum Way {
    Listener(Listener),
    /// This machine's node: by its socket where that may be opened, which needs no token, otherwise like anyone.
    Here {
        socket: PathBuf,
        listener: Listener,
    },
}

impl Way {
    fn of(args: &StatusArgs) -> anyhow::Result<Self> {
        let token = args.token_file.as_deref().map(read_token).transpose()?;
        if let Some(address) = &args.address {
            let (address, tls) = (address.clone(), args.tls(false));
            return Ok(Way::Listener(Listener { address, token, tls }));
        }
        let settings = super::settings(&args.config.config)?;
        let socket = settings.node.state_dir.join(CONTROL_SOCKET);
        let tls = args.tls(settings.http.certificate.is_some());
        let listener = Listener { address: reachable(settings.http.listen), token, tls };
        Ok(Way::Here { socket, listener })
    }

    async fn health(&self) -> anyhow::Result<Value> {
        match self {
            Way::Listener(listener) => client::ask(listener, "/health").await,
            Way::Here { socket, listener } => {
                match client::order(socket, "/health", None::<&()>).await {
                    Ok(health) => Ok(health),
                    Err(_) => client::ask(listener, "/health").await,
                }
            }
        }
    }
}

impl StatusArgs {
    fn tls(&self, spoken: bool) -> Option<TlsSettings> {
        let asked = self.ca_file.is_some() || self.server_name.is_some();
        (spoken || asked).then(|| TlsSettings {
            ca_file: self.ca_file.clone(),
            server_name: self.server_name.clone(),
            ..TlsSettings::default()
        })
    }
}

fn host_and_port(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(text.to_owned())
        }
        _ => Err("it is not HOST:PORT, e.g. node.lan:9464".to_owned()),
    }
}

/// Who listens on every address is asked on loopback; no certificate carries 0.0.0.0.
fn reachable(mut listen: SocketAddr) -> String {
    if listen.ip().is_unspecified() {
        listen.set_ip(match listen {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    listen.to_string()
}

fn read_token(file: &Path) -> anyhow::Result<Secret> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("read the token in {}", file.display()))?;
    Ok(Secret::new(text.trim().to_owned()))
}

fn show(health: &Value, args: &StatusArgs) -> anyhow::Result<()> {
    clear(args)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        return Ok(writeln!(out, "{health:#}")?);
    }
    write!(out, "{}", render(health))?;
    Ok(out.flush()?)
}

fn clear(args: &StatusArgs) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if args.watch && !args.json && out.is_terminal() {
        crossterm::execute!(
            out,
            crossterm::terminal::Clear(crossterm::terminal::ClearType::All),
            crossterm::cursor::MoveTo(0, 0)
        )?;
    }
    Ok(())
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn age(seconds: Option<f64>) -> String {
    match seconds {
        None => "-".to_owned(),
        Some(seconds) if seconds < 90.0 => format!("{seconds:.0} s"),
        Some(seconds) if seconds < 5400.0 => format!("{:.0} min", seconds / 60.0),
        Some(seconds) => format!("{:.1} h", seconds / 3600.0),
    }
}

fn render(health: &Value) -> String {
    let mut out = format!("{} · {}", text(&health["node"]["name"]), text(&health["state"]));
    let buffer = &health["buffer"];
    let mib = |value: &Value| value.as_f64().unwrap_or(0.0) / 1_048_576.0;
    out.push_str(&format!(
        " · buffer {:.0} of {:.0} MiB in {} generations\n",
        mib(&buffer["bytes"]),
        mib(&buffer["quota_bytes"]),
        text(&buffer["generations"])
    ));
    for because in health["because"].as_array().into_iter().flatten() {
        out.push_str(&format!("  ! {}\n", text(because)));
    }
    for warning in health["warnings"].as_array().into_iter().flatten() {
        out.push_str(&format!("  · {}\n", text(warning)));
    }
    out.push_str(&table(health).to_string());
    out.push('\n');
    out.push_str(&outside(health));
    out
}

/// A line per dependency: whether it answers, and its breaker where that is not closed or has tripped.
fn outside(health: &Value) -> String {
    let mut out = String::new();
    for (name, status) in health["dependencies"].as_object().into_iter().flatten() {
        let word = match status["up"].as_bool() {
            Some(true) => "answers",
            Some(false) => "is away",
            None => "not tried yet",
        };
        let breaker = &status["breaker"];
        let mut rest = String::new();
        if breaker["state"].as_str().is_some_and(|state| state != "closed") {
            rest.push_str(&format!(", breaker {}", text(&breaker["state"]).replace('_', " ")));
        }
        if let Some(next) = breaker["next_trial"].as_i64() {
            let left = (next - Arrival::now().as_micros()).max(0) as f64 / 1e6;
            rest.push_str(&format!(", next trial in {left:.0} s"));
        }
        if let Some(trips) = breaker["trips"].as_u64().filter(|trips| *trips > 0) {
            rest.push_str(&format!(", tripped {trips} times"));
        }
        out.push_str(&format!("{name} {word}{rest}\n"));
    }
    out
}

fn table(health: &Value) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header([
        "STREAM",
        "INPUT",
        "RECEIVED",
        "AGE",
        "SINK",
        "STATE",
        "DELIVERED",
        "PENDING",
        "DEAD",
        "FILTERED",
    ]);
    for stream in health["streams"].as_array().into_iter().flatten() {
        let status = &stream["status"];
        let input = match (status["subscribed"] == true, stream["silence"].is_object()) {
            (false, _) => "away",
            (true, true) => "silent",
            (true, false) => "active",
        };
        let mut first = vec![
            text(&stream["name"]),
            input.to_owned(),
            text(&status["sequence"]),
            age(stream["data_age_seconds"].as_f64()),
        ];
        for sink in stream["sinks"].as_array().into_iter().flatten() {
            let books = &sink["status"]["books"];
            let count = |name: &str| books[name].as_u64();
            let filtered = count("filtered").zip(count("incomplete")).map(|(f, i)| f + i);
            let number = |n: Option<u64>| n.map_or("-".to_owned(), |n| n.to_string());
            let mut row: Vec<Cell> = first.drain(..).map(Cell::new).collect();
            row.resize_with(4, || Cell::new(""));
            row.extend([Cell::new(text(&sink["sink"])), Cell::new(text(&sink["status"]["state"]))]);
            let numbers = [
                number(count("delivered")),
                text(&sink["pending"]),
                text(&sink["status"]["dead_letters"]),
                number(filtered),
            ];
            let right = |n: String| Cell::new(n).set_alignment(CellAlignment::Right);
            row.extend(numbers.map(right));
            table.add_row(row);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_named_once_and_each_sink_has_a_line() {
        let sink = |name: &str| {
            serde_json::json!({"sink": name, "pending": 2, "status": {"state": "delivering",
                "dead_letters": 1, "books": {"delivered": 7, "filtered": 1, "incomplete": 2}}})
        };
        let health = serde_json::json!({
            "state": "degraded", "because": ["kafka:main is away: refused"],
            "node": {"name": "n1"}, "buffer": {"bytes": 1048576, "quota_bytes": 2097152, "generations": 1},
            "dependencies": {"kafka:main": {"up": false,
                "breaker": {"state": "half_open", "trips": 2, "next_trial": null}}},
            "streams": [{"name": "energy", "data_age_seconds": 120.0,
                "status": {"subscribed": true, "sequence": 12},
                "sinks": [sink("kafka"), sink("energy_consumption")]}],
        });
        let shown = render(&health);
        assert_eq!(shown.matches("energy ").count(), 1, "{shown}");
        assert!(shown.contains("n1 · degraded · buffer 1 of 2 MiB"), "{shown}");
        assert!(shown.contains("! kafka:main is away"), "{shown}");
        assert!(shown.contains("energy_consumption"), "{shown}");
        assert!(shown.contains("2 min"), "{shown}");
        assert!(
            shown.contains("kafka:main is away, breaker half open, tripped 2 times"),
            "{shown}"
        );
    }
}
