//! The CPU time and the peak memory of a process.

use std::fs;

/// The unit in which `/proc` counts CPU time on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Returns the CPU seconds that a process and its children have used so far, including children
/// that ended: PostgreSQL has a child for every connection. Returns 0 if the process has ended.
pub(crate) fn cpu_s(pid: u32) -> f64 {
    let Some(process) = Times::read(pid) else {
        return 0.0;
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let children = pids
        .filter_map(Times::read)
        .filter(|times| times.parent == pid);
    (process.own + process.ended_children + children.map(|child| child.own).sum::<f64>())
        / TICKS_PER_SECOND
}

/// User and system time, in ticks.
struct Times {
    parent: u32,
    own: f64,
    /// The time of children that have ended.
    ended_children: f64,
}

impl Times {
    fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may contain blanks. After it the parent is the second field, and
        // the times are the 12th to the 15th.
        let (_, after_name) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks = |field: usize| fields.get(field)?.parse::<f64>().ok();
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own: ticks(11)? + ticks(12)?,
            ended_children: ticks(13)? + ticks(14)?,
        })
    }
}

/// Returns the peak memory of a process, in MiB.
pub(crate) fn memory_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    peak.and_then(|kib| kib.parse::<f64>().ok())
        .unwrap_or_default()
        / 1024.0
}

/// Measures the CPU seconds of a process from a moment on.
pub(crate) struct Since {
    pid: u32,
    cpu_s: f64,
}

impl Since {
    pub(crate) fn now(pid: u32) -> Self {
        Self {
            pid,
            cpu_s: cpu_s(pid),
        }
    }

    /// Returns the CPU seconds per 10,000 of `events`.
    pub(crate) fn per_10k(&self, events: usize) -> f64 {
        (cpu_s(self.pid) - self.cpu_s) * 10_000.0 / events.max(1) as f64
    }
}
