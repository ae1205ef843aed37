//! Is what was published in Kafka and in the tables, exactly?

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result};
use rig::{Homelab, Kafka, Postgres, Record};
use serde_json::{Map, Value};

use crate::observer::Message;
use crate::published::{Line, Published};
use crate::truth::{Stream, Table, canonical};

/// One stream's result.
pub struct Verdict {
    pub stream: String,
    pub published: u64,
    /// Acknowledged to the publisher, and never handed out by the broker.
    pub unseen: usize,
    /// Counted by the filter's rule of the description, not by the node.
    pub filtered: usize,
    /// `None` without Kafka.
    pub kafka: Option<Outcome>,
    pub tables: Vec<(String, Outcome)>,
}

/// Found against expected.
pub struct Outcome {
    pub expected: usize,
    pub found: usize,
    /// The first things that differ, for people.
    pub differences: Vec<String>,
}

impl Outcome {
    pub fn is_exact(&self) -> bool {
        self.differences.is_empty() && self.expected == self.found
    }
}

impl Verdict {
    /// A stream of which nothing was published shows nothing.
    pub fn is_exact(&self) -> bool {
        let tables = self.tables.iter().map(|(_, outcome)| outcome);
        self.published > 0
            && self.unseen == 0
            && self.kafka.iter().chain(tables).all(Outcome::is_exact)
    }

    pub fn differences(&self) -> impl Iterator<Item = String> {
        let kafka = self.kafka.iter().map(|outcome| ("Kafka", outcome));
        let tables = self.tables.iter().map(|(name, outcome)| (name.as_str(), outcome));
        let unseen = (self.unseen > 0)
            .then(|| format!("{}: {} never handed out by the broker", self.stream, self.unseen));
        let nothing =
            (self.published == 0).then(|| format!("{}: nothing was published", self.stream));
        nothing.into_iter().chain(unseen).chain(kafka.chain(tables).flat_map(
            move |(place, outcome)| {
                outcome
                    .differences
                    .iter()
                    .map(move |text| format!("{}, {place}: {text}", self.stream))
            },
        ))
    }
}

/// Everything outside the node that can be looked at.
pub struct Outside<'a> {
    pub homelab: &'a Homelab,
    pub postgres: &'a Postgres,
    pub kafka: Option<&'a Kafka>,
}

impl Outside<'_> {
    /// Judges one stream by what the broker handed out.
    ///
    /// # Errors
    /// When a topic or table cannot be read.
    pub fn judge(&self, name: &str, published: &Published, sent: &[Message]) -> Result<Verdict> {
        let stream = Stream::named(name)
            .with_context(|| format!("stream {name} is not one of the homelab's"))?;
        let all: Vec<(&str, &Value)> = sent
            .iter()
            .filter_map(|message| Some((message.topic.as_str(), message.payload.as_ref()?)))
            .collect();
        let messages = || all.iter().copied().filter(|(_, payload)| stream.counts(payload));
        let records: Vec<_> =
            messages().map(|(topic, payload)| stream.record(topic, payload)).collect();
        let mut tables = Vec::new();
        for table in stream.tables {
            let expected = stream.rows(table, messages());
            let found = self.rows(stream, table)?;
            tables.push((table.name.to_owned(), compare(&expected, &found)));
        }
        let kafka = match (self.kafka, self.homelab.topic(name)) {
            (Some(kafka), Some(topic)) => Some(compare(&records, &found_records(kafka, topic)?)),
            _ => None,
        };
        Ok(Verdict {
            stream: name.to_owned(),
            published: published.count(name),
            unseen: unseen(published.lines(name), sent),
            filtered: all.len() - records.len(),
            kafka,
            tables,
        })
    }

    fn rows(&self, stream: &Stream, table: &Table) -> Result<Vec<Map<String, Value>>> {
        let sinks = self.homelab.tables(stream.name)?;
        let sink = sinks
            .iter()
            .find(|sink| sink.table == table.name)
            .with_context(|| format!("the configuration has no table {}", table.name))?;
        let sql = format!(
            "SELECT to_jsonb(t) - 'time' - 'node' - 'updated_at' FROM {} t WHERE {}",
            table.name, table.condition
        );
        let rows = self.postgres.query(&sink.dbname, &sql)?;
        rows.into_iter()
            .map(|row| {
                let text = row.into_iter().next().flatten().context("a row without a value")?;
                serde_json::from_str(&text).context("read a row")
            })
            .collect()
    }
}

