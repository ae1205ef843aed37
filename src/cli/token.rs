//! `telemetry token`: who may ask the node over HTTP, and what.

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use comfy_table::Table;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};

use super::{ConfigArg, Exit};
use crate::http::{Scope, Token, TokenFile};

#[derive(Args, Debug)]
pub struct TokenArgs {
    #[command(flatten)]
    config: ConfigArg,
    #[command(subcommand)]
    order: TokenOrder,
}

#[derive(Subcommand, Debug)]
enum TokenOrder {
    /// Make a token and show it, this once
    Create {
        /// read: health, metrics, streams; operate: orders and dead letters too
        #[arg(long, value_enum)]
        scope: ScopeArg,
        /// A span (90d, 12h, 1y), a moment (2027-01-01T00:00:00Z), or never
        #[arg(long, value_name = "WHEN", value_parser = parse_expiry)]
        expires: Expiry,
        /// Whom or what it is for
        #[arg(long, value_name = "TEXT", default_value = "", value_parser = parse_note)]
        note: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// A line per token; the tokens themselves are kept nowhere
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Refuse a token from now on
    Revoke {
        /// As `list` shows it
        id: String,
    },
}

#[derive(ValueEnum, Debug, Clone, Copy)]
enum ScopeArg {
    Read,
    Operate,
}

impl From<ScopeArg> for Scope {
    fn from(scope: ScopeArg) -> Scope {
        match scope {
            ScopeArg::Read => Scope::Read,
            ScopeArg::Operate => Scope::Operate,
        }
    }
}

/// `None` in it: never.
#[derive(Debug, Clone, Copy)]
struct Expiry(Option<Timestamp>);

fn parse_expiry(text: &str) -> Result<Expiry, String> {
    if text == "never" {
        return Ok(Expiry(None));
    }
    let now = Timestamp::now();
    let at = match text.parse::<Timestamp>() {
        Ok(moment) => moment,
        Err(_) => {
            let span: Span = text.parse().map_err(|_| {
                "a span such as 90d, a moment such as 2027-01-01T00:00:00Z, or never".to_owned()
            })?;
            let at = now.to_zoned(TimeZone::UTC).checked_add(span);
            at.map_err(|error| error.to_string())?.timestamp()
        }
    };
    if at <= now {
        return Err("lies in the past".to_owned());
    }
    Ok(Expiry(Some(at)))
}

/// Longest note, in characters.
const NOTE_MAX: usize = 200;

fn parse_note(text: &str) -> Result<String, String> {
    if text.chars().count() > NOTE_MAX || text.contains(char::is_control) {
        return Err(format!("at most {NOTE_MAX} characters on one line"));
    }
    Ok(text.to_owned())
}

pub fn run(args: &TokenArgs) -> anyhow::Result<Exit> {
    let settings = super::settings(&args.config.config)?;
    let file = TokenFile::of(&settings.node.state_dir);
    match &args.order {
        TokenOrder::Create { scope, expires, note, json } => {
            let state_dir = &settings.node.state_dir;
            if !state_dir.is_dir() {
                bail!("{} does not exist yet: start the node once", state_dir.display());
            }
            let (token, text) = file.create((*scope).into(), expires.0, note.clone())?;
            if *json {
                let mut shown = serde_json::to_value(shown(&token)).context("print the token")?;
                shown["token"] = text.expose().into();
                println!("{shown:#}");
            } else {
                println!("{}", text.expose());
                eprintln!("token {}: keep the text above, it is not shown again", token.id);
            }
        }
        TokenOrder::List { json } => list(&file.list()?, *json),
        TokenOrder::Revoke { id } => {
            if !file.revoke(id)? {
                bail!("there is no token {id:?}: see `telemetry token list`");
            }
            println!("revoked: {id}");
        }
    }
    Ok(Exit::Fine)
}

/// What a person may see of a token: all but the hash.
fn shown(token: &Token) -> serde_json::Value {
    serde_json::json!({
        "id": token.id, "scope": token.scope, "note": token.note,
        "created": token.created, "expires": token.expires,
        "expired": token.expires.is_some_and(|at| at <= Timestamp::now()),
    })
}

fn list(tokens: &[Token], json: bool) {
    if json {
        println!("{:#}", tokens.iter().map(shown).collect::<serde_json::Value>());
        return;
    }
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["TOKEN", "SCOPE", "CREATED", "EXPIRES", "NOTE"]);
    let now = Timestamp::now();
    for token in tokens {
        let expires = match token.expires {
            None => "never".to_owned(),
            Some(at) if at <= now => format!("{at:.0} (expired)"),
            Some(at) => format!("{at:.0}"),
        };
        let created = format!("{:.0}", token.created);
        table.add_row([&token.id, token.scope.code(), &created, &expires, &token.note]);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiry_is_a_span_a_moment_or_never() {
        let days = |text: &str| {
            let at = parse_expiry(text).unwrap().0.unwrap();
            at.duration_since(Timestamp::now()).as_hours() / 24
        };
        assert_eq!((days("90d"), days("30 days"), days("1y") / 365), (89, 29, 0));
        assert!(parse_expiry("never").unwrap().0.is_none());
        assert!(parse_expiry("2999-01-01T00:00:00Z").unwrap().0.is_some());
        for wrong in ["", "soon", "2001-01-01T00:00:00Z", "-1d"] {
            assert!(parse_expiry(wrong).is_err(), "{wrong}");
        }
    }
}
