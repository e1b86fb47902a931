//! Decides whether an open batch waits a moment for more members before it is committed.
//!
//! A client whose request was just answered may send its next event at once, as a proxy with a
//! fixed number of concurrent requests does. If those events form their own batch while the other
//! clients' events are in flight, the clients split into two halves that take turns, and each half
//! pays for a whole disk sync. So a batch waits for the clients that were just answered, for at
//! most half the time that their batch took. After a wait in which too few events came, some
//! batches do not wait. Pure but for the clock.

use std::time::Duration;

use tokio::time::Instant;

/// A batch waits only after one with at least this many members.
const MEMBERS_MIN: usize = 8;

const WAIT_MAX: Duration = Duration::from_millis(3);

/// The most batches that do not wait after an unsuccessful wait. The number doubles with every
/// unsuccessful wait in a row.
const SKIP_MAX: u32 = 64;

#[derive(Debug)]
pub(super) struct FillWait {
    members_max: usize,
    /// The number of members at which the wait ends.
    members_wanted: usize,
    /// The end of the current wait; `None` while there is none.
    pub(super) until: Option<Instant>,
    /// How many of the next batches do not wait.
    skip: u32,
    /// What `skip` was set to after the last unsuccessful wait; 0 after a successful one.
    last_skip: u32,
}

impl FillWait {
    pub(super) fn new(members_max: usize) -> Self {
        Self {
            members_max,
            members_wanted: 0,
            until: None,
            skip: 0,
            last_skip: 0,
        }
    }

    /// Records a finished batch: `answered` requests whose batch was committed at `since`, while
    /// `waiting` other requests are in the open batch. Starts a wait if it is worth one.
    pub(super) fn record_answered(&mut self, answered: usize, waiting: usize, since: Instant) {
        self.until = None;
        if answered < MEMBERS_MIN {
            return;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        let now = Instant::now();
        // Seven eighths of them: the last few may take longer than they are worth.
        self.members_wanted = ((answered + waiting) * 7 / 8).min(self.members_max);
        self.until = Some(now + ((now - since) / 2).min(WAIT_MAX));
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.until.is_some()
    }

    /// Ends the wait if the open batch has enough members.
    pub(super) fn end_if_enough(&mut self, members: usize) {
        if self.is_waiting() && members >= self.members_wanted {
            self.until = None;
            self.last_skip = 0;
        }
    }

    /// Ends the wait because its time is over, and lets the next batches go without one.
    pub(super) fn record_timeout(&mut self) {
        self.until = None;
        self.last_skip = (self.last_skip * 2).clamp(1, SKIP_MAX);
        self.skip = self.last_skip;
    }
}

#[cfg(test)]
mod tests;
