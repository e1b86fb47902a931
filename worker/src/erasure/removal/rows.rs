//! Taking the metadata out of a row.
//!
//! Owns the transaction: the row, what waits in the outbox of it, and the signal that it changed,
//! which does not tell what was there.

use litestripe_contract::signal::{Access, EventReference, SubscriptionChanged};
use litestripe_domain::merge;
use litestripe_domain::plan;
use litestripe_domain::row::Row;
use litestripe_domain::signal;
use time::OffsetDateTime;

use super::Told;
use crate::error::StoreError;
use crate::store::{self, Store};

/// When the row is signalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    /// If a visible column changed, or a signal was taken out of the outbox.
    OfChange,
    /// In any case.
    Always,
}

/// Takes the metadata out of the row `id`, if there is one. Returns whether there was any.
///
/// # Errors
/// When the database is away.
pub(super) async fn strip(store: &Store, id: &str, cause: &EventReference, when: Signal) -> Result<bool, StoreError> {
    // A cancelled transaction would leave a poisoned connection in the pool, so nothing cancels it.
    let task = tokio::spawn({
        let (store, id, cause) = (store.clone(), id.to_owned(), cause.clone());
        async move {
            loop {
                match strip_once(&store, &id, &cause, when, OffsetDateTime::now_utc()).await? {
                    Some(stripped) => return Ok(stripped),
                    // A worker wrote it since it was read.
                    None => continue,
                }
            }
        }
    });
    task.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
}

async fn strip_once(
    store: &Store,
    id: &str,
    cause: &EventReference,
    when: Signal,
    now: OffsetDateTime,
) -> Result<Option<bool>, StoreError> {
    let tx = store.begin().await?;
    let Some(mut stored) = store::subscription::load(&tx, &[id]).await?.remove(id) else { return Ok(Some(false)) };
    let before = stored.state.visible().subscription;
    let stripped = stored.state.erase_metadata();
    let waiting = store::outbox::changes_of(&tx, id).await?;
    let superseded = waiting.iter().any(|row| Told::read(row.body.as_bytes()).has_metadata());
    let visible = stored.state.visible();
    let after = visible.subscription.clone();
    let changes = merge::changes(&before, &after);
    // What a row owes is not sent before the end of the replay.
    let is_owed = stored.last_sent.is_owed();
    let is_signalled = !is_owed && (changes.is_some() || superseded || when == Signal::Always);
    let last_sent = stored.last_sent.clone().without_metadata(&after);
    if !stripped && !is_signalled && last_sent == stored.last_sent {
        return Ok(Some(false));
    }
    let mut revision = stored.revision;
    if is_owed {
        store::outbox::delete(&tx, waiting.iter().map(|row| row.id).collect()).await?;
    } else if is_signalled {
        // What waits tells what is erased; the new signal tells what the row is now.
        store::outbox::delete(&tx, waiting.iter().map(|row| row.id).collect()).await?;
        revision = plan::next_revision(revision, now);
        let (changed, mut previous) = changes.map(|changes| (changes.changed, changes.previous)).unwrap_or_default();
        previous.retain(|name, _| !matches!(name.as_str(), "metadata" | "subscription_metadata"));
        let told = SubscriptionChanged {
            stripe_subscription_id: id.to_owned(),
            access: Access::of_status(after.status.as_deref()),
            subscription: after,
            revision,
            previous_revision: (stored.revision > 0).then_some(stored.revision),
            changed,
            previous,
            event: cause.clone(),
            replayed: false,
        };
        store::outbox::insert(&tx, vec![signal::subscription_changed(&told, None)], now).await?;
    }
    let (state, version) = (stored.state, stored.version + 1);
    let row = Row { stripe_subscription_id: id.to_owned(), state, visible, version, revision, last_sent };
    if store::subscription::save(&tx, vec![row], now).await?.is_empty() {
        return Ok(None);
    }
    tx.commit().await.map_err(StoreError::doing("commit an erasure"))?;
    Ok(Some(stripped))
}
