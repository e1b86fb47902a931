//! Keeps in the stream what only we know: operators' resolutions of orphans, and erasures.
//!
//! Only the operator knows what a resolution says: it cannot be fetched from Stripe. The stream
//! loses it with age, by a purge or with the broker's data, the database with its own data. So one
//! worker at a time looks for the database's resolutions in the stream, and stores again those that
//! are missing or will expire soon.
//!
//! Owns when a resolution is stored again. May not know how it is merged: that is idempotent.

use std::collections::HashMap;
use std::time::Duration;

use async_nats::jetstream;
use litestripe_contract::event::{EventType, RESOLUTION_TYPE};
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_contract::{exit, header, subject};
use litestripe_entity::orphaned_payment::Model;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::erasure::Erasures;
use crate::erasure::copy::{self, CopyError};
use crate::error::StoreError;
use crate::store::lease::Lease;
use crate::store::{self, Store};
use crate::stream::own_event::{self, OwnEventError, Resolution, Scope};
use crate::stream::progress::{self, ProgressError};
use crate::wait::pause;

/// How often a worker checks the stream.
const CHECK_EVERY: Duration = Duration::from_secs(60 * 60);

/// How soon it checks again after a failure, or while another worker checks.
const RETRY: Duration = Duration::from_secs(60);

/// Orphans read at a time.
const BATCH: u64 = 500;

#[derive(Debug, thiserror::Error)]
enum ResolutionsError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Progress(#[from] ProgressError),
    #[error(transparent)]
    OwnEvent(#[from] OwnEventError),
    #[error(transparent)]
    Copy(#[from] CopyError),
}

pub(crate) struct Resolutions {
    pub store: Store,
    pub jetstream: jetstream::Context,
    pub erasures: Erasures,
}

impl Resolutions {
    /// Keeps them in the stream, until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut lease = Lease::new(self.store.clone(), "resolutions");
        loop {
            let kept = lease.hold_during(self.store_again()).await;
            let every = match kept {
                Ok(Some(Ok(()))) => CHECK_EVERY,
                Ok(Some(Err(error))) => {
                    debug!("cannot keep what only we know: {}", exit::chain(&error));
                    RETRY
                }
                Ok(None) => RETRY,
                Err(error) => {
                    debug!("cannot keep what only we know: {}", exit::chain(&error));
                    RETRY
                }
            };
            if pause(every, &shutdown).await.is_none() {
                return;
            }
        }
    }

    async fn store_again(&self) -> Result<(), ResolutionsError> {
        let repeated = self.repeat_missing().await?;
        if repeated > 0 {
            info!("stored {repeated} operators' resolutions again in {EVENTS_STREAM}");
        }
        let kept = copy::keep(&self.store, &self.jetstream, OffsetDateTime::now_utc()).await?;
        if kept > 0 {
            info!("stored the erasures of {kept} ids again in {EVENTS_STREAM}");
        }
        Ok(())
    }

    /// Stores the resolutions again that the stream does not hold or will not hold for long.
    /// Returns their number.
    async fn repeat_missing(&self) -> Result<u64, ResolutionsError> {
        let db = self.store.connection();
        let now = OffsetDateTime::now_utc();
        let mut held: Option<HashMap<String, OffsetDateTime>> = None;
        let (mut after, mut repeated) = (String::new(), 0);
        loop {
            let orphans = store::orphan::resolved_by_operator(db, &after, BATCH).await?;
            let Some(last) = orphans.last() else {
                return Ok(repeated);
            };
            after.clone_from(&last.id);
            self.erasures.refresh(db).await?;
            let held = match &mut held {
                Some(held) => held,
                None => held.insert(self.held(now).await?),
            };
            for orphan in &orphans {
                repeated += u64::from(self.repeat(orphan, held, now).await?);
            }
        }
    }

    /// Stores the orphan's resolution again, unless it is among those `held`. Returns whether it
    /// was stored.
    async fn repeat(
        &self,
        orphan: &Model,
        held: &HashMap<String, OffsetDateTime>,
        now: OffsetDateTime,
    ) -> Result<bool, ResolutionsError> {
        let (Some(user), Some(at)) = (&orphan.resolved_client_reference_id, orphan.resolved_at)
        else {
            return Ok(false);
        };
        let resolution = Resolution {
            orphan_id: &orphan.id,
            client_reference_id: user,
            payment: store::orphan::payment_ids(orphan),
            reason: &orphan.reason,
        };
        let at = at.unix_timestamp();
        let ids = [
            Some(orphan.id.as_str()),
            orphan.stripe_customer_id.as_deref(),
            orphan.stripe_subscription_id.as_deref(),
        ];
        let is_erased = self.erasures.covers_object(ids.into_iter().flatten(), at);
        if is_erased || held.contains_key(&resolution.id(at)) {
            return Ok(false);
        }
        let scope = Scope {
            livemode: orphan.livemode,
            account: None,
        };
        let (jetstream, now) = (&self.jetstream, now.unix_timestamp());
        own_event::repeat_resolution(jetstream, &resolution, at, scope, now).await?;
        Ok(true)
    }

    /// Returns the ids of the resolutions that the stream will still hold for half its maximum age,
    /// with the time when each was stored.
    async fn held(
        &self,
        now: OffsetDateTime,
    ) -> Result<HashMap<String, OffsetDateTime>, ResolutionsError> {
        let event_type = EventType::parse(RESOLUTION_TYPE).expect("our own types are valid");
        let subject = subject::for_event_type(&event_type);
        let max_age = progress::max_age(&self.jetstream).await?;
        let mut held = HashMap::new();
        let mut from = 1;
        while let Some(message) = progress::next_of(&self.jetstream, &subject, from).await? {
            from = message.sequence + 1;
            let id = message.headers.get(header::MESSAGE_ID);
            // The id of a repeated resolution is followed by the time of its repetition.
            let id = id.and_then(|id| id.as_str().split(':').next());
            if let Some(id) = id
                && progress::expires_late(message.time, max_age, now)
            {
                held.insert(id.to_owned(), message.time);
            }
        }
        Ok(held)
    }
}
