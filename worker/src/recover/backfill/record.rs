//! The record of backfills: when the last complete one began, for each mode (live or test).
//!
//! Owns the time range of a backfill. A complete backfill has seen every event that Stripe listed
//! when it began. The next one starts somewhat earlier, because Stripe may list an event later than
//! it is created.

use std::time::Duration;

use time::OffsetDateTime;

use super::STRIPE_KEEPS;
use crate::error::StoreError;
use crate::store::{self, Store};

/// How far a backfill goes back before the beginning of the last one.
const OVERLAP: Duration = Duration::from_secs(2 * 60 * 60);

/// How far the first backfill goes back: as long as Stripe retries a live delivery.
pub(crate) const FIRST: Duration = Duration::from_secs(72 * 60 * 60);

/// The record of one mode.
#[derive(Clone)]
pub(crate) struct Record {
    store: Store,
    livemode: bool,
}

impl Record {
    pub(crate) fn new(store: Store, livemode: bool) -> Self {
        Self { store, livemode }
    }

    pub(crate) async fn last_complete(&self) -> Result<Option<OffsetDateTime>, StoreError> {
        let last = store::backfill::last_complete(self.store.connection(), self.livemode).await?;
        Ok(plausible(last, OffsetDateTime::now_utc()))
    }

    /// Records that a backfill which began at `began` has seen all events since `since`. Does
    /// nothing if that leaves a gap after the last complete backfill.
    pub(crate) async fn record_complete(
        &self,
        since: OffsetDateTime,
        began: OffsetDateTime,
    ) -> Result<(), StoreError> {
        let db = self.store.connection();
        let last = store::backfill::last_complete(db, self.livemode).await?;
        if !leaves_no_gap(plausible(last, began), since, began) {
            return Ok(());
        }
        store::backfill::record(db, self.livemode, began, last).await
    }
}

/// Returns where the next backfill starts, in whole seconds, as Stripe's times are.
pub(crate) fn next_since(last: Option<OffsetDateTime>, now: OffsetDateTime) -> OffsetDateTime {
    let since = match last {
        Some(last) => (last.min(now) - OVERLAP).max(oldest(now)),
        None => now - FIRST,
    };
    since.truncate_to_second()
}

pub(crate) fn oldest(now: OffsetDateTime) -> OffsetDateTime {
    now - STRIPE_KEEPS
}

/// Returns `last` unless it is too far in the future: hosts' clocks differ a little, but such a
/// time comes from a clock that was wrong.
fn plausible(last: Option<OffsetDateTime>, now: OffsetDateTime) -> Option<OffsetDateTime> {
    last.filter(|last| *last - now <= OVERLAP)
}

fn leaves_no_gap(
    last: Option<OffsetDateTime>,
    since: OffsetDateTime,
    began: OffsetDateTime,
) -> bool {
    match last {
        Some(last) => began > last && since <= last.max(oldest(began)),
        // Without a record it has to go as far back as a worker's own first backfill.
        None => since <= began - FIRST,
    }
}

#[cfg(test)]
mod tests;
