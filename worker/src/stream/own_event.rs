//! The events that workers themselves add to `STRIPE_EVENTS`.
//!
//! Owns their shape and how they are stored. Everything that changes a row enters through the
//! stream, so that a replay restores it: snapshots fetched from Stripe's API and operators'
//! resolutions of orphans are stored here and then applied like every other event. The copies of
//! erasures are stored here too, and ignored by batches: see `erasure::copy`. Functions that store
//! an event return its sequence in the stream.

use async_nats::HeaderMap;
use async_nats::jetstream::{self, context::PublishError};
use litestripe_contract::event::{
    ERASURE_TYPE, EventId, EventType, ID_BYTES_MAX, RESOLUTION_TYPE, SNAPSHOT_TYPE,
};
use litestripe_contract::signal::EventReference;
use litestripe_contract::telemetry::traces;
use litestripe_contract::trace::TraceContext;
use litestripe_contract::{header, subject};
use litestripe_domain::event::FetchStamp;
use litestripe_domain::payment::{AccountId, PaymentIds};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use sha2::{Digest as _, Sha256};

use crate::erasure::copy::Erased;
use crate::stripe::api::{Answer, ApiError};

/// An event of a worker, in the shape of Stripe's events.
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
    #[serde(skip_serializing_if = "Option::is_none")]
    fetched: Option<FetchStamp>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    notifications: &'a [EventReference],
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    searched: bool,
}

#[derive(Serialize)]
struct Data<'a> {
    object: &'a RawValue,
}

/// The mode and account of an object.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope<'a> {
    pub livemode: bool,
    /// The connected account that the object belongs to, if any.
    pub account: Option<AccountId<'a>>,
}

/// An operator's resolution of an orphan, with the values that its row needs if a replay applies
/// the resolution before the payment.
#[derive(Debug, Serialize)]
pub(crate) struct Resolution<'a> {
    pub orphan_id: &'a str,
    pub client_reference_id: &'a str,
    #[serde(flatten)]
    pub payment: PaymentIds,
    /// The orphan's reason.
    pub reason: &'a str,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OwnEventError {
    /// JetStream did not store the event, or its confirmation is missing.
    #[error("cannot store {0} in STRIPE_EVENTS")]
    Publish(EventId, #[source] PublishError),
    /// The fetched object is not valid JSON, or its id is not a valid id.
    #[error("cannot make an event of {0}")]
    Content(String),
}

/// How an object was fetched from Stripe's API.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fetched<'a> {
    /// The second up to which it holds every change, by Stripe's clock.
    pub as_of: i64,
    pub stamp: FetchStamp,
    /// The thin events that led to the fetch.
    pub notifications: &'a [EventReference],
    /// Whether Stripe was asked for the subscription's Checkout Sessions too, and lists none that
    /// names a user.
    pub searched: bool,
    /// The trace of what led to the fetch, which the event carries on while traces are off.
    pub trace: Option<&'a TraceContext>,
}

impl Fetched<'_> {
    /// Returns how the object in `answer` was fetched.
    pub(crate) fn from_answer(answer: &Answer) -> Result<Self, ApiError> {
        let (date, mark) = (answer.date()?, answer.mark());
        Ok(Self {
            as_of: answer.as_of()?,
            stamp: FetchStamp { date, mark },
            notifications: &[],
            searched: false,
            trace: None,
        })
    }
}

/// Stores `object`, a subscription or a Checkout Session as Stripe's API returned it.
pub(crate) async fn publish_snapshot(
    jetstream: &jetstream::Context,
    id: &str,
    object: &RawValue,
    fetched: Fetched<'_>,
    scope: Scope<'_>,
) -> Result<u64, OwnEventError> {
    let event = snapshot_event(id, object, fetched, scope)?;
    let message_id = event.id.as_str();
    event
        .store(jetstream, "snapshot", message_id, fetched.trace)
        .await
}

/// Returns the body that [`publish_snapshot`] stores for `object`, so that its effect can be
/// computed without storing it.
pub(crate) fn snapshot(
    id: &str,
    object: &RawValue,
    fetched: Fetched<'_>,
    scope: Scope<'_>,
) -> Result<Vec<u8>, OwnEventError> {
    snapshot_event(id, object, fetched, scope)?.body()
}

