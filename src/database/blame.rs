//! Which row of a refused segment is tried apart. Halves find a refused row in some log2 steps and send the good ones of its
//! segment two to three times; mostly a server names the row at which it stopped, and then those before it are sent twice.

use std::ops::Range;

/// So many names of one batch are followed: behind each one all of the rest is sent, and where most rows are refused halves
/// send fewer.
pub const NAMES_MAX: usize = 8;

/// What is believed of the server while one batch is delivered. It may collect rows and name the last one it has read: after
/// one wrong word nothing that it names counts.
#[derive(Debug, Default)]
pub struct Blame {
    named: Option<usize>,
    names: usize,
    misled: bool,
}

impl Blame {
    /// These rows went in.
    pub fn taken(&mut self, rows: &Range<usize>) {
        if self.named.take_if(|row| rows.contains(row)).is_some() {
            self.misled = true;
        }
    }

    /// These rows were refused, at the row `line` of them, counted from 1, where the server says so: the one to be tried
    /// alone. All before it must go in then.
    pub fn refused(&mut self, rows: &Range<usize>, line: Option<usize>) -> Option<usize> {
        if self.named.take().is_some_and(|row| *rows != (row..row + 1)) {
            self.misled = true;
        }
        let row = rows.start.saturating_add(line?.checked_sub(1)?);
        let followed = !self.misled && self.names < NAMES_MAX;
        self.named = Some(row).filter(|row| followed && rows.len() > 1 && rows.contains(row));
        self.names += usize::from(self.named.is_some());
        self.named
    }
}
