//! The unsent signals of rows and orphans, which a replay has held back until its end.
//!
//! Owns the transaction that puts them into the outbox: each row or orphan is signalled once, in
//! its state at that time. The process that ends a replay sends them. Every worker also checks for
//! unsent signals: the replay's process may have died, and a batch that read its rows before the
//! replay's end may have left some. Sends nothing while a replay is unfinished, because rows may be
//! half rebuilt.

use std::sync::Arc;
use std::time::Duration;

use litestripe_contract::exit;
use litestripe_domain::plan;
use litestripe_domain::signal::{self, Cause, NewSignal};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::error::StoreError;
use crate::store::Transaction;
use crate::store::{self, Store};
use crate::wait::pause;

/// Rows whose signals are sent in one transaction.
const BATCH: u64 = 500;

/// How often a worker checks for unsent signals.
const CHECK_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub(crate) struct Sent {
    pub signals: u64,
    /// Rows that cannot be read, so that their signals remain unsent.
    pub unreadable: Vec<String>,
}

/// Sends unsent signals while no replay is unfinished, until `shutdown`.
pub(crate) async fn run(store: Store, relay: Arc<Notify>, shutdown: CancellationToken) {
    let mut warned = Vec::new();
    loop {
        match send(&store, &relay, &shutdown).await {
            Ok(Sent {
                signals,
                unreadable,
            }) => {
                if signals > 0 {
                    info!("sent {signals} signals that a replay had held back");
                }
                if !unreadable.is_empty() && unreadable != warned {
                    warn!(
                        "these rows cannot be read, so their signals stay unsent (`reconcile --repair` repairs them): {}",
                        unreadable.join(", ")
                    );
                }
                warned = unreadable;
            }
            Err(error) => debug!("cannot check for unsent signals: {}", exit::chain(&error)),
        }
        if pause(CHECK_EVERY, &shutdown).await.is_none() {
            return;
        }
    }
}

/// Sends unsent signals, unless a replay is unfinished. Stops between two transactions on
/// `shutdown`.
pub(crate) async fn send(
    store: &Store,
    relay: &Notify,
    shutdown: &CancellationToken,
) -> Result<Sent, StoreError> {
    let mut sent = Sent::default();
    if !store::replay::unfinished(store.connection())
        .await?
        .is_empty()
    {
        return Ok(sent);
    }
    let mut after = String::new();
    while !shutdown.is_cancelled() {
        let ids = store::subscription::unsent(store.connection(), &after, BATCH).await?;
        let Some(last) = ids.last() else { break };
        after.clone_from(last);
        send_readable(store, ids, &mut sent).await?;
        relay.notify_one();
    }
    // Counting first avoids a write lock if there is none.
    while !shutdown.is_cancelled() && store::orphan::count_unsent(store.connection()).await? > 0 {
        let Some(signals) = store.uncancelled(send_orphans).await? else {
            break;
        };
        sent.signals += signals;
        relay.notify_one();
    }
    Ok(sent)
}

pub(crate) async fn count(store: &Store) -> Result<u64, StoreError> {
    let rows = store::subscription::count_unsent(store.connection()).await?;
    Ok(rows + store::orphan::count_unsent(store.connection()).await?)
}

/// Sends the unsent signals of the rows `ids`. If a row cannot be read, sends those of the others.
async fn send_readable(store: &Store, ids: Vec<String>, sent: &mut Sent) -> Result<(), StoreError> {
    match send_together(store, ids.clone()).await {
        Err(error) if error.is_refusal() => {}
        outcome => {
            sent.signals += outcome?;
            return Ok(());
        }
    }
    for id in ids {
        match send_together(store, vec![id.clone()]).await {
            Err(error) if error.is_refusal() => sent.unreadable.push(id),
            outcome => sent.signals += outcome?,
        }
    }
    Ok(())
}

async fn send_together(store: &Store, ids: Vec<String>) -> Result<u64, StoreError> {
    store
        .uncancelled(async move |tx| send_rows(tx, &ids).await)
        .await
}

/// Sends the unsent signals of the rows `ids`, and returns their count. Skips a row that another
/// process writes meanwhile: if its signal stays unsent, the next check sends it.
async fn send_rows(tx: Transaction, ids: &[String]) -> Result<u64, StoreError> {
    let now = OffsetDateTime::now_utc();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let mut stored: Vec<_> = store::subscription::load(&tx, &ids)
        .await?
        .into_iter()
        .collect();
    // Checked after the rows are read: a replay that starts in between would change them.
    if !store::replay::unfinished(&tx).await?.is_empty() {
        return Ok(0);
    }
    stored.retain(|(_, row)| row.last_sent.has_unsent_signal());
    stored.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    let unsent = stored
        .into_iter()
        .filter_map(|(id, row)| plan::plan_unsent(&id, row, now));
    let (rows, mut signals): (Vec<_>, Vec<_>) =
        unsent.map(|unsent| (unsent.row, unsent.signal)).unzip();
    let ids: Vec<String> = rows
        .iter()
        .map(|row| row.stripe_subscription_id.clone())
        .collect();
    let written = store::subscription::save(&tx, rows, now).await?;
    let mut is_written = ids.iter().map(|id| written.contains(id));
    signals.retain(|_| is_written.next() == Some(true));
    commit(tx, signals.into_iter().flatten().collect(), now).await
}

/// Sends the unsent signals of some orphans, and returns their count. `None` while a replay is
/// unfinished.
async fn send_orphans(tx: Transaction) -> Result<Option<u64>, StoreError> {
    let now = OffsetDateTime::now_utc();
    let orphans = store::orphan::take_unsent(&tx, BATCH).await?;
    if !store::replay::unfinished(&tx).await?.is_empty() {
        return Ok(None);
    }
    let signals = orphans.into_iter().filter_map(|(orphan, event)| {
        let cause = Cause::from(event);
        let to_signal = if orphan.resolved_at.is_some() {
            signal::orphan_resolved
        } else {
            signal::orphan_created
        };
        Some(to_signal(&store::orphan::to_new_orphan(&orphan)?, cause))
    });
    let signals = signals.collect();
    commit(tx, signals, now).await.map(Some)
}

async fn commit(
    tx: Transaction,
    signals: Vec<NewSignal>,
    now: OffsetDateTime,
) -> Result<u64, StoreError> {
    let count = signals.len() as u64;
    store::outbox::insert(&tx, signals, now).await?;
    tx.commit()
        .await
        .map_err(StoreError::doing("commit unsent signals"))?;
    Ok(count)
}
