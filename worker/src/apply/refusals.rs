//! What the database refuses, over all batches of a worker.
//!
//! Owns when a refused event becomes a dead letter, the pauses before it is tried again, and what
//! readiness says while batches fail. Takes the time as an argument. May not know messages.
//!
//! A constraint, a trigger or a missing permission may refuse every event. Then each event waits,
//! and none becomes a dead letter: that takes the proof that the database accepts others, a row
//! that was written after the refusal.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::error::Disposition;
use crate::health::Problems;

/// How long batches may fail before the worker is not ready.
const NOT_WORKING_AFTER: Duration = Duration::from_secs(30);

/// With which delivery a refused event becomes a dead letter, over all workers: some five minutes
/// after the first one. A redelivery for another reason counts too.
const DELIVERIES_MAX: u64 = 16;

/// The longest pause before a refused event is delivered again. It doubles from a second.
const DELAY_MAX: Duration = Duration::from_secs(30);

/// For how long a written row proves that the database accepts events. Short against the time
/// between the first and the last delivery, so that it was written in between.
const PROOF_LASTS: Duration = Duration::from_secs(120);

/// How many batches may be refused as a whole, one after the other, before the worker pauses
/// between them. Small batches may hold nothing but refused events.
const UNPAUSED: u32 = 2;

/// The longest pause between batches that are refused as a whole.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The least time between two log lines about refusals that come and go.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// How long readiness remembers a problem that is not reported again: another worker may have
/// applied the events.
const REPORT_LASTS: Duration = Duration::from_secs(180);

/// What readiness calls the applying of batches.
const PART: &str = "batches";

/// The refusals of one worker's batches. Its clones of `Problems` reach readiness.
#[derive(Debug, Default)]
pub struct Refusals {
    problems: Problems,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the attempt began since which nothing has succeeded.
    failing_since: Option<Instant>,
    /// Batches that were refused as a whole, one after the other.
    refused_in_a_row: u32,
    /// When a row was written last.
    written: Option<Instant>,
    /// Whether the log says that everything is refused.
    is_logged: bool,
    logged: Option<Instant>,
}

impl State {
    fn may_log(&mut self, now: Instant) -> bool {
        let is_early = |logged| now.saturating_duration_since(logged) < LOG_INTERVAL;
        let may_log = !self.logged.is_some_and(is_early);
        if may_log {
            self.logged = Some(now);
        }
        may_log
    }
}

impl Refusals {
    pub(crate) fn new(problems: Problems) -> Self {
        Self {
            problems,
            state: Mutex::default(),
        }
    }

    /// Records a commit. Only one that wrote a row ends a time in which everything is refused.
    pub(super) fn committed(&self, wrote: bool, now: Instant) {
        let mut state = self.locked();
        if !wrote && state.refused_in_a_row > 0 {
            return;
        }
        if wrote {
            state.written = Some(now);
        }
        state.failing_since = None;
        state.refused_in_a_row = 0;
        if std::mem::take(&mut state.is_logged) {
            info!("the database accepts events again");
        }
        self.problems.clear(PART);
    }

    /// Records an attempt, begun at `began`, for which the database was not available.
    pub(super) fn unavailable(&self, began: Instant, reason: &str, now: Instant) {
        self.failing(&mut self.locked(), began, reason, now);
    }

    /// Records a batch of which everything that was tried was refused. Returns the pause before the
    /// next batch.
    pub(super) fn all_refused(&self, began: Instant, reason: &str, now: Instant) -> Duration {
        let mut state = self.locked();
        if !state.is_logged && state.may_log(now) {
            state.is_logged = true;
            warn!(
                reason,
                "the database refuses all events of a batch: they are delivered again later: {reason}"
            );
        }
        state.refused_in_a_row = state.refused_in_a_row.saturating_add(1);
        self.failing(&mut state, began, reason, now);
        match state.refused_in_a_row.checked_sub(UNPAUSED + 1) {
            None => Duration::ZERO,
            Some(doublings) => doubled(doublings.into(), PAUSE_MAX),
        }
    }

    /// Records that `count` events of a batch were refused, and others accepted.
    pub(super) fn some_refused(&self, count: usize, reason: &str, now: Instant) {
        if self.locked().may_log(now) {
            warn!(
                count,
                reason,
                "the database refuses {count} events of a batch, which are delivered again later: {reason}"
            );
        }
    }

    /// Whether an event that was refused alone, by an attempt begun at `began`, becomes a dead
    /// letter. `after_others` says whether others of its batch had been written by then, after the
    /// whole batch was refused.
    pub(super) fn is_hopeless(
        &self,
        disposition: Disposition,
        after_others: bool,
        deliveries: u64,
        began: Instant,
    ) -> bool {
        // A row that is written later proves nothing: the fault may have been mended in between.
        let age = |written| began.checked_duration_since(written);
        let is_proven = self
            .locked()
            .written
            .and_then(age)
            .is_some_and(|age| age < PROOF_LASTS);
        (disposition == Disposition::Poison && after_others)
            || (deliveries >= DELIVERIES_MAX && is_proven)
    }

    fn failing(&self, state: &mut State, began: Instant, reason: &str, now: Instant) {
        let since = *state.failing_since.get_or_insert(began);
        if now.saturating_duration_since(since) >= NOT_WORKING_AFTER {
            let reason = format!("nothing is applied: {reason}");
            self.problems.report_until(PART, reason, now + REPORT_LASTS);
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the pause before a refused event is delivered again, after so many deliveries.
pub(super) fn redelivery_delay(deliveries: u64) -> Duration {
    doubled(deliveries.saturating_sub(1), DELAY_MAX)
}

fn doubled(doublings: u64, longest: Duration) -> Duration {
    let doublings = u32::try_from(doublings).unwrap_or(u32::MAX).min(16);
    Duration::from_secs(1 << doublings).min(longest)
}

#[cfg(test)]
mod tests;
