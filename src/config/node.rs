//! `[node]`, `[buffer]`, `[http]`, `[log]`, `[supervision]`.

use super::report::{At, Problems};
use super::schema::*;
use super::section::Section;
use super::settings::*;
use super::{Context, access, leaf};
use crate::domain::NodeName;

pub static NODE: Group = Group {
    doc: "The node itself.",
    settings: &[
        required(
            "name",
            Kind::Name,
            "Signs rows, cursors and MQTT client ids. Keep it: under another name the node \
             has no cursors and no sessions.",
        ),
        text(
            "state_dir",
            Kind::Path,
            "/var/lib/telemetry",
            "Folder of the buffer, on a disk of its own machine. Whoever deletes it deletes \
             what was kept and not yet delivered.",
        ),
        integer(
            "drain_timeout_seconds",
            (0, 3600),
            20,
            "After SIGTERM the sinks may work this long; the rest stays in the buffer for \
             the next start.",
        ),
        integer(
            "stream_threads",
            (1, 64),
            2,
            "Threads the streams are spread over. More help only with many busy streams.",
        ),
    ],
    refused: &[],
};

pub static BUFFER: Group = Group {
    doc: "The durable buffer between MQTT and the sinks.",
    settings: &[
        integer(
            "quota_bytes",
            (16 * MIB, 64 * TIB),
            8 * GIB,
            "All that is kept and not yet delivered. Above it the node stops acknowledging \
             and the broker keeps the rest. Some 1.2 kB per energy message: 8 GiB outlast 7 \
             million of them.",
        ),
        integer(
            "generation_bytes",
            (MIB, 4 * GIB),
            64 * MIB,
            "A generation is closed above this size and removed once every sink has passed \
             it. Smaller gives space back sooner and costs more files. About one that is \
             delivered already stays beside the one being written.",
        ),
        integer(
            "sync_linger_ms",
            (0, 1000),
            3,
            "The oldest waiting message waits this long for company before it is synced to \
             disk and acknowledged. 0 = lowest latency, more syncs.",
        ),
        integer(
            "group_messages_max",
            (1, 65_536),
            1024,
            "A group this large is synced without waiting any longer.",
        ),
        integer(
            "tail_bytes_max",
            (MIB, 4 * GIB),
            16 * MIB,
            "Newest records held in memory for sinks that are caught up, all streams \
             together. A sink further behind reads the disk.",
        ),
        integer(
            "dead_letter_quota_bytes",
            (MIB, TIB),
            256 * MIB,
            "Messages no sink could take, kept until a person replays or purges them. When \
             it is full the sink concerned holds rather than drops.",
        ),
        integer(
            "ballast_bytes",
            (0, GIB),
            8 * MIB,
            "A file of this size is given up when the disk is full, so that the buffer can \
             still be opened.",
        ),
        integer(
            "free_bytes_min",
            (0, 64 * TIB),
            256 * MIB,
            "Free space of the file system below which the node stops acknowledging, \
             whoever uses it up.",
        ),
    ],
    refused: &[],
};

pub static HTTP: Group = Group {
    doc: "Health, metrics and the streams' state over HTTP. On any other address than loopback \
             everything but the probes needs a token (`telemetry token create`); orders need one everywhere.",
    settings: &[
        text(
            "listen",
            Kind::Address,
            "127.0.0.1:9464",
            "Address and port. Another address than loopback needs `[http.tls]` or \
             `clear_text_allowed`. Port 0 takes a free one.",
        ),
        flag(
            "clear_text_allowed",
            false,
            "Acknowledges that tokens and answers travel readable for whoever is on the way. For a \
             network of its own, or behind a proxy that speaks TLS.",
        ),
        flag(
            "loopback_needs_token",
            false,
            "Demands tokens on loopback too: behind a proxy every caller comes from there.",
        ),
        integer(
            "requests_per_minute_max",
            (1, 1_000_000),
            600,
            "Of one token and address, where tokens are demanded. Above it the answer is 429 \
             with the seconds to wait.",
        ),
        integer(
            "connections_per_peer_max",
            (1, 512),
            64,
            "Open at a time from one address (an IPv6 /64 counts as one). Further ones are closed \
             at once. Raise it behind a proxy: there all come from one address.",
        ),
        optional_section("tls", &HTTP_TLS, "plain HTTP"),
    ],
    refused: &[],
};

