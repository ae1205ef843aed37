//! The house rules a machine can check.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

/// Every source file of the node with its text up to its tests.
fn product() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let is_test = |name: &str| name.contains("/tests/") || name.ends_with("tests.rs");
    let with_text = files.into_iter().map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        let product = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned();
        (path.strip_prefix(&root).unwrap().display().to_string(), product)
    });
    with_text.filter(|(name, _)| !is_test(name)).collect()
}

/// The folders in the order in which `src/lib.rs` lists them: the upper may import the lower.
fn order() -> Vec<String> {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let module = |line: &str| Some(line.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned());
    lib.lines().filter_map(module).collect()
}

#[test]
fn imports_point_down_the_list_in_lib_rs() {
    let order = order();
    let rank = |name: &str| order.iter().position(|known| known == name);
    let mut upward = BTreeSet::new();
    for (file, text) in product() {
        let folder = file.split(['/', '.']).next().unwrap_or_default();
        let Some(own) = rank(folder) else { continue };
        for import in text.split("crate::").skip(1) {
            let end = import.find(|c: char| !c.is_ascii_lowercase() && c != '_');
            let target = &import[..end.unwrap_or(import.len())];
            if rank(target).is_some_and(|other| other < own) {
                upward.insert(format!("{file} imports {target}, which stands above {folder}"));
            }
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
}

#[test]
fn each_client_library_lives_behind_its_folders() {
    let homes = [
        ("sled::", &["buffer"][..]),
        ("rdkafka::", &["kafka"]),
        ("rumqttc::", &["stream", "simulate"]),
        ("tokio_postgres::", &["database", "migrate"]),
        ("bb8::", &["database"]),
        ("actix_web::", &["http"]),
        ("backoff::", &["retry"]),
        ("prometheus_client::", &["observe"]),
        ("rcgen::", &["certificates"]),
        ("x509_parser::", &["certificates"]),
    ];
    let mut strays = BTreeSet::new();
    for (file, text) in product() {
        let folder = file.split(['/', '.']).next().unwrap_or_default().to_owned();
        for (library, allowed) in homes {
            let used = text.match_indices(library).any(|(at, _)| {
                // `crate::retry::Backoff` is not the library `backoff`.
                !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
            });
            if used && !allowed.contains(&folder.as_str()) {
                strays.insert(format!("{file} uses {library}"));
            }
        }
    }
    assert!(strays.is_empty(), "{strays:#?}");
}

#[test]
fn every_runbook_is_named_in_the_code_and_every_name_has_its_page() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/runbooks");
    let pages: BTreeSet<String> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "README.md")
        .collect();
    let named: BTreeSet<_> =
        telemetry::domain::Runbook::ALL.iter().map(|page| format!("{}.md", page.page())).collect();
    assert_eq!(pages, named);
    let index = fs::read_to_string(root.join("README.md")).unwrap();
    let product = product();
    for runbook in telemetry::domain::Runbook::ALL {
        let variant = format!("Runbook::{runbook:?}");
        let used = product.iter().filter(|(file, _)| file != "domain/runbook.rs");
        assert!(used.into_iter().any(|(_, text)| text.contains(&variant)), "{variant} is not used");
        assert!(
            index.contains(&format!("({}.md)", runbook.page())),
            "{} is not listed",
            runbook.page()
        );
        let page = fs::read_to_string(root.join(format!("{}.md", runbook.page()))).unwrap();
        for section in ["## What it means", "## What to do", "## How it ends"] {
            assert!(page.contains(section), "{}.md has no {section:?}", runbook.page());
        }
    }
}

#[test]
fn every_crash_point_is_taken_by_the_torture_and_every_crash_it_knows_exists() {
    let points: BTreeSet<String> = product()
        .iter()
        .flat_map(|(_, text)| texts_behind(text, "crash_point(\"").collect::<Vec<_>>())
        .map(|name| name.replace('_', "-"))
        .collect();
    let faults = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rig/src/bin/torture/faults");
    let mut taken = BTreeSet::new();
    for file in ["crash.rs", "replay.rs"] {
        let text = fs::read_to_string(faults.join(file)).unwrap();
        for call in ["at(\"", "new(\""] {
            taken.extend(texts_behind(&text, call).filter(|name| name.starts_with("crash-")));
        }
    }
    assert_eq!(points, taken);
}

/// Of each kind of part: where one of its lives can be ended or stopped.
const PART_POINTS: [(&str, &[&str]); 6] = [
    ("BatchWriter", &["part_writer_"]),
    ("KafkaProducer", &["part_kafka_", "part_copies_"]),
    ("Listener", &["part_listener_"]),
    ("Migrator", &["part_migrator_"]),
    ("StreamReader", &["part_stream_"]),
    ("Watcher", &["part_watch_"]),
];

