//! Questions whose attempts fail: how long each waits, and what the log says of them.
//!
//! Owns the pauses, and the bound of what failing questions take from the others: together, not
//! more than [`SHARE`] of the calls to Stripe's API or of the places for lookups, so that the
//! pauses grow with their number too. Logs each reason once. May not know how a question is asked.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::BackoffBuilder as _;
use litestripe_domain::question::{Kind, Question};
use tracing::{debug, info, warn};

use super::asker::IN_FLIGHT_MAX;
use super::lookup::ANSWER_MAX;
use crate::settings::BudgetSettings;
use crate::store::figures::COUNT_MAX;

/// The pause after the first failed attempt. It doubles with each, up to the longest.
pub(super) const PAUSE_FIRST: Duration = Duration::from_secs(3);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(5 * 60);

/// The longest pause if many questions fail.
pub(super) const MANY_PAUSE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Failing questions take at most one in this many of the calls.
const SHARE: u32 = 5;

/// A reason that did not occur for this long is logged again.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60 * 60);

/// Most reasons to remember. Reasons come from a few error texts, so there are never that many.
const REASONS_MAX: usize = 256;

/// The failing questions, as far as this process knows of them.
pub struct Failures {
    /// The time in which all failing questions that ask Stripe may make one call.
    call_every: Duration,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// How many questions of all workers fail.
    failing: BTreeMap<Kind, u64>,
    /// When each reason last occurred.
    reasons: BTreeMap<(Kind, String), Instant>,
}

impl Failures {
    /// Creates a record without failures. `budget` limits the calls to Stripe's API, if there is a
    /// key.
    pub fn new(budget: Option<&BudgetSettings>) -> Self {
        let call_every = budget.map(|budget| budget.window * SHARE / budget.requests.max(1));
        Self {
            call_every: call_every.unwrap_or_default(),
            known: Mutex::default(),
        }
    }

    /// Records how many questions fail.
    pub(super) fn record_counts(&self, failing: impl IntoIterator<Item = (Kind, u64)>) {
        // Above `COUNT_MAX` nobody knows how many there are, and each takes the longest pause.
        let known = |(kind, count)| (kind, if count < COUNT_MAX { count } else { u64::MAX });
        self.known().failing = failing.into_iter().map(known).collect();
    }

    /// Returns the pause of a question of `kind` after `attempts` failures in a row.
    pub(super) fn pause(&self, kind: Kind, attempts: i32) -> Duration {
        let every = match kind {
            Kind::Lookup => ANSWER_MAX * SHARE / u32::try_from(IN_FLIGHT_MAX).unwrap_or(1),
            Kind::Grace | Kind::Fetch | Kind::Notification => self.call_every,
            Kind::Erase | Kind::Removal => Duration::ZERO,
        };
        let known = self.known();
        let rivals = known.failing.iter().filter(|(other, _)| match kind {
            Kind::Lookup | Kind::Erase | Kind::Removal => **other == kind,
            _ => !matches!(other, Kind::Lookup | Kind::Erase | Kind::Removal),
        });
        let rivals = rivals.fold(0, |all: u64, (_, count)| all.saturating_add(*count));
        let turn = every.saturating_mul(u32::try_from(rivals).unwrap_or(u32::MAX));
        pause(PAUSE_FIRST, PAUSE_MAX, attempts).max(jittered(turn.min(MANY_PAUSE_MAX / 2)))
    }

    /// Logs why a question has no answer, if that reason is new.
    pub(super) fn log(&self, question: &Question, error: &str) {
        let (id, kind) = (&question.entity_id, question.kind());
        // Every request to Stripe has its own id.
        let reason = error.split(" (request ").next().unwrap_or(error).to_owned();
        let mut known = self.known();
        if known.reasons.len() >= REASONS_MAX {
            known.reasons.clear();
        }
        let last = known.reasons.insert((kind, reason), Instant::now());
        let kind = kind.as_str();
        if last.is_some_and(|last| last.elapsed() < FORGOTTEN_AFTER) {
            return debug!(entity_id = id, kind, "no answer yet about {id}: {error}");
        }
        warn!(
            entity_id = id,
            kind,
            "no answer yet about {id}, will retry: {error} (logged once; `status` shows how many questions fail)"
        );
    }

    /// Records that a question which failed before did not fail now.
    pub(super) fn recovered(&self, kind: Kind) {
        let mut known = self.known();
        let before = known.reasons.len();
        known.reasons.retain(|(other, _), _| *other != kind);
        if known.reasons.len() < before {
            let kind = kind.as_str();
            info!(kind, "questions of the kind {kind} are answered again");
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the pause after `attempts` in a row with the same outcome: `first`, doubled with
/// each, up to `max`, less up to a half, so that questions that fail together do not stay together.
pub(super) fn pause(first: Duration, max: Duration, attempts: i32) -> Duration {
    let doublings = u32::try_from(attempts.saturating_sub(1))
        .unwrap_or(0)
        .min(16);
    jittered(first.saturating_mul(1 << doublings).min(max) / 2)
}

/// Returns `least` and up to as much again.
fn jittered(least: Duration) -> Duration {
    let pauses = backon::ExponentialBuilder::new()
        .with_min_delay(least)
        .with_max_delay(least)
        .with_jitter();
    pauses.build().next().unwrap_or(least)
}

#[cfg(test)]
mod tests;
