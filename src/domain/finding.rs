//! What a look at something outside or inside found.

use serde::Serialize;

/// The later the worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// A promise holds now and may not later.
    Warn,
    /// A promise is broken, or cannot be kept.
    Fail,
}

impl Verdict {
    pub fn code(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        }
    }
}

/// One line of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// As the board calls it: `mqtt:home`, `postgresql:telemetry`, `drive`.
    pub about: String,
    pub check: &'static str,
    pub verdict: Verdict,
    /// What was measured or answered.
    pub figure: String,
    /// What to do; none when nothing needs to be done.
    pub remedy: Option<String>,
}

/// Collects what one look finds.
#[derive(Debug)]
pub struct Findings {
    about: String,
    found: Vec<Finding>,
}

impl Findings {
    pub fn about(about: impl Into<String>) -> Self {
        Findings { about: about.into(), found: Vec::new() }
    }

    pub fn ok(&mut self, check: &'static str, figure: impl Into<String>) {
        self.add(check, Verdict::Ok, figure.into(), None);
    }

    pub fn warn(&mut self, check: &'static str, figure: impl Into<String>, remedy: &str) {
        self.add(check, Verdict::Warn, figure.into(), Some(remedy));
    }

    pub fn fail(&mut self, check: &'static str, figure: impl Into<String>, remedy: &str) {
        self.add(check, Verdict::Fail, figure.into(), Some(remedy));
    }

    /// An error whose text says what to do.
    pub fn failed(&mut self, check: &'static str, error: &dyn std::error::Error) {
        self.add(check, Verdict::Fail, error.to_string(), None);
    }

    fn add(&mut self, check: &'static str, verdict: Verdict, figure: String, remedy: Option<&str>) {
        let (about, remedy) = (self.about.clone(), remedy.map(str::to_owned));
        self.found.push(Finding { about, check, verdict, figure, remedy });
    }

    pub fn done(self) -> Vec<Finding> {
        self.found
    }
}
