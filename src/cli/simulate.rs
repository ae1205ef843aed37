//! `telemetry simulate`: devices for a node to listen to.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;

use super::Exit;
use crate::config::{self, BackoffSettings, BrokerSettings, MqttVersion, Settings};
use crate::simulate::{self, FaultRates, Feed, Kind, Order, Totals};

/// Faster than any broker takes; a larger number is a slip of the pen.
const RATE_MAX: f64 = 1_000_000.0;

#[derive(Debug, clap::Args)]
pub struct SimulateArguments {
    /// Take brokers and topics of the configured streams that a simulated device is known for
    #[arg(long, value_name = "FILE", default_value = "/etc/telemetry/telemetry.toml")]
    pub config: PathBuf,
    /// Publish to this broker instead of reading a configuration
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "config", requires = "stream")]
    pub broker: Option<String>,
    /// Only these streams, each with messages per second or, as xN, a multiple of its natural rate
    #[arg(long, value_name = "NAME[=RATE]")]
    pub stream: Vec<String>,
    /// Of each stream without a rate of its own: messages per second or, as xN, a multiple
    #[arg(long, value_name = "RATE", default_value = "x1")]
    pub rate: String,
    /// The same seed makes the same values
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// End after this many seconds [default: at Ctrl-C]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub duration: Option<u64>,
    /// End after this many messages of each stream
    #[arg(long, value_name = "MESSAGES", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Devices of each stream; they take turns
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub devices: u64,
    /// Probabilities, e.g. bad-value=0.01,gap=0.01,duplicate=0.01,wrong-clock=0.01,malformed=0.01
    #[arg(long, value_name = "NAME=PROBABILITY,…", default_value = "")]
    pub faults: String,
    /// Write a line for each message the broker acknowledged
    #[arg(long, value_name = "FILE")]
    pub ledger: Option<PathBuf>,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command and answers the exit code.
pub fn simulate(arguments: &SimulateArguments) -> Exit {
    let order = match order(arguments) {
        Ok(order) => order,
        Err((code, problem)) => {
            eprintln!("{problem}");
            return code;
        }
    };
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("cannot start threads: {error}");
                return Exit::Failed;
            }
        };
    let shown = std::io::stderr().is_terminal();
    let outcome = runtime.block_on(async {
        let progress = |totals: &Totals| {
            if shown {
                show_progress(totals);
            }
        };
        simulate::run(order, stop_signal(), progress).await
    });
    if shown {
        eprintln!();
    }
    match outcome {
        Ok(totals) => {
            summarise(&totals, arguments.json);
            Exit::Fine
        }
        Err(error) => {
            eprintln!("{error}");
            Exit::Failed
        }
    }
}

type Refusal = (Exit, String);

fn order(arguments: &SimulateArguments) -> Result<Order, Refusal> {
    let usage = |problem: String| (Exit::Usage, problem);
    let faults = FaultRates::parse(&arguments.faults).map_err(|error| usage(error.to_string()))?;
    let default_rate = Rate::parse(&arguments.rate).map_err(usage)?;
    let chosen = arguments
        .stream
        .iter()
        .map(|text| Choice::parse(text, default_rate))
        .collect::<Result<Vec<Choice>, String>>()
        .map_err(usage)?;
    let devices = usize::try_from(arguments.devices).unwrap_or(1);
    let (brokers, feeds) = match &arguments.broker {
        Some(address) => feeds_of_broker(address, &chosen, devices).map_err(usage)?,
        None => {
            let environment = |name: &str| std::env::var(name).ok();
            let loaded = config::load(&arguments.config, &environment)
                .map_err(|report| (Exit::Configuration, report.to_string()))?;
            feeds_of_settings(&loaded.settings, &chosen, default_rate, devices).map_err(usage)?
        }
    };
    Ok(Order {
        brokers,
        feeds,
        seed: arguments.seed,
        devices,
        faults,
        duration: arguments.duration.map(Duration::from_secs),
        count: arguments.count,
        ledger: arguments.ledger.clone(),
    })
}

/// Messages per second of a stream.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rate {
    PerSecond(f64),
    /// Times what the devices do by nature.
    Multiple(f64),
}

impl Rate {
    fn parse(text: &str) -> Result<Self, String> {
        let number = |digits: &str| {
            let value: Option<f64> = digits.parse().ok();
            value.filter(|value| *value > 0.0 && *value <= RATE_MAX).ok_or_else(|| {
                format!(
                    "{text:?} is no rate: give messages per second (5, 0.5) or a multiple (x10)"
                )
            })
        };
        match text.strip_prefix('x') {
            Some(digits) => number(digits).map(Rate::Multiple),
            None => number(text).map(Rate::PerSecond),
        }
    }

