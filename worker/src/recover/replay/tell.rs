//! What is signalled when a replay has reached its end.
//!
//! Owns the transaction: each row that changed is signalled once, with its final state, and the debt
//! goes with it, also that of a row that is gone. What another process wrote meanwhile stays due.

use std::collections::HashMap;

use litestripe_contract::exit;
use litestripe_contract::subject::{ORPHAN_CREATED, ORPHAN_RESOLVED, SUBSCRIPTION_CHANGED};
use litestripe_domain::plan::{self, Overdue};
use litestripe_domain::signal::{self, Cause, NewSignal};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{ReplayError, Replayer};
use crate::error::{Disposition, StoreError};
use crate::store::{self, Store};

/// Rows that are signalled in one transaction.
const TOLD_AT_ONCE: u64 = 500;

/// Passes over all that is due in which nothing was settled, in a row: what another process is at, it
/// settles meanwhile.
const FRUITLESS_MAX: u32 = 3;

/// What became of some debts.
#[derive(Default)]
struct Told {
    signals: u64,
    /// Debts that are there no more.
    settled: u64,
}

impl Replayer {
    /// Signals what is due, and notes the replay's end. Returns how many signals that are, and whether
    /// that was all: it stops between two transactions when `shutdown` came.
    pub(super) async fn tell(&self, name: &str, shutdown: &CancellationToken) -> Result<(u64, bool), ReplayError> {
        let db = self.applier.store.connection();
        let (mut signals, mut fruitless) = (0, 0);
        while fruitless < FRUITLESS_MAX {
            let (mut settled, mut after) = (0, String::new());
            loop {
                if shutdown.is_cancelled() {
                    return Ok((signals, false));
                }
                let ids = store::signal_due::owed_by(db, name, &after, TOLD_AT_ONCE).await?;
                let Some(last) = ids.last() else { break };
                after.clone_from(last);
                let told = self.tell_readable(name, ids).await?;
                signals += told.signals;
                settled += told.settled;
                self.applier.relay.notify_one();
            }
            // Live events may have left some more to it.
            if after.is_empty() && self.finish(name).await? {
                return Ok((signals, true));
            }
            fruitless = if settled == 0 { fruitless + 1 } else { 0 };
        }
        Err(ReplayError::Untold(store::signal_due::count(db, name).await?))
    }

    /// Signals what is owed of `ids`, as far as their rows can be read: one that cannot must not keep
    /// the others from being told.
    async fn tell_readable(&self, replay: &str, ids: Vec<String>) -> Result<Told, StoreError> {
        match self.tell_in_own_task(replay, ids.clone()).await {
            Err(error) if error.disposition() == Disposition::Poison => {}
            outcome => return outcome,
        }
        let mut all = Told::default();
        for id in ids {
            match self.tell_in_own_task(replay, vec![id.clone()]).await {
                Ok(told) => {
                    all.signals += told.signals;
                    all.settled += told.settled;
                }
                Err(error) if error.disposition() == Disposition::Poison => {
                    warn!("the signal of {id} stays due: {}", exit::chain(&error));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    async fn finish(&self, replay: &str) -> Result<bool, StoreError> {
        let (store, replay) = (self.applier.store.clone(), replay.to_owned());
        let task = tokio::spawn(async move { store::replay::finish(&store, &replay, OffsetDateTime::now_utc()).await });
        task.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
    }

    /// A cancelled transaction would leave a poisoned connection in the pool, so nothing cancels it.
    async fn tell_in_own_task(&self, replay: &str, ids: Vec<String>) -> Result<Told, StoreError> {
        let (store, replay) = (self.applier.store.clone(), replay.to_owned());
        let task = tokio::spawn(async move { tell_some(&store, &replay, &ids, OffsetDateTime::now_utc()).await });
        task.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
    }
}

/// Signals what `replay` owes of `ids`. Rows that another process wrote meanwhile stay due.
async fn tell_some(store: &Store, replay: &str, ids: &[String], now: OffsetDateTime) -> Result<Told, StoreError> {
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let tx = store.begin().await?;
    let stored = store::subscription::load(&tx, &ids).await?;
    // Nothing is left to tell of a row that somebody deleted.
    let mut settled: Vec<&str> = ids.iter().copied().filter(|id| !stored.contains_key(*id)).collect();
    let mut rows = Vec::new();
    let mut owed: HashMap<String, Option<NewSignal>> = HashMap::new();
    for (id, stored) in stored {
        let Some(due) = stored.due.clone().filter(|due| due.replay == replay) else { continue };
        let Overdue { row, signal } = plan::of_overdue(&id, stored, due, now);
        rows.push(row);
        owed.insert(id, signal);
    }
    rows.sort_by(|a, b| a.stripe_subscription_id.cmp(&b.stripe_subscription_id));
    let written = store::subscription::save(&tx, rows, now).await?;
    let mut signals = Vec::new();
    for id in ids.iter().copied().filter(|id| written.contains(*id)) {
        settled.push(id);
        signals.extend(owed.remove(id).flatten());
    }
    let orphans = store::signal_due::of_orphans(&tx, replay, &ids).await?;
    for (id, dues) in &orphans {
        let Some(orphan) = store::orphan::find(&tx, id).await? else { continue };
        // One that came and went in this replay was nobody's concern.
        let was_created = dues.iter().any(|due| due.subject == ORPHAN_CREATED);
        if let (Some(due), true) = (dues.first(), was_created == orphan.resolved_at.is_none()) {
            let cause = Cause { event: due.event.clone(), traceparent: None };
            let tell = if orphan.resolved_at.is_some() { signal::orphan_resolved } else { signal::orphan_created };
            signals.extend(store::orphan::known(&orphan).map(|known| tell(&known, cause)));
        }
    }
    let told = signals.len() as u64;
    store::outbox::insert(&tx, signals, now).await?;
    let of_rows = store::signal_due::remove(&tx, &[SUBSCRIPTION_CHANGED], &settled).await?;
    let orphans: Vec<&str> = orphans.keys().map(String::as_str).collect();
    let of_orphans = store::signal_due::remove(&tx, &[ORPHAN_CREATED, ORPHAN_RESOLVED], &orphans).await?;
    tx.commit().await.map_err(StoreError::doing("commit signals that were due"))?;
    Ok(Told { signals: told, settled: of_rows + of_orphans })
}