/// Each fetch of an object is its own event: two successive fetches have different marks,
/// because the first is stored before the second begins.
fn snapshot_event<'a>(
    id: &str,
    object: &'a RawValue,
    fetched: Fetched<'a>,
    scope: Scope<'a>,
) -> Result<OwnEvent<'a>, OwnEventError> {
    let FetchStamp { date, mark } = fetched.stamp;
    let id = own_id(format!("litestripe.snapshot.{id}.{date}.{mark}"));
    let event = OwnEvent::new(SNAPSHOT_TYPE, id, fetched.as_of, object, scope)?;
    Ok(OwnEvent {
        fetched: Some(fetched.stamp),
        notifications: fetched.notifications,
        searched: fetched.searched,
        ..event
    })
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
        .store(jetstream, "resolution", event.id.as_str(), None)
        .await
}

/// Stores a resolution that was made at `created` once more, at `now`: the same event with another
/// message id, so that JetStream does not drop it as a duplicate.
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
        .store(
            jetstream,
            "resolution",
            &format!("{}:{now}", event.id),
            None,
        )
        .await
}

/// Stores the copy of erasures, made at `created`.
pub(crate) async fn publish_erasure(
    jetstream: &jetstream::Context,
    erased: &Erased,
    created: i64,
) -> Result<u64, OwnEventError> {
    let content = |_| OwnEventError::Content(ERASURE_TYPE.to_owned());
    let object = to_raw_value(erased).map_err(content)?;
    let hash: [u8; 32] = Sha256::digest(object.get()).into();
    let hash = u64::from_be_bytes(hash.first_chunk().copied().unwrap_or_default());
    let id = format!("{ERASURE_TYPE}.{created}.{hash:016x}");
    // Of all modes and accounts.
    let scope = Scope {
        livemode: false,
        account: None,
    };
    let event = OwnEvent::new(ERASURE_TYPE, id, created, &object, scope)?;
    // Never a duplicate of one that the stream has lost since.
    let unique = jetstream.client().new_inbox();
    event.store(jetstream, "erasure", &unique, None).await
}

impl Resolution<'_> {
    fn object(&self) -> Result<Box<RawValue>, OwnEventError> {
        to_raw_value(self).map_err(|_| OwnEventError::Content(self.orphan_id.to_owned()))
    }

    /// Returns the id of the event that stores the resolution, made at `created`.
    pub(crate) fn id(&self, created: i64) -> String {
        // The user is part of the id, because two operators may decide differently in one second.
        let user: [u8; 32] = Sha256::digest(self.client_reference_id).into();
        let user = u64::from_be_bytes(user.first_chunk().copied().unwrap_or_default());
        own_id(format!(
            "litestripe.resolution.{}.{created}.{user:016x}",
            self.orphan_id
        ))
    }

    fn event<'a>(
        &self,
        object: &'a RawValue,
        created: i64,
        scope: Scope<'a>,
    ) -> Result<OwnEvent<'a>, OwnEventError> {
        OwnEvent::new(RESOLUTION_TYPE, self.id(created), created, object, scope)
    }
}

/// Returns `id`, or a hash of it if it is too long: it contains an id of Stripe, which alone may
/// have the longest allowed length.
fn own_id(id: String) -> String {
    if id.len() <= ID_BYTES_MAX {
        return id;
    }
    let hash: [u8; 32] = Sha256::digest(&id).into();
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("litestripe.long.{hash}")
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
            fetched: None,
            notifications: &[],
            searched: false,
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
        of_cause: Option<&TraceContext>,
    ) -> Result<u64, OwnEventError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::MESSAGE_ID, message_id);
        headers.insert(header::SOURCE, source);
        if let Some(trace) = traces::current().or_else(|| of_cause.cloned()) {
            traces::add_to_headers(&mut headers, &trace);
        }
        let subject = subject::for_event_type(
            &EventType::parse(self.event_type).expect("our own types are valid"),
        );
        let failed = |error| OwnEventError::Publish(self.id.clone(), error);
        let ack = jetstream
            .publish_with_headers(subject, headers, self.body()?.into())
            .await
            .map_err(failed)?;
        // For a duplicate this is the sequence of the first message.
        ack.await.map(|ack| ack.sequence).map_err(failed)
    }
}
