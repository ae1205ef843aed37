//! The process as the kernel sees it, from `/proc/self`.

use std::fs;

/// Figures of this process; 0 where `/proc` does not tell.
pub struct Process {
    pub start_time_seconds: f64,
    pub resident_bytes: f64,
    pub cpu_seconds: f64,
    pub open_fds: f64,
}

impl Process {
    pub fn now() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The second field is the command in parentheses and may contain spaces.
        let after = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let field = |number: usize| -> f64 {
            after.split(' ').nth(number - 3).and_then(|text| text.parse().ok()).unwrap_or(0.0)
        };
        // USER_HZ is 100 on every Linux architecture Rust supports; the page size is asked for.
        let ticks_per_second = 100.0;
        let boot = boot_time_seconds();
        Process {
            start_time_seconds: boot + field(22) / ticks_per_second,
            resident_bytes: field(24) * page_bytes(),
            cpu_seconds: (field(14) + field(15)) / ticks_per_second,
            open_fds: fs::read_dir("/proc/self/fd").map_or(0.0, |fds| fds.count() as f64),
        }
    }
}

fn boot_time_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|text| text.trim().parse().ok()).unwrap_or(0.0)
}

fn page_bytes() -> f64 {
    static PAGE: std::sync::OnceLock<f64> = std::sync::OnceLock::new();
    *PAGE.get_or_init(|| {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let line = smaps.lines().find_map(|line| line.strip_prefix("KernelPageSize:"));
        let kib = line.and_then(|text| text.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.unwrap_or(4.0) * 1024.0
    })
}
