//! A device's own time, believed only inside its sanity window, and the one way times are written.

use jiff::civil::DateTime;
use jiff::fmt::temporal::DateTimePrinter;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Unit};

use super::decimal::Decimal;
use crate::config::{Rounding, TimestampFormat, TimestampSettings};

static PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));

/// The window around the arrival in which a device's time is believed, in microseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceClock {
    format: TimestampFormat,
    max_age_micros: i64,
    max_skew_micros: i64,
}

impl DeviceClock {
    pub(super) fn new(settings: &TimestampSettings) -> Self {
        let micros =
            |duration: std::time::Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        DeviceClock {
            format: settings.format,
            max_age_micros: micros(settings.max_age),
            max_skew_micros: micros(settings.max_skew),
        }
    }

    /// Microseconds since 1970, or `None` when the text is no time of the declared form or outside the window.
    pub(super) fn read_text(&self, text: &str, arrival: i64) -> Option<i64> {
        match self.format {
            TimestampFormat::Auto | TimestampFormat::Rfc3339 => {}
            _ => return None,
        }
        let time = text.parse::<Timestamp>().ok().or_else(|| {
            // Without a zone: UTC. The letter Z keeps jiff from reading a time with offset as a local one.
            let local: DateTime = text.parse().ok()?;
            TimeZone::UTC.to_timestamp(local).ok()
        })?;
        self.believed(time.as_microsecond(), arrival)
    }

    /// The same for a number.
    pub(super) fn read_number(&self, number: Decimal, arrival: i64) -> Option<i64> {
        let powers: &[f64] = match self.format {
            TimestampFormat::Auto => &[1e6, 1e3, 1.0],
            TimestampFormat::EpochSeconds => &[1e6],
            TimestampFormat::EpochMillis => &[1e3],
            TimestampFormat::EpochMicros => &[1.0],
            TimestampFormat::Rfc3339 => &[],
        };
        let zero = Decimal::from_f64(0.0)?;
        powers.iter().find_map(|power| {
            let micros = number.linear(Decimal::from_f64(*power)?, zero)?;
            self.believed(micros.to_integer(Rounding::Nearest).ok()?, arrival)
        })
    }

    fn believed(&self, micros: i64, arrival: i64) -> Option<i64> {
        let oldest = arrival.saturating_sub(self.max_age_micros);
        let newest = arrival.saturating_add(self.max_skew_micros);
        (oldest..=newest).contains(&micros).then_some(micros)
    }
}

/// Appends RFC 3339 in UTC with six digits of a second. A time beyond the year 9999 is written as its last instant.
pub(super) fn write_rfc3339(micros: i64, out: &mut Vec<u8>) {
    let bound = if micros < 0 { Timestamp::MIN } else { Timestamp::MAX };
    let time = Timestamp::from_microsecond(micros)
        .unwrap_or_else(|_| bound.round(Unit::Second).unwrap_or(bound));
    // Writing into memory does not fail.
    let _ = PRINTER.print_timestamp(&time, &mut *out);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const DAY: u64 = 86_400;
    /// 2026-03-14T07:21:05.412908Z
    const ARRIVAL: i64 = 1_773_472_865_412_908;

    fn clock(format: TimestampFormat) -> DeviceClock {
        DeviceClock::new(&TimestampSettings {
            format,
            max_age: Duration::from_secs(7 * DAY),
            max_skew: Duration::from_secs(300),
        })
    }

    #[test]
    fn texts_with_and_without_zone() {
        let auto = clock(TimestampFormat::Auto);
        for (text, seconds_before_arrival) in [
            ("2026-03-14T07:21:00Z", 5),
            ("2026-03-14T08:21:00+01:00", 5),
            ("2026-03-14T07:21:00", 5),
            ("2026-03-14 07:21:00", 5),
            ("2026-03-14T07:20:05", 60),
        ] {
            let expected = ARRIVAL - 412_908 - seconds_before_arrival * 1_000_000;
            assert_eq!(auto.read_text(text, ARRIVAL), Some(expected), "{text}");
        }
        for text in ["", "yesterday", "2031-01-01T00:00:00Z", "1970-01-01T00:00:00Z", "4520117"] {
            assert_eq!(auto.read_text(text, ARRIVAL), None, "{text}");
        }
        assert_eq!(
            clock(TimestampFormat::EpochMillis).read_text("2026-03-14T07:21:00Z", ARRIVAL),
            None
        );
    }

    #[test]
    fn a_local_time_that_a_zone_would_skip_is_utc() {
        let arrival = 1_774_751_400_000_000; // 2026-03-29T02:30:00Z
        assert_eq!(
            clock(TimestampFormat::Auto).read_text("2026-03-29T02:30:00", arrival),
            Some(arrival)
        );
    }

    #[test]
    fn numbers_by_the_unit_that_makes_sense() {
        let auto = clock(TimestampFormat::Auto);
        let read = |text: &str| auto.read_number(Decimal::parse(text).unwrap(), ARRIVAL);
        assert_eq!(read("1773472865"), Some(1_773_472_865_000_000));
        assert_eq!(read("1773472865.31"), Some(1_773_472_865_310_000));
        assert_eq!(read("1773472865310"), Some(1_773_472_865_310_000));
        assert_eq!(read("1773472865310123"), Some(1_773_472_865_310_123));
        for text in ["4520117", "0", "-1", "1924991999", "1e999"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn times_are_written_with_six_digits_in_utc() {
        for (micros, expected) in [
            (ARRIVAL, "2026-03-14T07:21:05.412908Z"),
            (0, "1970-01-01T00:00:00.000000Z"),
            (1, "1970-01-01T00:00:00.000001Z"),
        ] {
            let mut out = Vec::new();
            write_rfc3339(micros, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
        let mut out = Vec::new();
        write_rfc3339(i64::MAX, &mut out);
        assert!(out.starts_with(b"9999-12-30T") || out.starts_with(b"9999-12-31T"));
    }
}
