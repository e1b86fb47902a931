//! Measures whether signals are sent faster in one batch or one by one, and chooses the faster way.
//!
//! The server keeps a batch in files of its own until it is committed. That takes as long as
//! syncing some ten to thirty single messages, and far longer than single messages of a server
//! that does not sync. The server does not say which of the two it is, and disks differ. So every
//! round that is sent shows what its way costs now, and from time to time a round is sent in the
//! other way. Pure: time is an argument.

use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Fewer signals are sent one by one: no batch is faster. Nor are they measured, because they show
/// how long the way to the server is.
const BATCH_MIN: usize = 6;

/// How many signals a way that has not been measured lately is tried with: a batch also with more.
const TRIED: RangeInclusive<usize> = 16..=128;

/// How long a measured cost holds until its way is tried again.
const HOLD: Duration = Duration::from_secs(30);

/// What one more member adds to a batch.
const MEMBER: Duration = Duration::from_micros(10);

/// A server that takes at least this long for one signal among others syncs each message.
const SYNCED: Duration = Duration::from_micros(100);

/// How signals are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    OneByOne,
    Batch,
}

/// What the two ways cost now.
#[derive(Debug, Default)]
pub struct SignalCosts(Mutex<Costs>);

#[derive(Debug, Default)]
struct Costs {
    /// Of one signal among others.
    single: Option<Cost>,
    /// Of a batch, without its members.
    batch: Option<Cost>,
}

#[derive(Debug, Clone, Copy)]
struct Cost {
    each: Duration,
    /// When it was measured last.
    at: Instant,
}

impl SignalCosts {
    /// Returns how `count` signals are sent.
    pub(super) fn choose(&self, count: usize, now: Instant) -> Way {
        self.costs().choose(count, now)
    }

    /// Records that `count` signals were sent in this way and took so long.
    pub(super) fn record(&self, way: Way, count: usize, took: Duration, now: Instant) {
        self.costs().record(way, count, took, now);
    }

    /// Whether the server seems to sync each message, so that many signals in one batch save much.
    pub(crate) fn are_synced(&self) -> bool {
        let single = self.costs().single;
        single.is_some_and(|single| single.each >= SYNCED)
    }

    fn costs(&self) -> MutexGuard<'_, Costs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Costs {
    fn choose(&self, count: usize, now: Instant) -> Way {
        if count < BATCH_MIN {
            return Way::OneByOne;
        }
        let is_stale = |cost: Option<Cost>| cost.is_none_or(|cost| now - cost.at >= HOLD);
        match (self.single, self.batch) {
            _ if count >= *TRIED.start() && is_stale(self.batch) => Way::Batch,
            _ if TRIED.contains(&count) && is_stale(self.single) => Way::OneByOne,
            (None, _) if count > *TRIED.end() => Way::Batch,
            (Some(single), Some(batch))
                if batch.each + times(MEMBER, count) < times(single.each, count) =>
            {
                Way::Batch
            }
            _ => Way::OneByOne,
        }
    }

    fn record(&mut self, way: Way, count: usize, took: Duration, now: Instant) {
        if count < BATCH_MIN {
            return;
        }
        let (cost, each) = match way {
            Way::Batch => (&mut self.batch, took.saturating_sub(times(MEMBER, count))),
            Way::OneByOne => (
                &mut self.single,
                took / u32::try_from(count).unwrap_or(u32::MAX),
            ),
        };
        let each = match *cost {
            // A stall of the disk counts little, and a lasting change for all it is soon.
            Some(before) if now - before.at < HOLD => {
                (before.each * 3 + each.min(before.each * 4)) / 4
            }
            _ => each,
        };
        *cost = Some(Cost { each, at: now });
    }
}

fn times(each: Duration, count: usize) -> Duration {
    each.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests;
