//! When the budget's requests may be sent: its slots, as arithmetic. Pure.
//!
//! Slots are at least [`Plan::interval`] apart, whoever takes them. A request reaches Stripe at its
//! slot or up to a slack later, so those that arrive within a window have their slots within a window
//! and a slack: with `interval = (window + slack) / requests` these are never more than `requests`,
//! wherever the window begins. Half of the slack is for the process that may wake up late, after which
//! the permit is lost; the other half is for the request's way.

use std::time::Duration;

use time::OffsetDateTime;

/// The slack is the window's twentieth: it leaves 20 parts of 21, or 95 %, of the budget usable.
const SLACK: u32 = 20;

/// A block is at most the budget's twentieth: a process that dies takes no more with it.
const BLOCK: u32 = 20;

/// A next slot that is this many windows away is nothing that workers have taken, a block each, but was
/// written by a clock that has been set back since.
const AHEAD_MAX: u32 = 1000;

/// A budget: so many requests in every window of that length.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    window: Duration,
    interval: Duration,
    lateness: Duration,
    block: usize,
}

/// A run of slots that one process took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    /// When the first one is.
    pub(super) first: OffsetDateTime,
    /// When the first one is that the block leaves to others.
    pub(super) next: OffsetDateTime,
}

impl Plan {
    /// A plan of at most `requests` in every `window`. `requests` is above 0.
    pub(super) fn new(requests: u32, window: Duration) -> Self {
        let slack = window / SLACK;
        // Up to the microsecond that is stored.
        let interval = (window + slack).as_micros().div_ceil(u128::from(requests.max(1)));
        let interval = Duration::from_micros(u64::try_from(interval).unwrap_or(u64::MAX));
        let block = usize::try_from(requests / BLOCK).unwrap_or(usize::MAX).max(1);
        Self { window, interval, lateness: slack / 2, block }
    }

    /// The time from one slot to the next.
    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    /// How long after its slot a permit may still be used.
    pub(super) fn lateness(&self) -> Duration {
        self.lateness
    }

    /// Slots in a block, at most.
    pub(super) fn block(&self) -> usize {
        self.block
    }

    /// Slots in the next block of a process that has used up one of `size` slots, and asks for the next slot
    /// so late after it: twice as many while it is punctual. One that lags behind the slots would come too
    /// late for the last ones of a larger block, and nobody could use them.
    pub(super) fn next_size(&self, size: usize, late: Duration) -> usize {
        let next = if late <= self.lateness / 4 { size.saturating_mul(2) } else { size / 2 };
        next.clamp(1, self.block)
    }

    /// Slots that one process may use at once, because it woke up late.
    pub(super) fn burst(&self) -> usize {
        let slots = self.lateness.as_micros() / self.interval.as_micros().max(1);
        usize::try_from(slots).unwrap_or(usize::MAX).saturating_add(2)
    }

    /// The next `count` slots, where `stored` is what the last block left to others.
    pub(super) fn take(&self, stored: Stored, now: OffsetDateTime, count: usize) -> Block {
        let first = match stored {
            Stored::Nothing => now,
            Stored::Next(next) if next <= now + self.window * AHEAD_MAX => next.max(now),
            // Whatever was taken before is over after a window.
            Stored::Next(_) | Stored::Unreadable => now + self.window,
        };
        Block { first, next: first + self.interval * u32::try_from(count).unwrap_or(u32::MAX) }
    }

    /// The slots of a block.
    pub(super) fn slots(&self, block: Block) -> impl Iterator<Item = OffsetDateTime> {
        let interval = self.interval;
        std::iter::successors(Some(block.first), move |slot| Some(*slot + interval))
            .take_while(move |slot| *slot < block.next)
    }
}

/// What stands under the budget's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// Nothing yet.
    Nothing,
    /// The next free slot.
    Next(OffsetDateTime),
    /// Something else.
    Unreadable,
}

impl Stored {
    /// Reads a value: microseconds since the Unix epoch.
    pub(super) fn read(value: Option<&[u8]>) -> Self {
        let Some(value) = value else { return Self::Nothing };
        let micros = std::str::from_utf8(value).ok().and_then(|text| text.parse::<i64>().ok());
        let time = micros.and_then(|micros| OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1000).ok());
        time.map_or(Self::Unreadable, Self::Next)
    }

    /// The value that says that `next` is free. Rounded up: a slot is never too early.
    pub(super) fn write(next: OffsetDateTime) -> String {
        let nanos = next.unix_timestamp_nanos();
        (nanos.div_euclid(1000) + i128::from(nanos.rem_euclid(1000) != 0)).to_string()
    }
}

#[cfg(test)]
mod tests;