fn unseen<'a>(lines: impl Iterator<Item = &'a Line>, sent: &[Message]) -> usize {
    let mut left: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for message in sent {
        *left.entry((&message.topic, &message.sha256)).or_default() += 1;
    }
    let missing =
        lines.filter(|line| match left.get_mut(&(line.topic.as_str(), line.sha256.as_str())) {
            Some(count) if *count > 0 => {
                *count -= 1;
                false
            }
            _ => true,
        });
    missing.count()
}

/// Tags and fields of each record; what a restart repeated counts once, as the header says.
fn found_records(kafka: &Kafka, topic: &str) -> Result<Vec<Map<String, Value>>> {
    let mut seen = HashSet::new();
    let records = kafka.read_topic(topic)?;
    let first = records
        .iter()
        .filter(|record| record.header("telemetry-id").is_none_or(|id| seen.insert(id.to_owned())));
    first.map(flat).collect()
}

fn flat(record: &Record) -> Result<Map<String, Value>> {
    let json = record.json()?;
    let mut map = Map::new();
    for part in ["tags", "fields"] {
        let members = json.get(part).and_then(Value::as_object);
        let members = members.with_context(|| format!("a record without {part}: {json}"))?;
        map.extend(members.clone());
    }
    Ok(map)
}

const DIFFERENCES_SHOWN: usize = 3;

fn compare(expected: &[Map<String, Value>], found: &[Map<String, Value>]) -> Outcome {
    let mut balance: BTreeMap<String, i64> = BTreeMap::new();
    for map in expected {
        *balance.entry(canonical(map)).or_default() += 1;
    }
    for map in found {
        *balance.entry(canonical(map)).or_default() -= 1;
    }
    let differences = balance.iter().filter(|(_, count)| **count != 0).map(|(text, count)| {
        let word = if *count > 0 { "missing" } else { "not expected" };
        format!("{word}: {text}")
    });
    Outcome {
        expected: expected.len(),
        found: found.len(),
        differences: differences.take(DIFFERENCES_SHOWN).collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    #[test]
    fn equal_contents_are_exact_in_any_order_and_form() {
        let expected = [map(json!({"a": 1, "b": null})), map(json!({"a": 2}))];
        let found = [map(json!({"a": 2.0})), map(json!({"a": 1.0, "c": null}))];
        assert!(compare(&expected, &found).is_exact());
    }

    #[test]
    fn a_missing_a_doubled_and_a_wrong_row_are_told() {
        let [one, two] = [map(json!({"a": 1})), map(json!({"a": 2}))];
        let missing = compare(&[one.clone(), two.clone()], std::slice::from_ref(&one));
        assert_eq!(missing.differences, ["missing: a=2 "]);
        let doubled = compare(std::slice::from_ref(&one), &[one.clone(), one.clone()]);
        assert_eq!(doubled.differences, ["not expected: a=1 "]);
        assert_eq!(compare(&[one], &[two]).differences.len(), 2);
    }

    #[test]
    fn a_stream_of_which_nothing_was_published_is_not_exact() {
        let verdict = |published| Verdict {
            stream: "s".into(),
            published,
            unseen: 0,
            filtered: 0,
            kafka: None,
            tables: vec![("t".into(), compare(&[], &[]))],
        };
        assert!(verdict(1).is_exact());
        assert!(!verdict(0).is_exact());
        assert_eq!(verdict(0).differences().collect::<Vec<_>>(), ["s: nothing was published"]);
    }

    #[test]
    fn what_the_broker_acknowledged_and_never_handed_out_is_counted() {
        let line =
            |sha256: &str| Line { stream: "s".into(), topic: "t".into(), sha256: sha256.into() };
        let sent = [Message { topic: "t".into(), sha256: "1".into(), payload: None }];
        assert_eq!(unseen([line("1")].iter(), &sent), 0);
        assert_eq!(unseen([line("1"), line("1"), line("2")].iter(), &sent), 2);
    }
}
