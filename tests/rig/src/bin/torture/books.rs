//! The node's own books: whether they balance, and say what is there.

use std::collections::BTreeMap;

use rig::{Books, SinkState, StreamState, Streams};

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

/// At any moment: what no book accounts for, by the node's own sum and by ours.
pub fn unbalanced(streams: &Streams) -> Vec<String> {
    let sinks = streams
        .streams
        .iter()
        .flat_map(|stream| stream.sinks.iter().map(move |sink| (stream.name.as_str(), sink)));
    let own = |sink: &SinkState| sink.difference.unwrap_or_default();
    let wrong = sinks.filter(|(_, sink)| own(sink) != 0 || sink.status.books.is_some_and(is_off));
    wrong.map(|(stream, sink)| format!("{stream}/{}: {:?}", sink.sink, sink.status.books)).collect()
}

fn is_off(books: Books) -> bool {
    let Books { cursor, base, delivered, filtered, incomplete, dead_lettered, lost } = books;
    Some(delivered + filtered + incomplete + dead_lettered + lost) != cursor.checked_sub(base)
}

/// By stream and sink, what the books are to say; cursor and base are left 0.
#[derive(Debug, Clone, Default)]
pub struct Accounts(BTreeMap<(&'static str, &'static str), Books>);

impl Accounts {
    pub fn add(&mut self, stream: &'static str, sink: &'static str, books: Books) {
        let sum = self.0.entry((stream, sink)).or_default();
        sum.delivered += books.delivered;
        sum.filtered += books.filtered;
        sum.incomplete += books.incomplete;
        sum.dead_lettered += books.dead_lettered;
    }

    pub fn and(mut self, more: &Accounts) -> Accounts {
        for ((stream, sink), books) in &more.0 {
            self.add(stream, sink, *books);
        }
        self
    }

    #[cfg(test)]
    pub fn of(&self, stream: &'static str, sink: &'static str) -> Books {
        self.0[&(stream, sink)]
    }
}

/// At rest: what each sink says became of its messages, beside what did. The letters of the round are those that wait;
/// earlier ones were purged, which changes no book.
pub fn compare(streams: &Streams, accounts: &Accounts, round: &Accounts, verdict: &mut Verdict) {
    for ((stream, sink), expected) in &accounts.0 {
        let state = streams.stream(stream).and_then(|state| state.sink(sink));
        let said = state.map(|state| Books { cursor: 0, base: 0, ..state.books() });
        if said != Some(*expected) {
            verdict.books.push(format!("{stream}/{sink} says {said:?} instead of {expected:?}"));
        }
        let waiting = round.0.get(&(*stream, *sink)).map_or(0, |books| books.dead_lettered);
        let shown = state.map(|state| state.status.dead_letters);
        if shown != Some(waiting) {
            verdict
                .books
                .push(format!("{stream}/{sink}: {waiting} letters wait, it shows {shown:?}"));
        }
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
                "sinks": [{"sink": "kafka", "difference": 0, "status": {"books": books, "dead_letters": 1}}],
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
    fn what_no_book_accounts_for_is_told_whatever_the_node_makes_of_it() {
        assert!(unbalanced(&streams()).is_empty());
        let mut off = streams();
        sink(&mut off).difference = Some(1);
        assert_eq!(unbalanced(&off).len(), 1);
        for change in [
            |books: &mut Books| books.delivered -= 1,
            |books: &mut Books| books.lost += 1,
            |books: &mut Books| books.base = 11,
        ] {
            let mut off = streams();
            change(sink(&mut off).status.books.as_mut().unwrap());
            assert_eq!(unbalanced(&off).len(), 1);
        }
    }

    #[test]
    fn books_that_are_off_by_one_are_told_whichever_it_is() {
        let right = Books { delivered: 7, filtered: 2, dead_lettered: 1, ..Books::default() };
        let told = |sink: &'static str, expected: Books, waiting| {
            let mut accounts = Accounts::default();
            accounts.add("plug", sink, expected);
            let mut round = Accounts::default();
            round.add("plug", sink, Books { dead_lettered: waiting, ..Books::default() });
            let mut verdict = Verdict::default();
            compare(&streams(), &accounts, &round, &mut verdict);
            verdict.books.len()
        };
        assert_eq!(told("kafka", right, 1), 0);
        assert_eq!(told("kafka", right, 2), 1);
        assert_eq!(told("no_such", Books::default(), 0), 2);
        for change in [
            |books: &mut Books| books.delivered += 1,
            |books: &mut Books| books.filtered -= 1,
            |books: &mut Books| books.incomplete += 1,
            |books: &mut Books| books.dead_lettered -= 1,
        ] {
            let mut wrong = right;
            change(&mut wrong);
            assert_eq!(told("kafka", wrong, 1), 1);
        }
    }

    #[test]
    fn accounts_of_two_rounds_are_one() {
        let mut one = Accounts::default();
        one.add("plug", "kafka", Books { delivered: 3, dead_lettered: 1, ..Books::default() });
        let both = one.clone().and(&one);
        let expected = Books { delivered: 6, dead_lettered: 2, ..Books::default() };
        assert_eq!(both.of("plug", "kafka"), expected);
    }
}
