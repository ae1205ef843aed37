//! What the kernel says of a process.

use anyhow::{Context, Result};

/// CPU time spent so far, in seconds.
///
/// # Errors
/// When the process has ended.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    /// Of the kernel's clock for user space, whatever its own rate is.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("read the CPU time")?;
    // The name in brackets may hold anything; 12th and 13th after it are user and system time.
    let (_, rest) = stat.rsplit_once(") ").context("the kernel's form")?;
    let field = |number: usize| -> Option<f64> { rest.split(' ').nth(number)?.parse().ok() };
    let ticks = field(11).zip(field(12)).context("the kernel's form")?;
    Ok((ticks.0 + ticks.1) / TICKS_PER_SECOND)
}

/// Resident memory now, and the most it ever was, in MiB.
///
/// # Errors
/// When the process has ended.
pub fn resident_mib(pid: u32) -> Result<(f64, f64)> {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).context("read the memory")?;
    let kib = |name: &str| -> Option<f64> {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let (now, most) = kib("VmRSS:").zip(kib("VmHWM:")).context("the kernel's form")?;
    Ok((now / 1024.0, most / 1024.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_use_memory_and_time() {
        let me = std::process::id();
        let (now, most) = resident_mib(me).unwrap();
        assert!(now > 0.5 && most >= now, "{now} {most}");
        assert!(cpu_seconds(me).unwrap() >= 0.0);
    }
}