pub static HTTP_TLS: Group = Group {
    doc: "HTTPS, TLS 1.2 or newer. Renewed files count from the next connection on.",
    settings: &[
        required(
            "certificate_file",
            Kind::Path,
            "PEM file of the certificate, with its chain. `telemetry certs init` makes one.",
        ),
        required("key_file", Kind::Path, "PEM file of its private key."),
    ],
    refused: &[],
};

pub static LOG: Group = Group {
    doc: "Log lines: changes of state, never every message.",
    settings: &[
        text(
            "format",
            Kind::Choice(&["auto", "text", "json", "journald"]),
            "auto",
            "`auto`: the journal when started by systemd, text on a terminal, JSON otherwise.",
        ),
        text(
            "filter",
            Kind::Text,
            "info",
            "Levels by part, e.g. `info,telemetry::stream=debug`. Debug is for hours, not \
             for months.",
        ),
    ],
    refused: &[("level", "called `filter` here, e.g. filter = \"debug\"")],
};

pub static SUPERVISION: Group = Group {
    doc: "What happens to a part that fails: it is made anew, and parked when that does not help.",
    settings: &[
        integer(
            "restarts_max",
            (0, 1000),
            5,
            "Restarts within `restart_window_seconds` before a part is parked. The other \
             parts never notice.",
        ),
        integer(
            "restart_window_seconds",
            (1, DAY_SECONDS),
            60,
            "Window in which restarts are counted.",
        ),
        integer(
            "backoff_min_ms",
            (10, HOUR_MS),
            200,
            "Pause before the first restart; it doubles.",
        ),
        integer(
            "backoff_max_ms",
            (10, HOUR_MS),
            10_000,
            "Longest pause between restarts, and up to 30 % more.",
        ),
        integer(
            "parked_retry_seconds",
            (1, DAY_SECONDS),
            300,
            "A parked part is tried again this often.",
        ),
        integer(
            "stall_timeout_seconds",
            (5, DAY_SECONDS),
            60,
            "A part with work waiting and no progress, or on a thread that stands still, for \
             this long counts as stalled and is made anew.",
        ),
    ],
    refused: &[],
};

pub fn node(root: &Section, context: &mut Context<'_>) -> Option<NodeSettings> {
    let section = root.section("node")?;
    let state_dir = context.resolve(&section.text("state_dir"));
    if !state_dir.is_dir() {
        let rule = format!("{} does not exist yet; the node makes it", state_dir.display());
        context.problems.warn(section.at("state_dir"), rule);
    }
    Some(NodeSettings {
        // A name that is wrong or missing is reported; the rest is still checked.
        name: NodeName::parse(&section.text("name")).or_else(|_| NodeName::parse("node")).ok()?,
        state_dir,
        drain_timeout: section.duration("drain_timeout_seconds"),
        stream_threads: section.integer("stream_threads"),
    })
}

/// Fewer and a sink that lags in the oldest generation would hold the whole quota.
const GENERATIONS_MIN: u64 = 4;

pub fn buffer(root: &Section, problems: &mut Problems) -> Option<BufferSettings> {
    let section = root.section("buffer")?;
    let settings = BufferSettings {
        quota_bytes: section.integer("quota_bytes"),
        generation_bytes: section.integer("generation_bytes"),
        sync_linger: section.duration("sync_linger_ms"),
        group_messages_max: section.integer("group_messages_max"),
        tail_bytes_max: section.integer("tail_bytes_max"),
        dead_letter_quota_bytes: section.integer("dead_letter_quota_bytes"),
        ballast_bytes: section.integer("ballast_bytes"),
        free_bytes_min: section.integer("free_bytes_min"),
    };
    let least = settings.generation_bytes.saturating_mul(GENERATIONS_MIN);
    if settings.quota_bytes < least {
        let name = if section.has("quota_bytes") { "quota_bytes" } else { "generation_bytes" };
        problems.error(
            section.at(name),
            format!("quota_bytes must be at least {GENERATIONS_MIN} × generation_bytes = {least}"),
        );
    }
    Some(settings)
}

