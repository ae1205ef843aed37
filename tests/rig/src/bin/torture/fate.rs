//! What becomes of a message of each kind at each kind of sink, and how the books count it.

use rig::Books;

use crate::traffic::Kind;

/// What a message becomes at a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    There,
    Dead,
    Nowhere,
    /// In the row of its device, until the next message takes its place: judged by what that row says in the end.
    InTheLatest,
}

pub fn in_table(kind: Kind) -> Fate {
    match kind {
        Kind::Reading => Fate::There,
        Kind::Poison | Kind::Malformed => Fate::Dead,
        Kind::Filtered | Kind::Incomplete => Fate::Nowhere,
    }
}

/// Refused rows were replayed after the table was mended.
pub fn in_mended_table(kind: Kind) -> Fate {
    match kind {
        Kind::Poison => Fate::There,
        other => in_table(other),
    }
}

pub fn in_latest_table(kind: Kind) -> Fate {
    match in_table(kind) {
        Fate::There => Fate::InTheLatest,
        other => other,
    }
}

pub fn in_kafka(kind: Kind) -> Fate {
    match kind {
        Kind::Reading | Kind::Poison | Kind::Incomplete => Fate::There,
        Kind::Malformed => Fate::Dead,
        Kind::Filtered => Fate::Nowhere,
    }
}

/// Why a message of this kind is a dead letter: the reason, and what the database said of it.
pub fn cause(kind: Kind) -> Option<(&'static str, Option<&'static str>)> {
    match kind {
        Kind::Malformed => Some(("not_json", None)),
        // A check violation.
        Kind::Poison => Some(("database_refused", Some("23514"))),
        Kind::Reading | Kind::Filtered | Kind::Incomplete => None,
    }
}

/// Where the books count a message of this kind.
pub fn entry_of(books: &mut Books, fate: Fate, kind: Kind) -> &mut u64 {
    match fate {
        Fate::There | Fate::InTheLatest => &mut books.delivered,
        Fate::Dead => &mut books.dead_lettered,
        Fate::Nowhere if kind == Kind::Incomplete => &mut books.incomplete,
        Fate::Nowhere => &mut books.filtered,
    }
}
