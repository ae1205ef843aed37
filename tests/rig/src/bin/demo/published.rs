//! The simulator's ledger: what the broker acknowledged, one JSON object per line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// One acknowledged message.
#[derive(Debug, Clone, Deserialize)]
pub struct Message {
    pub stream: String,
    pub topic: String,
    /// As it was sent.
    pub payload: String,
}

impl Message {
    /// `None` when it is not JSON.
    pub fn json(&self) -> Option<Value> {
        serde_json::from_str(&self.payload).ok()
    }
}

/// Reads the ledger while it is being written.
#[derive(Debug)]
pub struct Published {
    file: PathBuf,
    reader: Option<BufReader<File>>,
    line: String,
    pub messages: Vec<Message>,
}

impl Published {
    pub fn new(file: &Path) -> Self {
        Self { file: file.to_owned(), reader: None, line: String::new(), messages: Vec::new() }
    }

    /// Takes in the lines that have come since the last call.
    ///
    /// # Errors
    /// When a line is not what it should be.
    pub fn read_on(&mut self) -> Result<()> {
        if self.reader.is_none() {
            self.reader = File::open(&self.file).ok().map(BufReader::new);
        }
        let Some(reader) = &mut self.reader else { return Ok(()) };
        while reader.read_line(&mut self.line).context("read the ledger")? > 0 {
            if !self.line.ends_with('\n') {
                // Half a line: the rest comes with the next call.
                break;
            }
            let message = serde_json::from_str(&self.line)
                .with_context(|| format!("a line of the ledger: {}", self.line))?;
            self.messages.push(message);
            self.line.clear();
        }
        Ok(())
    }

    pub fn stream<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Message> {
        self.messages.iter().filter(move |message| message.stream == name)
    }
}
