//! Exact decimal numbers, read from the raw text of a JSON number: no digit of a 64-bit counter is lost on the way
//! through a double, and 6, 6.0 and 0.6e1 are one number.

use crate::config::Rounding;

/// Digits kept exactly. What lies behind them only tells "a little more than", which is all that rounding needs.
const DIGITS_MAX: u32 = 30;
/// 10^38 is the largest power of ten an `i128` holds.
const POWER_MAX: u32 = 38;
/// Beyond this an exponent is as good as infinite, whatever the digits in front of it.
const EXPONENT_MAX: i64 = 1_000_000;

/// `mantissa` × 10^`exponent`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decimal {
    mantissa: i128,
    exponent: i64,
}

/// Why a number is no integer of 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotAnInteger {
    Fraction,
    TooLarge,
}

impl Decimal {
    /// Reads JSON's number grammar; `None` for any other text.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if !is_json_number(text) {
            return None;
        }
        let (digits, exponent) = match text.split_once(['e', 'E']) {
            Some((digits, exponent)) => (digits, clamped_exponent(exponent)),
            None => (text, 0),
        };
        let mut number = Decimal { mantissa: 0, exponent };
        let (mut kept, mut behind_point, mut dropped_any) = (0, false, false);
        for byte in digits.bytes() {
            match byte {
                b'.' => behind_point = true,
                b'0'..=b'9' if kept < DIGITS_MAX => {
                    number.mantissa = number.mantissa * 10 + i128::from(byte - b'0');
                    kept += u32::from(number.mantissa != 0);
                    number.exponent -= i64::from(behind_point);
                }
                b'0'..=b'9' => {
                    dropped_any |= byte != b'0';
                    number.exponent += i64::from(!behind_point);
                }
                _ => {}
            }
        }
        if dropped_any {
            number.mantissa = number.mantissa * 10 + 1;
            number.exponent -= 1;
        }
        if text.starts_with('-') {
            number.mantissa = -number.mantissa;
        }
        Some(number)
    }

    /// The shortest decimal that reads back as this double: what a person wrote in the configuration.
    pub(super) fn from_f64(value: f64) -> Option<Self> {
        value.is_finite().then(|| Self::parse(ryu::Buffer::new().format_finite(value))).flatten()
    }

    /// `self × scale + offset`, or `None` where that needs more than 38 digits.
    pub(super) fn linear(self, scale: Decimal, offset: Decimal) -> Option<Self> {
        let product = Decimal {
            mantissa: self.mantissa.checked_mul(scale.mantissa)?,
            exponent: self.exponent + scale.exponent,
        };
        if offset.mantissa == 0 {
            return Some(product);
        }
        let exponent = product.exponent.min(offset.exponent);
        let aligned = |number: Decimal| {
            number.mantissa.checked_mul(power_of_ten(number.exponent - exponent)?)
        };
        Some(Decimal { mantissa: aligned(product)?.checked_add(aligned(offset)?)?, exponent })
    }

    /// The integer by the rule of rounding.
    pub(super) fn to_integer(self, rounding: Rounding) -> Result<i64, NotAnInteger> {
        if self.mantissa == 0 {
            return Ok(0);
        }
        let whole = if self.exponent >= 0 {
            power_of_ten(self.exponent).and_then(|power| self.mantissa.checked_mul(power))
        } else {
            Some(self.rounded(rounding)?)
        };
        whole.and_then(|whole| i64::try_from(whole).ok()).ok_or(NotAnInteger::TooLarge)
    }

    fn rounded(self, rounding: Rounding) -> Result<i128, NotAnInteger> {
        let (whole, fraction, half_or_more) = match power_of_ten(-self.exponent) {
            Some(power) => {
                let fraction = self.mantissa % power;
                let half_or_more = fraction.unsigned_abs() >= power.unsigned_abs().div_ceil(2);
                (self.mantissa / power, fraction, half_or_more)
            }
            // Fewer digits than the point is wide: less than a tenth.
            None => (0, self.mantissa.signum(), false),
        };
        match rounding {
            _ if fraction == 0 => Ok(whole),
            Rounding::Floor => Ok(whole - i128::from(self.mantissa < 0)),
            Rounding::Nearest if half_or_more => Ok(whole + self.mantissa.signum()),
            Rounding::Nearest => Ok(whole),
            Rounding::Reject => Err(NotAnInteger::Fraction),
        }
    }

    /// The nearest double; infinite where there is none.
    pub(super) fn to_f64(self) -> f64 {
        // Correctly rounded by the standard library; only scaled values come this way.
        format!("{}e{}", self.mantissa, self.exponent).parse().unwrap_or(f64::INFINITY)
    }
}

impl PartialEq for Decimal {
    fn eq(&self, other: &Self) -> bool {
        let plain = |number: &Decimal| {
            let (mut mantissa, mut exponent) = (number.mantissa, number.exponent);
            while mantissa != 0 && mantissa % 10 == 0 {
                mantissa /= 10;
                exponent += 1;
            }
            (mantissa, if mantissa == 0 { 0 } else { exponent })
        };
        plain(self) == plain(other)
    }
}

fn power_of_ten(exponent: i64) -> Option<i128> {
    let exponent = u32::try_from(exponent).ok().filter(|exponent| *exponent <= POWER_MAX)?;
    Some(10_i128.pow(exponent))
}

