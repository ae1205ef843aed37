//! Figures: a line each for people, and the same as JSON.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// What is asked of a figure.
#[derive(Debug, Clone, Copy)]
pub enum Bar {
    /// Ours divided by the baseline's.
    RatioAtLeast(f64),
    RatioAtMost(f64),
    AtMost(f64),
    /// At most this, or the run fails: a promise, far from what an idle machine measures.
    Promised(f64),
}

/// One row of the report.
#[derive(Debug, Clone)]
pub struct Measure {
    pub name: &'static str,
    pub unit: &'static str,
    pub bar: Bar,
    pub ours: Vec<f64>,
    /// Empty where there is none.
    pub baseline: Vec<f64>,
}

impl Measure {
    pub fn new(name: &'static str, unit: &'static str, bar: Bar) -> Self {
        Self { name, unit, bar, ours: Vec::new(), baseline: Vec::new() }
    }

    pub fn ratio(&self) -> Option<f64> {
        Some(median(&self.ours)? / median(&self.baseline)?)
    }

    pub fn is_met(&self) -> Option<bool> {
        match self.bar {
            Bar::RatioAtLeast(bar) => Some(self.ratio()? >= bar),
            Bar::RatioAtMost(bar) => Some(self.ratio()? <= bar),
            Bar::AtMost(bar) | Bar::Promised(bar) => Some(median(&self.ours)? <= bar),
        }
    }

    /// It was measured, and is not what is promised.
    pub fn breaks_a_promise(&self) -> bool {
        matches!(self.bar, Bar::Promised(_)) && self.is_met() == Some(false)
    }

    /// For people.
    pub fn line(&self) -> String {
        let mut line = format!("{:<44} {}", self.name, spread(&self.ours, self.unit));
        if let Some(ratio) = self.ratio() {
            line.push_str(&format!(
                "  baseline {}  ratio {ratio:.2}",
                spread(&self.baseline, self.unit)
            ));
        }
        let bar = match self.bar {
            Bar::RatioAtLeast(bar) => format!("at least {bar} x"),
            Bar::RatioAtMost(bar) => format!("at most {bar} x"),
            Bar::AtMost(bar) => format!("at most {}", number(bar)),
            Bar::Promised(bar) => format!("at most {}, promised", number(bar)),
        };
        let met = match self.is_met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        };
        line.push_str(&format!("  ({bar}: {met})"));
        line
    }

    fn json(&self) -> Value {
        let (kind, bar) = match self.bar {
            Bar::RatioAtLeast(bar) => ("ratio_at_least", bar),
            Bar::RatioAtMost(bar) => ("ratio_at_most", bar),
            Bar::AtMost(bar) => ("at_most", bar),
            Bar::Promised(bar) => ("promised", bar),
        };
        json!({
            "name": self.name,
            "unit": self.unit,
            "ours": median(&self.ours),
            "baseline": median(&self.baseline),
            "ratio": self.ratio(),
            "runs": { "ours": self.ours, "baseline": self.baseline },
            "bar": { "kind": kind, "value": bar, "met": self.is_met() },
        })
    }
}

/// Writes all of them.
///
/// # Errors
/// When the file cannot be written.
pub fn write(measures: &[Measure], file: &Path) -> Result<()> {
    let all: Vec<Value> = measures.iter().map(Measure::json).collect();
    let text = serde_json::to_string_pretty(&all).context("form the results")?;
    std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// The value below which this part of all lies.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn spread(values: &[f64], unit: &str) -> String {
    let (Some(middle), Some(least), Some(most)) = (
        median(values),
        values.iter().copied().min_by(f64::total_cmp),
        values.iter().copied().max_by(f64::total_cmp),
    ) else {
        return "-".to_owned();
    };
    format!("{} {unit} [{}..{}]", number(middle), number(least), number(most))
}

/// Three digits that matter, thousands in groups.
fn number(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.*}", if value < 10.0 { 2 } else { 1 });
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(5.333), "5.33");
        assert_eq!(number(99.94), "99.9");
        assert_eq!(number(1_234_567.0), "1,234,567");
    }

    #[test]
    fn the_median_and_quantiles_are_values_that_were_measured() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&hundred, 0.5), 50.0);
        assert_eq!(quantile(&hundred, 0.99), 99.0);
    }

    #[test]
    fn a_bar_is_met_or_missed() {
        let mut measure = Measure::new("x", "1/s", Bar::RatioAtLeast(0.5));
        assert_eq!(measure.is_met(), None);
        measure.ours = vec![50.0];
        measure.baseline = vec![100.0];
        assert_eq!(measure.is_met(), Some(true));
    }

    #[test]
    fn only_a_promise_is_broken() {
        let measured = |bar| Measure { ours: vec![3.1], ..Measure::new("x", "s", bar) };
        assert!(measured(Bar::Promised(3.0)).breaks_a_promise());
        assert!(!measured(Bar::Promised(3.2)).breaks_a_promise());
        assert!(!measured(Bar::AtMost(3.0)).breaks_a_promise());
        assert!(!Measure::new("x", "s", Bar::Promised(3.0)).breaks_a_promise(), "not measured");
    }
}
