//! Whether this machine's clock is kept by a time service, as the kernel has it: whichever service that is tells the
//! kernel how far off the clock may be, and without any the kernel lets that bound grow.
#![allow(unsafe_code)]

use std::io;
use std::time::Duration;

use crate::domain::{Finding, Findings};

const CHECK: &str = "clock";

/// The kernel's bound grows to this and no further: nobody has kept the clock for hours. `timedatectl` takes the same for
/// "not synchronized", and as little as it the flag beside it, which some services set for other reasons.
const ERROR_MAX: Duration = Duration::from_secs(16);

/// Above this arrival times mislead.
const ERROR_WARN: Duration = Duration::from_secs(1);

pub fn probe() -> Vec<Finding> {
    let mut findings = Findings::about("machine");
    told(error_bound(), &mut findings);
    findings.done()
}

/// How far off the clock may be.
fn error_bound() -> io::Result<Duration> {
    // SAFETY: plain numbers, for which zero is a value; `modes` of zero asks and sets nothing.
    let mut clock: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes into a structure of its own layout that outlives the call.
    if unsafe { libc::adjtimex(&raw mut clock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::from_micros(u64::try_from(clock.maxerror).unwrap_or(u64::MAX)))
}

fn told(bound: io::Result<Duration>, findings: &mut Findings) {
    let remedy = "have a time service keep it (systemd-timesyncd, chrony): rows carry the node's arrival time";
    match bound {
        Ok(bound) if bound >= ERROR_MAX => findings.warn(CHECK, "no time service keeps it", remedy),
        Ok(bound) => {
            let figure =
                format!("kept by a time service to within {:.0} ms", bound.as_secs_f64() * 1e3);
            if bound > ERROR_WARN {
                findings.warn(CHECK, figure, remedy);
            } else {
                findings.ok(CHECK, figure);
            }
        }
        Err(error) => findings.warn(CHECK, format!("unknown: {error}"), "ask `timedatectl`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Verdict;

    fn of(bound: io::Result<Duration>) -> (Verdict, String) {
        let mut findings = Findings::about("machine");
        told(bound, &mut findings);
        let found = findings.done().remove(0);
        (found.verdict, found.figure)
    }

    #[test]
    fn a_clock_nobody_keeps_is_doubtful_and_so_is_one_that_is_not_known() {
        let (verdict, figure) = of(Ok(Duration::from_micros(2_400)));
        assert_eq!((verdict, figure.contains("2 ms")), (Verdict::Ok, true), "{figure}");
        let (verdict, figure) = of(Ok(Duration::from_secs(3)));
        assert_eq!((verdict, figure.contains("3000 ms")), (Verdict::Warn, true), "{figure}");
        let (verdict, figure) = of(Ok(ERROR_MAX));
        assert_eq!((verdict, figure.contains("no time service")), (Verdict::Warn, true));
        let (verdict, figure) = of(Err(io::Error::from_raw_os_error(libc::EPERM)));
        assert_eq!((verdict, figure.starts_with("unknown: ")), (Verdict::Warn, true), "{figure}");
    }

    /// Whatever else runs here, the kernel's bound is none of ours: it cannot be zero, and it grows or is kept.
    #[test]
    fn the_kernel_tells() {
        let bound = error_bound().unwrap();
        assert!(bound > Duration::ZERO && bound <= ERROR_MAX, "{bound:?}");
    }
}