fn clamped_exponent(text: &str) -> i64 {
    let digits = text.trim_start_matches(['+', '-']).trim_start_matches('0');
    let size = match digits.len() {
        0 => 0,
        1..=6 => digits.parse().unwrap_or(EXPONENT_MAX),
        _ => EXPONENT_MAX,
    };
    if text.starts_with('-') { -size } else { size }
}

/// JSON's grammar: `-`? digits without leading zero, `.` digits?, exponent?
pub(super) fn is_json_number(text: &str) -> bool {
    let digits = |text: &mut &[u8]| {
        let count = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
        *text = &text[count..];
        count
    };
    let mut rest = text.strip_prefix('-').unwrap_or(text).as_bytes();
    let leading_zero = rest.first() == Some(&b'0');
    let whole = digits(&mut rest);
    if whole == 0 || (leading_zero && whole > 1) {
        return false;
    }
    if let [b'.', behind @ ..] = rest {
        rest = behind;
        if digits(&mut rest) == 0 {
            return false;
        }
    }
    if let [b'e' | b'E', behind @ ..] = rest {
        rest = behind;
        if let [b'+' | b'-', behind @ ..] = rest {
            rest = behind;
        }
        if digits(&mut rest) == 0 {
            return false;
        }
    }
    rest.is_empty()
}

/// A plain integer of at most 18 digits, the usual case, without the detour over [`Decimal`].
pub(super) fn plain_integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.as_bytes() {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    if !(1..=18).contains(&digits.len()) {
        return None;
    }
    let mut value = 0_i64;
    for byte in digits {
        if !byte.is_ascii_digit() {
            return None;
        }
        value = value * 10 + i64::from(byte - b'0');
    }
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn integer(text: &str, rounding: Rounding) -> Result<i64, NotAnInteger> {
        Decimal::parse(text).unwrap().to_integer(rounding)
    }

    #[test]
    fn rounding_by_rule() {
        for (text, floor, nearest) in [
            ("90.05044555664062", 90, 90),
            ("-0.4", -1, 0),
            ("0.5", 0, 1),
            ("-0.5", -1, -1),
            ("2.5", 2, 3),
            ("-2.5", -3, -3),
            ("1e3", 1000, 1000),
            ("0.6e1", 6, 6),
            ("6.0", 6, 6),
            ("-0.0", 0, 0),
            ("0.49999999999999999999999999999999999999999999", 0, 0),
            ("0.50000000000000000000000000000000000000000001", 0, 1),
            ("-1e-999999999999", -1, 0),
            ("9223372036854775807", i64::MAX, i64::MAX),
            ("-9223372036854775808.0", i64::MIN, i64::MIN),
        ] {
            assert_eq!(integer(text, Rounding::Floor), Ok(floor), "{text}");
            assert_eq!(integer(text, Rounding::Nearest), Ok(nearest), "{text}");
        }
        assert_eq!(integer("1.5", Rounding::Reject), Err(NotAnInteger::Fraction));
        assert_eq!(integer("1.50e1", Rounding::Reject), Ok(15));
    }

    #[test]
    fn numbers_beyond_64_bits_are_too_large_not_wrong() {
        let long = "9".repeat(400);
        for text in ["9223372036854775808", "1e999", "1e99999999999999999999", &long] {
            assert_eq!(integer(text, Rounding::Floor), Err(NotAnInteger::TooLarge), "{text}");
        }
        let small = format!("0.{}", "3".repeat(400));
        assert_eq!(integer(&small, Rounding::Nearest), Ok(0));
    }

    #[test]
    fn scaling_is_exact_in_decimal() {
        let scale = Decimal::from_f64(100.0).unwrap();
        let zero = Decimal::from_f64(0.0).unwrap();
        let scaled = Decimal::parse("0.29").unwrap().linear(scale, zero).unwrap();
        assert_eq!(scaled.to_integer(Rounding::Floor), Ok(29));
        let tenth = Decimal::from_f64(0.1).unwrap();
        let offset = Decimal::from_f64(-40.0).unwrap();
        assert_eq!(Decimal::parse("637").unwrap().linear(tenth, offset).unwrap().to_f64(), 23.7);
    }

    #[test]
    fn what_is_no_json_number_is_none() {
        for text in ["", "-", "01", "1.", ".5", "1e", "+1", "NaN", "Infinity", "1 ", "0x1", "--1"] {
            assert!(Decimal::parse(text).is_none(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_int8_survives_in_each_spelling(value: i64) {
            for text in [format!("{value}"), format!("{value}.0"), format!("{value}e0")] {
                prop_assert_eq!(integer(&text, Rounding::Reject), Ok(value));
            }
        }

        #[test]
        fn rounding_agrees_with_whole_and_hundredths(whole in -1_000_000_i64..1_000_000, cents in 0_i64..100) {
            let hundredths = whole * 100 + if whole < 0 { -cents } else { cents };
            let sign = if hundredths < 0 { "-" } else { "" };
            let size = hundredths.abs();
            let text = format!("{sign}{}.{:02}", size / 100, size % 100);
            prop_assert_eq!(integer(&text, Rounding::Floor), Ok(hundredths.div_euclid(100)));
            let nearest = hundredths.signum() * ((size + 50) / 100);
            prop_assert_eq!(integer(&text, Rounding::Nearest), Ok(nearest));
        }

        #[test]
        fn grammar_agrees_with_serde_json(text in "-?[0-9]{0,3}(\\.[0-9]{0,3})?([eE][+-]?[0-9]{0,2})?") {
            let oracle = serde_json::from_str::<&serde_json::value::RawValue>(&text).is_ok();
            prop_assert_eq!(is_json_number(&text), oracle);
        }
    }
}
