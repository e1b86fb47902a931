//! The removal of a row's metadata.
//!
//! Owns the transaction, or the part of one, that changes the row, deletes its older signals from
//! the outbox, and adds a signal of its new state.

use litestripe_contract::signal::EventReference;
use litestripe_domain::plan::{self, Erased};
use time::OffsetDateTime;

use crate::error::StoreError;
use crate::store::Transaction;
use crate::store::{self, Store};

/// A row whose metadata is gone.
pub(in crate::erasure) struct Stripped {
    /// Whether there was any.
    pub(super) had_metadata: bool,
    /// The revision of its new signal. Older signals may contain erased data.
    pub(super) keep_from: i64,
}

/// Removes the metadata from the row `id`, if it exists, and signals the row even if it had none.
pub(super) async fn strip(
    store: &Store,
    id: &str,
    cause: &EventReference,
) -> Result<Option<Stripped>, StoreError> {
    loop {
        let (id, cause) = (id.to_owned(), cause.clone());
        let once = async move |tx: Transaction| {
            let stripped = strip_in(&tx, &id, &cause, OffsetDateTime::now_utc()).await?;
            if !matches!(stripped, Outcome::Conflict) {
                tx.commit()
                    .await
                    .map_err(StoreError::doing("commit an erasure"))?;
            }
            Ok::<_, StoreError>(stripped)
        };
        if let Outcome::Done(stripped) = store.uncancelled(once).await? {
            return Ok(stripped);
        }
    }
}

pub(in crate::erasure) enum Outcome {
    Done(Option<Stripped>),
    /// A worker wrote the row after it was read.
    Conflict,
}

/// Does the same in `tx`.
pub(in crate::erasure) async fn strip_in(
    tx: &Transaction,
    id: &str,
    cause: &EventReference,
    now: OffsetDateTime,
) -> Result<Outcome, StoreError> {
    let Some(stored) = store::subscription::load(tx, &[id]).await?.remove(id) else {
        return Ok(Outcome::Done(None));
    };
    let Erased {
        row,
        signal,
        had_metadata,
    } = plan::plan_erasure(id, stored, cause.clone(), now);
    // Signals in the outbox may contain the erased data.
    store::outbox::delete_changes_of(tx, id).await?;
    // The new signal is kept. Without one, because the row's signal is unsent, no earlier signal is
    // kept.
    let keep_from = if signal.is_some() {
        row.revision
    } else {
        row.revision + 1
    };
    store::outbox::insert(tx, signal.into_iter().collect(), now).await?;
    if store::subscription::save(tx, vec![row], now)
        .await?
        .is_empty()
    {
        return Ok(Outcome::Conflict);
    }
    Ok(Outcome::Done(Some(Stripped {
        had_metadata,
        keep_from,
    })))
}
