//! How far backfills have come: when the last complete one began, by mode.
//!
//! Owns the windows. A complete backfill has seen all that Stripe had listed when it began; the next
//! one starts a while before that, because an event may be listed later than it is created.

use std::time::Duration;

use time::OffsetDateTime;

use super::STRIPE_KEEPS;
use crate::error::StoreError;
use crate::store::{self, Store};

/// How much of the time before is looked at again.
const OVERLAP: Duration = Duration::from_secs(2 * 60 * 60);

/// How far the first backfill goes back: as far as Stripe tries a live delivery again.
pub(crate) const FIRST: Duration = Duration::from_secs(72 * 60 * 60);

/// What is known of backfills of one mode.
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

    /// Notes that all events since `since` were looked at, by a backfill that began at `began`. One
    /// that leaves a gap after the last complete one is not noted.
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

/// Where the next backfill starts: a whole second, as Stripe has them.
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

/// Hosts' clocks differ, but a time that is further ahead comes from one that was wrong.
fn plausible(last: Option<OffsetDateTime>, now: OffsetDateTime) -> Option<OffsetDateTime> {
    last.filter(|last| *last <= now + OVERLAP)
}

fn leaves_no_gap(
    last: Option<OffsetDateTime>,
    since: OffsetDateTime,
    began: OffsetDateTime,
) -> bool {
    match last {
        Some(last) => began > last && since <= last.max(oldest(began)),
        // As far back as the first one that a worker makes by itself.
        None => since <= began - FIRST,
    }
}

#[cfg(test)]
mod tests;
