//! `telemetry dlq fix`: a corrected copy of one letter's payload, checked, then replayed in the letter's place.

use clap::Args;
use serde_json::Value;

use super::correction::{Correction, parse_patch, parse_set};
use super::desk::Desk;
use super::{parse_key, shown};
use crate::cli::Exit;
use crate::config::Settings;
use crate::domain::{DeadLetter, DeadLetterKey};
use crate::http::ReplayRequest;

#[derive(Args, Debug)]
pub struct FixArgs {
    /// STREAM/SINK/SEQUENCE, as `list` prints it
    #[arg(value_parser = parse_key)]
    letter: DeadLetterKey,
    /// Set this member, e.g. params['temperature:0'].tC=6.5; repeatable
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = parse_set)]
    set: Vec<(String, Value)>,
    /// A JSON patch (RFC 6902) or merge patch (RFC 7396), or a file that holds one
    #[arg(long, value_name = "JSON|FILE", value_parser = parse_patch, conflicts_with = "set")]
    patch: Option<Value>,
    /// Only show what the current mapping makes of the correction
    #[arg(long)]
    dry_run: bool,
}

impl FixArgs {
    fn correction(&self) -> Correction {
        match &self.patch {
            Some(patch) => Correction::Patch(patch.clone()),
            None if !self.set.is_empty() => Correction::Set(self.set.clone()),
            None => Correction::Editor,
        }
    }
}

pub fn fix(settings: &Settings, args: &FixArgs) -> anyhow::Result<Exit> {
    let letter = super::find(settings, &args.letter)?;
    let payload = args.correction().apply(&letter.payload)?;
    let corrected = DeadLetter { payload: payload.clone().into_bytes(), ..letter };
    let explained = shown::explained(settings, &corrected).map_err(anyhow::Error::msg)?;
    if explained.verdict != "mapped" {
        eprint!("the current mapping does not take the correction; nothing is done\n\n{explained}");
        return Ok(Exit::Failed);
    }
    if args.dry_run {
        println!("{payload}\n\n{explained}");
        return Ok(Exit::Fine);
    }
    let keys = vec![args.letter.clone()];
    let request = ReplayRequest { keys, payload: Some(payload), ..Default::default() };
    let results = crate::cli::block_on(async {
        let mut desk = Desk::new(settings);
        let results = desk.replay(&request).await?;
        desk.close().await?;
        anyhow::Ok(results)
    })??;
    match results.into_iter().next().map(|result| result.error) {
        Some(None) => println!("corrected and replayed {}", args.letter),
        Some(Some(error)) => {
            println!("still dead {}: {error}", args.letter);
            return Ok(Exit::Failed);
        }
        // Somebody else was quicker.
        None => println!("no dead letter {} any more", args.letter),
    }
    Ok(Exit::Fine)
}
