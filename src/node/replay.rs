//! Which replayer a dead letter belongs to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::database::{self, TableSink};
use crate::domain::{DeadLetter, SinkName, StreamName};
use crate::http::Replay;
use crate::kafka::{self, KafkaReplayer};
use crate::observe::Board;

/// Of what is configured now; each life of a producer brings its own replayer.
#[derive(Clone, Default)]
pub struct Replayers {
    targets: Arc<Mutex<Targets>>,
}

#[derive(Default)]
struct Targets {
    tables: HashMap<(StreamName, SinkName), TableSink>,
    /// The cluster of each Kafka sink.
    routes: HashMap<(StreamName, SinkName), String>,
    clusters: HashMap<String, KafkaReplayer>,
}

/// Where a letter goes.
enum Target {
    Table(TableSink),
    Kafka(KafkaReplayer),
}

impl Replayers {
    fn targets(&self) -> MutexGuard<'_, Targets> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_tables(&self, sinks: Vec<TableSink>) {
        let key = |sink: &TableSink| (sink.stream.name.clone(), sink.table.sink.clone());
        self.targets().tables = sinks.into_iter().map(|sink| (key(&sink), sink)).collect();
    }

    pub fn set_routes(&self, routes: impl Iterator<Item = ((StreamName, SinkName), String)>) {
        self.targets().routes = routes.collect();
    }

    pub fn set_kafka(&self, cluster: &str, replayer: KafkaReplayer) {
        self.targets().clusters.insert(cluster.to_owned(), replayer);
    }

    fn target(&self, key: &(StreamName, SinkName)) -> Option<Target> {
        let targets = self.targets();
        if let Some(sink) = targets.tables.get(key) {
            return Some(Target::Table(sink.clone()));
        }
        let cluster = targets.routes.get(key)?;
        targets.clusters.get(cluster).cloned().map(Target::Kafka)
    }
}

/// Delivers one letter to the sink it was meant for.
pub fn replay(replayers: Replayers, board: Arc<Board>) -> Replay {
    Arc::new(move |letter: DeadLetter| {
        let (replayers, board) = (replayers.clone(), board.clone());
        Box::pin(async move {
            let key = (letter.key.stream.clone(), letter.key.sink.clone());
            let outcome = match replayers.target(&key) {
                Some(Target::Table(sink)) => to_table(&sink, &letter).await,
                Some(Target::Kafka(replayer)) => to_kafka(&replayer, &letter).await,
                None => Err("its stream or sink is not configured (any more)".to_owned()),
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
