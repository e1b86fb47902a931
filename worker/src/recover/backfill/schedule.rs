//! The schedule of the backfills that workers run by themselves.
//!
//! Owns when one runs: after a worker's start, for events that it missed while it was stopped, and
//! then every interval, on one worker at a time. A backfill never delays a batch. If it fails, it
//! is retried and the worker continues.

use std::time::Duration;

use litestripe_contract::exit;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::record::{self, Record};
use super::{Backfill, BackfillError, End, Summary, Wanted};
use crate::error::StoreError;
use crate::metrics;
use crate::settings::StripeSettings;
use crate::store::Store;
use crate::store::lease::Lease;
use crate::stripe::mode::{self, Mismatch};
use crate::wait::{self, Awaited, Wait};

/// The longest time between two checks whether a backfill is due: other workers start and stop.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// A backfill that began up to this long before a worker's start counts as one after its start, so
/// that workers that start together run only one. The record has whole seconds.
const STARTED_TOGETHER: Duration = Duration::from_secs(2);

const BACKFILLS: Awaited = Awaited {
    begins: "a backfill failed and will be retried",
    ends: "backfills succeed again",
    first: Duration::from_secs(2),
    longest: Duration::from_secs(10 * 60),
    shown: None,
};

/// The task that runs backfills when they are due.
pub(crate) struct Schedule {
    pub backfill: Backfill,
    pub interval: Duration,
    /// When this process was started. Its first backfill is due at once, unless another worker has
    /// run one since then. Afterwards, when this process began its last one: by a clock that was
    /// set back, the start may be in the future.
    pub started: OffsetDateTime,
    pub record: Record,
    pub lease: Lease,
    /// The database of the rows, which must have the key's mode.
    pub store: Store,
    pub stripe: StripeSettings,
}

#[derive(Debug, thiserror::Error)]
enum ScheduleError {
    /// No backfill has begun.
    #[error("cannot see whether a backfill is due")]
    Unknown(#[source] StoreError),
    #[error(transparent)]
    Backfill(#[from] BackfillError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
}

impl Schedule {
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut wait = Wait::new(BACKFILLS);
        while !shutdown.is_cancelled() {
            let pause = match self.run_if_due(&shutdown).await {
                Ok(Some(left)) => {
                    // Otherwise it may have been interrupted.
                    if !shutdown.is_cancelled() {
                        wait.succeeded();
                    }
                    left.min(CHECK_EVERY)
                }
                Ok(None) => CHECK_EVERY,
                Err(error @ ScheduleError::Unknown(_)) => {
                    debug!("{}", exit::chain(&error));
                    CHECK_EVERY
                }
                Err(error) => {
                    metrics::backfill_ended(false);
                    wait.failed(&error)
                }
            };
            let _ = wait::pause(pause, &shutdown).await;
        }
    }

    /// Runs a backfill if one is due. Returns the time until the next is due, or `None` if another
    /// worker runs one.
    async fn run_if_due(
        &mut self,
        shutdown: &CancellationToken,
    ) -> Result<Option<Duration>, ScheduleError> {
        let started = self.started;
        let left = due_in(&self.record, self.interval, started).await;
        let left = left.map_err(ScheduleError::Unknown)?;
        if !left.is_zero() {
            return Ok(Some(left));
        }
        let work = async {
            // Another worker may have finished one just before we got the lease.
            let left = due_in(&self.record, self.interval, started).await?;
            if !left.is_zero() {
                return Ok((left, started));
            }
            if let Some(mismatch) = mode::find_mismatch(&self.store, &self.stripe).await? {
                return Err(mismatch.into());
            }
            let began = run(&self.backfill, &self.record, shutdown).await?;
            Ok((self.interval, began))
        };
        let worked: Result<Option<Result<_, ScheduleError>>, _> =
            self.lease.hold_during(work).await;
        let Some(worked) = worked.map_err(ScheduleError::Unknown)? else {
            return Ok(None);
        };
        let (left, started) = worked?;
        self.started = started;
        Ok(Some(left))
    }
}

/// Runs a backfill. Returns when it began.
async fn run(
    backfill: &Backfill,
    record: &Record,
    shutdown: &CancellationToken,
) -> Result<OffsetDateTime, ScheduleError> {
    let began = OffsetDateTime::now_utc();
    let since = record::next_since(record.last_complete().await?, began);
    let wanted = Wanted {
        since,
        undelivered_only: false,
    };
    let mut summary = Summary::default();
    let mut counted = 0;
    let count = |summary: &Summary| {
        let missing = summary.published - summary.duplicates;
        metrics::events_backfilled(missing - counted);
        counted = missing;
    };
    let outcome = backfill.run(wanted, &mut summary, count, shutdown).await;
    log_summary(&summary, since);
    if outcome? == End::Complete {
        record.record_complete(since, began).await?;
        metrics::backfill_ended(true);
    }
    Ok(began)
}

fn log_summary(summary: &Summary, since: OffsetDateTime) {
    let since = since.format(&Rfc3339).unwrap_or_default();
    let listed = summary.listed;
    if summary.published == 0 && summary.skipped == 0 {
        return debug!(
            listed,
            "backfill since {since}: none of {listed} events was missing"
        );
    }
    let missing = summary.published - summary.duplicates;
    info!(
        listed,
        already_there = summary.already_there,
        published = summary.published,
        duplicates = summary.duplicates,
        skipped = summary.skipped,
        "backfill since {since}: of {listed} events, {missing} had not arrived and are in STRIPE_EVENTS now"
    );
}

/// Returns the time until a backfill is due.
async fn due_in(
    record: &Record,
    interval: Duration,
    started: OffsetDateTime,
) -> Result<Duration, StoreError> {
    let last = record.last_complete().await?;
    let Some(last) = last.filter(|last| *last >= started - STARTED_TOGETHER) else {
        return Ok(Duration::ZERO);
    };
    // Another host's clock may be ahead of ours.
    let passed = Duration::try_from(OffsetDateTime::now_utc() - last).unwrap_or_default();
    Ok(interval.saturating_sub(passed))
}
