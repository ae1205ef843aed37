//! The live picture: one line per stream, rewritten in place on a terminal, one line now and then otherwise.

use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::style::Stylize;
use crossterm::terminal::{Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen};
use crossterm::{execute, queue};
use rig::{StreamState, Streams};

use crate::published::Published;

/// Between two lines when nobody watches.
const PLAIN_PAUSE: Duration = Duration::from_secs(5);

pub const HEAD: [&str; 9] = [
    "stream",
    "published",
    "received",
    "pending",
    "in Kafka",
    "in table",
    "dead",
    "filtered",
    "newest row",
];

/// Where the picture goes. Dropping it gives the terminal back.
pub struct Screen {
    terminal: bool,
    last_plain: Option<Instant>,
    /// What stands below the table: places and commands.
    footer: Vec<String>,
}

impl Screen {
    /// # Errors
    /// When the terminal cannot be written to.
    pub fn open(footer: Vec<String>) -> Result<Self> {
        let terminal = stdout().is_terminal();
        if terminal {
            execute!(stdout(), EnterAlternateScreen, Hide)?;
        } else {
            footer.iter().for_each(|line| println!("{line}"));
        }
        Ok(Self { terminal, last_plain: None, footer })
    }

    /// Shows the state.
    ///
    /// # Errors
    /// When the terminal cannot be written to.
    pub fn show(&mut self, streams: &Streams, published: &Published, title: &str) -> Result<()> {
        if self.terminal {
            return self.paint(streams, published, title);
        }
        if self.last_plain.is_none_or(|last| last.elapsed() >= PLAIN_PAUSE) {
            self.last_plain = Some(Instant::now());
            println!("\n{title}");
            lines(streams, published).iter().for_each(|line| println!("{line}"));
        }
        Ok(())
    }

    fn paint(&self, streams: &Streams, published: &Published, title: &str) -> Result<()> {
        let mut out = stdout().lock();
        queue!(out, MoveTo(0, 0))?;
        let mut lines =
            vec![title.bold().to_string(), String::new(), row(&HEAD).bold().to_string()];
        for stream in &streams.streams {
            let cells = cells(stream, published);
            lines.push(row(&cells.each_ref().map(String::as_str)));
            lines.extend(troubles(stream).map(|text| format!("    {}", text.yellow())));
        }
        lines.push(String::new());
        lines.extend(self.footer.iter().cloned());
        for line in lines {
            write!(out, "{line}")?;
            queue!(out, Clear(ClearType::UntilNewLine))?;
            write!(out, "\r\n")?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))?;
        out.flush()?;
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.terminal {
            let _ = execute!(stdout(), Show, LeaveAlternateScreen);
        }
    }
}

/// A heading, a line for each stream, and what troubles it.
fn lines(streams: &Streams, published: &Published) -> Vec<String> {
    let mut lines = vec![row(&HEAD)];
    for stream in &streams.streams {
        let cells = cells(stream, published);
        lines.push(row(&cells.each_ref().map(String::as_str)));
        lines.extend(troubles(stream).map(|text| format!("    {text}")));
    }
    lines
}

/// Cells in columns: the first to the left, numbers to the right.
pub fn row(cells: &[&str]) -> String {
    let mut text = String::new();
    for (column, cell) in cells.iter().enumerate() {
        if column == 0 {
            text.push_str(&format!("  {cell:<20}"));
        } else {
            text.push_str(&format!("{cell:>11}"));
        }
    }
    text
}

fn cells(stream: &StreamState, published: &Published) -> [String; 9] {
    let sinks = || stream.sinks.iter();
    let pending = sinks().map(|sink| stream.pending(sink)).max().flatten();
    let kafka = sinks().find(|sink| sink.is_kafka()).map(|sink| sink.books().delivered);
    let tables = sinks().filter(|sink| !sink.is_kafka());
    let in_tables: u64 = tables.clone().map(|sink| sink.books().delivered).sum();
    let dead: u64 = sinks().map(|sink| sink.books().dead_lettered).sum();
    let passed_over = |books: rig::Books| books.filtered + books.incomplete;
    let filtered = sinks().map(|sink| passed_over(sink.books())).max().unwrap_or(0);
    let age = tables.filter_map(|sink| sink.age_seconds()).min_by(f64::total_cmp);
    let or_dash = |value: Option<u64>| value.map_or_else(|| "-".into(), |value| value.to_string());
    [
        stream.name.clone(),
        published.count(&stream.name).to_string(),
        stream.status.sequence.to_string(),
        or_dash(pending),
        or_dash(kafka),
        in_tables.to_string(),
        dead.to_string(),
        filtered.to_string(),
        age.map_or_else(|| "-".into(), |seconds| format!("{seconds:.1} s")),
    ]
}

pub fn troubles(stream: &StreamState) -> impl Iterator<Item = String> {
    let own = stream.status.trouble.iter().cloned();
    own.chain(stream.sinks.iter().filter_map(|sink| {
        let trouble = sink.status.trouble.as_ref()?;
        Some(format!("{}: {trouble}", sink.sink))
    }))
}
