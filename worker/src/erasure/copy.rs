//! The copy of the erasures in `STRIPE_EVENTS`.
//!
//! A database that was restored from a backup does not know what was erased since, and an empty one
//! knows nothing. So each erasure is stored in the stream too: ids and when they were erased, no
//! personal data. Workers ignore these events.
//!
//! Owns bringing the table up to date before anything else uses the database, with what follows for
//! its rows ([`restore`]), and storing again what the stream has lost or will drop soon (`keep`).

use std::collections::BTreeMap;
use std::sync::Arc;

use async_nats::jetstream;
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind};
use backon::Retryable as _;
use litestripe_contract::event::{ERASURE_TYPE, EventType};
use litestripe_contract::signal::Timestamp;
use litestripe_contract::subject::{self, EVENTS_STREAM};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tracing::warn;

use super::removal::rows;
use super::{Erasures, attempts, reference};
use crate::error::StoreError;
use crate::store::{self, Store, Transaction};
use crate::stream::own_event::{self, OwnEventError};
use crate::stream::progress::{self, ProgressError};
use crate::stream::scan::{self, ScanError};

/// Ids in one event, and in one transaction that restores them.
const IDS_MAX: usize = 200;

/// Why the copy could not be read, kept or restored.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Find(#[from] ScanError),
    #[error("cannot read the erasures in {EVENTS_STREAM}")]
    Read(#[from] RawMessageError),
    #[error(transparent)]
    Progress(#[from] ProgressError),
    #[error("cannot keep the erasures in {EVENTS_STREAM}")]
    Publish(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The object of such an event.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Erased {
    /// When each id was erased, in seconds since the Unix epoch.
    pub(crate) erased: BTreeMap<String, i64>,
}

/// The part of such an event that is read.
#[derive(Deserialize)]
struct Stored {
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    object: Erased,
}

/// Stores the copy of an erasure that was recorded at `now`, in seconds since the Unix epoch.
pub async fn store(
    jetstream: &jetstream::Context,
    erased: BTreeMap<String, i64>,
    now: i64,
) -> Result<(), CopyError> {
    let mut left = erased.into_iter().peekable();
    while left.peek().is_some() {
        let erased = Erased {
            erased: left.by_ref().take(IDS_MAX).collect(),
        };
        let stored = own_event::publish_erasure(jetstream, &erased, now).await;
        stored.map_err(|error: OwnEventError| CopyError::Publish(error.into()))?;
    }
    Ok(())
}

/// Records the erasures that only the copy has, and removes the personal data that the database has
/// of them: it was restored from a backup, or it is new. Reads them into `erasures`.
pub async fn restore(
    store: &Store,
    jetstream: &jetstream::Context,
    erasures: &Erasures,
) -> Result<(), CopyError> {
    let mut missing: BTreeMap<String, i64> = BTreeMap::new();
    let note = |erased: BTreeMap<String, i64>, _: OffsetDateTime| {
        for (id, at) in erased {
            if !erasures.covers_object([id.as_str()], at) {
                let known = missing.entry(id).or_insert(at);
                *known = at.max(*known);
            }
        }
    };
    read(jetstream, note).await?;
    if missing.is_empty() {
        return Ok(());
    }
    warn!(
        "{} ids were erased that the database does not know of, because it was restored from a backup or is new: their \
         personal data is removed again",
        missing.len()
    );
    let mut left = missing.into_iter().peekable();
    while left.peek().is_some() {
        let some: Arc<BTreeMap<_, _>> = Arc::new(left.by_ref().take(IDS_MAX).collect());
        let once = || async { erase_again(store, Arc::clone(&some)).await };
        let is_temporary = |error: &StoreError| error.is_temporary();
        while once.retry(attempts()).when(is_temporary).await? == Again::Conflict {}
    }
    store.truncate_log().await?;
    Ok(erasures.refresh(store.connection()).await?)
}

#[derive(PartialEq, Eq)]
enum Again {
    Done,
    /// A row was written after it was read.
    Conflict,
}

/// Records erasures and removes the personal data that rows and orphans have of them, in one
/// transaction, so that a crash leaves none of them half done. All of this data is older than the
/// erasure: the database did not know of it.
async fn erase_again(
    store: &Store,
    erased: Arc<BTreeMap<String, i64>>,
) -> Result<Again, StoreError> {
    let again = async move |tx: Transaction| {
        let now = OffsetDateTime::now_utc();
        store::erasure::record_in(&tx, &erased, now).await?;
        let ids: Vec<&str> = erased.keys().map(String::as_str).collect();
        store::orphan::erase_emails_of(&tx, &ids).await?;
        for (id, at) in erased.iter() {
            let Ok(at) = Timestamp::from_unix(*at) else {
                continue;
            };
            if let rows::Outcome::Conflict = rows::strip_in(&tx, id, &reference(at), now).await? {
                return Ok(Again::Conflict);
            }
        }
        tx.commit()
            .await
            .map_err(StoreError::doing("commit erasures again"))?;
        Ok(Again::Done)
    };
    store.uncancelled(again).await
}

/// Stores the erasures again that the stream does not hold or will not hold for long. Returns their
/// number.
pub(crate) async fn keep(
    store: &Store,
    jetstream: &jetstream::Context,
    now: OffsetDateTime,
) -> Result<usize, CopyError> {
    let recorded = store::erasure::all(store.connection()).await?;
    if recorded.is_empty() {
        return Ok(0);
    }
    let max_age = progress::max_age(jetstream).await?;
    let mut held: BTreeMap<String, i64> = BTreeMap::new();
    read(jetstream, |erased, stored| {
        if progress::expires_late(stored, max_age, now) {
            held.extend(erased);
        }
    })
    .await?;
    let is_held = |id: &String, at: &i64| held.get(id).is_some_and(|held| held >= at);
    let missing: BTreeMap<_, _> = recorded
        .into_iter()
        .map(|erasure| (erasure.stripe_id, erasure.erased_at))
        .filter(|(id, at)| !is_held(id, at))
        .collect();
    let count = missing.len();
    self::store(jetstream, missing, now.unix_timestamp()).await?;
    Ok(count)
}

/// Calls `visit` with the ids of each event, and with when it was stored.
async fn read(
    jetstream: &jetstream::Context,
    mut visit: impl FnMut(BTreeMap<String, i64>, OffsetDateTime),
) -> Result<(), CopyError> {
    let Some(stream) = scan::find(jetstream, EVENTS_STREAM).await? else {
        return Ok(());
    };
    let event_type = EventType::parse(ERASURE_TYPE).expect("our own types are valid");
    let subject = subject::for_event_type(&event_type);
    let mut from = 1;
    loop {
        let message = match stream
            .get_first_raw_message_by_subject(&subject, from)
            .await
        {
            Ok(message) => message,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        from = message.sequence + 1;
        if let Ok(Stored { data }) = serde_json::from_slice(&message.payload) {
            visit(data.object.erased, message.time);
        }
    }
}
