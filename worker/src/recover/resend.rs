//! Resend: signals rows again, as they are and under the revision that they have.
//!
//! For subscribers that are new, or that were offline for longer than signals are kept. Locks each
//! row while its signal is put into the outbox, so that it never signals a state that a concurrent
//! change has already replaced. A row that was never signalled, because its user is unknown, is
//! signalled only if the operator names it. Open orphans are signalled again in the same way.

use std::time::Duration;

use litestripe_domain::plan;
use litestripe_domain::row::{LastSent, Stored};
use litestripe_domain::signal;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::error::StoreError;
use crate::store::Transaction;
use crate::store::{self, Store};

/// Rows whose signals are put into the outbox in one transaction.
pub(crate) const BATCH: u64 = 500;

/// Signals that may wait in the outbox before more are added: a live signal has to queue behind
/// them.
const BACKLOG_MAX: u64 = 2000;

/// How often the outbox is checked for room.
const CHECK_EVERY: Duration = Duration::from_millis(50);

/// How the operator chose the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chosen {
    /// All rows. Those with an unsent or withheld signal are left out.
    All,
    /// By name. Unsent and withheld signals are sent too.
    Named,
}

impl std::ops::AddAssign for Resent {
    fn add_assign(&mut self, more: Self) {
        self.sent += more.sent;
        self.left += more.left;
        self.withheld += more.withheld;
    }
}

/// What was put into the outbox, and what was left out.
#[derive(Debug, Default)]
pub(crate) struct Resent {
    pub sent: u64,
    /// Rows with an unsent signal: it is sent at the end of the replay.
    pub left: u64,
    /// Rows whose first signal is withheld.
    pub withheld: u64,
}

/// Puts signals of the rows `ids` into the outbox.
pub(crate) async fn put_in_outbox(
    store: &Store,
    ids: Vec<String>,
    chosen: Chosen,
) -> Result<Resent, StoreError> {
    store
        .uncancelled(async move |tx| put_rows(tx, &ids, chosen, OffsetDateTime::now_utc()).await)
        .await
}

/// Puts signals of up to [`BATCH`] open orphans after `after`, in the order of their ids, into the
/// outbox. Returns the last id; `None` if there are no more.
pub(crate) async fn put_orphans_in_outbox(
    store: &Store,
    after: String,
) -> Result<(Resent, Option<String>), StoreError> {
    store
        .uncancelled(async move |tx| put_orphans(tx, &after, OffsetDateTime::now_utc()).await)
        .await
}

async fn put_orphans(
    tx: Transaction,
    after: &str,
    now: OffsetDateTime,
) -> Result<(Resent, Option<String>), StoreError> {
    let open = store::orphan::lock_open(&tx, after, BATCH).await?;
    let last = open.last().map(|orphan| orphan.id.clone());
    let (unsent, open): (Vec<_>, Vec<_>) = open
        .into_iter()
        .partition(|orphan| orphan.unsent_event.is_some());
    let signals: Vec<_> = open
        .iter()
        .filter_map(|row| {
            let created = row.dt_created.truncate_to_second().into();
            Some(signal::orphan_resent(
                &store::orphan::to_new_orphan(row)?,
                created,
                now,
            ))
        })
        .collect();
    let resent = Resent {
        sent: signals.len() as u64,
        left: unsent.len() as u64,
        withheld: 0,
    };
    store::outbox::insert(&tx, signals, now).await?;
    tx.commit()
        .await
        .map_err(StoreError::doing("commit signals to send again"))?;
    Ok((resent, last))
}

/// Waits until there is room in the outbox, or until `shutdown`: while NATS is unavailable the
/// outbox stays full.
pub(crate) async fn wait_for_room(
    store: &Store,
    shutdown: &CancellationToken,
) -> Result<(), StoreError> {
    while !shutdown.is_cancelled() && !store::outbox::is_at_most(store, BACKLOG_MAX).await? {
        tokio::time::sleep(CHECK_EVERY).await;
    }
    Ok(())
}

async fn put_rows(
    tx: Transaction,
    ids: &[String],
    chosen: Chosen,
    now: OffsetDateTime,
) -> Result<Resent, StoreError> {
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    store::subscription::lock(&tx, &ids).await?;
    let mut rows: Vec<(String, Stored)> = store::subscription::load(&tx, &ids)
        .await?
        .into_iter()
        .collect();
    rows.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    let mut signals = Vec::new();
    let mut released = Vec::new();
    let mut resent = Resent::default();
    for (id, stored) in rows {
        let is_unsent = stored.last_sent.has_unsent_signal();
        let is_withheld = stored.last_sent.is_withheld();
        if chosen == Chosen::All && (is_unsent || is_withheld) {
            resent.left += u64::from(is_unsent);
            resent.withheld += u64::from(is_withheld);
            continue;
        }
        let Some(event) = signal::last_event(&stored.state) else {
            continue;
        };
        if stored.revision > 0 && !is_unsent {
            let visible = stored.state.visible();
            signals.push(plan::resent_signal(
                &id,
                &visible.subscription,
                stored.revision,
                event,
                now,
            ));
            continue;
        }
        // It gets its first revision, or the one that was due at the end of a replay.
        let last_sent = match stored.last_sent {
            older @ LastSent::Older(_) => older,
            _ => LastSent::Nothing,
        };
        let stored = Stored {
            last_sent,
            ..stored
        };
        let Some(first) = plan::plan_unsent(&id, stored, now) else {
            continue;
        };
        signals.extend(first.signal);
        released.push(first.row);
    }
    store::subscription::save(&tx, released, now).await?;
    resent.sent = signals.len() as u64;
    store::outbox::insert(&tx, signals, now).await?;
    tx.commit()
        .await
        .map_err(StoreError::doing("commit signals to send again"))?;
    Ok(resent)
}
