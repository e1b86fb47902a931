//! Resend: rows as they are, signalled once more under the revision they have.
//!
//! Owns which rows, and that nothing is sent which a change made meanwhile has overtaken: each row is
//! locked while its signal is put into the outbox. For subscribers that are new, or were away longer
//! than signals are kept.

use std::time::Duration;

use litestripe_domain::plan;
use litestripe_domain::row::{LastSent, Stored};
use litestripe_domain::signal;
use sea_orm::DatabaseTransaction;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::error::StoreError;
use crate::store::{self, Store};

/// Rows that are put into the outbox at once.
pub(crate) const BATCH: u64 = 500;

/// Signals that may wait in the outbox before more are put in: a live one has to queue behind them.
const BACKLOG_MAX: u64 = 2000;

/// How often it is looked whether they are sent.
const CHECK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
pub(crate) struct Put {
    pub sent: u64,
    /// Rows that owe a signal: they are left to the end of the replay.
    pub left: u64,
}

/// Puts the rows `ids` into the outbox.
pub(crate) async fn put_in_outbox(store: &Store, ids: Vec<String>) -> Result<Put, StoreError> {
    store
        .uncancelled(async move |tx| put(tx, &ids, OffsetDateTime::now_utc()).await)
        .await
}

/// Waits until there is room in the outbox, or until `shutdown`: while NATS is away there is none.
pub(crate) async fn wait_for_room(
    store: &Store,
    shutdown: &CancellationToken,
) -> Result<(), StoreError> {
    while !shutdown.is_cancelled()
        && store::outbox::backlog(store.connection()).await?.0 > BACKLOG_MAX
    {
        tokio::time::sleep(CHECK_EVERY).await;
    }
    Ok(())
}

async fn put(
    tx: DatabaseTransaction,
    ids: &[String],
    now: OffsetDateTime,
) -> Result<Put, StoreError> {
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    store::subscription::lock(&tx, &ids).await?;
    let mut rows: Vec<(String, Stored)> = store::subscription::load(&tx, &ids)
        .await?
        .into_iter()
        .collect();
    rows.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    let mut signals = Vec::new();
    let mut never_sent = Vec::new();
    let mut left = 0;
    for (id, stored) in rows {
        if stored.last_sent.has_unsent_signal() {
            left += 1;
            continue;
        }
        let visible = stored.state.visible();
        let Some(event) = signal::last_event(&stored.state) else {
            continue;
        };
        if stored.revision > 0 {
            signals.push(plan::resend(
                &id,
                &visible.subscription,
                stored.revision,
                event,
                now,
            ));
            continue;
        }
        // Of a replay that told nobody: its first revision.
        let Some(first) = plan::plan_unsent(
            &id,
            Stored {
                last_sent: LastSent::Nothing,
                ..stored
            },
            now,
        ) else {
            continue;
        };
        signals.extend(first.signal);
        never_sent.push(first.row);
    }
    store::subscription::save(&tx, never_sent, now).await?;
    let put = Put {
        sent: signals.len() as u64,
        left,
    };
    store::outbox::insert(&tx, signals, now).await?;
    tx.commit()
        .await
        .map_err(StoreError::doing("commit signals to send again"))?;
    Ok(put)
}
