//! What goes wrong with real devices, each with its probability.

use rand::Rng;

use super::SimulateError;

/// One way a message goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// A value of the wrong type or far outside its column.
    BadValue,
    /// The message is not sent at all.
    Gap,
    /// The same bytes are published twice.
    Duplicate,
    /// The device's own time is wrong.
    WrongClock,
    /// No JSON: cut off, not UTF-8 or empty.
    Malformed,
}

impl Fault {
    pub const ALL: [Fault; 5] =
        [Fault::BadValue, Fault::Gap, Fault::Duplicate, Fault::WrongClock, Fault::Malformed];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Fault::BadValue => "bad-value",
            Fault::Gap => "gap",
            Fault::Duplicate => "duplicate",
            Fault::WrongClock => "wrong-clock",
            Fault::Malformed => "malformed",
        }
    }
}

/// The probability of each fault per message; together at most 1.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FaultRates {
    probabilities: [f64; Fault::ALL.len()],
}

impl FaultRates {
    /// Reads `bad-value=0.01,gap=0.001`.
    pub fn parse(text: &str) -> Result<Self, SimulateError> {
        let refuse = |problem: String| SimulateError::Faults { problem };
        let mut rates = FaultRates::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, probability) =
                part.split_once('=').ok_or_else(|| refuse(format!("{part:?} has no '='")))?;
            let known = Fault::ALL.iter().position(|fault| fault.name() == name.trim());
            let at = known.ok_or_else(|| {
                let names: Vec<&str> = Fault::ALL.iter().map(|fault| fault.name()).collect();
                refuse(format!("{name:?} is none of {}", names.join(", ")))
            })?;
            let probability: Option<f64> = probability.trim().parse().ok();
            rates.probabilities[at] = probability
                .filter(|probability| (0.0..=1.0).contains(probability))
                .ok_or_else(|| refuse(format!("{part:?} is no probability from 0 to 1")))?;
        }
        if rates.probabilities.iter().sum::<f64>() > 1.0 {
            return Err(refuse("together they are more than 1".to_owned()));
        }
        Ok(rates)
    }

    /// The fault of the next message; the same draw for every choice of rates, so that a seed stays comparable.
    pub(super) fn draw(&self, random: &mut impl Rng) -> Option<Fault> {
        let mut left: f64 = random.random();
        for (fault, probability) in Fault::ALL.into_iter().zip(self.probabilities) {
            if left < probability {
                return Some(fault);
            }
            left -= probability;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn rates_are_read_and_refused() {
        let rates = FaultRates::parse("bad-value=0.25, gap=0.5").unwrap();
        assert_eq!(rates.probabilities, [0.25, 0.5, 0.0, 0.0, 0.0]);
        assert_eq!(FaultRates::parse("").unwrap(), FaultRates::default());
        for text in ["gap", "gap=2", "gap=-1", "gap=NaN", "storm=0.1", "gap=0.6,malformed=0.6"] {
            assert!(FaultRates::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn faults_come_as_often_as_asked() {
        let mut random = StdRng::seed_from_u64(1);
        let rates = FaultRates::parse("gap=0.2,malformed=0.1").unwrap();
        let drawn: Vec<_> = (0..10_000).map(|_| rates.draw(&mut random)).collect();
        let count = |wanted| drawn.iter().filter(|fault| **fault == wanted).count();
        assert!((1_800..2_200).contains(&count(Some(Fault::Gap))));
        assert!((850..1_150).contains(&count(Some(Fault::Malformed))));
        assert_eq!(count(Some(Fault::BadValue)), 0);
    }
}
