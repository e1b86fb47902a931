//! The events that workers themselves add to `STRIPE_EVENTS`.
//!
//! Owns their shape and how they are stored. Everything that changes a row enters through the
//! stream, so that a replay restores it: snapshots fetched from Stripe's API and operators'
//! resolutions of orphans come in here and then take the way of every other event. Whatever stores one
//! returns its sequence in the stream.

use async_nats::HeaderMap;
use async_nats::jetstream::{self, context::PublishError};
use litestripe_contract::event::{EventId, EventType, RESOLUTION_TYPE, SNAPSHOT_TYPE};
use litestripe_contract::{header, subject};
use litestripe_domain::payment::{AccountId, PaymentIds};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use sha2::{Digest as _, Sha256};

/// An event of ours, in the shape of Stripe's.
#[derive(Serialize)]
struct OwnEvent<'a> {
    id: EventId,
    object: &'static str,
    #[serde(rename = "type")]
    event_type: &'static str,
    created: i64,
    livemode: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    account: Option<&'a str>,
    data: Data<'a>,
}

#[derive(Serialize)]
struct Data<'a> {
    object: &'a RawValue,
}

/// Where an object belongs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub livemode: bool,
    /// The connected account it belongs to.
    pub account: Option<AccountId<'a>>,
}

/// What an operator says of an orphan, with what its row needs where a replay meets the resolution
/// before the payment.
#[derive(Debug, Serialize)]
pub(crate) struct Resolution<'a> {
    pub orphan_id: &'a str,
    pub client_reference_id: &'a str,
    #[serde(flatten)]
    pub payment: PaymentIds,
    /// Why it was an orphan.
    pub reason: &'a str,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OwnEventError {
    /// JetStream did not store it, or did not say so.
    #[error("cannot store {0} in STRIPE_EVENTS")]
    Publish(EventId, #[source] PublishError),
    /// What was fetched is no JSON, or its id is no id.
    #[error("cannot make an event of {0}")]
    Content(String),
}

/// Stores `object`, a subscription or a Checkout Session as Stripe's API returned it, as what it
/// was at `as_of`.
pub(crate) async fn publish_snapshot(
    jetstream: &jetstream::Context,
    id: &str,
    object: &RawValue,
    as_of: i64,
    scope: Scope<'_>,
) -> Result<u64, OwnEventError> {
    let event = snapshot_event(id, object, as_of, scope)?;
    event.store(jetstream, "snapshot", event.id.as_str()).await
}

/// The body under which [`publish_snapshot`] stores `object`: what it would lead to can be seen
/// without storing it.
pub(crate) fn snapshot(
    id: &str,
    object: &RawValue,
    as_of: i64,
    scope: Scope<'_>,
) -> Result<Vec<u8>, OwnEventError> {
    snapshot_event(id, object, as_of, scope)?.body()
}

/// The same object as of the same second is the same event.
fn snapshot_event<'a>(
    id: &str,
    object: &'a RawValue,
    as_of: i64,
    scope: Scope<'a>,
) -> Result<OwnEvent<'a>, OwnEventError> {
    OwnEvent::new(
        SNAPSHOT_TYPE,
        format!("litestripe.snapshot.{id}.{as_of}"),
        as_of,
        object,
        scope,
    )
}

/// Stores an operator's resolution, made at `created`.
pub(crate) async fn publish_resolution(
    jetstream: &jetstream::Context,
    resolution: &Resolution<'_>,
    created: i64,
    scope: Scope<'_>,
) -> Result<u64, OwnEventError> {
    let object = resolution.object()?;
    let event = resolution.event(&object, created, scope)?;
    event
        .store(jetstream, "resolution", event.id.as_str())
        .await
}

/// Stores a resolution that was made at `created` once more, `now`: it is the same event, and yet no
/// repetition that JetStream is to drop.
pub(crate) async fn repeat_resolution(
    jetstream: &jetstream::Context,
    resolution: &Resolution<'_>,
    created: i64,
    scope: Scope<'_>,
    now: i64,
) -> Result<u64, OwnEventError> {
    let object = resolution.object()?;
    let event = resolution.event(&object, created, scope)?;
    event
        .store(jetstream, "resolution", &format!("{}:{now}", event.id))
        .await
}

impl Resolution<'_> {
    fn object(&self) -> Result<Box<RawValue>, OwnEventError> {
        to_raw_value(self).map_err(|_| OwnEventError::Content(self.orphan_id.to_owned()))
    }

    fn event<'a>(
        &self,
        object: &'a RawValue,
        created: i64,
        scope: Scope<'a>,
    ) -> Result<OwnEvent<'a>, OwnEventError> {
        // Two operators may decide differently in one second: only the same decision is the same event.
        let user: [u8; 32] = Sha256::digest(self.client_reference_id).into();
        let user = u64::from_be_bytes(user.first_chunk().copied().unwrap_or_default());
        let id = format!(
            "litestripe.resolution.{}.{created}.{user:016x}",
            self.orphan_id
        );
        OwnEvent::new(RESOLUTION_TYPE, id, created, object, scope)
    }
}

impl<'a> OwnEvent<'a> {
    fn new(
        event_type: &'static str,
        id: String,
        created: i64,
        object: &'a RawValue,
        scope: Scope<'a>,
    ) -> Result<Self, OwnEventError> {
        let id = EventId::parse(id.as_str()).map_err(|_| OwnEventError::Content(id))?;
        let (Scope { livemode, account }, data) = (scope, Data { object });
        Ok(Self {
            id,
            object: "event",
            event_type,
            created,
            livemode,
            account: account.map(|account| account.0),
            data,
        })
    }

    fn body(&self) -> Result<Vec<u8>, OwnEventError> {
        serde_json::to_vec(self).map_err(|_| OwnEventError::Content(self.id.to_string()))
    }

    async fn store(
        &self,
        jetstream: &jetstream::Context,
        source: &str,
        message_id: &str,
    ) -> Result<u64, OwnEventError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::MESSAGE_ID, message_id);
        headers.insert(header::SOURCE, source);
        let subject = subject::for_event_type(
            &EventType::parse(self.event_type).expect("our own types are types"),
        );
        let failed = |error| OwnEventError::Publish(self.id.clone(), error);
        let ack = jetstream
            .publish_with_headers(subject, headers, self.body()?.into())
            .await
            .map_err(failed)?;
        // Of a duplicate it is the sequence of the first.
        ack.await.map(|ack| ack.sequence).map_err(failed)
    }
}
