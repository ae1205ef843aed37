//! A node that does not run, as far as its dead letters need one: its state and the ways into its sinks. No stream, no
//! writer, no HTTP; what a command orders goes the way an order to the running node goes.

use std::sync::Arc;

use super::blueprint::{routes, tables};
use super::replay::{Replayers, replay};
use crate::buffer::BufferError;
use crate::buffer::offline::StoppedState;
use crate::config::Settings;
use crate::database::{Pool, TableSink};
use crate::http::DeadLetters;
use crate::kafka::{KafkaReplayer, ReplayerParts};
use crate::observe::Board;

/// Its state directory is locked until it is closed.
pub struct StoppedNode {
    state: StoppedState,
    letters: DeadLetters,
}

impl StoppedNode {
    /// Connects to nothing yet. `Locked` while the node runs.
    pub fn open(settings: &Settings) -> Result<Self, BufferError> {
        let board = Board::new(settings);
        let state = StoppedState::open(&settings.node.state_dir, board.clone())?;
        let replayers = replayers(settings, &state, &board);
        let letters = DeadLetters { state: state.state(), replay: replay(replayers) };
        Ok(StoppedNode { state, letters })
    }

    pub fn letters(&self) -> &DeadLetters {
        &self.letters
    }

    /// The node may start again.
    pub async fn close(self) -> Result<(), BufferError> {
        self.state.close().await
    }
}

fn replayers(settings: &Settings, state: &StoppedState, board: &Arc<Board>) -> Replayers {
    let replayers = Replayers::default();
    let mut sinks = Vec::new();
    for (name, database) in &settings.databases {
        let pool = Pool::new(database, board.dependency(&format!("postgresql:{name}")));
        let database = Arc::new(database.clone());
        sinks.extend(tables(settings, name).into_iter().map(|(stream, table)| TableSink {
            stream: Arc::new(stream.clone()),
            table: Arc::new(table.clone()),
            database_name: name.clone(),
            database: database.clone(),
            pool: pool.clone(),
            log: state.identity(),
            board: board.clone(),
            node: settings.node.name.clone(),
        }));
    }
    replayers.set_tables(sinks);
    for (cluster, cluster_settings) in &settings.clusters {
        let replayer = KafkaReplayer::alone(ReplayerParts {
            cluster,
            settings: cluster_settings.clone(),
            streams: routes(settings, cluster),
            state: state.state(),
            log: state.identity(),
            board,
        });
        replayers.set_kafka(cluster, replayer);
    }
    replayers.set_routes(settings);
    replayers
}