#[test]
fn every_kind_of_part_can_be_made_to_fail_and_a_test_does() {
    let product = product();
    let parts: BTreeSet<&str> = product
        .iter()
        .flat_map(|(_, text)| text.split(" Part for ").skip(1))
        .filter_map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric()).next())
        .collect();
    assert_eq!(parts, PART_POINTS.iter().map(|(part, _)| *part).collect());
    let points: BTreeSet<String> = product
        .iter()
        .flat_map(|(_, text)| texts_behind(text, "part_point(|| format!(\"").collect::<Vec<_>>())
        .filter_map(|name| Some(name.split('{').next()?.to_owned()))
        .collect();
    let known = PART_POINTS.iter().flat_map(|(_, points)| *points);
    assert_eq!(points, known.map(|point| (*point).to_owned()).collect());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node");
    let tests = ["parts.rs", "threads.rs"].map(|file| fs::read_to_string(root.join(file)).unwrap());
    for point in points {
        assert!(tests.iter().any(|text| text.contains(&point)), "no test goes to {point}");
    }
}

/// What stands between each `call` and the next quotation mark.
fn texts_behind<'t>(text: &'t str, call: &str) -> impl Iterator<Item = String> + use<'t> {
    let pieces: Vec<&str> = text.split(call).skip(1).collect();
    pieces.into_iter().filter_map(|rest| Some(rest.split('"').next()?.to_owned()))
}

#[test]
fn the_picture_names_bounds_that_exist() {
    let product = product();
    let lib = &product.iter().find(|(name, _)| name == "lib.rs").expect("lib.rs").1;
    let picture = lib.split("```").nth(1).expect("the picture");
    let words = picture.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let bounds: BTreeSet<_> = words.filter(|word| word.contains('_')).collect();
    assert!(bounds.len() > 5, "{bounds:?}");
    for bound in bounds {
        let constant = format!("const {bound}:");
        let setting = format!("pub {bound}:");
        let known = product.iter().any(|(name, text)| {
            text.contains(&constant) || name == "config/settings.rs" && text.contains(&setting)
        });
        assert!(
            known,
            "the picture in lib.rs names {bound}, which is neither constant nor setting"
        );
    }
}

#[test]
fn the_template_unit_differs_from_the_unit_in_its_instance_alone() {
    let unit = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name);
        let text = fs::read_to_string(path).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned);
        lines.collect::<Vec<_>>().join("\n")
    };
    let one = unit("telemetry.service")
        .replace("Description=Telemetry node", "Description=Telemetry node %i")
        .replace("/etc/telemetry/", "/etc/telemetry/nodes/%i/")
        .replace("Directory=telemetry", "Directory=telemetry@%i");
    assert_eq!(unit("telemetry@.service").trim(), one.trim());
}

/// `node clock` is short for `cargo test --test node clock`, which runs what has that in its name: nothing, without a word,
/// where it is spelt wrong.
#[test]
fn every_proof_that_the_guarantees_name_is_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/guarantees.md")).unwrap();
    let mut proofs = 0;
    for quoted in text.split('`').skip(1).step_by(2) {
        let mut words = quoted.split_whitespace().peekable();
        while words.next_if(|word| ["cargo", "test", "--test"].contains(word)).is_some() {}
        let Some(names) = words.next().and_then(|target| test_names(root, target)) else {
            continue;
        };
        let filters: Vec<&str> = words.filter(|word| *word != "--").collect();
        assert!(filters.len() < 2 || quoted.contains(" -- "), "`{quoted}`: cargo refuses a second");
        for filter in filters {
            assert!(names.iter().any(|name| name.contains(filter)), "`{quoted}` runs no test");
            proofs += 1;
        }
    }
    assert!(proofs > 50, "{proofs}");
}

/// The functions of a target of `cargo test`, behind their modules; `None` when it is no target.
fn test_names(root: &Path, target: &str) -> Option<Vec<String>> {
    let folder = match target {
        "--lib" => root.join("src"),
        target => root.join("tests").join(target),
    };
    let mut files: Vec<_> =
        Some(folder.with_extension("rs")).into_iter().filter(|file| file.is_file()).collect();
    if folder.is_dir() {
        sources(&folder, &mut files);
    }
    let names = files.iter().flat_map(|file| {
        let text = fs::read_to_string(file).unwrap();
        let module = file.strip_prefix(&folder).unwrap_or(Path::new("")).with_extension("");
        let module = module.display().to_string().replace('/', "::");
        let behind = |function: &str| format!("{module}::{}", function.split('(').next().unwrap());
        text.split("fn ").skip(1).map(behind).collect::<Vec<_>>()
    });
    Some(names.collect()).filter(|names: &Vec<String>| !names.is_empty())
}
