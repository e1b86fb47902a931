//! The events that workers themselves add to `STRIPE_EVENTS`.
//!
//! Owns their shape and how they are stored. Everything that changes a row enters through the
//! stream, so that a replay restores it: snapshots fetched from Stripe's API and operators'
//! resolutions of orphans come in here and then take the way of every other event.

use async_nats::HeaderMap;
use async_nats::jetstream::{self, context::PublishError};
use litestripe_contract::event::{EventId, EventType, RESOLUTION_TYPE, SNAPSHOT_TYPE};
use litestripe_contract::{header, subject};
use litestripe_domain::payment::PaymentIds;
use serde::Serialize;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

/// An event of ours, in the shape of Stripe's.
#[derive(Serialize)]
struct OwnEvent<'a> {
    id: &'a EventId,
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
pub struct Scope<'a> {
    /// Whether it exists in live mode.
    pub livemode: bool,
    /// The connected account it belongs to.
    pub account: Option<&'a str>,
}

/// What an operator says of an orphan, with what its row needs where a replay meets the resolution
/// before the payment.
#[derive(Debug, Serialize)]
pub struct Resolution<'a> {
    /// The orphan.
    pub orphan_id: &'a str,
    /// The user.
    pub client_reference_id: &'a str,
    /// What it was the payment of.
    #[serde(flatten)]
    pub payment: PaymentIds,
    /// Why it was one.
    pub reason: &'a str,
}

/// An event of ours could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum OwnEventError {
    /// JetStream did not store it, or did not say so.
    #[error("cannot store {0} in STRIPE_EVENTS")]
    Publish(EventId, #[source] PublishError),
    /// What was fetched is no JSON, or its id is no id.
    #[error("cannot make an event of {0}")]
    Content(String),
}

/// Stores `object`, a subscription or a Checkout Session as Stripe's API returned it, as what it
/// was at `as_of`. Returns its sequence in `STRIPE_EVENTS`.
///
/// # Errors
/// When JetStream does not store it.
pub async fn publish_snapshot(
    jetstream: &jetstream::Context,
    id: &str,
    object: &RawValue,
    as_of: i64,
    scope: Scope<'_>,
) -> Result<u64, OwnEventError> {
    let event_id = snapshot_id(id, as_of)?;
    publish(jetstream, SNAPSHOT_TYPE, "snapshot", &event_id, as_of, object, scope).await
}

/// The body under which [`publish_snapshot`] stores `object`: what it would lead to can be seen
/// without storing it.
///
/// # Errors
/// When what was fetched is no JSON, or its id is no id.
pub fn snapshot(id: &str, object: &RawValue, as_of: i64, scope: Scope<'_>) -> Result<Vec<u8>, OwnEventError> {
    body(SNAPSHOT_TYPE, &snapshot_id(id, as_of)?, as_of, object, scope)
}

/// The same object as of the same second is the same event.
fn snapshot_id(id: &str, as_of: i64) -> Result<EventId, OwnEventError> {
    event_id(format!("litestripe.snapshot.{id}.{as_of}"))
}

/// Stores an operator's resolution, made at `created`. Returns its sequence in `STRIPE_EVENTS`.
///
/// # Errors
/// When JetStream does not store it.
pub async fn publish_resolution(
    jetstream: &jetstream::Context,
    resolution: &Resolution<'_>,
    created: i64,
    scope: Scope<'_>,
) -> Result<u64, OwnEventError> {
    let (event_id, object) = resolution_event(resolution, created)?;
    publish(jetstream, RESOLUTION_TYPE, "resolution", &event_id, created, &object, scope).await
}

/// Stores a resolution that was made at `created` once more, `now`: it is the same event, and yet no
/// repetition that JetStream is to drop. Returns its sequence in `STRIPE_EVENTS`.
///
/// # Errors
/// When JetStream does not store it.
pub async fn repeat_resolution(
    jetstream: &jetstream::Context,
    resolution: &Resolution<'_>,
    created: i64,
    scope: Scope<'_>,
    now: i64,
) -> Result<u64, OwnEventError> {
    let (event_id, object) = resolution_event(resolution, created)?;
    let body = body(RESOLUTION_TYPE, &event_id, created, &object, scope)?;
    let message_id = format!("{event_id}:{now}");
    store(jetstream, RESOLUTION_TYPE, "resolution", &event_id, &message_id, body).await
}

fn resolution_event(resolution: &Resolution<'_>, created: i64) -> Result<(EventId, Box<RawValue>), OwnEventError> {
    // Two operators may decide differently in one second: only the same decision is the same event.
    let user: [u8; 32] = Sha256::digest(resolution.client_reference_id).into();
    let user = u64::from_be_bytes(user.first_chunk().copied().unwrap_or_default());
    let event_id = event_id(format!("litestripe.resolution.{}.{created}.{user:016x}", resolution.orphan_id))?;
    let object =
        serde_json::value::to_raw_value(resolution).map_err(|_| OwnEventError::Content(event_id.to_string()))?;
    Ok((event_id, object))
}

fn event_id(id: String) -> Result<EventId, OwnEventError> {
    EventId::parse(id.as_str()).map_err(|_| OwnEventError::Content(id))
}

async fn publish(
    jetstream: &jetstream::Context,
    event_type: &'static str,
    source: &str,
    id: &EventId,
    created: i64,
    object: &RawValue,
    scope: Scope<'_>,
) -> Result<u64, OwnEventError> {
    let body = body(event_type, id, created, object, scope)?;
    store(jetstream, event_type, source, id, id.as_str(), body).await
}

async fn store(
    jetstream: &jetstream::Context,
    event_type: &'static str,
    source: &str,
    id: &EventId,
    message_id: &str,
    body: Vec<u8>,
) -> Result<u64, OwnEventError> {
    let mut headers = HeaderMap::new();
    headers.insert(header::MESSAGE_ID, message_id);
    headers.insert(header::SOURCE, source);
    let subject = subject::of_event(&EventType::parse(event_type).expect("our own types are types"));
    let failed = |error| OwnEventError::Publish(id.clone(), error);
    let ack = jetstream.publish_with_headers(subject, headers, body.into()).await.map_err(failed)?;
    // Of a duplicate it is the sequence of the first.
    ack.await.map(|ack| ack.sequence).map_err(failed)
}

fn body(
    event_type: &'static str,
    id: &EventId,
    created: i64,
    object: &RawValue,
    scope: Scope<'_>,
) -> Result<Vec<u8>, OwnEventError> {
    let event = OwnEvent {
        id,
        object: "event",
        event_type,
        created,
        livemode: scope.livemode,
        account: scope.account,
        data: Data { object },
    };
    serde_json::to_vec(&event).map_err(|_| OwnEventError::Content(id.to_string()))
}