    fn per_second(self, kind: Kind, devices: usize) -> f64 {
        match self {
            Rate::PerSecond(rate) => rate,
            Rate::Multiple(times) => times * devices as f64 / kind.natural_interval().as_secs_f64(),
        }
    }
}

/// A stream named on the command line.
#[derive(Debug)]
struct Choice {
    name: String,
    rate: Rate,
}

impl Choice {
    fn parse(text: &str, default_rate: Rate) -> Result<Self, String> {
        let (name, rate) = match text.split_once('=') {
            Some((name, rate)) => (name, Rate::parse(rate)?),
            None => (text, default_rate),
        };
        Ok(Choice { name: name.to_owned(), rate })
    }
}

type Feeds = (Vec<BrokerSettings>, Vec<Feed>);

fn feeds_of_broker(address: &str, chosen: &[Choice], devices: usize) -> Result<Feeds, String> {
    let refused = || format!("{address:?} is no broker: give host:port");
    let (host, port) = address.rsplit_once(':').ok_or_else(refused)?;
    let port = port.parse().map_err(|_| refused())?;
    if host.is_empty() {
        return Err(refused());
    }
    let feeds = chosen.iter().map(|choice| {
        let kind = known_kind(&choice.name)?;
        Ok(Feed {
            stream: choice.name.clone(),
            kind,
            broker: 0,
            topic_filter: kind.topic_filter().to_owned(),
            rate: choice.rate.per_second(kind, devices),
        })
    });
    let feeds = feeds.collect::<Result<Vec<Feed>, String>>()?;
    Ok((vec![plain_broker(host, port)], feeds))
}

fn known_kind(name: &str) -> Result<Kind, String> {
    Kind::of_stream(name).ok_or_else(|| {
        let names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.stream()).collect();
        format!("no device is known for stream {name:?}: there are {}", names.join(", "))
    })
}

fn feeds_of_settings(
    settings: &Settings,
    chosen: &[Choice],
    default_rate: Rate,
    devices: usize,
) -> Result<Feeds, String> {
    for choice in chosen {
        known_kind(&choice.name)?;
        if !settings.streams.keys().any(|name| name.as_str() == choice.name) {
            return Err(format!("the configuration has no stream {:?}", choice.name));
        }
    }
    let mut brokers: Vec<(&str, BrokerSettings)> = Vec::new();
    let mut feeds = Vec::new();
    for (name, stream) in &settings.streams {
        let choice = chosen.iter().find(|choice| choice.name == name.as_str());
        let (Some(kind), true) =
            (Kind::of_stream(name.as_str()), chosen.is_empty() || choice.is_some())
        else {
            continue;
        };
        let rate = choice.map_or(default_rate, |choice| choice.rate);
        feeds.push(Feed {
            stream: name.to_string(),
            kind,
            broker: broker_index(&mut brokers, &stream.broker, settings)?,
            topic_filter: stream.topic_filter.clone(),
            rate: rate.per_second(kind, devices),
        });
    }
    if feeds.is_empty() {
        return Err("the configuration has no stream a simulated device is known for".to_owned());
    }
    Ok((brokers.into_iter().map(|(_, broker)| broker).collect(), feeds))
}

/// One connection per broker that is published to.
fn broker_index<'s>(
    brokers: &mut Vec<(&'s str, BrokerSettings)>,
    name: &'s str,
    settings: &Settings,
) -> Result<usize, String> {
    if let Some(known) = brokers.iter().position(|(known, _)| *known == name) {
        return Ok(known);
    }
    let broker = settings.brokers.get(name);
    let broker = broker.ok_or_else(|| format!("the configuration has no broker {name:?}"))?;
    brokers.push((name, broker.clone()));
    Ok(brokers.len() - 1)
}

/// A broker on this network: no TLS, no password.
fn plain_broker(host: &str, port: u16) -> BrokerSettings {
    BrokerSettings {
        host: host.to_owned(),
        port,
        version: MqttVersion::V5,
        tls: None,
        username: None,
        password: None,
        keepalive: Duration::from_secs(30),
        session_expiry: Duration::ZERO,
        connect_timeout: Duration::from_secs(10),
        operation_timeout: Duration::from_secs(30),
        reconnect: BackoffSettings { min: Duration::from_millis(200), max: Duration::from_secs(5) },
        breaker: Default::default(),
        receive_maximum: u16::MAX,
        unacknowledged_messages_max: usize::from(u16::MAX),
        unacknowledged_bytes_max: 64 << 20,
        packet_bytes_max: 1 << 20,
    }
}

/// True after the first SIGINT or SIGTERM.
fn stop_signal() -> watch::Receiver<bool> {
    use tokio::signal::unix::{SignalKind, signal};
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        let terminated = async {
            match signal(SignalKind::terminate()) {
                Ok(mut terminate) => terminate.recv().await,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminated => {}
        }
        sender.send_replace(true);
        // The receiver asks the sender, so it has to live on.
        sender.closed().await;
    });
    receiver
}

