//! Backfill: fetches events that never arrived from Stripe's Events API, and publishes them to
//! `STRIPE_EVENTS`.
//!
//! Owns which events are fetched and which of them are published. They are published like any
//! delivery: same subject, same `Nats-Msg-Id`, the body as Stripe rendered it. So a backfill is
//! idempotent: an event that it publishes twice is dropped by its message id, or its merge changes
//! nothing. Compares ids, never bodies: Stripe renders an event for its API in a different version
//! than for a webhook. An event whose change a thin event announced is not published either: the
//! ids differ, but its object has been or will be fetched. May not know rows.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::{self};
use bytes::Bytes;
use futures_util::{StreamExt as _, TryFutureExt as _};
use litestripe_contract::event::{EventId, HANDLED_TYPES};
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_contract::{header, subject};
use litestripe_domain::event::api::{self, Change, EventPage, ListedEvent};
use litestripe_domain::event::owner::{self, DeletedCustomer};
use litestripe_domain::event::{self, MetadataKeys};
use serde::Serialize;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::erasure::Erasures;
use crate::error::StoreError;
use crate::settings::Settings;
use crate::store::Store;
use crate::stripe::api::{ApiError, StripeApi};

pub(crate) mod record;
pub(crate) mod schedule;
mod stored_ids;

use stored_ids::StoredIds;

/// How long Stripe keeps events. Stripe: "List all events".
pub(crate) const STRIPE_KEEPS: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How far Stripe's clock, in `created`, may be ahead of the broker's.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(10 * 60);

/// Events that are published at a time.
const IN_FLIGHT_MAX: usize = 32;

/// Attempts to publish one event. Each takes at most the timeout of a PubAck.
const ATTEMPTS_MAX: u32 = 4;

#[derive(Clone)]
pub(crate) struct Backfill {
    pub stripe: StripeApi,
    pub jetstream: jetstream::Context,
    pub store: Store,
    pub erasures: Erasures,
    pub types: Vec<&'static str>,
}

/// Returns the event types that workers act on.
pub(crate) fn types(settings: &Settings) -> Vec<&'static str> {
    let deleted = settings
        .erase_on_customer_deleted
        .then_some("customer.deleted");
    HANDLED_TYPES.into_iter().chain(deleted).collect()
}

/// Which events a backfill asks Stripe for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub since: OffsetDateTime,
    /// Only events that at least one endpoint has not accepted.
    pub undelivered_only: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Summary {
    pub listed: u64,
    /// Listed events that the stream already held.
    pub already_there: u64,
    /// Listed events that were published.
    pub published: u64,
    /// Published events that had arrived meanwhile: the stream dropped the duplicate.
    pub duplicates: u64,
    /// Listed events that cannot be stored: they lack an id or a type, are too large, or were not
    /// wanted.
    pub skipped: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Complete,
    /// Asked to stop after a page.
    Stopped,
}

