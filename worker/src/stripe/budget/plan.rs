//! Reservations of the shared budget, as arithmetic on the broker's clock. Pure.
//!
//! A reservation starts when the broker stored it, or at its `free` if that is later. The next one starts at
//! least its `length` after that: [`Plan::interval`] for each request. Requests are sent within
//! [`Plan::usable`] of the start and reach Stripe within as long as half of that. So the requests that reach
//! Stripe within one window belong to reservations that start within a span: window, usable and way. The
//! lengths of all of these but the last one fit into the span, so with `interval = span / (requests - size_max
//! + 1)` they have at most `requests - size_max` requests, and the last one has at most `size_max`.

use std::time::{Duration, Instant};

use time::OffsetDateTime;

/// A budget: at most so many requests in every window.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// The time that a reservation takes for each of its requests.
    pub(super) interval: Duration,
    /// How long after its start a reservation may be used: a thirtieth of the window. With the way to Stripe
    /// it costs a twentieth of the budget.
    pub(super) usable: Duration,
    /// Requests in one reservation, at most: a hundredth of the budget. A process that dies wastes no more.
    pub(super) size_max: u32,
    /// No reservation ends later than this after it was stored.
    span: Duration,
}

/// What stands under the budget's key: the last reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reservation {
    /// When the reservations before it end.
    pub(super) free: OffsetDateTime,
    pub(super) length: Duration,
}

impl Plan {
    /// `requests` is above 0.
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

    /// When a reservation starts that the broker stored at `stored`. If it would end beyond the span, somebody
    /// wrote the key by hand or set the broker's clock back: then it starts a span after `stored`.
    pub(super) fn start(&self, reservation: Reservation, stored: OffsetDateTime) -> OffsetDateTime {
        if reservation.free - stored <= self.span.saturating_sub(reservation.length) {
            reservation.free.max(stored)
        } else {
            stored + self.span
        }
    }

    /// The reservation of `length` that follows the one in `value`, which was stored at `stored`. If `value` is
    /// missing or unreadable, whatever was reserved before is over a span after `stored`.
    pub(super) fn next(
        &self,
        value: Option<&[u8]>,
        stored: OffsetDateTime,
        length: Duration,
    ) -> Reservation {
        let free = match value.and_then(Reservation::parse) {
            Some(last) => self.start(last, stored) + last.length.min(self.span),
            None => stored + self.span,
        };
        Reservation { free, length }
    }

    /// When `reservation` may be used, by our clock. It was sent at `sent`, and by `received` we had read that
    /// the broker stored it, or a later one, at `stored`: its clock showed that in between.
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

    /// How long to wait after `stored`, when the last reservation was stored, before `next` may be stored: stored
    /// earlier, it would end beyond the span.
    pub(super) fn wait(&self, next: Reservation, stored: OffsetDateTime) -> Duration {
        Duration::try_from(next.free + next.length - (stored + self.span)).unwrap_or_default()
    }
}

impl Reservation {
    /// Microseconds since the Unix epoch, a blank and microseconds. Earlier versions wrote when the next
    /// reservation starts, without a length.
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

    /// What [`Reservation::parse`] reads. Rounded up, so that nothing is free too early.
    pub(super) fn to_value(self) -> String {
        let free = (self.free.unix_timestamp_nanos() + 999).div_euclid(1000);
        format!("{free} {}", self.length.as_nanos().div_ceil(1000))
    }
}

#[cfg(test)]
mod tests;
