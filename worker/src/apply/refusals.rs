//! What the database refuses, over all batches of a worker.
//!
//! Owns when a refused event becomes a dead letter, the pauses before it is tried again, and what
//! readiness says while batches fail. Takes the time as an argument. May not know messages.
//!
//! A constraint, a trigger or a missing permission may refuse every event. Then each event waits,
//! and none becomes a dead letter: that takes the proof that the database accepts others, a row
//! that was written shortly before the refused attempt. The deliveries of such a time say nothing
//! about an event, so for a while after it none becomes a dead letter for their number.

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

/// A batch of which this many events and no others were tried shows that the database refuses
/// everything. One or two may be at fault themselves, and come alone in a quiet installation.
const EVERYTHING: usize = 3;

/// For how long after a time in which everything was refused no number of deliveries makes a dead
/// letter: longer than it takes to deliver an event as often as that takes.
const TRIED_ANEW: Duration = Duration::from_secs(360);

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

/// How long readiness remembers refusals beside accepted events: somewhat longer than the longest
/// pause before the next one.
const REFUSAL_LASTS: Duration = Duration::from_secs(60);

/// What readiness calls the applying of batches.
const PART: &str = "batches";

/// What readiness calls the events that are refused while others are accepted.
const REFUSED_PART: &str = "refused events";

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
    /// When everything was refused last, after a time without a written row.
    refused_everything: Option<Instant>,
    /// When refusals beside accepted events began, and the latest.
    refusing: Option<(Instant, Instant)>,
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

    /// Records a batch of which every change that was tried, of `count` events, was refused.
    /// Returns the pause before the next batch.
    pub(super) fn all_refused(
        &self,
        count: usize,
        began: Instant,
        reason: &str,
        now: Instant,
    ) -> Duration {
        let mut state = self.locked();
        if !state.is_logged && state.may_log(now) {
            state.is_logged = true;
            warn!(
                reason,
                "the database refuses all events of a batch: they are delivered again later: {reason}"
            );
        }
        state.refused_in_a_row = state.refused_in_a_row.saturating_add(1);
        let lasted = self.failing(&mut state, began, reason, now);
        if count >= EVERYTHING && lasted >= NOT_WORKING_AFTER {
            state.refused_everything = Some(now);
        }
        match state.refused_in_a_row.checked_sub(UNPAUSED + 1) {
            None => Duration::ZERO,
            Some(doublings) => doubled(doublings.into(), PAUSE_MAX),
        }
    }

    /// Records that `count` events of a batch were refused, and others accepted.
    pub(super) fn some_refused(&self, count: usize, reason: &str, now: Instant) {
        let mut state = self.locked();
        let goes_on = |(_, latest): &(Instant, Instant)| {
            now.saturating_duration_since(*latest) < REFUSAL_LASTS
        };
        let since = state
            .refusing
            .filter(goes_on)
            .map_or(now, |(since, _)| since);
        state.refusing = Some((since, now));
        if now.saturating_duration_since(since) >= NOT_WORKING_AFTER {
            self.problems
                .report_until(REFUSED_PART, reason.to_owned(), now + REFUSAL_LASTS);
        }
        if state.may_log(now) {
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
        match disposition {
            Disposition::Wait | Disposition::Broken => return false,
            Disposition::Poison if after_others => return true,
            Disposition::Poison | Disposition::Refused => {}
        }
        let state = self.locked();
        // A row that is written later proves nothing: the fault may have been mended in between.
        let age = |written| began.checked_duration_since(written);
        let is_proven = (state.written.and_then(age)).is_some_and(|age| age < PROOF_LASTS);
        let is_tried_anew = (state.refused_everything)
            .is_some_and(|at| began.saturating_duration_since(at) < TRIED_ANEW);
        deliveries >= DELIVERIES_MAX && is_proven && !is_tried_anew
    }

    /// Whether a row was written since the process started.
    pub(super) fn has_written(&self) -> bool {
        self.locked().written.is_some()
    }

    /// Returns for how long nothing has succeeded.
    fn failing(&self, state: &mut State, began: Instant, reason: &str, now: Instant) -> Duration {
        let since = *state.failing_since.get_or_insert(began);
        let lasted = now.saturating_duration_since(since);
        if lasted >= NOT_WORKING_AFTER {
            let reason = format!("nothing is applied: {reason}");
            self.problems.report_until(PART, reason, now + REPORT_LASTS);
        }
        lasted
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the pause before a refused event is delivered again, after its `deliveries`.
pub(super) fn redelivery_delay(deliveries: u64) -> Duration {
    doubled(deliveries.saturating_sub(1), DELAY_MAX)
}

fn doubled(doublings: u64, longest: Duration) -> Duration {
    let doublings = u32::try_from(doublings).unwrap_or(u32::MAX).min(16);
    Duration::from_secs(1 << doublings).min(longest)
}

#[cfg(test)]
mod tests;
