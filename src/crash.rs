//! Where a test build can be told to die: before and after each step that makes something durable, here or outside.
//! `FAILPOINTS="crash_NAME=return"` ends the process there without another instruction of its own, as `kill -9` would.

/// Ends the process when a test told it to die at this point; nothing in any build without fail points.
pub(crate) fn crash_point(name: &'static str) {
    let _ = name;
    fail::fail_point!(name, |_| std::process::abort());
}
