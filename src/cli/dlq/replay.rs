//! `telemetry dlq replay`: page by page, saying what became of each letter.

use std::collections::BTreeSet;

use anyhow::bail;

use super::desk::Desk;
use super::{FilterArgs, PAGE};
use crate::cli::{Exit, block_on};
use crate::config::Settings;
use crate::domain::{DeadLetterKey, SinkName, StreamName};
use crate::http::{ReplayRequest, ReplayResult};

pub fn replay(
    settings: &Settings,
    filter: &FilterArgs,
    keys: &[DeadLetterKey],
    dry_run: bool,
) -> anyhow::Result<Exit> {
    let all = super::letters(settings, &filter.filter())?;
    let chosen: Vec<_> = all
        .into_iter()
        .map(|letter| letter.key)
        .filter(|key| keys.is_empty() || keys.contains(key))
        .collect();
    if let Some(missing) = keys.iter().find(|key| !chosen.contains(key)) {
        bail!("no dead letter {missing}: see `telemetry dlq list`");
    }
    if dry_run {
        chosen.iter().for_each(|key| println!("would replay {key}"));
        return Ok(Exit::Fine);
    }
    let tally = block_on(deliver(settings, &chosen))??;
    tally.tell();
    Ok(if tally.is_fine() { Exit::Fine } else { Exit::Failed })
}

async fn deliver(settings: &Settings, chosen: &[DeadLetterKey]) -> anyhow::Result<Tally> {
    let mut desk = Desk::new(settings);
    let mut tally = Tally::default();
    let mut done = 0;
    for page in chosen.chunks(PAGE) {
        let keys = tally.worth_a_try(page);
        if !keys.is_empty() {
            let tried = keys.len();
            let request = ReplayRequest { keys, ..Default::default() };
            tally.enter(tried, desk.replay(&request).await?);
        }
        done += page.len();
        if chosen.len() > PAGE {
            eprintln!("{done} of {}", chosen.len());
        }
    }
    desk.close().await?;
    Ok(tally)
}

/// What became of the letters so far.
#[derive(Default)]
struct Tally {
    replayed: usize,
    still_dead: usize,
    not_tried: usize,
    failed_sinks: BTreeSet<(StreamName, SinkName)>,
}

impl Tally {
    fn is_fine(&self) -> bool {
        self.still_dead == 0 && self.not_tried == 0
    }

    /// A sink that failed for itself would fail again, after as long a wait.
    fn worth_a_try(&mut self, page: &[DeadLetterKey]) -> Vec<DeadLetterKey> {
        let failed = |key: &&DeadLetterKey| {
            self.failed_sinks.contains(&(key.stream.clone(), key.sink.clone()))
        };
        let keys: Vec<_> = page.iter().filter(|key| !failed(key)).cloned().collect();
        self.not_tried += page.len() - keys.len();
        keys
    }

    fn enter(&mut self, tried: usize, results: Vec<ReplayResult>) {
        let answered = results.len();
        let mut sink_failed = false;
        for result in results {
            match result.error {
                None => {
                    self.replayed += 1;
                    println!("replayed {}", result.key);
                }
                Some(error) => {
                    self.still_dead += 1;
                    println!("still dead {}: {error}", result.key);
                }
            }
            if result.sink_failed {
                sink_failed = true;
                self.failed_sinks.insert((result.key.stream, result.key.sink));
            }
        }
        // Without a failed sink they left by somebody else's hand.
        if sink_failed {
            self.not_tried += tried - answered;
        }
    }

    /// Where the work ended early: what was done, and what is left.
    fn tell(&self) {
        if self.failed_sinks.is_empty() {
            return;
        }
        let sinks: Vec<_> =
            self.failed_sinks.iter().map(|(stream, sink)| format!("{stream}/{sink}")).collect();
        eprintln!(
            "stopped at {}, which took nothing (see above): replayed {}, still dead {}, not tried {}; \
             give the same command again once that is mended",
            sinks.join(", "),
            self.replayed,
            self.still_dead,
            self.not_tried
        );
    }
}
