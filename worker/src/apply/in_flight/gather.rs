//! Decides when a small batch waits for more messages.
//!
//! A transaction costs the database as much as some twenty events, and so does the round of the
//! relay that follows it. A broker that syncs each message is the slowest part of that round, and
//! the more signals come together, the fewer syncs they need. So a batch waits if messages come so
//! fast that the wait is short. A lone message never waits. Pure: time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// How many messages a batch waits for, at most. Beyond that, a transaction costs little beside its
/// events.
const WANTED_MAX: usize = 128;

/// How many messages have to come while a batch waits, for the wait to be worth it.
const WANTED_MIN: usize = 24;

/// How many messages a batch waits for beside another one.
const WANTED_BESIDE: usize = 64;

/// How long a batch waits, at most, from its first message on.
const WAIT_MAX: Duration = Duration::from_millis(20);

/// How long it waits, in times of what a batch takes.
const WAIT_TIMES: u32 = 4;

/// The shortest time from which a rate is derived.
const RATE_OVER_MIN: Duration = Duration::from_millis(1);

/// How fast messages come, and how long a batch takes.
pub(super) struct Gather {
    limit: usize,
    /// When the last batch was started, and how many messages have come since.
    started: Instant,
    arrived: usize,
    /// When the first message of the next batch came.
    first: Instant,
    /// How long a batch takes, from its start to its acks.
    takes: Duration,
}

impl Gather {
    /// Makes a `Gather` for batches of up to `limit` messages.
    pub(super) fn new(limit: usize, now: Instant) -> Self {
        Self {
            limit,
            started: now,
            arrived: 0,
            first: now,
            takes: Duration::ZERO,
        }
    }

    pub(super) fn record_arrival(&mut self, count: usize, is_first: bool, now: Instant) {
        self.arrived += count;
        if is_first {
            self.first = now;
        }
    }

    pub(super) fn record_start(&mut self, now: Instant) {
        self.started = now;
        self.arrived = 0;
    }

    /// Records how long a batch took.
    pub(super) fn record_end(&mut self, took: Duration) {
        self.takes = (self.takes * 7 + took.min(WAIT_MAX)) / 8;
    }

    /// When the next batch stops waiting.
    pub(super) fn until(&self, is_beside_another: bool) -> Instant {
        let wait = if is_beside_another {
            WAIT_MAX
        } else {
            WAIT_MAX.min(self.takes * WAIT_TIMES)
        };
        self.first + wait
    }

    /// Whether the next batch takes in messages that come now.
    pub(super) fn is_open(&self, now: Instant) -> bool {
        now < self.first + WAIT_MAX
    }

    /// Whether the next batch, which has `count` messages, waits for more. Without another batch
    /// that is worth it only if the broker syncs each signal or each batch of them.
    pub(super) fn waits(
        &self,
        count: usize,
        is_beside_another: bool,
        are_signals_synced: bool,
        now: Instant,
    ) -> bool {
        let until = self.until(is_beside_another);
        if count >= self.limit || now >= until {
            return false;
        }
        if is_beside_another {
            // The two would keep both cores busy with transactions.
            return count < WANTED_BESIDE;
        }
        are_signals_synced
            && count < WANTED_MAX
            && self.expected(until - self.first, now) >= WANTED_MIN.min(self.limit)
    }

    /// How many messages come in this time, if they come as fast as since the last batch started.
    fn expected(&self, time: Duration, now: Instant) -> usize {
        let passed = (now - self.started).max(RATE_OVER_MIN);
        (self.arrived as u128 * time.as_micros() / passed.as_micros().max(1)) as usize
    }
}

#[cfg(test)]
mod tests;
