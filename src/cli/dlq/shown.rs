//! How a dead letter is shown: a line of JSON, or text with what the current mapping makes of it.

use std::io::Write;

use crate::config::Settings;
use crate::domain::{Arrival, DeadLetter};
use crate::mapping::{UseExplanation, explain};

/// To the microsecond, as the row of the message has it.
pub fn time_text(at: Arrival) -> String {
    jiff::Timestamp::from_microsecond(at.as_micros())
        .map_or_else(|_| at.as_micros().to_string(), |time| format!("{time:.6}"))
}

/// One line of `list --json` and of `export`. The payload is text where it is text.
pub fn json(letter: &DeadLetter) -> serde_json::Value {
    let mut value = serde_json::json!({
        "letter": letter.key.to_string(), "stream": letter.key.stream, "sink": letter.key.sink,
        "sequence": letter.key.sequence, "topic": letter.topic, "arrival": time_text(letter.arrival),
        "dead_at": time_text(letter.dead_at), "stage": letter.stage, "reason": letter.reason,
        "detail": letter.detail, "sqlstate": letter.sqlstate, "column": letter.column,
        "attempts": letter.attempts, "payload_bytes": letter.payload.len(),
    });
    match std::str::from_utf8(&letter.payload) {
        Ok(text) => value["payload"] = text.into(),
        Err(_) => value["payload_hex"] = hex::encode(&letter.payload).into(),
    }
    value
}

/// What the current mapping makes of the letter for its own sink; the error says why it cannot be told.
pub fn explained(settings: &Settings, letter: &DeadLetter) -> Result<UseExplanation, String> {
    let stream = settings.streams.get(&letter.key.stream);
    let stream = stream.ok_or("its stream is not configured (any more)")?;
    let explanation = explain(stream, &letter.record()).map_err(|mistakes| {
        mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    })?;
    let of_sink = |used: &UseExplanation| used.sink == letter.key.sink.as_str();
    let found = explanation.uses.into_iter().find(of_sink);
    found.ok_or_else(|| "its sink is not configured (any more)".to_owned())
}

/// Everything of one letter for people.
pub fn text(settings: &Settings, letter: &DeadLetter, out: &mut dyn Write) -> std::io::Result<()> {
    for (name, value) in json(letter).as_object().into_iter().flatten() {
        match value {
            serde_json::Value::Null => {}
            serde_json::Value::String(text) => writeln!(out, "{name:>14}  {text}")?,
            other => writeln!(out, "{name:>14}  {other}")?,
        }
    }
    writeln!(out, "\nthe current mapping makes of it:")?;
    match explained(settings, letter) {
        Ok(explained) => write!(out, "{explained}"),
        Err(why) => writeln!(out, "nothing: {why}"),
    }
}
