//! What is signalled when a replay has reached its end.
//!
//! Owns the transaction: each row that changed is signalled once, with its final state, and the debt
//! goes with it. What another process wrote meanwhile stays due.

use litestripe_contract::subject::{ORPHAN_CREATED, ORPHAN_RESOLVED, SUBSCRIPTION_CHANGED};
use time::OffsetDateTime;

use crate::error::StoreError;
use crate::plan::{self, Overdue};
use crate::signal::{self, Cause};
use crate::store::{self, Store};

/// Signals what `replay` owes of `ids`. Rows that another process wrote meanwhile stay due.
pub(super) async fn tell_some(
    store: &Store,
    replay: &str,
    ids: &[String],
    now: OffsetDateTime,
) -> Result<u64, StoreError> {
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let tx = store.begin().await?;
    let stored = store::subscription::load(&tx, &ids).await?;
    let mut overdue: Vec<(String, Overdue)> = Vec::new();
    for (id, stored) in stored {
        let due = stored.due.clone().filter(|due| due.replay == replay);
        overdue.extend(due.map(|due| (id.clone(), plan::of_overdue(&id, stored, due, now))));
    }
    overdue.sort_by(|(a, _), (b, _)| a.cmp(b));
    let written = store::subscription::save(&tx, overdue.iter().map(|(_, overdue)| &overdue.row), now).await?;
    let mut settled = Vec::new();
    let mut signals = Vec::new();
    for (id, overdue) in &mut overdue {
        if written.contains(id) {
            settled.push(id.as_str());
            signals.extend(overdue.signal.take());
        }
    }
    let orphans = store::signal_due::of_orphans(&tx, replay, &ids).await?;
    for (id, dues) in &orphans {
        let Some(orphan) = store::orphan::find(&tx, id).await? else { continue };
        // One that came and went in this replay was nobody's concern.
        let was_created = dues.iter().any(|due| due.subject == ORPHAN_CREATED);
        if let (Some(due), true) = (dues.first(), was_created == orphan.resolved_at.is_none()) {
            signals.extend(signal::orphan_stands(&orphan, Cause { event: due.event.clone(), traceparent: None }));
        }
    }
    let told = signals.len() as u64;
    store::outbox::insert(&tx, signals, now).await?;
    store::signal_due::remove(&tx, &[SUBSCRIPTION_CHANGED], &settled).await?;
    let orphans: Vec<&str> = orphans.keys().map(String::as_str).collect();
    store::signal_due::remove(&tx, &[ORPHAN_CREATED, ORPHAN_RESOLVED], &orphans).await?;
    tx.commit().await.map_err(StoreError::doing("commit signals that were due"))?;
    Ok(told)
}
