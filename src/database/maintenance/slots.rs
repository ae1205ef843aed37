//! Pure arithmetic of partitions: which ranges are missing, what they are called, which are too old.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// PostgreSQL cuts longer names off, silently, and two partitions would share one.
const NAME_BYTES_MAX: usize = 63;

/// A half-open range of microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    pub start: i64,
    pub end: i64,
}

/// How many slots of `width` the range `[from, to]` touches.
pub(super) fn count(width: i64, from: i64, to: i64) -> i64 {
    to.max(from).div_euclid(width) - from.div_euclid(width) + 1
}

/// The ranges that must be made so that every instant of `[from, to]` has a partition: slots aligned to multiples of
/// `width` since 1970 UTC, less what `existing` covers. A slot that an existing partition of another width covers in part
/// is filled up around it.
pub(super) fn missing(width: i64, from: i64, to: i64, existing: &[Slot]) -> Vec<Slot> {
    let mut existing = existing.to_vec();
    existing.sort_unstable();
    let first = from.div_euclid(width);
    let mut missing = Vec::new();
    for slot in (first..first + count(width, from, to)).map(|n| Slot::nth(n, width)) {
        let mut start = slot.start;
        for taken in existing.iter().filter(|taken| taken.end > slot.start) {
            if taken.start >= slot.end {
                break;
            }
            if taken.start > start {
                missing.push(Slot { start, end: taken.start });
            }
            start = start.max(taken.end);
        }
        if start < slot.end {
            missing.push(Slot { start, end: slot.end });
        }
    }
    missing
}

impl Slot {
    fn nth(number: i64, width: i64) -> Self {
        let start = number.saturating_mul(width);
        Slot { start, end: start.saturating_add(width) }
    }
}

/// `<table>_p20260314`, with the time of day where the partition does not begin at midnight. A long table name is cut so
/// that the date is not.
pub(super) fn partition_name(table: &str, start: i64) -> String {
    let at = timestamp(start).to_zoned(TimeZone::UTC);
    let midnight = start.rem_euclid(86_400_000_000) == 0;
    let suffix = at.strftime(if midnight { "_p%Y%m%d" } else { "_p%Y%m%dt%H%M%S" }).to_string();
    let room = NAME_BYTES_MAX.saturating_sub(suffix.len());
    let cut = (0..=room.min(table.len())).rev().find(|at| table.is_char_boundary(*at)).unwrap_or(0);
    format!("{}{suffix}", &table[..cut])
}

/// As PostgreSQL reads it, whatever the session's time zone.
pub(super) fn literal(micros: i64) -> String {
    format!("'{}'", timestamp(micros))
}

fn timestamp(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(if micros < 0 {
        Timestamp::MIN
    } else {
        Timestamp::MAX
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000_000;
    const DAY: i64 = 24 * HOUR;

    fn slots(ranges: &[(i64, i64)]) -> Vec<Slot> {
        ranges.iter().map(|(start, end)| Slot { start: start * DAY, end: end * DAY }).collect()
    }

    #[test]
    fn a_range_needs_every_slot_it_touches() {
        assert_eq!(missing(DAY, DAY, DAY, &[]), slots(&[(1, 2)]), "an edge belongs to the next");
        assert_eq!(missing(DAY, DAY - 1, DAY, &[]), slots(&[(0, 1), (1, 2)]));
        assert_eq!(missing(7 * DAY, 15 * DAY, 15 * DAY, &[]), slots(&[(14, 21)]));
        assert_eq!(missing(DAY, -1, -1, &[]), slots(&[(-1, 0)]), "before 1970");
    }

    #[test]
    fn what_is_there_is_not_made_again() {
        let there = slots(&[(2, 3), (0, 1)]);
        assert_eq!(missing(DAY, 0, 4 * DAY - 1, &there), slots(&[(1, 2), (3, 4)]));
        let unbounded = [Slot { start: i64::MIN, end: 2 * DAY }];
        assert_eq!(missing(DAY, 0, 3 * DAY - 1, &unbounded), slots(&[(2, 3)]));
    }

    #[test]
    fn a_changed_width_fills_the_gaps_around_old_partitions() {
        let there = slots(&[(2, 3), (5, 6)]);
        assert_eq!(missing(7 * DAY, 0, 0, &there), slots(&[(0, 2), (3, 5), (6, 7)]));
        let weeks = slots(&[(0, 7)]);
        assert_eq!(missing(DAY, 6 * DAY, 7 * DAY, &weeks), slots(&[(7, 8)]));
    }

    #[test]
    fn names_carry_the_start_and_fit() {
        let day = 1_773_446_400_000_000;
        assert_eq!(partition_name("energy", day), "energy_p20260314");
        assert_eq!(partition_name("energy", day + 6 * HOUR), "energy_p20260314t060000");
        let long = partition_name(&"ü".repeat(60), day);
        assert!(long.len() <= NAME_BYTES_MAX && long.ends_with("_p20260314"), "{long}");
        assert_eq!(literal(day), "'2026-03-14T00:00:00Z'");
    }
}
