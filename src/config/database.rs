//! `[databases.<name>]`.

use super::Context;
use super::access::{
    self, PASSWORD_CREDENTIAL, PASSWORD_ENV, PASSWORD_FILE, PASSWORD_REFUSED, TLS,
};
use super::leaf;
use super::node::{BREAKER_COOL_DOWN, BREAKER_FAILURES, backoff, breaker};
use super::report::Problems;
use super::schema::*;
use super::section::Section;
use super::settings::*;

pub static DATABASE: Group = Group {
    doc: "A PostgreSQL database, with or without TimescaleDB. All table sinks in it \
             share one pool.",
    settings: &[
        required("host", Kind::Text, "Name, address, or the folder of a Unix socket."),
        integer("port", (1, 65_535), 5432, "Port."),
        required("dbname", Kind::Text, "The database on that server."),
        required(
            "user",
            Kind::Text,
            "Role. It needs rights to read and write the tables, and without `migrator` to create them.",
        ),
        PASSWORD_FILE,
        PASSWORD_CREDENTIAL,
        PASSWORD_ENV,
        optional_section("migrator", &MIGRATOR, "`user` does all of it"),
        text(
            "tls_mode",
            Kind::Choice(&["verify_full", "off"]),
            "verify_full",
            "`verify_full`: TLS with certificate and host name checked. `off` must be \
             written: rows and password then travel in clear text.",
        ),
        optional_section("tls", &TLS, "the public web authorities"),
        text(
            "schema",
            Kind::Identifier,
            "public",
            "Where the tables and the node's bookkeeping live. Old and new systems side by \
             side use two schemas.",
        ),
        integer(
            "connections_max",
            (2, 1000),
            8,
            "Connections the table sinks share: one per busy sink. The migrator has another beside \
             them, for migrations, upkeep and jobs. With `migrator`, a sink that has partitions made takes one \
             more meanwhile.",
        ),
        integer("connect_timeout_seconds", (1, 3600), 10, "For connecting and logging in."),
        integer("pool_timeout_seconds", (1, 3600), 30, "Waiting for a free connection."),
        integer(
            "statement_timeout_seconds",
            (1, 3600),
            30,
            "For one statement of a writer, and for a transaction of it as a whole; then it is tried again.",
        ),
        integer("query_timeout_seconds", (1, DAY_SECONDS), 300, "For a migration or a job."),
        integer("retry_min_ms", (10, HOUR_MS), 500, "First pause before trying again; it doubles."),
        integer(
            "retry_max_ms",
            (10, HOUR_MS),
            30_000,
            "Longest pause before trying again, and up to 30 % more.",
        ),
        BREAKER_FAILURES,
        BREAKER_COOL_DOWN,
        optional(
            "migrations_dir",
            Kind::Path,
            "the node creates nothing but its own bookkeeping",
            "Folder with this database's numbered SQL files, applied before the first row \
             is written.",
        ),
        integer(
            "migration_wait_seconds",
            (1, DAY_SECONDS),
            120,
            "The migrator waits this long for the database before it says so, and goes on waiting.",
        ),
        sections("jobs", &JOB, KeyRule::Name),
    ],
    refused: &[
        PASSWORD_REFUSED,
        ("database", "called `dbname` here"),
        ("username", "called `user` here"),
        ("url", "write host, port, dbname and user; the password comes from a file"),
        ("sslmode", "called `tls_mode` here: \"verify_full\" or \"off\""),
    ],
};

static MIGRATOR: Group = Group {
    doc: "Another role that migrates, makes and drops partitions and runs the jobs, so that `user` can read and write \
             rows and nothing else.",
    settings: &[
        required("user", Kind::Text, "Role that owns the tables."),
        PASSWORD_FILE,
        PASSWORD_CREDENTIAL,
        PASSWORD_ENV,
    ],
    refused: &[PASSWORD_REFUSED, ("username", "called `user` here")],
};

pub static JOB: Group = Group {
    doc: "A SQL function the node calls on a schedule: `SELECT function(from, to)`, e.g. \
             a roll-up.",
    settings: &[
        required(
            "function",
            Kind::Text,
            "Its name, without parentheses; it takes two `timestamptz`.",
        ),
        integer("interval_seconds", (1, 30 * DAY_SECONDS), 60, "Between two calls."),
        integer(
            "lookback_seconds",
            (1, YEAR_SECONDS),
            2 * DAY_SECONDS,
            "The range handed over ends now and begins this long ago. Rows that come later \
             than this are not seen.",
        ),
    ],
    refused: &[],
};

pub fn database(section: &Section, context: &mut Context<'_>) -> DatabaseSettings {
    let password = access::password(section, context);
    let migrator = section.section("migrator").map(|login| LoginSettings {
        user: login.text("user"),
        password: access::password(login, context),
    });
    let tls_mode = section
        .pick("tls_mode", &[("verify_full", DatabaseTls::VerifyFull), ("off", DatabaseTls::Off)]);
    let tls = section.section("tls").map(|tls| access::tls(tls, context));
    let host = section.text("host");
    if tls_mode == DatabaseTls::Off {
        if tls.is_some() {
            context.problems.error(section.at("tls"), "tls_mode is \"off\"; leave one of them out");
        } else if !access::is_local(&host) {
            let rule = "rows and password travel in clear text";
            context.problems.warn(section.at("tls_mode"), rule);
        }
    } else if host.starts_with('/') {
        let rule = "a Unix socket has no TLS; write tls_mode = \"off\"";
        context.problems.error(section.at("host"), rule);
    }
    DatabaseSettings {
        host,
        port: section.integer("port"),
        dbname: section.text("dbname"),
        user: section.text("user"),
        password,
        migrator,
        tls_mode,
        tls: if tls_mode == DatabaseTls::Off { tls } else { Some(tls.unwrap_or_default()) },
        schema: section.text("schema"),
        connections_max: section.integer("connections_max"),
        connect_timeout: section.duration("connect_timeout_seconds"),
        pool_timeout: section.duration("pool_timeout_seconds"),
        statement_timeout: section.duration("statement_timeout_seconds"),
        query_timeout: section.duration("query_timeout_seconds"),
        retry: backoff(section, "retry_min_ms", "retry_max_ms", &mut context.problems),
        breaker: breaker(section),
        migrations_dir: migrations_dir(section, context),
        migration_wait: section.duration("migration_wait_seconds"),
        jobs: section
            .sections("jobs")
            .map(|(name, section)| (name.clone(), job(section, &mut context.problems)))
            .collect(),
    }
}

fn migrations_dir(section: &Section, context: &mut Context<'_>) -> Option<std::path::PathBuf> {
    let folder = context.resolve(&section.optional_text("migrations_dir")?);
    if !folder.is_dir() {
        let rule = format!("there is no folder {}", folder.display());
        context.problems.error(section.at("migrations_dir"), rule);
    }
    Some(folder)
}

fn job(section: &Section, problems: &mut Problems) -> JobSettings {
    let function = section.text("function");
    let parts: Vec<&str> = function.split('.').collect();
    let named = parts.len() <= 2 && parts.iter().all(|part| leaf::identifier(part).is_ok());
    if section.has("function") && (!named || function.contains(['(', ')', ' '])) {
        let rule =
            "must be a function's name, e.g. \"refresh_rollups\" or \"public.refresh_rollups\"";
        problems.error(section.at("function"), rule);
    }
    JobSettings {
        function,
        interval: section.duration("interval_seconds"),
        lookback: section.duration("lookback_seconds"),
    }
}
