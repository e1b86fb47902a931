//! Reservations of the shared budget, as arithmetic on the broker's clock. Pure.
//!
//! A reservation starts when the broker stored it, or at its `free` if that is later. The next one
//! starts at least its `length` after that: [`Plan::interval`] for each request. Requests are sent
//! within [`Plan::usable`] of the start, and take at most half of that to reach Stripe. So the
//! requests that reach Stripe within one window belong to reservations that start within one span:
//! the window, plus `usable`, plus the time to Stripe. The lengths of all these reservations except
//! the last one fit into the span. With `interval = span / (requests - size_max + 1)` they have at
//! most `requests - size_max` requests together, and the last one has at most `size_max`.

use std::time::{Duration, Instant};

use litestripe_domain::question::later;
use time::OffsetDateTime;

/// A budget: at most `requests` in every window.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// The time that a reservation takes for each of its requests.
    pub(super) interval: Duration,
    /// How long after its start a reservation may be used: a thirtieth of the window. Together with
    /// the time to Stripe it costs a twentieth of the budget.
    pub(super) usable: Duration,
    /// The most requests in one reservation: a hundredth of the budget. A process that dies wastes
    /// at most these.
    pub(super) size_max: u32,
    /// The longest time from storing a reservation to its end.
    span: Duration,
}

/// The value of the budget's key: the last reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reservation {
    /// When the reservations before it end.
    pub(super) free: OffsetDateTime,
    pub(super) length: Duration,
}

impl Plan {
    /// Creates a plan. `requests` is above 0.
    pub(super) fn new(requests: u32, window: Duration) -> Self {
        let usable = window / 30;
        let size_max = (requests / 100).max(1);
        let intervals = requests.saturating_sub(size_max).saturating_add(1);
        let nanos = (window + usable + usable / 2)
            .as_nanos()
            .div_ceil(u128::from(intervals));
        let interval =
            Duration::from_micros(u64::try_from(nanos.div_ceil(1000)).unwrap_or(u64::MAX));
        Self {
            interval,
            usable,
            size_max,
            span: interval.saturating_mul(intervals),
        }
    }

    /// Returns when a reservation starts that the broker stored at `stored`. If it would end beyond
    /// the span, the key was written by hand or the broker's clock was set back: then it starts a
    /// span after `stored`.
    pub(super) fn start(&self, reservation: Reservation, stored: OffsetDateTime) -> OffsetDateTime {
        if reservation.free - stored <= self.span.saturating_sub(reservation.length) {
            reservation.free.max(stored)
        } else {
            later(stored, self.span)
        }
    }

    /// Returns the reservation of `length` that follows the one in `value`, which was stored at
    /// `stored`. If `value` is missing or unreadable, every earlier reservation has ended a span
    /// after `stored`.
    pub(super) fn next(
        &self,
        value: Option<&[u8]>,
        stored: OffsetDateTime,
        length: Duration,
    ) -> Reservation {
        let free = match value.and_then(Reservation::parse) {
            Some(last) => later(self.start(last, stored), last.length.min(self.span)),
            None => later(stored, self.span),
        };
        Reservation { free, length }
    }

    /// Returns from when until when `reservation` may be used, by our clock. It was sent at `sent`,
    /// and at `received` we had read that the broker stored it, or a later one, at `stored`. So the
    /// broker's clock showed `stored` at some moment between `sent` and `received`.
    pub(super) fn permitted(
        &self,
        reservation: Reservation,
        stored: OffsetDateTime,
        sent: Instant,
        received: Instant,
    ) -> (Instant, Instant) {
        let ahead = (self.start(reservation, stored) - stored).unsigned_abs();
        (received + ahead, sent + ahead + self.usable)
    }

    /// Returns how long to wait after `stored`, the time of the last reservation, before `next` may
    /// be stored: stored earlier, it would end beyond the span.
    pub(super) fn wait(&self, next: Reservation, stored: OffsetDateTime) -> Duration {
        let end = later(next.free, next.length);
        Duration::try_from(end - later(stored, self.span)).unwrap_or_default()
    }
}

impl Reservation {
    /// Parses `free` in microseconds since the Unix epoch, a space, and `length` in microseconds.
    /// Earlier versions wrote only the start of the next reservation, without a length.
    fn parse(value: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?;
        let (free, length) = text.split_once(' ').unwrap_or((text, "0"));
        let nanos = i128::from(free.parse::<i64>().ok()?) * 1000;
        let free = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?;
        Some(Self {
            free,
            length: Duration::from_micros(length.parse().ok()?),
        })
    }

    /// Formats the reservation for [`Reservation::parse`]. Rounds up, so that the next one does not
    /// start too early.
    pub(super) fn to_value(self) -> String {
        let free = (self.free.unix_timestamp_nanos() + 999).div_euclid(1000);
        format!("{free} {}", self.length.as_nanos().div_ceil(1000))
    }
}

#[cfg(test)]
mod tests;
