//! What the broker's clock shows, by ours.
//!
//! Owns the estimate and how wrong it may be. Processes on different hosts agree on slots by the one
//! clock that all of them see: the time at which the broker stored something. Pure.

use std::time::{Duration, Instant};

use time::OffsetDateTime;

/// How far two clocks run apart, at most: a five-thousandth of the time that passed. Crystals are
/// five times better.
const DRIFT: u32 = 5000;

/// After which the broker's clock is looked at again: somebody may have set it.
const FRESH: Duration = Duration::from_secs(30);

/// The broker's clock, as far as we know it.
#[derive(Debug, Default)]
pub(super) struct Clock {
    best: Option<Reading>,
    looked: Option<Instant>,
}

/// The broker's clock showed `shown` at `at`, give or take `doubt`.
#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    shown: OffsetDateTime,
    doubt: Duration,
}

impl Reading {
    fn doubt_at(&self, instant: Instant) -> Duration {
        let passed = instant.saturating_duration_since(self.at).max(self.at.saturating_duration_since(instant));
        self.doubt + passed / DRIFT
    }

    fn shows_at(&self, instant: Instant) -> OffsetDateTime {
        match instant.checked_duration_since(self.at) {
            Some(passed) => self.shown + passed,
            None => self.shown - self.at.saturating_duration_since(instant),
        }
    }

    /// When it certainly shows `time`.
    fn instant_of(&self, time: OffsetDateTime) -> Instant {
        let ahead = time - self.shown;
        match Duration::try_from(ahead) {
            Ok(ahead) => self.at + ahead,
            Err(_) => self.at.checked_sub(ahead.unsigned_abs()).unwrap_or(self.at),
        }
    }
}

impl Clock {
    /// The broker stored something at `stored`, on its clock, between `sent` and `received`, on ours.
    pub(super) fn learn(&mut self, sent: Instant, received: Instant, stored: OffsetDateTime) {
        let doubt = received.saturating_duration_since(sent) / 2;
        let new = Reading { at: sent + doubt, shown: stored, doubt };
        self.looked = Some(received);
        // The better of two that agree. Where they do not, somebody has set a clock.
        let keeps_old = self.best.is_some_and(|old| {
            let apart = (old.shows_at(new.at) - new.shown).unsigned_abs();
            let old_doubt = old.doubt_at(new.at);
            old_doubt <= new.doubt && apart <= old_doubt + new.doubt
        });
        if !keeps_old {
            self.best = Some(new);
        }
    }

    /// The broker stored something at `stored`, on its clock, and we saw it at `seen`: if we thought
    /// that this time was still to come, we know nothing.
    pub(super) fn check(&mut self, stored: OffsetDateTime, seen: Instant) {
        if self.best.is_some_and(|best| best.shows_at(seen) + best.doubt_at(seen) < stored) {
            *self = Self::default();
        }
    }

    /// What the broker's clock shows at `now`, if that was looked at lately and is known that well.
    pub(super) fn shows(&self, now: Instant, doubt_max: Duration) -> Option<OffsetDateTime> {
        let looked = self.looked.filter(|looked| now.saturating_duration_since(*looked) < FRESH);
        let best = self.best.filter(|best| best.doubt_at(now) <= doubt_max);
        looked.and(best).map(|best| best.shows_at(now))
    }

    /// The time, on our clock, in which the broker's certainly shows `from` to `from + length`.
    pub(super) fn span(&self, from: OffsetDateTime, length: Duration) -> Option<(Instant, Instant)> {
        let best = self.best?;
        let (start, end) = (best.instant_of(from), best.instant_of(from + length));
        Some((start + best.doubt_at(start), end - best.doubt_at(end)))
    }
}

#[cfg(test)]
mod tests;