fn show_progress(totals: &Totals) {
    let streams: Vec<String> = totals
        .streams
        .iter()
        .map(|(name, totals)| format!("{name} {}", totals.acknowledged))
        .collect();
    let problem = totals.problem.as_deref().map(|text| format!("  ({text})")).unwrap_or_default();
    // One line, rewritten in place; a screen that is gone is no reason to stop.
    let _ = write!(
        std::io::stderr(),
        "\r\x1b[K{:.0} s, acknowledged: {}{problem}",
        totals.seconds,
        streams.join(", ")
    );
}

fn summarise(totals: &Totals, json: bool) {
    if json {
        let streams: serde_json::Map<String, serde_json::Value> = totals
            .streams
            .iter()
            .map(|(name, totals)| (name.clone(), serde_json::json!(totals)))
            .collect();
        let acknowledged = totals.acknowledged();
        println!(
            "{}",
            serde_json::json!({
                "seconds": totals.seconds, "acknowledged": acknowledged, "streams": streams,
            })
        );
        return;
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["stream", "published", "acknowledged", "refused", "unconfirmed", "faults"]);
    for (name, totals) in &totals.streams {
        let faults: Vec<String> =
            totals.faults.iter().map(|(name, count)| format!("{name} {count}")).collect();
        table.add_row([
            name.clone(),
            totals.published.to_string(),
            totals.acknowledged.to_string(),
            totals.refused.to_string(),
            totals.unconfirmed.to_string(),
            faults.join(", "),
        ]);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    fn parsed(line: &str) -> Result<SimulateArguments, clap::Error> {
        let command = SimulateArguments::augment_args(clap::Command::new("simulate"));
        let matches = command.try_get_matches_from(line.split(' '))?;
        SimulateArguments::from_arg_matches(&matches)
    }

    #[test]
    fn a_broker_needs_streams_and_excludes_a_configuration() {
        let arguments = parsed("simulate --broker h:1 --stream energy=5 --count 3").unwrap();
        let order = order(&arguments).unwrap();
        assert_eq!((order.feeds.len(), order.count, order.duration), (1, Some(3), None));
        assert!(parsed("simulate --config f --duration 3 --json").is_ok());
        for line in [
            "simulate --broker h:1",
            "simulate --broker h:1 --stream energy --config f",
            "simulate --duration 0",
            "simulate --devices 0",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[test]
    fn the_configured_streams_share_a_connection_per_broker() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/homelab/telemetry.toml");
        let arguments = parsed(&format!("simulate --config {file} --rate 2")).unwrap();
        let order = order(&arguments).unwrap();
        assert_eq!((order.brokers.len(), order.feeds.len()), (1, 5));
        assert!(order.feeds.iter().all(|feed| feed.rate == 2.0));
        let nowhere = parsed("simulate --config /nowhere/telemetry.toml").unwrap();
        assert_eq!(super::order(&nowhere).unwrap_err().0, Exit::Configuration);
    }

    #[test]
    fn rates_are_numbers_or_multiples_of_nature() {
        assert_eq!(Rate::parse("50"), Ok(Rate::PerSecond(50.0)));
        assert_eq!(Rate::parse("x10"), Ok(Rate::Multiple(10.0)));
        assert_eq!(Rate::Multiple(10.0).per_second(Kind::Heatpump, 1), 2.0);
        assert_eq!(Rate::Multiple(1.0).per_second(Kind::Plug, 60), 1.0);
        for text in ["", "0", "-1", "x", "NaN", "inf", "x0", "1e9"] {
            assert!(Rate::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_broker_of_the_command_line_feeds_the_named_streams() {
        let choices = |texts: &[&str]| {
            let parse = |text: &&str| Choice::parse(text, Rate::Multiple(1.0)).unwrap();
            texts.iter().map(parse).collect::<Vec<Choice>>()
        };
        let chosen = choices(&["energy=100", "plug"]);
        let (brokers, feeds) = feeds_of_broker("127.0.0.1:1883", &chosen, 6).unwrap();
        assert_eq!((brokers[0].host.as_str(), brokers[0].port), ("127.0.0.1", 1883));
        let rates: Vec<f64> = feeds.iter().map(|feed| feed.rate).collect();
        assert_eq!(rates, [100.0, 0.1]);
        assert_eq!(feeds[1].topic_filter, "tele/+/STATE");
        assert!(feeds_of_broker("127.0.0.1:1883", &choices(&["wind"]), 1).is_err());
        for address in ["", "host", ":1883", "host:port", "host:70000"] {
            assert!(feeds_of_broker(address, &[], 1).is_err(), "{address}");
        }
    }
}
