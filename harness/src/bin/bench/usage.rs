//! What a process used: CPU time and the most memory it ever held.

use std::fs;

/// `/proc` counts CPU time in these, on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds a process has used so far; 0 for one that has ended.
pub(crate) fn cpu_s(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold blanks; user and system time are the 12th and 13th after it.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: f64 = after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / TICKS_PER_SECOND
}

/// The most memory a process ever held, in MiB.
pub(crate) fn memory_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    peak.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or_default() / 1024.0
}

/// CPU seconds of a process since a moment.
pub(crate) struct Since {
    pid: u32,
    cpu_s: f64,
}

impl Since {
    pub(crate) fn now(pid: u32) -> Self {
        Self { pid, cpu_s: cpu_s(pid) }
    }

    /// CPU seconds for every 10,000 of `events`.
    pub(crate) fn per_10k(&self, events: usize) -> f64 {
        (cpu_s(self.pid) - self.cpu_s) * 10_000.0 / events.max(1) as f64
    }
}
