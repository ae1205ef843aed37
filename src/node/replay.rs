//! Which replayer a dead letter belongs to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::assembly::{Context, TableSinks};
use crate::database;
use crate::domain::{DeadLetter, SinkName, StreamName};
use crate::http::Replay;
use crate::kafka::{self, KafkaReplayer};

/// The replayers of the running producers (each life of a producer brings its own), by stream.
#[derive(Clone, Default)]
pub struct Replayers {
    kafka: Arc<Mutex<HashMap<StreamName, KafkaReplayer>>>,
}

impl Replayers {
    pub fn set_kafka(&self, streams: impl Iterator<Item = StreamName>, replayer: &KafkaReplayer) {
        let mut kafka = self.kafka.lock().unwrap_or_else(PoisonError::into_inner);
        kafka.extend(streams.map(|stream| (stream, replayer.clone())));
    }

    fn kafka(&self, stream: &StreamName) -> Option<KafkaReplayer> {
        self.kafka.lock().unwrap_or_else(PoisonError::into_inner).get(stream).cloned()
    }
}

/// Delivers one letter to the sink it was meant for.
pub fn replay(context: &Context, sinks: &TableSinks, replayers: &Replayers) -> Replay {
    let tables: HashMap<(StreamName, SinkName), _> = sinks
        .iter()
        .map(|sink| ((sink.stream.name.clone(), sink.table.sink.clone()), sink.clone()))
        .collect();
    let tables = Arc::new(tables);
    let (replayers, board) = (replayers.clone(), context.board.clone());
    Arc::new(move |letter: DeadLetter| {
        let (tables, replayers, board) = (tables.clone(), replayers.clone(), board.clone());
        Box::pin(async move {
            let key = (letter.key.stream.clone(), letter.key.sink.clone());
            let outcome = match tables.get(&key) {
                Some(sink) => to_table(sink, &letter).await,
                None => match replayers.kafka(&key.0) {
                    Some(replayer) => to_kafka(&replayer, &letter).await,
                    None => Err("its stream or sink is not configured (any more)".to_owned()),
                },
            };
            if outcome.is_ok() {
                board.letter_left(&key.0, &key.1);
            }
            outcome
        })
    })
}

async fn to_table(sink: &database::TableSink, letter: &DeadLetter) -> Result<(), String> {
    use database::ReplayOutcome::{
        AlreadyReplayed, Delivered, Filtered, Incomplete, NotPassed, StillDead,
    };
    match database::replay(sink, letter).await {
        Ok(Delivered | AlreadyReplayed) => Ok(()),
        Ok(Filtered) => Err("the current filter excludes it: purge it".to_owned()),
        Ok(Incomplete) => {
            Err("it lacks a required field: purge it or relax the mapping".to_owned())
        }
        Ok(NotPassed) => Err("its writer has not passed it yet: try again".to_owned()),
        Ok(StillDead(fault)) => Err(fault.detail),
        Err(error) => Err(error.to_string()),
    }
}

async fn to_kafka(replayer: &KafkaReplayer, letter: &DeadLetter) -> Result<(), String> {
    use kafka::ReplayOutcome::{Dead, Delivered, Filtered, Incomplete};
    match replayer.replay(letter).await {
        Ok(Delivered) => Ok(()),
        Ok(Filtered) => Err("the current filter excludes it: purge it".to_owned()),
        Ok(Incomplete) => {
            Err("it lacks a required field: purge it or relax the mapping".to_owned())
        }
        Ok(Dead(fault)) => Err(fault.detail),
        Err(error) => Err(error.to_string()),
    }
}
