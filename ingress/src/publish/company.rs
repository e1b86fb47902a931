//! Whether a batch waits a moment for more members.
//!
//! A client that was answered just now may send its next event at once, as a proxy with a fixed number
//! of open requests does. If those form a batch of their own while the others are in flight, two halves
//! take turns, and each pays for a whole sync. So a batch waits for the clients that were just answered,
//! for less time than they took, and stops waiting for a while once nobody came. Pure but for the clock.

use std::time::Duration;

use tokio::time::Instant;

/// Members that have to be answered together before a batch waits for them.
const MEMBERS_MIN: usize = 8;

const WAIT_MAX: Duration = Duration::from_millis(3);

/// Batches that do not wait after one that waited for nothing; twice as many every time.
const VAIN_MAX: u32 = 64;

#[derive(Debug)]
pub(super) struct Company {
    members_max: usize,
    /// With how many members a batch stops waiting.
    enough: usize,
    /// Until when it waits, if it does.
    pub(super) until: Option<Instant>,
    /// How many batches do not wait, and how many did not the last time.
    skip: u32,
    vain: u32,
}

impl Company {
    pub(super) fn new(members_max: usize) -> Self {
        Self {
            members_max,
            enough: 0,
            until: None,
            skip: 0,
            vain: 0,
        }
    }

    /// Records `members` answered requests that had waited since `since`, and how many `others` wait now.
    pub(super) fn leave(&mut self, members: usize, others: usize, since: Instant) {
        self.until = None;
        if members < MEMBERS_MIN {
            return;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        let now = Instant::now();
        // The last few may take longer than they are worth.
        self.enough = ((members + others) * 7 / 8).min(self.members_max);
        self.until = Some(now + ((now - since) / 2).min(WAIT_MAX));
    }

    pub(super) fn is_expected(&mut self, members: usize) -> bool {
        if self.until.is_none() {
            return false;
        }
        if members >= self.enough {
            self.until = None;
            self.vain = 0;
            return false;
        }
        true
    }

    /// Nobody came in time.
    pub(super) fn stay_away(&mut self) {
        self.until = None;
        self.vain = (self.vain * 2).clamp(1, VAIN_MAX);
        self.skip = self.vain;
    }
}

#[cfg(test)]
mod tests;
