//! The simulator's ledger: what the broker acknowledged, one JSON object per line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

/// One acknowledged message.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Line {
    pub stream: String,
    pub topic: String,
    /// Of the payload, in hexadecimal digits.
    pub sha256: String,
}

/// Reads the ledger while it is being written.
#[derive(Debug)]
pub struct Published {
    file: PathBuf,
    reader: Option<BufReader<File>>,
    /// The last line, while only half of it is there.
    partial: String,
    counts: BTreeMap<String, u64>,
    /// Kept for the judgement; an endless demo has none.
    lines: Option<Vec<Line>>,
}

impl Published {
    pub fn new(file: &Path, keep_lines: bool) -> Self {
        Self {
            file: file.to_owned(),
            reader: None,
            partial: String::new(),
            counts: BTreeMap::new(),
            lines: keep_lines.then(Vec::new),
        }
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
        while reader.read_line(&mut self.partial).context("read the ledger")? > 0 {
            if !self.partial.ends_with('\n') {
                break;
            }
            let line: Line = serde_json::from_str(&self.partial)
                .with_context(|| format!("a line of the ledger: {}", self.partial))?;
            self.partial.clear();
            *self.counts.entry(line.stream.clone()).or_default() += 1;
            if let Some(lines) = &mut self.lines {
                lines.push(line);
            }
        }
        Ok(())
    }

    pub fn count(&self, stream: &str) -> u64 {
        self.counts.get(stream).copied().unwrap_or(0)
    }

    pub fn lines<'a>(&'a self, stream: &'a str) -> impl Iterator<Item = &'a Line> {
        self.lines.iter().flatten().filter(move |line| line.stream == stream)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn half_a_line_waits_for_its_other_half() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut published = Published::new(file.path(), true);
        let line = r#"{"stream":"a","topic":"t","id":1,"sha256":"00","acknowledged":"now"}"#;
        write!(file, "{line}\n{}", &line[..20]).unwrap();
        published.read_on().unwrap();
        assert_eq!(published.count("a"), 1);
        writeln!(file, "{}", &line[20..]).unwrap();
        published.read_on().unwrap();
        assert_eq!((published.count("a"), published.lines("a").count()), (2, 2));
    }
}
