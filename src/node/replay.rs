//! Which replayer a dead letter belongs to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::Settings;
use crate::database::{self, TableSink};
use crate::domain::{DeadLetter, ErrorClass, SinkName, StreamName};
use crate::http::{Replay, ReplayError};
use crate::kafka::{self, KafkaReplayer};

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

    pub fn set_routes(&self, settings: &Settings) {
        let routed = settings.streams.values().filter_map(|stream| {
            let kafka = stream.kafka.as_ref()?;
            Some(((stream.name.clone(), kafka.sink.clone()), kafka.cluster.clone()))
        });
        self.targets().routes = routed.collect();
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
pub fn replay(replayers: Replayers) -> Replay {
    Arc::new(move |letter: DeadLetter| {
        let replayers = replayers.clone();
        Box::pin(async move {
            let key = (letter.key.stream.clone(), letter.key.sink.clone());
            match replayers.target(&key) {
                Some(Target::Table(sink)) => to_table(&sink, &letter).await,
                Some(Target::Kafka(replayer)) => to_kafka(&replayer, &letter).await,
                None => Err(ReplayError::Sink(
                    "its stream or sink is not configured (any more)".to_owned(),
                )),
            }
        })
    })
}

const FILTERED: &str = "the current filter excludes it: purge it";
const INCOMPLETE: &str = "it lacks a required field: purge it or relax the mapping";
const NOT_PASSED: &str = "its sink has not passed it yet: try again while the node runs";

/// What a sink says of one letter; its errors are of its own.
async fn to_table(sink: &database::TableSink, letter: &DeadLetter) -> Result<(), ReplayError> {
    use database::ReplayOutcome::{
        AlreadyReplayed, Delivered, Filtered, Incomplete, NotPassed, StillDead,
    };
    let outcome = database::replay(sink, letter).await;
    let of_letter = match outcome.map_err(|error| ReplayError::Sink(error.to_string()))? {
        Delivered | AlreadyReplayed => return Ok(()),
        Filtered => FILTERED.to_owned(),
        Incomplete => INCOMPLETE.to_owned(),
        NotPassed => NOT_PASSED.to_owned(),
        StillDead(fault) => fault.detail,
    };
    Err(ReplayError::Letter(of_letter))
}

async fn to_kafka(replayer: &KafkaReplayer, letter: &DeadLetter) -> Result<(), ReplayError> {
    use kafka::ReplayOutcome::{Dead, Delivered, Filtered, Incomplete, NotPassed};
    let outcome = replayer.replay(letter).await.map_err(|error| match error.class() {
        ErrorClass::Data => ReplayError::Letter(error.to_string()),
        ErrorClass::Transient | ErrorClass::Standing => ReplayError::Sink(error.to_string()),
    })?;
    let of_letter = match outcome {
        Delivered => return Ok(()),
        Filtered => FILTERED.to_owned(),
        Incomplete => INCOMPLETE.to_owned(),
        NotPassed => NOT_PASSED.to_owned(),
        Dead(fault) => fault.detail,
    };
    Err(ReplayError::Letter(of_letter))
}
