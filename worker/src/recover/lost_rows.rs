//! Detects that the rows were lost: the table is empty, although events have been applied.
//!
//! The SQLite file is gone, a backup was restored, or `DATABASE_URL` names another database. A live
//! event would then create a row of an old subscription without its user.
//!
//! Owns this check at the start of a program that applies events. The loss is recorded as a replay
//! that no process runs, so that everything else works as during a replay; the next replay ends it.
//! A new database beside a stream without applied events is recorded too, as finished, so that a
//! shop without any subscription is never mistaken for a loss.

use async_nats::jetstream;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use tracing::warn;

use crate::error::StoreError;
use crate::store::{self, Store};
use crate::stream::progress::{self, ProgressError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum LostRowsError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Progress(#[from] ProgressError),
}

/// Records a loss of the rows, if there was one, and warns until they are rebuilt.
pub(crate) async fn record_if_lost(
    store: &Store,
    jetstream: &jetstream::Context,
) -> Result<(), LostRowsError> {
    let db = store.connection();
    let has_rows = !store::subscription::keys_after(db, "", 1).await?.is_empty();
    if !has_rows && !store::replay::is_any(db).await? {
        let now = store::clock::now(db).await?;
        let progress = progress::find(jetstream, WORKER_CONSUMER).await?;
        let floor = progress.map_or(0, |progress| progress.ack_floor);
        let (stream, first) = progress::begin(jetstream).await?;
        store::replay::record_lost_rows(db, stream, first, floor, now).await?;
    }
    let unfinished = store::replay::unfinished(db).await?;
    if let Some(lost) = unfinished
        .iter()
        .find(|replay| replay.is_lost_rows_record())
    {
        warn!(
            "the table stripe_subscription was found empty at {}, although {WORKER_CONSUMER} has applied {EVENTS_STREAM} \
             up to event {}: the rows were lost, or DATABASE_URL names another database. Until they are rebuilt, a \
             subscription from before that time is signalled only once its user is known. Run `litestripe-worker \
             replay --signals none`, then `reconcile --repair`, then `resend --all` (docs/after-an-outage.md)",
            lost.started.truncate_to_second(),
            lost.last_sequence
        );
    }
    Ok(())
}
