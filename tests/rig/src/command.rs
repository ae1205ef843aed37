//! A program that runs to its end.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Lines of a failed program's output that are shown.
const LINES: usize = 40;

/// Runs it and gives what it printed.
///
/// # Errors
/// When it does not end well: with the last lines of what it said.
pub fn succeeded(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        let last = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n");
        bail!("{command:?} failed ({}):\n{last}", output.status);
    }
    Ok(output.stdout)
}
