//! The judgement of the tables of the latest state.

use std::collections::HashMap;

use crate::collect::Reading;
use crate::traffic::Table;
use crate::verdict::Verdict;

/// A row per device says what the device's newest record says.
pub fn judge<'a>(
    table: &Table,
    rows: &[Reading],
    newest: impl Iterator<Item = &'a Reading>,
    verdict: &mut Verdict,
) {
    let mut by_device: HashMap<&str, &Reading> = HashMap::new();
    for row in rows {
        if by_device.insert(&row.device, row).is_some() {
            verdict.doubled.push(format!("{}: two rows of {}", table.name, row.device));
        }
    }
    for last in newest {
        match by_device.remove(last.device.as_str()) {
            None => verdict.lost.push(format!("{}: the row of {}", table.name, last.device)),
            Some(row) if row != last => {
                verdict.changed.push(format!("{}: {row:?} instead of {last:?}", table.name));
            }
            Some(_) => {}
        }
    }
    verdict.foreign.extend(by_device.keys().map(|device| format!("{}: {device}", table.name)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::STREAMS;

    fn reading(device: &str, number: u64, value: u32) -> Reading {
        let time = "2026-03-14T07:21:05.412908Z".to_owned();
        Reading { device: device.to_owned(), number, value: Some(value), time }
    }

    fn verdict(rows: &[Reading]) -> Verdict {
        let mut verdict = Verdict::default();
        let newest = [reading("r1-0", 8, 3), reading("r1-1", 9, 4)];
        let table = STREAMS[2].tables.iter().find(|table| table.latest).unwrap();
        judge(table, rows, newest.iter(), &mut verdict);
        verdict
    }

    #[test]
    fn each_device_has_the_row_of_its_newest_record() {
        assert!(verdict(&[reading("r1-1", 9, 4), reading("r1-0", 8, 3)]).holds());
    }

    #[test]
    fn a_row_too_many_missing_old_or_of_nobody_is_told() {
        let (one, other) = (reading("r1-0", 8, 3), reading("r1-1", 9, 4));
        let twice = verdict(&[one.clone(), other.clone(), other.clone()]);
        assert_eq!(twice.doubled, ["settings: two rows of r1-1"]);
        assert_eq!(verdict(std::slice::from_ref(&one)).lost, ["settings: the row of r1-1"]);
        let stale = verdict(&[reading("r1-0", 7, 3), other.clone()]);
        assert_eq!(stale.changed.len(), 1, "{stale}");
        let mixed = verdict(&[reading("r1-0", 8, 9), other.clone()]);
        assert_eq!(mixed.changed.len(), 1, "{mixed}");
        let later = Reading { time: "2026-03-14T07:21:06.000000Z".to_owned(), ..one.clone() };
        assert_eq!(verdict(&[later, other.clone()]).changed.len(), 1);
        let foreign = verdict(&[one, other, reading("r1-7", 1, 1)]);
        assert_eq!(foreign.foreign, ["settings: r1-7"]);
    }
}
