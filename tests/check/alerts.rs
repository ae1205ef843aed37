//! The alert rules against the metrics that exist and the pages they send people to.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use telemetry::domain::Runbook;

const RULES: &str = "packaging/prometheus/telemetry.rules.yml";

/// Where the package puts `docs/`.
const PAGES: &str = "/usr/share/doc/telemetry/";

fn rules() -> String {
    fs::read_to_string(RULES).unwrap()
}

/// The names in the table of `docs/metrics.md`, with what a histogram is made of.
fn metrics() -> BTreeSet<String> {
    let page = fs::read_to_string("docs/metrics.md").unwrap();
    let mut found = BTreeSet::from(["up".to_owned()]);
    for chapter in page.split("\n## ") {
        let names = chapter.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        for name in names {
            found.insert(name.to_owned());
            if chapter.starts_with("Histograms") {
                found.extend(["bucket", "count", "sum"].map(|part| format!("{name}_{part}")));
            }
        }
    }
    found
}

#[test]
fn alerts_ask_only_for_metrics_that_exist() {
    let metrics = metrics();
    assert!(metrics.contains("telemetry_end_to_end_duration_seconds_bucket"), "{metrics:?}");
    let rules = rules();
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut asked = BTreeSet::new();
    // Comments, names of groups and paths aside: what stands in an expression.
    let expressions = rules.split("expr:").skip(1);
    for expression in expressions.map(|rest| rest.split("annotations:").next().unwrap()) {
        let words = expression.split(|c| !is_word(c));
        asked.extend(words.filter(|w| w.starts_with("telemetry_") || w.starts_with("process_")));
    }
    assert!(asked.len() > 30, "{asked:?}");
    let unknown: Vec<_> = asked.into_iter().filter(|name| !metrics.contains(*name)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

#[test]
fn every_alert_names_a_page_that_exists_and_every_runbook_has_its_alert() {
    let rules = rules();
    let alerts = rules.split("- alert: ").skip(1);
    let mut named = BTreeSet::new();
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        let page = alert.lines().find_map(|line| line.trim().strip_prefix("runbook: "));
        let page = page.unwrap_or_else(|| panic!("{name} names no page"));
        let (file, section) = page.split_once('#').unwrap_or((page, ""));
        let file =
            Path::new("docs").join(file.strip_prefix(PAGES).expect("where the package has it"));
        let text =
            fs::read_to_string(&file).unwrap_or_else(|error| panic!("{name}: {page}: {error}"));
        let anchor =
            |line: &str| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        let has = |line: &str| line.starts_with("## ") && anchor(&line.replace(',', "")) == section;
        assert!(section.is_empty() || text.lines().any(has), "{name}: {page} has no such section");
        named.extend(file.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    for runbook in Runbook::ALL {
        assert!(named.contains(runbook.page()), "no alert for {}", runbook.page());
    }
}
