//! Whether a batch waits a moment for more members.
//!
//! Whoever was answered just now may send the next event at once: a proxy that keeps so many
//! requests open does. If those form a batch of their own while the others are on their way, two
//! halves take turns, and each pays for a whole sync. So a batch waits for those who left, for less
//! than it took them, and no more once it has waited in vain. Pure but for the clock.

use std::time::Duration;

use tokio::time::Instant;

use super::batch::MEMBERS_MAX;

/// Members that have to leave together before anybody waits for them.
const MEMBERS_MIN: usize = 8;

/// How long they are waited for at most.
const WAIT_MAX: Duration = Duration::from_millis(3);

/// Batches that do not wait after one that waited in vain; twice as many every time.
const VAIN_MAX: u32 = 64;

/// Those who were answered just now.
#[derive(Debug, Default)]
pub(super) struct Company {
    /// With how many members a batch waits no more.
    enough: usize,
    /// Until when it waits, if it does.
    pub(super) until: Option<Instant>,
    /// How many batches do not wait, and how many did not the last time.
    skip: u32,
    vain: u32,
}

impl Company {
    /// So many leave, who set out at `since`; so many others are there.
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
        self.enough = ((members + others) * 7 / 8).min(MEMBERS_MAX);
        self.until = Some(now + ((now - since) / 2).min(WAIT_MAX));
    }

    /// Whether a batch of so many waits for more.
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
