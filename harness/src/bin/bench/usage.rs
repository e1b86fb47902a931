//! What a process used: CPU time and the most memory it ever held.

use std::fs;

/// `/proc` counts CPU time in these, on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds that a process and those it started have used so far, the ended ones included: PostgreSQL has one for
/// every connection. 0 for one that has ended.
pub(crate) fn cpu_s(pid: u32) -> f64 {
    let Some(of_itself) = Times::of(pid) else {
        return 0.0;
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let children = pids
        .filter_map(Times::of)
        .filter(|times| times.parent == pid);
    (of_itself.own + of_itself.waited_for + children.map(|child| child.own).sum::<f64>())
        / TICKS_PER_SECOND
}

/// User and system time, in ticks.
struct Times {
    parent: u32,
    own: f64,
    /// Of children that have ended.
    waited_for: f64,
}

impl Times {
    fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold blanks; after it the parent is the second field, times are the 12th to 15th.
        let (_, after_name) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks = |field: usize| fields.get(field)?.parse::<f64>().ok();
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own: ticks(11)? + ticks(12)?,
            waited_for: ticks(13)? + ticks(14)?,
        })
    }
}

/// The most memory a process ever held, in MiB.
pub(crate) fn memory_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    peak.and_then(|kib| kib.parse::<f64>().ok())
        .unwrap_or_default()
        / 1024.0
}

/// CPU seconds of a process since a moment.
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

    /// CPU seconds for every 10,000 of `events`.
    pub(crate) fn per_10k(&self, events: usize) -> f64 {
        (cpu_s(self.pid) - self.cpu_s) * 10_000.0 / events.max(1) as f64
    }
}