pub fn http(root: &Section, context: &mut Context<'_>) -> Option<HttpSettings> {
    let section = root.section("http")?;
    let listen: std::net::SocketAddr =
        section.text("listen").parse().unwrap_or_else(|_| ([127, 0, 0, 1], 0).into());
    let certificate = section.section("tls").and_then(|tls| access::certificate(tls, context));
    clear_text_counts(section, listen, &mut context.problems);
    let exposed = !listen.ip().is_loopback();
    if exposed && !section.has("tls") {
        if section.boolean("clear_text_allowed") {
            let rule = "tokens and answers travel in clear text";
            context.problems.warn(section.at("clear_text_allowed"), rule);
        } else {
            context.problems.error_with(
                section.at("listen"),
                "reachable from other machines, and tokens would travel in clear text",
                Some(
                    "add [http.tls], or clear_text_allowed = true when the network is yours alone"
                        .into(),
                ),
            );
        }
    }
    Some(HttpSettings {
        listen,
        certificate,
        guarded: exposed || section.boolean("loopback_needs_token"),
        requests_per_minute_max: section.integer("requests_per_minute_max"),
        connections_per_peer_max: section.integer("connections_per_peer_max"),
    })
}

fn clear_text_counts(section: &Section, listen: std::net::SocketAddr, problems: &mut Problems) {
    if !section.boolean("clear_text_allowed") {
        return;
    }
    let rule = if section.has("tls") {
        "has no effect beside [http.tls]"
    } else if listen.ip().is_loopback() {
        "has no effect: only this machine reaches the listener"
    } else {
        return;
    };
    problems.warn(section.at("clear_text_allowed"), rule);
}

pub fn log(root: &Section, problems: &mut Problems) -> Option<LogSettings> {
    let section = root.section("log")?;
    let filter = section.text("filter");
    if let Err(error) = tracing_subscriber::EnvFilter::try_new(&filter) {
        problems.error(section.at("filter"), format!("no log filter: {error}"));
    }
    let formats = [
        ("auto", LogFormat::Auto),
        ("text", LogFormat::Text),
        ("json", LogFormat::Json),
        ("journald", LogFormat::Journald),
    ];
    Some(LogSettings { format: section.pick("format", &formats), filter })
}

pub fn supervision(root: &Section, problems: &mut Problems) -> Option<SupervisionSettings> {
    let section = root.section("supervision")?;
    let pauses = backoff(section, "backoff_min_ms", "backoff_max_ms", problems);
    Some(SupervisionSettings {
        restarts_max: section.integer("restarts_max"),
        restart_window: section.duration("restart_window_seconds"),
        backoff_min: pauses.min,
        backoff_max: pauses.max,
        parked_retry: section.duration("parked_retry_seconds"),
        stall_timeout: section.duration("stall_timeout_seconds"),
    })
}

/// A pair of pauses, the first not above the second.
pub fn backoff(
    section: &Section,
    min: &'static str,
    max: &'static str,
    problems: &mut Problems,
) -> BackoffSettings {
    let settings = BackoffSettings { min: section.duration(min), max: section.duration(max) };
    if settings.min > settings.max {
        let at = section.at(if section.has(min) { min } else { max });
        problems.error(at, format!("{min} must not be above {max}"));
    }
    settings
}

pub const BREAKER_FAILURES: Setting = integer(
    "breaker_failures",
    (1, 1000),
    5,
    "So many failures in a row, of all parts that use it together (or half of at least ten calls), and it is left \
             alone but for one trial at a time.",
);
pub const BREAKER_COOL_DOWN: Setting = integer(
    "breaker_cool_down_seconds",
    (1, 3600),
    3,
    "Between two trials, instead of the pauses above. The first one that works lets everybody go on at once.",
);

pub fn breaker(section: &Section) -> BreakerSettings {
    BreakerSettings {
        failures: section.integer("breaker_failures"),
        cool_down: section.duration("breaker_cool_down_seconds"),
    }
}

/// A reference to a table by its name: reports one that leads nowhere.
pub fn reference(
    root: &Section,
    tables: &'static str,
    from: &Section,
    setting: &'static str,
    problems: &mut Problems,
) -> String {
    let name = from.text(setting);
    let known: Vec<&str> = root.sections(tables).map(|(key, _)| key.as_str()).collect();
    if !name.is_empty() && !known.contains(&name.as_str()) {
        let hint = super::report::did_you_mean(&name, known.iter().copied()).unwrap_or_else(|| {
            if known.is_empty() {
                format!("define [{tables}.{name}]")
            } else {
                format!("defined: {}", leaf::quoted(&known))
            }
        });
        let at: At = from.at(setting);
        problems.error_with(at, format!("there is no [{tables}.{name}]"), Some(hint));
    }
    name
}
