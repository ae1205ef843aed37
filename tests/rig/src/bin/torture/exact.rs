//! What a Kafka record is to the byte: each member the mapping names, in its order.

use std::collections::{BTreeMap, HashMap};

use rig::Homelab;

use crate::chronicle::Fresh;
use crate::traffic::{Message, STREAMS};
use crate::verdict::Verdict;

/// By stream, the names of tags and of fields.
pub struct Shapes(BTreeMap<&'static str, [Vec<String>; 2]>);

impl Shapes {
    pub fn of(homelab: &Homelab) -> Self {
        let shape = |stream: &crate::traffic::Stream| {
            let (tags, fields): (Vec<_>, Vec<_>) =
                homelab.fields(stream.name).into_iter().partition(|(_, is_tag)| *is_tag);
            let names = |all: Vec<(String, bool)>| all.into_iter().map(|(name, _)| name).collect();
            (stream.name, [names(tags), names(fields)])
        };
        Self(STREAMS.iter().map(shape).collect())
    }

    /// Of records that somebody published; the others are told of elsewhere.
    pub fn judge(&self, messages: &[Message], fresh: &[Fresh], verdict: &mut Verdict) {
        let by_number: HashMap<u64, &Message> =
            messages.iter().map(|message| (message.number, message)).collect();
        for Fresh { reading, text, .. } in fresh {
            let Some(message) = by_number.get(&reading.number) else { continue };
            let expected = self.record(message, &reading.time);
            if *text != expected {
                verdict.changed.push(format!("{text} instead of {expected}"));
            }
        }
    }

    fn record(&self, message: &Message, time: &str) -> String {
        let [tags, fields] = &self.0[message.stream.name];
        let members = |names: &[String]| {
            let member = |name: &String| format!("\"{name}\":{}", message.says(name));
            names.iter().map(member).collect::<Vec<_>>().join(",")
        };
        let (tags, fields) = (members(tags), members(fields));
        format!("{{\"ts\":\"{time}\",\"tags\":{{{tags}}},\"fields\":{{{fields}}}}}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::Reading;
    use crate::traffic::Kind;

    const TIME: &str = "2026-03-14T07:21:05.412908Z";
    const RECORD: &str = "{\"ts\":\"2026-03-14T07:21:05.412908Z\",\"tags\":{\"plug_id\":\"r1-0\"},\
        \"fields\":{\"status\":false,\"wifi_rssi\":7,\"uptime_seconds\":5}}";

    fn told(text: &str) -> usize {
        let shapes = Shapes::of(&Homelab::load().unwrap());
        let message = Message {
            number: 5,
            stream: &STREAMS[3],
            device: "r1-0".to_owned(),
            value: 7,
            kind: Kind::Reading,
            payload: String::new(),
        };
        let reading =
            Reading { device: "r1-0".to_owned(), number: 5, value: Some(7), time: TIME.to_owned() };
        let mut verdict = Verdict::default();
        let fresh = [Fresh { stream: "plug", reading, text: text.to_owned() }];
        shapes.judge(&[message], &fresh, &mut verdict);
        verdict.changed.len()
    }

    #[test]
    fn a_record_is_the_same_to_the_byte() {
        assert_eq!(told(RECORD), 0);
        assert_eq!(told(&RECORD.replace("false", "true")), 1);
        assert_eq!(told(&RECORD.replace("\"wifi_rssi\":7,", "")), 1);
        assert_eq!(told(&RECORD.replace("},", "}, ")), 1);
    }
}