/// Why a backfill ended halfway. Events that were published until then stay.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackfillError {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "there is no stream {EVENTS_STREAM}: `litestripe-ingress` and `litestripe-worker run` create it"
    )]
    NoStream,
    #[error("cannot read which events {EVENTS_STREAM} holds")]
    Read(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// JetStream did not store an event, or its PubAck was lost.
    #[error("cannot store {0} in {EVENTS_STREAM}")]
    Publish(EventId, #[source] PublishError),
}

#[derive(PartialEq)]
enum Published {
    Stored,
    Duplicate,
    TooLarge,
}

impl Backfill {
    /// Lists events from Stripe, newest first, and publishes those that the stream lacks. Calls
    /// `report` after every page. `summary` is correct even if this fails.
    pub(crate) async fn run(
        &self,
        wanted: Wanted,
        summary: &mut Summary,
        mut report: impl FnMut(&Summary),
        shutdown: &CancellationToken,
    ) -> Result<End, BackfillError> {
        let mut stored = StoredIds::open(&self.jetstream, wanted.since - CLOCK_SKEW_MAX).await?;
        let mut after = None;
        loop {
            let page = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(End::Stopped),
                page = self.list(wanted, after.as_deref()) => page?,
            };
            // Events may have arrived, and persons may have been erased, since the last page.
            stored.catch_up().await?;
            self.erasures.refresh(self.store.connection()).await?;
            let is_first = after.is_none();
            after.clone_from(&page.after);
            let neighbours = Neighbours {
                has_newer: !is_first,
                has_older: after.is_some(),
            };
            let outcome = self
                .publish_missing(page, neighbours, &stored, summary)
                .await;
            report(summary);
            outcome?;
            if after.is_none() {
                return Ok(End::Complete);
            }
        }
    }

    async fn list(&self, wanted: Wanted, after: Option<&str>) -> Result<EventPage, ApiError> {
        let since = wanted.since.unix_timestamp();
        let answer = self
            .stripe
            .events(&self.types, since, wanted.undelivered_only, after)
            .await?;
        api::event_page(&answer.body).ok_or_else(|| answer.unusable("it is no list of events"))
    }

    async fn publish_missing(
        &self,
        page: EventPage,
        neighbours: Neighbours,
        stored: &StoredIds,
        summary: &mut Summary,
    ) -> Result<(), BackfillError> {
        let EventPage {
            events, skipped, ..
        } = page;
        summary.listed += (events.len() + skipped) as u64;
        let (wanted, unwanted): (Vec<_>, Vec<_>) =
            events.into_iter().partition(|event| self.is_wanted(event));
        summary.skipped += (skipped + unwanted.len()) as u64;
        let announced = announced(&wanted, stored, neighbours);
        let (already_there, missing): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|event| {
            let change = event.change.as_ref();
            stored.contains(&event.id) || change.is_some_and(|change| announced.contains(change))
        });
        summary.already_there += already_there.len() as u64;
        let publishing = futures_util::stream::iter(missing).map(|event| self.publish(event));
        let mut outcomes = publishing.buffer_unordered(IN_FLIGHT_MAX);
        while let Some(outcome) = outcomes.next().await {
            let outcome = outcome?;
            summary.published += u64::from(outcome != Published::TooLarge);
            summary.duplicates += u64::from(outcome == Published::Duplicate);
            summary.skipped += u64::from(outcome == Published::TooLarge);
        }
        Ok(())
    }

    /// Whether a backfill may publish the event: its type was asked for, and no erasure covers it.
    /// Events of an erased person must not come back.
    fn is_wanted(&self, event: &ListedEvent) -> bool {
        let body = event.raw.get().as_bytes();
        let is_erased = || {
            let event = event::decode(body, &MetadataKeys::Only(BTreeSet::new()));
            event.is_ok_and(|event| event.is_some_and(|event| self.erasures.covers(&event)))
        };
        // The erasure removed its own `customer.deleted` event. Publishing that again would repeat
        // the erasure after every backfill.
        let is_erased_deletion = || {
            let deleted = owner::deleted_customer(body);
            let is_covered = |deleted: DeletedCustomer| {
                self.erasures.covers_object(
                    [deleted.stripe_customer_id.as_str()],
                    deleted.event.created.unix(),
                )
            };
            deleted.is_some_and(is_covered)
        };
        self.types.contains(&event.event_type.as_str()) && !is_erased() && !is_erased_deletion()
    }

    async fn publish(&self, event: ListedEvent) -> Result<Published, BackfillError> {
        let ListedEvent {
            id,
            event_type,
            raw,
            ..
        } = event;
        let body = Bytes::from(Box::<str>::from(raw).into_string());
        let mut headers = HeaderMap::new();
        headers.insert(header::MESSAGE_ID, id.as_str());
        headers.insert(header::SOURCE, "backfill");
        let subject = subject::for_event_type(&event_type);
        let mut attempt = 1;
        loop {
            let publishing =
                self.jetstream
                    .publish_with_headers(subject.clone(), headers.clone(), body.clone());
            let acked = publishing.and_then(IntoFuture::into_future).await;
            match acked.map_err(|error| (error.kind(), error)) {
                // After a lost PubAck our own retry is reported as a duplicate: the event counts as
                // stored.
                Ok(ack) if ack.duplicate && attempt == 1 => return Ok(Published::Duplicate),
                Ok(_) => return Ok(Published::Stored),
                Err((PublishErrorKind::MaxPayloadExceeded, _)) => {
                    warn!(event_id = %id, "{id} is larger than the NATS server's max_payload: it cannot be stored");
                    return Ok(Published::TooLarge);
                }
                Err((PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe, _))
                    if attempt < ATTEMPTS_MAX =>
                {
                    attempt += 1
                }
                Err((_, error)) => return Err(BackfillError::Publish(id, error)),
            }
        }
    }
}

/// Whether other pages come before and after a page of events.
#[derive(Debug, Clone, Copy)]
struct Neighbours {
    has_newer: bool,
    has_older: bool,
}

/// Returns the changes on a page that thin events have announced: their objects are or will be
/// fetched, so that the page's events would add nothing.
///
/// Two changes of one object may have the same type and second. If fewer of them were announced
/// than are listed, it is unknown which one is missing, so none counts as announced. The same holds
/// for the seconds at the ends of the page, because its neighbours may list more of them.
fn announced(
    events: &[ListedEvent],
    stored: &StoredIds,
    Neighbours {
        has_newer,
        has_older,
    }: Neighbours,
) -> HashSet<Change> {
    let mut listed: HashMap<&Change, usize> = HashMap::new();
    for change in events.iter().filter_map(|event| event.change.as_ref()) {
        *listed.entry(change).or_default() += 1;
    }
    let seconds = || listed.keys().map(|change| change.created);
    let oldest = seconds().min().filter(|_| has_older);
    let newest = seconds().max().filter(|_| has_newer);
    let is_announced = |(change, count): (&Change, usize)| {
        let is_whole = [oldest, newest]
            .iter()
            .all(|end| *end != Some(change.created));
        (is_whole && stored.thin_events(change) >= count).then(|| change.clone())
    };
    listed.into_iter().filter_map(is_announced).collect()
}
