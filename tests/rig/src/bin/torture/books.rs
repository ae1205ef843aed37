//! The node's own books: whether they balance, and say what is there.

use rig::{SinkState, StreamState, Streams};

use crate::traffic::STREAMS;
use crate::verdict::Verdict;

/// The node says that everything has come through: else why it has not.
pub fn at_rest(streams: &Streams) -> Option<String> {
    if streams.streams.len() < STREAMS.len() {
        return Some("not every stream is shown".to_owned());
    }
    streams.streams.iter().find_map(|stream| {
        let idle = |sink: &&SinkState| stream.pending(sink) == Some(0);
        let busy = stream.sinks.iter().find(|sink| !idle(sink));
        let unsubscribed = !stream.status.subscribed;
        let trouble = stream.status.trouble.clone().unwrap_or_default();
        match busy {
            Some(sink) => Some(busy_text(stream, sink)),
            None => unsubscribed.then(|| format!("{} is not subscribed: {trouble}", stream.name)),
        }
    })
}

fn busy_text(stream: &StreamState, sink: &SinkState) -> String {
    let status = &sink.status;
    format!(
        "{}/{} is {}: {:?} of {} pending; {}",
        stream.name,
        sink.sink,
        status.state,
        stream.pending(sink),
        stream.status.sequence,
        status.trouble.as_deref().unwrap_or("no trouble")
    )
}

/// At any moment: what no book accounts for.
pub fn unbalanced(streams: &Streams) -> Vec<String> {
    let sinks = streams
        .streams
        .iter()
        .flat_map(|stream| stream.sinks.iter().map(move |sink| (stream.name.as_str(), sink)));
    let wrong = sinks.filter(|(_, sink)| sink.difference.is_some_and(|number| number != 0));
    wrong.map(|(stream, sink)| format!("{stream}/{}: {:?}", sink.sink, sink.status.books)).collect()
}

/// What a sink says it delivered, beside what is there.
pub fn compare(streams: &Streams, stream: &str, sink: &str, there: u64, verdict: &mut Verdict) {
    let state = streams.stream(stream).and_then(|state| state.sink(sink));
    let delivered = state.map(|sink| sink.books().delivered);
    if delivered != Some(there) {
        verdict
            .books
            .push(format!("{stream}/{sink} says {delivered:?} delivered, {there} are there"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten records of each stream came, and one sink has dealt with all: seven delivered, two filtered, one dead.
    fn streams() -> Streams {
        let books =
            serde_json::json!({"cursor": 10, "delivered": 7, "filtered": 2, "dead_lettered": 1});
        let one = |stream: &crate::traffic::Stream| {
            serde_json::json!({
                "name": stream.name,
                "status": {"subscribed": true, "sequence": 10},
                "sinks": [{"sink": "kafka", "difference": 0, "status": {"books": books}}],
            })
        };
        let all: Vec<_> = STREAMS.iter().map(one).collect();
        serde_json::from_value(serde_json::json!({ "streams": all })).unwrap()
    }

    fn sink(streams: &mut Streams) -> &mut SinkState {
        &mut streams.streams[1].sinks[0]
    }

    #[test]
    fn rest_is_when_every_stream_is_subscribed_and_nothing_is_pending() {
        assert_eq!(at_rest(&streams()), None);
        let told = |change: fn(&mut Streams)| {
            let mut streams = streams();
            change(&mut streams);
            at_rest(&streams).expect("no rest")
        };
        assert!(told(|all| drop(all.streams.pop())).contains("not every stream"));
        let pending = told(|all| all.streams[1].status.sequence = 11);
        assert!(pending.contains("temperature_indoor/kafka") && pending.contains("Some(1)"));
        assert!(told(|all| sink(all).status.books = None).contains("None of 10 pending"));
        let deaf = told(|all| all.streams[1].status.subscribed = false);
        assert!(deaf.contains("temperature_indoor is not subscribed"), "{deaf}");
    }

    #[test]
    fn what_no_book_accounts_for_is_told() {
        assert!(unbalanced(&streams()).is_empty());
        let mut off = streams();
        sink(&mut off).difference = Some(1);
        assert_eq!(unbalanced(&off).len(), 1);
    }

    #[test]
    fn books_that_are_off_by_one_are_told() {
        let verdict = |there| {
            let mut verdict = Verdict::default();
            compare(&streams(), "plug", "kafka", there, &mut verdict);
            verdict.books.len()
        };
        assert_eq!([verdict(6), verdict(7), verdict(8)], [1, 0, 1]);
        let mut unknown = Verdict::default();
        compare(&streams(), "plug", "no_such", 0, &mut unknown);
        assert_eq!(unknown.books.len(), 1);
    }
}
