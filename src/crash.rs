//! Where a test build can be told to die, to panic or to stand still.
//!
//! To die: before and after each step that makes something durable, here or outside. `FAILPOINTS="crash_NAME=return"` ends
//! the process there without another instruction of its own, as `kill -9` would. To panic or to stand still: in the middle
//! of what each kind of part does, with work at hand. `FAILPOINTS="part_NAME=1*panic"` ends one life of one part,
//! `"part_NAME=1*return"` makes it wait for what never comes.

/// Ends the process when a test told it to die at this point; nothing in any build without fail points.
pub(crate) fn crash_point(name: &'static str) {
    let _ = name;
    fail::fail_point!(name, |_| std::process::abort());
}

/// Panics or never returns when a test told it to at this point; nothing in any build without fail points.
pub(crate) async fn part_point(name: impl FnOnce() -> String) {
    if is_told_to_hang(name) {
        std::future::pending::<()>().await;
    }
}

fn is_told_to_hang(name: impl FnOnce() -> String) -> bool {
    let _ = &name;
    fail::fail_point!(&name(), |_| true);
    false
}
